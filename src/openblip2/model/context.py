"""How much a language model takes at once: what it reads, and of a decoder what it writes after that.

Shapes: Q queries.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from openblip2.compat import log, unlimited_length
from openblip2.errors import UserError

MOST_TOKENS = 512  # of a text to train on: a longer one is no caption, and its whole batch would be as long
_cut: set[int] = set()  # hashes of the texts that were cut, so that each is counted once


class Language(Protocol):
    """A language model of `model/language.py`, which imports this module and can therefore not be imported here."""

    llm: Any
    tokenizer: Any
    end: list[int]

    def length(self, prompt: str) -> int: ...
    def _head(self, prompt: str, queries: int) -> list[int]: ...
    def _caption(self, prompt: str, caption: str) -> list[int]: ...


def context_of(language: Language) -> int | None:
    """The most tokens that it takes at once, soft ones counted; None where nothing says so.

    By its configuration, or where that knows no limit (T5 tells places by distance) by its tokenizer.
    """
    places = getattr(language.llm.config.get_text_config(), "max_position_embeddings", None)
    if places is not None and places > 0:
        return places
    most = language.tokenizer.model_max_length  # a very large number where it is unknown
    return None if most >= unlimited_length() else most


def room_for_prompt(language: Language, context: int | None, queries: int, new: int) -> int | None:
    """How long a prompt may be, as `language.length` counts it; may be negative; None = however long.

    Args:
        context: tokens that fit at once.
        queries: Q, soft tokens beside it.
        new: tokens that are to be written. An encoder-decoder writes them elsewhere.
    """
    if context is None:
        return None
    return context - queries - (0 if language.llm.config.is_encoder_decoder else new)


def require_room(language: Language, prompt: str, queries: int, new: int, context: int | None = None) -> int:
    """How long a prompt is, as `language.length` counts it; arguments as in `room_for_prompt`, None = its own context.

    Raises:
        UserError: it does not fit beside the picture and what is to be written.
    """
    length, context = language.length(prompt), context or context_of(language)
    room = room_for_prompt(language, context, queries, new)
    if room is not None and length > room:
        raise UserError(
            f"text {prompt[:40]!r}... takes {length:,} tokens with its template, but only {max(room, 0)} fit beside "
            f"the picture and {new} new tokens: the language model has a context of {context:,}; give a shorter text, "
            "or ask for fewer new tokens"
        )
    return length


def fit_rows(
    language: Language, prompts: Sequence[str], captions: Sequence[str], queries: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Ids in front of each caption, and of each caption with END, for training: cut where they do not fit.

    A bad row must not end a run, nor make its batch many times as large. Each text that is cut is counted in a warning.

    Args:
        prompts: B texts.
        captions: B texts.
        queries: Q.
    """
    end, separate = language.end, language.llm.config.is_encoder_decoder
    context = context_of(language) or unlimited_length()
    # A caption keeps one token at least.
    longest = min(context - (0 if separate else len(end) + 1), queries + language.length("") + MOST_TOKENS)
    heads: list[list[int]] = []
    tails: list[list[int]] = []
    for prompt, caption in zip(prompts, captions, strict=True):
        head, tail = language._head(prompt, queries), language._caption(prompt, caption)
        whole, begin = len(head) + len(tail), prompt
        while len(head) > longest and begin:  # of the text, for the ids have the soft tokens' places among them
            begin = begin[: len(begin) * max(longest, 0) // len(head)]
            head = language._head(begin, queries)
        room = min(MOST_TOKENS, context - (0 if separate else len(head)))
        tail = tail if len(tail) <= room else tail[: max(room - len(end), 0)] + end
        if len(head) + len(tail) < whole:
            _count(prompt + caption, whole, len(head) + len(tail))
        heads.append(head)
        tails.append(tail)
    return heads, tails


def _count(text: str, tokens: int, left: int) -> None:
    known = hash("".join(text.split()))  # an encoder-decoder's text is split at another place each time
    if known in _cut:
        return
    _cut.add(known)
    if (count := len(_cut)) <= 20 or count % 1000 == 0:
        log.warning("openblip2: cut (%d so far): %r... has %d tokens, and %d fit", count, text[:40], tokens, left)
