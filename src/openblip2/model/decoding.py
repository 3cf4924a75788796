"""Settings for text generation, and the call of a language model's own `generate`.

Shapes: B rows, T tokens, L LLM width.
"""

import math
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from openblip2.compat import cache_name
from openblip2.errors import UserError, one_line


@dataclass(frozen=True)
class Decoding:
    """Settings for text generation with the language model. Lengths count new tokens only.

    The defaults are the paper's for captions, except `min_new_tokens` (8 there): a picture may need fewer words.

    Attributes:
        beams: number of beams; 1 = greedy decoding, or sampling.
        repetition_penalty: a value above 1 lowers the logits of tokens that the generated text already contains. The
            prompt and the soft prompt do not count.
        sample: nucleus sampling with `top_p` and `temperature`; it requires `beams=1`.
        seed: random seed for sampling. A text then depends on the seed, the picture and the prompt, but not on the
            rest of its batch. None = a seed is drawn from torch's generator.

    Raises:
        UserError: a value is invalid.
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
    """Logits processor that samples one token per row from the nucleus, with a separate generator for each row.

    With transformers' one generator for all rows, a text would depend on the other texts of its batch.
    """

    def __init__(self, how: Decoding, rows: int) -> None:
        seeds = torch.randint(2**62, (rows,)).tolist() if how.seed is None else [how.seed] * rows
        self.how, self.generators = how, [Random(str(seed)) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits `[B, W]`: 0 for the drawn token, and minus infinity for all others."""
        logits = (scores - scores.amax(1, keepdim=True)).double()  # fp32 is too imprecise for sums of 50,000 numbers
        chances, order = (logits / self.how.temperature).softmax(1).sort(1, descending=True)
        nucleus = chances.masked_fill(chances.cumsum(1) - chances >= self.how.top_p, 0)  # always keeps the top token
        # Back in the order of the ids, because the sort order of equally likely tokens is not reproducible.
        sums = torch.zeros_like(chances).scatter(1, order, nucleus).cumsum(1)
        draws = sums.new_tensor([[generator.random()] for generator in self.generators]) * sums[:, -1:]
        return torch.full_like(scores, -torch.inf).scatter(1, torch.searchsorted(sums, draws, right=True), 0.0)


def drop_own_settings(llm: Any) -> Any:
    """Removes a language model's own generation settings, which would override `Decoding`, except its start token ids.

    For example a repetition penalty, forbidden words or `top_k` in `generation_config.json`; the file is not changed.
    """
    from transformers import GenerationConfig

    if (own := llm.generation_config) is not None:
        llm.generation_config = GenerationConfig(
            bos_token_id=own.bos_token_id, decoder_start_token_id=own.decoder_start_token_id
        )
    return llm


def generate(language: Any, embeds: Tensor, mask: Tensor, how: Decoding, cache: Any) -> list[str]:
    """Generates one text for each row with the language model's own `generate`.

    Args:
        language: a `DecoderLM` or an `EncoderDecoderLM`.
        embeds: `[B, T, L]`.
        mask: `[B, T]`.
        cache: key-value cache of the tokens read so far, with one row for each beam; None = nothing was read.
    """
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    llm, tokenizer, stop = language.llm, language.tokenizer, language.end[-1]
    processors: Any = LogitsProcessorList()
    if how.repetition_penalty != 1:  # does not apply to the start token of an encoder-decoder
        skipped = int(llm.config.is_encoder_decoder)
        processors.append(RepetitionPenaltyLogitsProcessor(float(how.repetition_penalty), skipped))
    if how.sample:
        processors.append(_Draw(how, len(embeds)))  # last, after the processors that change the logits
    beams = {"length_penalty": how.length_penalty} if how.beams > 1 else {}  # only beam search accepts it
    known = {} if cache is None else {str(cache_name(llm)): cache}
    found = llm.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=how.max_new_tokens,
        min_new_tokens=how.min_new_tokens,
        num_beams=how.beams,
        do_sample=False,  # `_Draw` leaves only the sampled token
        repetition_penalty=1.0,
        logits_processor=processors,
        eos_token_id=stop,
        pad_token_id=stop if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **beams,
        **known,
        **language.watched,
    )
    return [text.strip() for text in tokenizer.batch_decode(found, skip_special_tokens=True)]


@torch.no_grad()
def try_generation(language: Any, queries: int, prompt: str) -> None:
    """Generates two tokens, greedily and with beam search, so that a problem is found before training starts.

    Args:
        language: a `DecoderLM` or an `EncoderDecoderLM`.
        queries: number of soft tokens; word embeddings are used in their place.
        prompt: the text after the soft prompt.

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
    except Exception as error:  # any error here would also occur each time the run is used
        kind = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(
            f"{type(llm).__name__} cannot generate text after a soft prompt ({kind}): choose another language.name"
        ) from error
