"""What the server asks of the process that holds the models: plain values, so that they can be sent."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from openblip2.model.decoding import Decoding


class Failed(NamedTuple):
    """A job that cannot be done, as the client is told."""

    message: str


@dataclass(frozen=True)
class Write:
    """A text about a picture.

    Attributes:
        turns: questions and their answers before this one. question: None = describe it, behind `prompt` or the run's.
        plain: the question is put as for VQA (`Captioner.answer`), else as it is written.
        stream: under which pieces are sent while it writes; 0 = not at all.
    """

    picture: bytes
    decoding: Decoding
    question: str | None = None
    turns: tuple[tuple[str, str], ...] = ()
    prompt: str | None = None
    plain: bool = False
    stream: int = 0

    @property
    def together(self) -> tuple[object, ...]:
        """Jobs of equal value here run in one batch; a streamed one by itself."""
        return ("write", self.decoding, self.stream)


class Written(NamedTuple):
    """The text, how many tokens were read for it (soft ones too), and how many it has."""

    text: str
    read: int
    wrote: int


@dataclass(frozen=True)
class Match:
    """How well texts fit a picture: `[(cosine, probability)]`, of ITC and of ITM."""

    picture: bytes
    texts: tuple[str, ...]

    @property
    def together(self) -> tuple[object, ...]:
        return ("match",)


@dataclass(frozen=True)
class Embed:
    """One vector `[E]` of length 1 for a picture, or for a text."""

    picture: bytes | None = None
    text: str | None = None

    @property
    def together(self) -> tuple[object, ...]:
        return ("embed", self.picture is None)


@dataclass(frozen=True)
class Search:
    """Pictures of the index: `[(number, path below its root, cosine, probability or None)]`."""

    text: str | None = None
    picture: bytes | None = None
    best: int = 12
    rerank: int = 0

    @property
    def together(self) -> tuple[object, ...]:
        return ("search",)


@dataclass(frozen=True)
class Attend:
    """A picture with a map over it, as PNG: of a text by ITC or ITM, or without one what all queries look at."""

    picture: bytes
    text: str | None = None
    by: Literal["itc", "itm"] = "itc"

    @property
    def together(self) -> tuple[object, ...]:
        return ("attend",)


Job = Write | Match | Embed | Search | Attend
