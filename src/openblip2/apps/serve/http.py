"""What all requests have in common: checks before the body is read, headers, and errors in OpenAI's form."""

import hmac
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from openblip2.errors import UserError

OPEN = ("/", "/health")  # they need no token, nor does /assets/: the page asks the user for it
# The page loads nothing from other sites, and no text that it shows can run as a script.
POLICY = b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
POLICY += b"base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
HEADERS = ((b"content-security-policy", POLICY), (b"x-content-type-options", b"nosniff"))
HEADERS += ((b"referrer-policy", b"no-referrer"),)


class ServeError(HTTPException):
    """An error that is reported to the client.

    Args:
        message: what happened and what to do.
        status: the HTTP status code.
        code: OpenAI's short name of the error, if it has one.
        param: the field of the request that is wrong.
        headers: more headers of the response.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.code, self.param = code, param


def error_response(error: Exception) -> Response:
    """The response for any exception: `{"error": {"message", "type", "param", "code"}}`."""
    if isinstance(error, RequestValidationError):
        error = _validation_error(error)
    elif isinstance(error, UserError):
        error = ServeError(str(error))
    elif not isinstance(error, HTTPException):
        error = ServeError("internal error: see the server's log", 500)
    status = error.status_code
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    body = {"message": error.detail, "type": kind} | {name: getattr(error, name, None) for name in ("param", "code")}
    # Written in ASCII: a message may quote half of a surrogate pair, which UTF-8 cannot encode.
    return Response(json.dumps({"error": body}), status, error.headers, "application/json")


def _validation_error(error: RequestValidationError) -> ServeError:
    # If a field can have several types, the error with the longest path comes from the type that fits best.
    first = max(error.errors(), key=lambda one: len(one["loc"]))
    if first["type"] == "json_invalid":
        return ServeError("the body of the request is not valid JSON")
    field, *inner = [str(part) for part in first["loc"][1:]] or ["the body of the request"]
    path = [part for part in inner if re.fullmatch(r"[a-z0-9_]+", part)]  # without the names of types
    param = ".".join([field, *path])[:200]
    if first["type"] == "extra_forbidden":
        hint = ", or use repetition_penalty" if field.endswith("_penalty") else ""
        message = f"this server does not support {param!r}: leave it out{hint}"
        return ServeError(message, code="unsupported_parameter", param=param)
    code = "missing_required_parameter" if first["type"] == "missing" else None
    return ServeError(f"{param}: {first['msg']}", code=code, param=param)


class Guard:
    """ASGI middleware that checks requests. It does not read the body of a request that it refuses.

    Args:
        app: the application to protect.
        hosts: allowed names in the Host header; `*.example.com` matches all names of a domain.
        token: the token that clients must send; None = no token.
        limit: maximum bytes of a request's body, with or without a Content-Length header.
    """

    def __init__(self, app: Any, hosts: Sequence[str], token: str | None, limit: int) -> None:
        self.app, self.hosts, self.token, self.limit = app, hosts, token, limit

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        received = 0

        async def limited_receive() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            self._check_size(received)  # a body sent in chunks has no length in its headers
            return message

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, limited_receive, send_with_headers)
        except ServeError as error:
            await error_response(error)(scope, receive, send_with_headers)

    def _check(self, scope: dict[str, Any]) -> None:
        headers, path = dict(scope["headers"]), scope["path"]
        # A web page whose own name resolves to this machine (DNS rebinding) must not reach the server.
        host = re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1")).lower()
        if not any(host == name or (name[:1] == "*" and host.endswith(name[1:])) for name in self.hosts):
            raise ServeError("this host name is not allowed: start the server with --name", 400, "unknown_host")
        if self.token is not None and path not in OPEN and not path.startswith("/assets/"):
            token = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not hmac.compare_digest(token, self.token.encode()):
                message = "wrong or missing token: send the server's token as Authorization: Bearer ..."
                raise ServeError(message, 401, "invalid_api_key")
        length = headers.get(b"content-length", b"0")
        self._check_size(int(length[:20]) if length.isdigit() else self.limit + 1)
        if scope["method"] == "POST":
            scope["app"].state.batcher.check_room()

    def _check_size(self, size: int) -> None:
        if size > self.limit:  # the rest of the body is not read, so the connection cannot be used again
            message = f"the request has more than {self.limit:,} bytes: send a smaller picture"
            raise ServeError(message, 413, "too_large", headers={"Connection": "close"})
