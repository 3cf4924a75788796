"""What the process with the models serves, and what it is asked to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from openblip2.model.decoding import Decoding
from openblip2.model.likelihood import TokenScore


@dataclass(frozen=True)
class Served:
    """What a server serves, each None where there is none: folders of a stage-2 run, a stage-1 run and an index."""

    captioner: str | None = None
    matcher: str | None = None
    index: str | None = None


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
        logprobs: number of most likely tokens to list at each position; None = no log-probabilities.
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
class Call:
    """Call a method of `Engine` with these arguments."""

    method: Literal["match", "embed", "find", "attend"]
    arguments: tuple[Any, ...]


Job = Write | Call
