"""How text is drawn from a language model, and the call of its own `generate`.

Shapes: B rows, T tokens, L LLM width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
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
        beams: 1 = greedy, or plain sampling.
        sample: nucleus sampling with `top_p` and `temperature`.
    """

    max_new_tokens: int = 30
    min_new_tokens: int = 1
    beams: int = 5
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    sample: bool = False
    top_p: float = 0.9
    temperature: float = 1.0


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
    sampling: dict[str, Any] = {"do_sample": how.sample}
    if how.sample:  # transformers cuts to the 50 likeliest words unless told otherwise; the nucleus is the only cut
        sampling |= {"top_p": how.top_p, "temperature": how.temperature, "top_k": 0}
    beams = {"length_penalty": how.length_penalty} if how.beams > 1 else {}  # without beams it is unknown there
    known = {} if cache is None else {str(cache_name(llm)): cache}
    found = llm.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=how.max_new_tokens,
        min_new_tokens=how.min_new_tokens,
        num_beams=how.beams,
        repetition_penalty=how.repetition_penalty,
        eos_token_id=stop,
        pad_token_id=stop if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **sampling,
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
