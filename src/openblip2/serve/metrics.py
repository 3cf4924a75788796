"""What a monitoring system reads at /metrics, kept by prometheus_client."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("openblip2_requests", "Answered requests.", ("path", "status"), registry=self.registry)
        self.seconds = Histogram(
            "openblip2_request_seconds",
            "From a request to its answer.",
            ("path",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batch = Histogram(
            "openblip2_batch_jobs", "Jobs that ran together.", buckets=(1, 2, 4, 8, 16, 32), registry=self.registry
        )
        self.queue = Gauge("openblip2_queue_jobs", "Jobs that wait or run.", registry=self.registry)
        self.restarts = Counter(
            "openblip2_worker_restarts", "Times the models were loaded anew.", registry=self.registry
        )

    def page(self) -> bytes:
        """All of them as text."""
        return generate_latest(self.registry)
