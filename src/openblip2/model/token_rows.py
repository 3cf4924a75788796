"""Rows of ids with places for the soft prompt, as a language model is given them.

Shapes: B rows, T tokens, Q soft tokens, L LLM width.
"""

from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from openblip2.model.template import split_control_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOFT = -1  # stands for one soft token in a row of ids


def text_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The ids of a user's text. Control tokens in it are read as plain text, and none are added."""
    return template_ids(tokenizer, split_control_tokens(text, tokenizer))


def template_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The ids of a text whose control tokens are meant as such; none are added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []  # pyright: ignore


def common_start(rows: list[list[int]]) -> list[int]:
    """What all rows begin with, soft tokens included."""
    columns = zip(*rows, strict=False)  # the shortest row ends it
    return [first for first, *_ in takewhile(lambda ids: len(set(ids)) == 1, columns)]


def common_text(rows: list[list[int]]) -> list[int]:
    """The ids that all rows begin with, up to the first soft token."""
    return list(takewhile(lambda token: token != SOFT, common_start(rows)))


def embed_rows(llm: Any, rows: list[list[int]], soft: Tensor, left: bool, fixed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeds rows of ids in which `SOFT` marks the soft tokens' places: `[B, T, L]` and attention mask `[B, T]`.

    left: padding comes first, but after the first `fixed` ids, which are never moved.
    """
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for n, row in enumerate(rows):
        rest = fixed + (longest - len(row) if left else 0)
        for start, part in ((0, row[:fixed]), (rest, row[fixed:])):
            place = slice(start, start + len(part))
            ids[n, place], mask[n, place] = torch.tensor(part), 1
    ids, mask = ids.to(soft.device), mask.to(soft.device)
    embeds = llm.get_input_embeddings()(ids.clamp(min=0))
    return embeds.masked_scatter((ids == SOFT)[..., None], soft.to(embeds.dtype)), mask
