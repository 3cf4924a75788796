"""What a server allows: sizes, lengths, queue, time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Attributes:
    bytes: of one request's body. queue: requests that wait or run; more are told 429. batch: that run together.
    wait: seconds that a request waits for others to run with. seconds: that a request may take; then 504.
    tokens: new ones of an answer. pictures: of one request. texts: of one request, to match or to embed.
    remote: whether addresses of pictures are fetched.
    """

    bytes: int = 16 * 2**20
    queue: int = 64
    batch: int = 16
    wait: float = 0.01
    seconds: float = 60.0
    tokens: int = 256
    pictures: int = 16
    texts: int = 64
    remote: bool = False
