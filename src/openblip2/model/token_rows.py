"""Rows of token ids for a language model: their common start, their maximum length and their embeddings.

Shapes: B rows, T tokens, Q soft tokens, L LLM width.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from openblip2.compat import log, unlimited_length
from openblip2.errors import UserError
from openblip2.model.template import split_control_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOFT = -1  # placeholder for one soft token in a row of ids
PADDING = -2
MOST_TOKENS = 512  # limit for a training text: a longer one is no caption, and would make its batch as long
_cut: set[int] = set()  # hashes of the texts that were cut, so that each is counted once


def text_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of a user's text. Control tokens in it are treated as plain text, and none are added."""
    return template_ids(tokenizer, split_control_tokens(text, tokenizer))


def template_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of a text in which control tokens keep their special meaning; none are added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []  # pyright: ignore


def end_ids(tokenizer: Any, end: str | None) -> list[int]:
    """Token ids that end a text: those of `end`, or the end-of-sequence token if `end` is None."""
    if end is None and not tokenizer.eos_token:
        raise UserError("this tokenizer has no end-of-sequence token: set language.end to the text that ends a caption")
    ids = template_ids(tokenizer, tokenizer.eos_token if end is None else end)
    # Some tokenizers (T5's, for example) drop line breaks: a text would then only end at the length limit.
    if end is not None and (not ids or tokenizer.unk_token_id in ids):
        raise UserError(
            f"language.end={end!r} is not a token of this model's tokenizer: set language.end to another text, "
            "or to null for its end-of-sequence token"
        )
    return ids


def common_start(rows: list[list[int]]) -> list[int]:
    """The longest common prefix of all rows, including soft tokens."""
    columns = zip(*rows, strict=False)  # stops at the end of the shortest row
    return [first for first, *_ in takewhile(lambda ids: len(set(ids)) == 1, columns)]


def common_text(rows: list[list[int]]) -> list[int]:
    """The longest common prefix of all rows, up to the first soft token."""
    return list(takewhile(lambda token: token != SOFT, common_start(rows)))


def embed_rows(llm: Any, rows: list[list[int]], soft: Tensor, left: bool, fixed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeds rows of ids, with soft tokens in place of `SOFT`: returns `[B, T, L]` and the attention mask `[B, T]`.

    left: True = padding on the left, but after the first `fixed` ids, which are never moved.
    """
    longest = max(map(len, rows))
    padded = []
    for row in rows:
        place = fixed if left else len(row)
        padded.append([*row[:place], *[PADDING] * (longest - len(row)), *row[place:]])
    ids = torch.tensor(padded, device=soft.device)
    embeds = llm.get_input_embeddings()(ids.clamp(min=0))
    return embeds.masked_scatter((ids == SOFT)[..., None], soft.to(embeds.dtype)), (ids != PADDING).long()


class Language(Protocol):
    """The interface of the language models in `model/language.py`, which cannot be imported here (import cycle)."""

    llm: Any
    tokenizer: Any
    end: list[int]

    def length(self, prompt: str) -> int: ...
    def _head(self, prompt: str, queries: int) -> list[int]: ...
    def _caption(self, prompt: str, caption: str) -> list[int]: ...


def context_of(language: Language) -> int | None:
    """Maximum context length of the language model in tokens, including soft tokens; None if it is unknown.

    It is read from the configuration or, if that has no limit (T5: relative positions), from the tokenizer.
    """
    places = getattr(language.llm.config.get_text_config(), "max_position_embeddings", None)
    if places is not None and places > 0:
        return places
    most = language.tokenizer.model_max_length  # a very large number if it is unknown
    return None if most >= unlimited_length() else most


def room_for_prompt(language: Language, context: int | None, queries: int, new: int) -> int | None:
    """Maximum length of a prompt, as counted by `language.length`; it can be negative, and None means no limit.

    Args:
        context: maximum context length in tokens; None = no limit.
        queries: Q, the number of soft tokens in the same context.
        new: number of tokens to generate. An encoder-decoder generates them in its decoder, where they need no room.
    """
    if context is None:
        return None
    return context - queries - (0 if language.llm.config.is_encoder_decoder else new)


def require_room(language: Language, prompt: str, queries: int, new: int, context: int | None = None) -> int:
    """Returns the length of a prompt; arguments as in `room_for_prompt`, but None = the model's own context.

    Raises:
        UserError: the prompt, the soft tokens and the new tokens do not fit into the context.
    """
    length, context = language.length(prompt), context or context_of(language)
    room = room_for_prompt(language, context, queries, new)
    if room is not None and length > room:
        raise UserError(
            f"text {prompt[:40]!r}... takes {length:,} tokens with its template, but only {max(room, 0)} fit with "
            f"the picture and {new} new tokens: the language model has a context of {context:,}; give a shorter text, "
            "or ask for fewer new tokens"
        )
    return length


def fit_rows(
    language: Language, prompts: Sequence[str], captions: Sequence[str], queries: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the text before each caption, and of each caption with END, for training; cut if they do not fit.

    One very long row must not stop a run, or make its batch many times larger. A warning counts the texts that are cut.

    Args:
        prompts: B texts.
        captions: B texts.
        queries: Q.
    """
    end, separate = language.end, language.llm.config.is_encoder_decoder
    context = context_of(language) or unlimited_length()
    # At least one token of each caption is kept.
    longest = min(context - (0 if separate else len(end) + 1), queries + language.length("") + MOST_TOKENS)
    heads: list[list[int]] = []
    tails: list[list[int]] = []
    for prompt, caption in zip(prompts, captions, strict=True):
        head, tail = language._head(prompt, queries), language._caption(prompt, caption)
        whole, begin = len(head) + len(tail), prompt
        while len(head) > longest and begin:  # cuts the text, because the ids include the soft tokens
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
    known = hash("".join(text.split()))  # without spaces: an encoder-decoder splits a text at different places
    if known in _cut:
        return
    _cut.add(known)
    if (count := len(_cut)) <= 20 or count % 1000 == 0:
        log.warning("openblip2: cut (%d so far): %r... has %d tokens, but only %d fit", count, text[:40], tokens, left)
