"""Frozen language models behind a soft visual prompt (paper, section 3.2 and figure 3).

A language model and its tokenizer are one thing here. `DecoderLM` and `EncoderDecoderLM` have the same methods:
`loss` for training and `generate`, which is the language model's own.

Shapes: B images, Q queries, T tokens, L LLM width, W vocabulary.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openblip2.errors import UserError
from openblip2.model.precision import own_precision
from openblip2.model.template import PAPER_TEMPLATE, resolve_template

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SOFT = -1  # stands for one soft token in a row of ids
IGNORED = -100  # a position without a target


@dataclass(frozen=True)
class Decoding:
    """How text is drawn from the language model. Lengths count new tokens.

    The defaults are the paper's for captions, but for `min_new_tokens`, 8 there: a picture may need fewer words.

    Attributes:
        beams: 1 = greedy, or plain sampling. sample: nucleus sampling with `top_p` and `temperature`.
    """

    max_new_tokens: int = 30
    min_new_tokens: int = 1
    beams: int = 5
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    sample: bool = False
    top_p: float = 0.9
    temperature: float = 1.0


class FrozenLM(nn.Module):
    """What both kinds share: a frozen `transformers` language model, its tokenizer, and its frame.

    It computes in the precision of its own weights: autocast to another is off inside.

    Args:
        llm: the language model. tokenizer: its own.
        template: see `model/template.py`; `{bos}` is empty where the tokenizer has no first token.
        end: the text that ends a caption ("\\n" for OPT, as the paper has it); None = the end-of-sequence token.

    Raises:
        UserError: a template without `{image}` or with an unknown slot, or a tokenizer without an end token.
    """

    def __init__(
        self,
        llm: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        template: str = PAPER_TEMPLATE,
        end: str | None = None,
    ) -> None:
        super().__init__()
        self.llm = llm.requires_grad_(False).eval()
        self.tokenizer, self.template = tokenizer, resolve_template(template, tokenizer)
        self.width: int = llm.get_input_embeddings().weight.shape[1]  # pyright: ignore
        self.end = _end_ids(tokenizer, end)

    def train(self, mode: bool = True) -> "FrozenLM":
        """Frozen parts stay in eval mode: the language model's own dropout is off (the authors leave it on)."""
        return super().train(False)

    @property
    def adapted(self) -> bool:
        """Whether adapters train in it (model/lora.py)."""
        return any(parameter.requires_grad for parameter in self.llm.parameters())

    def embed(self, soft: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """All that the language model reads before it writes: embeddings `[B, T, L]` and attention mask `[B, T]`.

        Padded on the left for a decoder, on the right for an encoder.

        Args:
            soft: `[B, Q, L]`. prompts: B texts.
        """
        rows = [self._head(prompt, soft.shape[1]) for prompt in prompts]
        return _embed(self.llm, rows, soft, left=not self.llm.config.is_encoder_decoder)

    def own_precision(self) -> AbstractContextManager[object]:
        return own_precision(self.llm.device, self.llm.dtype)

    def _head(self, prompt: str, queries: int) -> list[int]:
        """Ids in front of what is to be written, `SOFT` in the soft tokens' places."""
        before, after = self.template.split("{image}")
        return [
            *_ids(self.tokenizer, before.format(prompt=prompt)),
            *[SOFT] * queries,
            *_ids(self.tokenizer, after.format(prompt=prompt)),
            *(self.end if self.llm.config.is_encoder_decoder else ()),  # as its tokenizer ends every text
        ]


class DecoderLM(FrozenLM):
    """A frozen causal language model: `[before] [Q soft tokens] [after, prompt] caption END`."""

    def loss(self, soft: Tensor, prompts: Sequence[str], captions: Sequence[str]) -> Tensor:
        """Mean cross-entropy of the captions' tokens and END; the prompt, soft tokens and padding have no target.

        Args:
            soft: `[B, Q, L]`. prompts, captions: B texts each.
        """
        heads = [self._head(prompt, soft.shape[1]) for prompt in prompts]
        tails = [self._caption(prompt, caption) for prompt, caption in zip(prompts, captions, strict=True)]
        before = _common_text(heads)
        rows = [head[len(before) :] + tail for head, tail in zip(heads, tails, strict=True)]
        embeds, mask = _embed(self.llm, rows, soft, left=False)
        labels = torch.full_like(mask, IGNORED)
        for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
            labels[row, len(head) - len(before) :][: len(tail)] = torch.tensor(tail)
        # Logits only from the first position that any row scores: soft tokens and common prompt need none. The
        # positions are given one by one: a slice of the hidden states is not contiguous, and a CPU would multiply it
        # with a copy of the output embedding for every row.
        first = min(map(len, heads)) - len(before) - 1
        places = torch.arange(first, mask.shape[1], device=soft.device)
        mask = F.pad(mask, (len(before), 0), value=1)
        with self.own_precision():
            known = self._read(before, len(rows)) if before else {"use_cache": False}
            logits = self.llm(inputs_embeds=embeds, attention_mask=mask, logits_to_keep=places, **known).logits
        targets = labels[:, first + 1 :]
        scored = targets != IGNORED
        return F.cross_entropy(logits[:, :-1][scored].float(), targets[scored])

    @torch.no_grad()
    def generate(self, soft: Tensor, prompts: Sequence[str], decoding: Decoding) -> list[str]:
        """One text for each of the B soft prompts `[B, Q, L]`; left padding, so a batch equals its single images."""
        rows = [self._head(prompt, soft.shape[1]) for prompt in prompts]
        before = _common_text(rows)
        embeds, mask = _embed(self.llm, [row[len(before) :] for row in rows], soft, left=True)
        mask = F.pad(mask, (len(before), 0), value=1)
        # `generate` wants the whole rows, and skips what it finds in the cache.
        embeds = F.pad(embeds, (0, 0, len(before), 0))
        with self.own_precision():
            known = self._read(before, len(rows) * decoding.beams) if before else {}
            return _generate(self.llm, self.tokenizer, embeds, mask, decoding, stop=self.end[-1], **known)

    def _read(self, text: list[int], count: int) -> dict[str, Any]:
        """The keys and values of a text that `count` rows begin with. No picture is in it, so it is read once."""
        # Nothing in it trains, unless adapters read it.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.adapted):
            ids = torch.tensor([text], device=self.llm.device)
            cache = self.llm(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(count)
        return {"past_key_values": cache, "use_cache": True}

    def _caption(self, prompt: str, caption: str) -> list[int]:
        spaced = self.template.endswith("{prompt}") and prompt and not prompt[-1].isspace()
        return _ids(self.tokenizer, " " + caption if spaced else caption) + self.end


class EncoderDecoderLM(FrozenLM):
    """A frozen encoder-decoder: `[Q soft tokens] [prompt] prefix` in the encoder, the suffix is the target."""

    def loss(self, soft: Tensor, prompts: Sequence[str], captions: Sequence[str]) -> Tensor:
        """Prefix language modelling: mean cross-entropy of each caption's suffix, `soft [B, Q, L]`, B texts each.

        The split points come from torch's global generator.
        """
        split = [split_caption(caption) for caption in captions]
        heads = [
            self._head(f"{prompt} {prefix}".strip(), soft.shape[1])
            for prompt, (prefix, _) in zip(prompts, split, strict=True)
        ]
        embeds, mask = _embed(self.llm, heads, soft, left=False)
        tails = [_ids(self.tokenizer, suffix) + self.end for _, suffix in split]
        labels = torch.full((len(tails), max(map(len, tails))), IGNORED, device=soft.device)
        for row, tail in enumerate(tails):
            labels[row, : len(tail)] = torch.tensor(tail)
        with self.own_precision():
            logits = self.llm(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False).logits
        scored = labels != IGNORED
        return F.cross_entropy(logits[scored].float(), labels[scored])

    @torch.no_grad()
    def generate(self, soft: Tensor, prompts: Sequence[str], decoding: Decoding) -> list[str]:
        """One text for each of the B soft prompts `[B, Q, L]`."""
        embeds, mask = self.embed(soft, prompts)
        with self.own_precision():
            return _generate(self.llm, self.tokenizer, embeds, mask, decoding, stop=self.end[-1])


LanguageModel = DecoderLM | EncoderDecoderLM


def split_caption(caption: str) -> tuple[str, str]:
    """Prefix and suffix of a caption, split after 1 to n // 2 of its n words, uniformly drawn.

    The split's range is the author's word; it is missing in the released code. A single word is all suffix.
    """
    words = caption.split()
    if len(words) < 2:
        return "", caption
    place = int(torch.randint(1, len(words) // 2 + 1, ()))
    return " ".join(words[:place]), " ".join(words[place:])


def _end_ids(tokenizer: Any, end: str | None) -> list[int]:
    end = tokenizer.eos_token if end is None else end
    if not end:
        raise UserError("this tokenizer has no end-of-sequence token: set language.end to the text that ends a caption")
    return _ids(tokenizer, end)


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []  # pyright: ignore


def _common_text(heads: list[list[int]]) -> list[int]:
    """The ids that all rows begin with, up to the first soft token."""
    columns = zip(*heads, strict=False)  # the shortest row ends it
    return [first for first, *_ in takewhile(lambda ids: ids[0] != SOFT and len(set(ids)) == 1, columns)]


def _embed(llm: Any, rows: list[list[int]], soft: Tensor, left: bool) -> tuple[Tensor, Tensor]:
    """Embeds rows of ids in which `SOFT` marks the soft tokens' places: `[B, T, L]` and attention mask `[B, T]`."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for n, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[n, place], mask[n, place] = torch.tensor(row), 1
    ids, mask = ids.to(soft.device), mask.to(soft.device)
    embeds = llm.get_input_embeddings()(ids.clamp(min=0))
    return embeds.masked_scatter((ids == SOFT)[..., None], soft.to(embeds.dtype)), mask


def _generate(
    llm: Any, tokenizer: Any, embeds: Tensor, mask: Tensor, how: Decoding, stop: int, **known: Any
) -> list[str]:
    # transformers cuts to the 50 likeliest words unless told otherwise; the nucleus is the only cut here.
    sampling = {"top_p": how.top_p, "temperature": how.temperature, "top_k": 0} if how.sample else {}
    beams = {"length_penalty": how.length_penalty} if how.beams > 1 else {}  # without beams it is unknown there
    found = llm.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=how.max_new_tokens,
        min_new_tokens=how.min_new_tokens,
        num_beams=how.beams,
        do_sample=how.sample,
        repetition_penalty=how.repetition_penalty,
        eos_token_id=stop,
        pad_token_id=stop if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **sampling,
        **beams,
        **known,
    )
    return [text.strip() for text in tokenizer.batch_decode(found, skip_special_tokens=True)]
