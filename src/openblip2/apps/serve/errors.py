"""Errors of the server, in the shape of OpenAI's API."""

import json
import re
from collections.abc import Mapping

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from openblip2.errors import UserError


class ServeError(HTTPException):
    """An error that a client is told.

    Args:
        message: what happened and what to do.
        status: of HTTP.
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
    body = {
        "message": error.detail,
        "type": kind,
        "param": getattr(error, "param", None),
        "code": getattr(error, "code", None),
    }
    # Written in ASCII: a message may quote half of a surrogate pair, which UTF-8 cannot encode.
    return Response(json.dumps({"error": body}), status, error.headers, "application/json")


def _validation_error(error: RequestValidationError) -> ServeError:
    # Where a field can be of several types, the type that fits best is refused deepest inside.
    first = max(error.errors(), key=lambda one: len(one["loc"]))
    if first["type"] == "json_invalid":
        return ServeError("the body of the request is not valid JSON")
    where = [str(part) for part in first["loc"][1:]]
    where = where[:1] + [part for part in where[1:] if re.fullmatch(r"[a-z0-9_]+", part)]  # without names of types
    param = ".".join(where)[:200]
    missing = first["type"] in ("missing", "extra_forbidden")
    code = (
        {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}[first["type"]]
        if missing
        else None
    )
    return ServeError(f"{param or 'the body of the request'}: {first['msg']}", code=code, param=param or None)
