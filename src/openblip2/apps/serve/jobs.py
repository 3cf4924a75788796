"""What the server asks of the process that holds the models: plain values, which can be sent to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from openblip2.model.decoding import Decoding
from openblip2.model.likelihood import TokenScore


@dataclass(frozen=True)
class Write:
    """Write a text about a picture; the result is a `Written`.

    Attributes:
        picture: content of a picture file.
        decoding: jobs with equal settings can share a batch.
        question: None = a caption.
        turns: earlier questions and their answers.
        prompt: how a caption begins; None = the run's own prompt.
        plain: whether the question is asked as in VQA (`Captioner.answer`), else as it is written.
        stream: whether the text is sent while it is written; such a job runs alone.
        logprobs: None = no log-probabilities; otherwise those of the text's tokens and of so many of the most likely
            tokens at each position.
    """

    picture: bytes
    decoding: Decoding
    question: str | None = None
    turns: tuple[tuple[str, str], ...] = ()
    prompt: str | None = None
    plain: bool = False
    stream: bool = False
    logprobs: int | None = None


class Written(NamedTuple):
    """A text, the number of tokens read for it (soft tokens included), the number of tokens in it, and these tokens
    with their log-probabilities where a job asks for them."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    tokens: Sequence[TokenScore] = ()


@dataclass(frozen=True)
class Match:
    """Compare texts with a picture: `[(cosine of ITC, probability of ITM)]`."""

    picture: bytes
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Embed:
    """Embed a picture or a text: one vector `[E]` of length 1."""

    picture: bytes | None = None
    text: str | None = None


@dataclass(frozen=True)
class Search:
    """Search the index: `[(number, path, cosine, ITM probability or None)]`."""

    text: str | None = None
    picture: bytes | None = None
    best: int = 12
    rerank: int = 0


@dataclass(frozen=True)
class Attend:
    """Draw the attention map of a text, or of all queries, over a picture: a PNG file."""

    picture: bytes
    text: str | None = None
    by: Literal["itc", "itm"] = "itc"


Job = Write | Match | Embed | Search | Attend
