"""How text is drawn from a language model, and the call of its own `generate`.

Shapes: B rows, T tokens, L LLM width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from openblip2.compat import cache_name
from openblip2.errors import UserError, one_line


@dataclass(frozen=True)
class Decoding:
    """How text is drawn from the language model. Lengths count new tokens.

    The defaults are the paper's for captions, but for `min_new_tokens`, 8 there: a picture may need fewer words.

    Attributes:
        beams: 1 = greedy, or sampling.
        repetition_penalty: lowers the logits of tokens that the text contains already, if it is above 1. Neither the
            prompt nor the soft prompt counts.
        sample: nucleus sampling with `top_p` and `temperature`; it needs `beams=1`.
        seed: of sampling. A text then depends on the seed, the picture and the prompt, not on the rest of its batch.
            None = drawn from torch's generator.

    Raises:
        UserError: a value that cannot be used.
    """

    max_new_tokens: int = 30
    min_new_tokens: int = 1
    beams: int = 5
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    sample: bool = False
    top_p: float = 0.9
    temperature: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.sample and self.beams > 1:
            raise UserError("sampling uses no beams: set beams=1")
        for name in ("repetition_penalty", "temperature"):
            if not (0 < getattr(self, name) < math.inf):
                raise UserError(f"{name}={getattr(self, name)}: give a number above 0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: give a number above 0 and at most 1")


class _Draw:
    """Leaves one token of each row, drawn from the nucleus by the row's own generator.

    transformers draws for all rows from one generator, so that a text would depend on the others of its batch.
    """

    def __init__(self, how: Decoding, rows: int) -> None:
        seeds = torch.randint(2**62, (rows,)).tolist() if how.seed is None else [how.seed] * rows
        self.how, self.generators = how, [Random(str(seed)) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits `[B, W]`: 0 for the drawn token, and minus infinity for all others."""
        logits = (scores - scores.amax(1, keepdim=True)).double()  # fp32 sums of 50,000 numbers are too coarse
        chances, order = (logits / self.how.temperature).softmax(1).sort(1, descending=True)
        nucleus = chances.masked_fill(chances.cumsum(1) - chances >= self.how.top_p, 0)  # keeps the first
        # In the order of the ids again: tokens that are equally likely have no other order that lasts.
        sums = torch.zeros_like(chances).scatter(1, order, nucleus).cumsum(1)
        draws = sums.new_tensor([[generator.random()] for generator in self.generators]) * sums[:, -1:]
        return torch.full_like(scores, -torch.inf).scatter(1, torch.searchsorted(sums, draws, right=True), 0.0)


def drop_own_settings(llm: Any) -> Any:
    """A language model without its own generation settings (`generation_config.json`), except its first ids.

    A repetition penalty, forbidden words or `top_k` in there would change what `Decoding` says. The folder is not
    written to.
    """
    from transformers import GenerationConfig

    if (own := llm.generation_config) is not None:
        llm.generation_config = GenerationConfig(
            bos_token_id=own.bos_token_id, decoder_start_token_id=own.decoder_start_token_id
        )
    return llm


def generate(
    llm: Any,
    tokenizer: Any,
    embeds: Tensor,
    mask: Tensor,
    how: Decoding,
    stop: int,
    cache: Any = None,
    watched: Mapping[str, Any] | None = None,
) -> list[str]:
    """One text for each row, by the language model's own `generate`.

    Args:
        embeds: `[B, T, L]`.
        mask: `[B, T]`.
        stop: the id that ends a text.
        cache: what has been read of the rows, once for each beam; None = nothing.
        watched: by what it is followed while it writes: `streamer`, `stopping_criteria` as transformers has them.
    """
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    processors: Any = LogitsProcessorList()
    if how.repetition_penalty != 1:  # not of the token that every text of an encoder-decoder begins with
        skipped = int(llm.config.is_encoder_decoder)
        processors.append(RepetitionPenaltyLogitsProcessor(float(how.repetition_penalty), skipped))
    if how.sample:
        processors.append(_Draw(how, len(embeds)))  # last, after what changes the logits
    beams = {"length_penalty": how.length_penalty} if how.beams > 1 else {}  # without beams it is unknown there
    known = {} if cache is None else {str(cache_name(llm)): cache}
    found = llm.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=how.max_new_tokens,
        min_new_tokens=how.min_new_tokens,
        num_beams=how.beams,
        do_sample=False,  # `_Draw` leaves no choice
        repetition_penalty=1.0,
        logits_processor=processors,
        eos_token_id=stop,
        pad_token_id=stop if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **beams,
        **known,
        **(watched or {}),
    )
    return [text.strip() for text in tokenizer.batch_decode(found, skip_special_tokens=True)]


@torch.no_grad()
def try_generation(language: Any, queries: int, prompt: str) -> None:
    """Generates two tokens, greedily and by beam search: better to learn before a training than after it.

    Args:
        language: a `DecoderLM` or an `EncoderDecoderLM`.
        queries: tokens of the soft prompt; embeddings of words take its place.
        prompt: the text after it.

    Raises:
        UserError: the language model cannot generate from embeddings.
    """
    llm = language.llm
    soft = llm.get_input_embeddings()(
        torch.arange(2 * queries, device=llm.device).view(2, -1) % len(language.tokenizer)
    )
    try:
        for beams in (1, Decoding.beams):
            language.generate(soft, [prompt, f"{prompt} a"], Decoding(max_new_tokens=2, beams=beams))
    except Exception as error:  # whatever it is, it would end every use of the run
        kind = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(
            f"{type(llm).__name__} cannot generate text after a soft prompt ({kind}): choose another language.name"
        ) from error
