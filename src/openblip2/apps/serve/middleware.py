"""Checks before a request is read (host, token, size, queue), metrics, and headers of every response."""

import hmac
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from openblip2.apps.serve.errors import ServeError, error_response

OPEN = ("/", "/health")  # and /assets/: the page asks the user for the token
HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """What `/metrics` shows of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("openblip2_requests", "Answered requests.", ("path", "status"), registry=registry)
        self.seconds = Histogram(
            "openblip2_request_seconds", "Time to answer a request.", ("path",), buckets=SECONDS, registry=registry
        )
        self.batch = Histogram(
            "openblip2_batch_jobs", "Jobs in a batch.", buckets=(1, 2, 4, 8, 16, 32), registry=registry
        )
        self.queue = Gauge("openblip2_queue_jobs", "Jobs that wait or run.", registry=registry)
        self.restarts = Counter("openblip2_worker_restarts", "Restarts of the models' process.", registry=registry)


class Guard:
    """ASGI middleware.

    Args:
        app: the application behind it.
        hosts: names in the Host header; `*.example.com` stands for all names of a domain.
        token: that clients must send; None = none.
        limit: bytes of a request's body, with or without a Content-Length header.
        busy: an error if the queue is full. Bodies of requests that will be refused are not read: clients that try
            again and again would take time that answers need.
        metrics: counts every response.
    """

    def __init__(
        self,
        app: Any,
        hosts: Sequence[str],
        token: str | None,
        limit: int,
        busy: Callable[[], ServeError | None],
        metrics: Metrics,
    ) -> None:
        self.app, self.hosts, self.token, self.limit = app, hosts, token, limit
        self.busy, self.metrics = busy, metrics

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, received = time.perf_counter(), 0, 0

        async def limited_receive() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:  # sent in chunks, without a length
                raise self._too_large()
            return message

        async def counted_send(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        refusal = self._refusal(scope)
        app = self.app if refusal is None else error_response(refusal)
        try:
            await app(scope, limited_receive, counted_send)
        finally:
            path = getattr(scope.get("route"), "path", "none")  # the declared path, so that there are few
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)

    def _refusal(self, scope: dict[str, Any]) -> ServeError | None:
        headers, path = dict(scope["headers"]), scope["path"]
        # A page of another name that resolves to this machine (DNS rebinding) must not reach it.
        host = re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1")).lower()
        if not any(host == name or (name[:1] == "*" and host.endswith(name[1:])) for name in self.hosts):
            return ServeError("this server is not called by that name: start it with --name", 400, "unknown_host")
        if self.token is not None and path not in OPEN and not path.startswith("/assets/"):
            token = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not hmac.compare_digest(token, self.token.encode()):
                message = "wrong or missing token: send the server's token as Authorization: Bearer ..."
                return ServeError(message, 401, "invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self.limit:
            return self._too_large()
        return self.busy() if scope["method"] == "POST" else None

    def _too_large(self) -> ServeError:
        # The rest of the body is not read, so the connection cannot be used again.
        message = f"the request has more than {self.limit:,} bytes: send a smaller picture"
        return ServeError(message, 413, "too_large", headers={"Connection": "close"})
