"""Being asked to stop: by Ctrl-C, or by SIGTERM, as schedulers do before they take a machine away."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from openblip2.distributed.collectives import world_size
from openblip2.errors import Stopped


class Stops:
    """What was asked so far. `signal`: the number of the first request, 0 = none."""

    def __init__(self) -> None:
        self.signal = 0
        self.at_once = False

    def ask(self, kind: int, _: object = None) -> None:
        self.signal = self.signal or kind
        if self.at_once:
            raise Stopped(self.signal)

    @contextlib.contextmanager
    def breaking_off(self) -> Iterator[None]:
        """What is done within is broken off by a request, with `Stopped`; it must change nothing that is saved.

        Not where processes work together: one that breaks off would leave the others waiting.
        """
        if self.signal and world_size() == 1:
            raise Stopped(self.signal)
        try:
            self.at_once = world_size() == 1
            yield
        finally:
            self.at_once = False


@contextlib.contextmanager
def stop_requests() -> Iterator[Stops]:
    """Collects Ctrl-C and SIGTERM instead of dying of them, so that a step is never half taken."""
    stops = Stops()
    if threading.current_thread() is not threading.main_thread():
        yield stops  # only the main thread may handle signals
        return
    before = {kind: signal.signal(kind, stops.ask) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stops
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
