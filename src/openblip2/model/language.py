"""Frozen language models that read a soft visual prompt (paper, section 3.2 and figure 3).

Shapes: B images, Q queries, T tokens, L LLM width, W vocabulary.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from openblip2.compat import cache_name, checkpointable_layers, log, set_attention
from openblip2.errors import UserError
from openblip2.model import prompt_cache
from openblip2.model.decoding import Decoding, drop_own_settings, generate
from openblip2.model.fast.chunked_loss import ends_in_head, gather_head_input, loss_at
from openblip2.model.precision import own_precision
from openblip2.model.template import PAPER_TEMPLATE, resolve_template, split_control_tokens
from openblip2.model.token_rows import (
    SOFT,
    common_start,
    common_text,
    embed_rows,
    end_ids,
    fit_rows,
    template_ids,
    text_ids,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100  # a position without a target
REUSE_IS_OFF = "prompt reuse is off: %s; each beam and each question reads its whole prompt again"
CHUNKED_LOSS_IS_OFF = (
    "chunked loss is off: %s does not return its output embedding's logits unchanged; training keeps the logits of all "
    "positions in memory"
)


class FrozenLM(nn.Module):
    """Base class: a frozen `transformers` language model, its tokenizer, and the template around picture and prompt.

    It computes in the precision of its own weights: autocast to another dtype is disabled inside. Both kinds have
    `scored` for training, and `generate`, which calls the language model's own `generate`.

    Args:
        llm: the language model.
        tokenizer: the tokenizer of `llm`.
        template: see `model/template.py`; `{bos}` is empty if the tokenizer has no beginning-of-sequence token.
        end: the text that ends a caption ("\\n" for OPT, as in the paper); None = the end-of-sequence token.

    Raises:
        UserError: the template has no `{image}` or an unknown slot, or the tokenizer has no end token.
    """

    def __init__(
        self,
        llm: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        template: str = PAPER_TEMPLATE,
        end: str | None = None,
    ) -> None:
        super().__init__()
        self.llm = drop_own_settings(llm).requires_grad_(False).eval()  # frozen (3.2)
        gather_head_input(llm)
        set_attention(llm)
        self.tokenizer, self.template = tokenizer, resolve_template(template, tokenizer)
        self.width: int = llm.get_input_embeddings().weight.shape[1]  # pyright: ignore
        self.end, self.checkpointed = end_ids(tokenizer, end), False
        self.sharded = False  # sharded over processes, which must then run the model equally often
        self.watched: dict[str, Any] = {}  # `streamer` and `stopping_criteria` of `generate`: see `decoding.generate`
        self.last_read = prompt_cache.LastRead()
        self.reuse = prompt_cache.find_reuse(llm)
        if self.reuse.reason:
            log.warning("openblip2: %s", REUSE_IS_OFF % self.reuse.reason)

    def train(self, mode: bool = True) -> "FrozenLM":
        """Stays in eval mode, so the language model's own dropout is off (the authors leave it on)."""
        return super().train(False)

    def checkpoint_activations(self) -> None:
        """Enables activation checkpointing: the backward pass recomputes each layer instead of storing activations.

        Raises:
            UserError: transformers does not mark any layer of this model as fit for it.
        """
        layers = checkpointable_layers(self.llm)
        if not layers:
            raise UserError(f"train.checkpoint_activations=true: {type(self.llm).__name__} does not support it")
        # transformers' own option only works in training mode, where dropout is on.
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        self.checkpointed = True

    @cached_property
    def _ends_in_head(self) -> bool:
        found = ends_in_head(self.llm)
        if not found:
            log.warning("openblip2: %s", CHUNKED_LOSS_IS_OFF % type(self.llm).__name__)
        return found

    def slow_paths(self) -> list[str]:
        """One sentence for each optimisation that this language model does not support; none changes a result."""
        reuse = [REUSE_IS_OFF % self.reuse.reason] if self.reuse.reason else []
        return reuse + ([] if ends_in_head(self.llm) else [CHUNKED_LOSS_IS_OFF % type(self.llm).__name__])

    @property
    def adapted(self) -> bool:
        """Whether adapters in the language model are trained (model/lora.py)."""
        return any(parameter.requires_grad for parameter in self.llm.parameters())

    def embed(self, soft: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What the language model reads before it generates: embeddings `[B, T, L]` and attention mask `[B, T]`.

        Padded on the left for a decoder, on the right for an encoder.

        Args:
            soft: `[B, Q, L]`.
            prompts: B texts.
        """
        rows = [self._head(prompt, soft.shape[1]) for prompt in prompts]
        return embed_rows(self.llm, rows, soft, left=not self.llm.config.is_encoder_decoder)

    def length(self, prompt: str) -> int:
        """Number of tokens before and after the picture, of a prompt and its template; soft tokens are not counted."""
        return len(self._head(prompt, 0))

    def own_precision(self) -> AbstractContextManager[object]:
        return own_precision(self.llm.device, self.llm.dtype)

    def _head(self, prompt: str, queries: int) -> list[int]:
        """Token ids before the text to be generated, with `SOFT` in place of each soft token."""
        prompt = split_control_tokens(prompt, self.tokenizer)
        before, after = self.template.split("{image}")
        return [
            *template_ids(self.tokenizer, before.format(prompt=prompt)),
            *[SOFT] * queries,
            *template_ids(self.tokenizer, after.format(prompt=prompt)),
            *(self.end if self.llm.config.is_encoder_decoder else ()),  # as its tokenizer does for every text
        ]


class DecoderLM(FrozenLM):
    """A frozen causal language model: `[before] [Q soft tokens] [after, prompt] caption END`."""

    def scored(
        self, soft: Tensor, prompts: Sequence[str], captions: Sequence[str], draws: Sequence[float] | None = None
    ) -> tuple[Tensor, int]:
        """Mean cross-entropy of the captions' tokens and END after `soft [B, Q, L]`, and their number.

        The prompt, soft tokens and padding have no target. `draws` is only used by encoder-decoders, which split texts.
        """
        heads, tails = fit_rows(self, prompts, captions, soft.shape[1])
        # A checkpointed layer would append to the cache twice; a sharded model must run equally often in all processes.
        before = [] if self.checkpointed or self.sharded else common_text(heads)
        rows = [head[len(before) :] + tail for head, tail in zip(heads, tails, strict=True)]
        embeds, mask = embed_rows(self.llm, rows, soft, left=False)  # padding on the right: no token attends to it
        pairs = zip(rows, tails, strict=True)
        labels = label_rows([IGNORED] * (len(row) - len(tail)) + tail for row, tail in pairs).to(soft.device)  # [B, T]
        # Logits are only needed from the first position that is scored in any row.
        first = min(map(len, heads)) - len(before) - 1
        places = torch.arange(first, mask.shape[1] - 1, device=soft.device)
        mask = F.pad(mask, (len(before), 0), value=1)  # columns of the cached text
        targets = labels[:, first + 1 :]  # a position predicts the next token
        scored = targets != IGNORED
        with self.own_precision():
            known: dict[str, Any] = self._read(before, len(rows)) if before else {"use_cache": False}
            known |= {"inputs_embeds": embeds, "attention_mask": mask, "logits_to_keep": places}
            return loss_at(self.llm, self._ends_in_head, scored, targets[scored], **known), int(scored.sum())

    @torch.no_grad()
    def generate(
        self, soft: Tensor, prompts: Sequence[str], decoding: Decoding, pictures: Sequence[int] | None = None
    ) -> list[str]:
        """Generates a text for each of B prompts; the batch does not affect it: prompts are left-padded or run singly.

        Each beginning is read only once: the text before all pictures, which is kept for the next call, a picture for
        all prompts about it, and all but the last token of a prompt for all beams.

        Args:
            soft: `[N, Q, L]` of N pictures.
            pictures: the index of each prompt's picture, `[B]`; None = prompt n is about picture n.
        """
        pictures = range(len(soft)) if pictures is None else pictures
        rows = [self._head(prompt, soft.shape[1]) for prompt in prompts]
        if len(set(map(len, rows))) > 1 and not prompt_cache.can_pad(self.llm):
            return [self.generate(soft, [p], decoding, [n])[0] for p, n in zip(prompts, pictures, strict=True)]
        text, shared = self._shared(rows, pictures)
        embeds, mask = embed_rows(self.llm, rows, soft[list(pictures)], left=True, fixed=shared)
        firsts = [pictures.index(picture) for picture in pictures]  # for each row, the first row with the same picture
        stages = [(text, [0] * len(rows)), (shared, firsts)]
        if self.reuse.cache and decoding.beams > 1:
            stages.append((embeds.shape[1] - 1, list(range(len(rows)))))  # `generate` computes the last token itself
        with self.own_precision():
            # A sharded model must run equally often in all processes, so it reads the text again.
            cache = self._text_cache(rows[0][:text]) if text and not self.sharded else None
            cache = prompt_cache.read(self.llm, embeds, mask, stages, self.end[-1], cache)
            # `generate` takes the whole rows and skips the tokens that are in the cache.
            if self.reuse.cache:
                room = embeds.shape[1] + decoding.max_new_tokens
                cache = prompt_cache.with_room(self.llm, cache, decoding.beams, room)
            return generate(self, embeds, mask, decoding, cache)

    def _shared(self, rows: list[list[int]], pictures: Sequence[int]) -> tuple[int, int]:
        """Lengths of two common prefixes of all rows: the text before the pictures, and the prefix with the picture.

        They are equal unless pictures repeat. Padding, if it is needed, comes after the common prefix.
        """
        if not self.reuse.cache or not (self.reuse.gaps or len(set(map(len, rows))) == 1):
            return 0, 0
        most = min(map(len, rows)) - 1  # `generate` computes the last token itself
        text = min(len(common_text(rows)), most)
        shared = min(len(common_start(rows)), most)
        return text, shared if len(set(pictures)) < len(rows) and SOFT in rows[0][:shared] else text

    def _text_cache(self, text: list[int]) -> Any:
        """Keys and values of a text, in one row; read again each time if adapters are trained."""
        return prompt_cache.read_text(self.llm, text) if self.adapted else self.last_read(self.llm, text)

    def _read(self, text: list[int], count: int) -> dict[str, Any]:
        """Keys and values of a text that `count` rows begin with."""
        cache = self._text_cache(text)
        cache.batch_repeat_interleave(count)  # it was read as one row
        return {str(cache_name(self.llm)): cache, "use_cache": True}

    def _caption(self, prompt: str, caption: str) -> list[int]:
        spaced = self.template.endswith("{prompt}") and prompt and not prompt[-1].isspace()
        return text_ids(self.tokenizer, " " + caption if spaced else caption) + self.end


class EncoderDecoderLM(FrozenLM):
    """A frozen encoder-decoder: `[Q soft tokens] [prompt] prefix` in the encoder, the suffix is the target.

    splits: False = there is no prefix, and the whole text is the target, as in fine-tuning.
    """

    splits = True

    def scored(
        self, soft: Tensor, prompts: Sequence[str], captions: Sequence[str], draws: Sequence[float] | None = None
    ) -> tuple[Tensor, int]:
        """Prefix language modelling: mean cross-entropy of each caption's suffix, and the number of these positions.

        `draws`: B numbers in [0, 1) that decide where each caption is split; None = from torch's generator.
        """
        draws = torch.rand(len(captions)).tolist() if draws is None else draws
        split = [
            split_caption(caption, draw) if self.splits else ("", caption)
            for caption, draw in zip(captions, draws, strict=True)
        ]
        read = [f"{prompt} {prefix}".strip() for prompt, (prefix, _) in zip(prompts, split, strict=True)]
        heads, tails = fit_rows(self, read, [suffix for _, suffix in split], soft.shape[1])
        embeds, mask = embed_rows(self.llm, heads, soft, left=False)  # the mask excludes padding in the encoder
        labels = label_rows(tails).to(soft.device)
        scored = labels != IGNORED  # [B, T]
        written = self.llm.prepare_decoder_input_ids_from_labels(labels=labels)  # pyright: ignore
        with self.own_precision():
            given = {"inputs_embeds": embeds, "attention_mask": mask, "decoder_input_ids": written}
            loss = loss_at(self.llm, self._ends_in_head, scored, labels[scored], use_cache=False, **given)
        return loss, int(scored.sum())

    @torch.no_grad()
    def generate(
        self, soft: Tensor, prompts: Sequence[str], decoding: Decoding, pictures: Sequence[int] | None = None
    ) -> list[str]:
        """As `DecoderLM.generate`; the encoder reads a prompt once for all beams, but a picture for each prompt."""
        embeds, mask = self.embed(soft if pictures is None else soft[list(pictures)], prompts)
        cache = prompt_cache.encoder_decoder_cache(self.llm, decoding.max_new_tokens) if self.reuse.cache else None
        with self.own_precision():
            return generate(self, embeds, mask, decoding, cache)

    def _caption(self, prompt: str, caption: str) -> list[int]:
        return text_ids(self.tokenizer, caption) + self.end


LanguageModel = DecoderLM | EncoderDecoderLM


def label_rows(rows: Iterable[list[int]]) -> Tensor:
    """Target ids, padded on the right with `IGNORED`: `[B, T]`."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=IGNORED)


def split_caption(caption: str, draw: float) -> tuple[str, str]:
    """Splits a caption of n words into prefix and suffix after 1 to n // 2 words, as `draw` in [0, 1) says.

    The range was stated by an author and is missing in the released code. A single word is used as the suffix.
    """
    words = caption.split()
    if len(words) < 2:  # one word cannot be split in two
        return "", caption
    place = 1 + int(draw * (len(words) // 2))
    return " ".join(words[:place]), " ".join(words[place:])
