"""What a request passes before any of it is read: token, length, a place in the queue; and what is counted of it."""

import contextlib
import hmac
import json
import time
from collections.abc import Callable
from typing import Any

from openblip2.serve.limits import Limits
from openblip2.serve.metrics import Metrics

BUSY = "the server is busy; try again in a moment"
OPEN = ("/", "/health")  # and /assets/: the page asks for the token


class Guard:
    """ASGI middleware: 401 without the token, 413 beyond `Limits.bytes`, whatever a client says of its length, and 429.

    Args:
        wait: seconds after which to ask again where the queue is full, else 0. A request that will be refused is not
            read first: clients that ask again and again would take the time that answers need.
    """

    def __init__(self, app: Any, limits: Limits, token: str | None, wait: Callable[[], int]) -> None:
        self.app, self.limits, self.token, self.wait = app, limits, token, wait

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        path = scope["path"]
        if self.token is not None and path not in OPEN and not path.startswith("/assets/"):
            shown = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not hmac.compare_digest(shown, self.token.encode()):
                await _refuse(send, 401, "give the server's token: Authorization: Bearer ...")
                return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self.limits.bytes:
            await _refuse(send, 413, f"a request of at most {self.limits.bytes:,} bytes")
            return
        if scope["method"] == "POST" and (wait := self.wait()):
            await _refuse(send, 429, BUSY, "rate_limit_error", wait)
            return
        seen, answered, large = 0, False, False

        async def counted() -> Any:
            nonlocal seen, large
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.limits.bytes:  # sent in chunks, without a length
                large = True
                raise TooLarge
            return message

        async def sent(message: Any) -> None:
            nonlocal answered
            if not large or answered:  # what was made of half a body is nobody's answer
                answered = True
                await send(message)

        with contextlib.suppress(TooLarge):
            await self.app(scope, counted, sent)
        if large and not answered:
            await _refuse(send, 413, f"a request of at most {self.limits.bytes:,} bytes")


class Counted:
    """ASGI middleware: every answer is counted and timed, and told browsers to guess nothing."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def sent(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        try:
            await self.app(scope, receive, sent)
        finally:
            path = getattr(scope.get("route"), "path", "none")  # as it is declared, so that there are few
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - began)


_HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))


class TooLarge(Exception):
    """More bytes came than are allowed."""


async def _refuse(
    send: Any, status: int, message: str, kind: str = "invalid_request_error", wait: int | None = None
) -> None:
    body = json.dumps({"error": {"message": message, "type": kind}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close") if wait is None else (b"retry-after", str(wait).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
