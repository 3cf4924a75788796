"""Checks and prepares the inputs of inference: pictures and sentences."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from openblip2.compat import log
from openblip2.data.images import Picture, open_picture, to_pixels
from openblip2.data.text import MAX_CHARACTERS, MAX_WORDS, BertTokens, clean_question, only_unknown
from openblip2.errors import UserError
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2

GROUP = 32  # pictures per batch


def group_of(model: Stage1 | Stage2) -> int:
    """Batch size for pictures and texts about them: `GROUP`, or 1 on a CPU that computes in less than fp32.

    In low precision, rounding depends on the number of rows, so a caption would depend on the other pictures of its
    batch. This is also true on a GPU, but a batch size of 1 would take many times as long there. Call this function
    within `hardware.computing`.
    """
    half = torch.is_autocast_enabled("cpu") or any(p.dtype != torch.float32 for p in model.parameters())
    return 1 if half and next(model.parameters()).device.type == "cpu" else GROUP


def features_of(model: Stage1 | Stage2, images: Sequence[Picture]) -> Iterator[Tensor]:
    """Yields the features of pictures from the frozen encoder in batches, `[<= group_of(model), P, V]`."""
    assert model.vision is not None
    device, group = next(model.parameters()).device, group_of(model)
    for start in range(0, len(images), group):
        yield model.vision(to_pixels(images[start : start + group], model.vision.image_size).to(device))


T = TypeVar("T")


def each_readable(
    images: Sequence[Picture], use: Callable[[Sequence[Picture], Sequence[int]], Iterable[T]]
) -> list[T | None]:
    """Returns one result for each picture; None, with a warning, for a picture that cannot be opened.

    Bad pictures are searched for only if `use` has failed, so that good ones are not opened twice.

    Args:
        use: Takes pictures and their numbers in `images`, and returns a result for each of them.

    Raises:
        UserError: `use` failed for another reason.
    """
    try:
        return list(use(images, range(len(images))))
    except UserError:
        bad: dict[int, str] = {}
        for n, image in enumerate(images):
            try:
                open_picture(image)
            except UserError as problem:
                bad[n] = str(problem)
        if not bad:
            raise
    for problem in dict.fromkeys(bad.values()):
        log.warning("%s", problem)
    good = [n for n in range(len(images)) if n not in bad]
    found = dict(zip(good, use([images[n] for n in good], good) if good else (), strict=True))
    return [found.get(n) for n in range(len(images))]


def stacked(rows: Sequence[Tensor | None], *shape: int) -> Tensor:
    """Stacks rows of the same shape; a row that is None becomes NaN."""
    missing = torch.full(shape, torch.nan)
    return torch.stack([missing if row is None else row for row in rows])


def clean_texts(texts: Sequence[str], clean: Callable[[str, int], str]) -> list[str]:
    """Cleans texts as in training, but raises an error instead of shortening a long text."""
    found = [clean(text, len(text)) for text in texts]
    for text, cleaned in zip(texts, found, strict=True):
        if not cleaned:
            raise UserError(f"an empty text, {text[:40]!r}: give a sentence in words")
        if (count := len(cleaned.split())) > MAX_WORDS:
            raise UserError(f"text {text[:40]!r}... has {count} words: at most {MAX_WORDS}")
        if len(cleaned) > MAX_CHARACTERS:
            raise UserError(f"text {text[:40]!r}... has {len(cleaned):,} characters: at most {MAX_CHARACTERS:,}")
    return found


def clean_questions(questions: Sequence[str], as_written: bool = False) -> list[str]:
    """Cleans questions as in training for VQA; `as_written` (for InstructBLIP) removes only outer white space."""
    if not as_written:
        return clean_texts(questions, clean_question)
    found = [question.strip() for question in questions]
    if "" in found:
        raise UserError("an empty question: ask something in words")
    return found


def require_readable(tokens: BertTokens, texts: Sequence[str]) -> None:
    """Raises a `UserError` if a text is too long for the Q-Former."""
    if long := tokens.too_long(texts):
        begins, most = texts[long[0]][:40], tokens.longest
        raise UserError(f"text {begins!r}... is too long: the Q-Former reads at most {most} tokens; shorten it")


def warn_unknown(tokenizer: Any, texts: Sequence[str]) -> None:
    """Warns about texts that contain no word that the tokenizer knows."""
    for n in only_unknown(tokenizer, texts):
        log.warning(
            "text %r: the model's tokenizer knows none of its words and returns only %s", texts[n], tokenizer.unk_token
        )


def require_pairs(images: Sequence[Picture], texts: Sequence[str], what: str) -> None:
    """Raises a `UserError` unless there is one text for each picture."""
    if len(images) != len(texts):
        raise UserError(f"{len(images)} pictures and {len(texts)} {what}: give as many {what} as pictures")
