"""Finding a frozen language model by its name: on the hub, in a folder, in a wheel, or inside a BLIP-2."""

import re
from typing import Any

import torch

from openblip2.compat import keep_4bit_gradients, quiet_transformers
from openblip2.errors import UserError, one_line
from openblip2.model.language import DecoderLM, EncoderDecoderLM, LanguageModel
from openblip2.model.mapped import load_in
from openblip2.model.precision import quantised_options
from openblip2.model.template import PAPER_TEMPLATE
from openblip2.model.wheels import locate

BLIP2_PREFIX = "language_model."  # of the language model's weights in a BLIP-2 of transformers
BLIP2_OTHERS = ("vision_model.", "qformer.", "query_tokens", "language_projection.")  # and of the other parts


def load_language(
    name: str,
    template: str = PAPER_TEMPLATE,
    end: str | None = None,
    dtype: torch.dtype = torch.float32,
    bits: int | None = None,
    place: torch.device | None = None,
    exact_gelu: bool = False,
) -> LanguageModel:
    """A frozen language model by hub name, directory, or wheel (`wheel:smollm2-135m-instruct`).

    Whether it is a decoder or an encoder-decoder is read from its configuration. Of a BLIP-2 of transformers, the
    language part alone is read.

    Args:
        dtype: of its weights.
        bits: 8 or 4 to quantise its linear layers; all else is `dtype`.
        exact_gelu: a T5's feed-forward layers compute GELU itself, not its tanh approximation.
        place: where quantised weights go, None = a GPU if there is one; others are on the CPU until they are moved.

    Raises:
        UserError: there is no such model, it is neither kind, weights of it are missing or do not fit, or what
            quantises it is not installed.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    options = {} if bits is None else quantised_options(bits, dtype, place)
    source = locate(name)
    try:
        with quiet_transformers():
            config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
            prefix = BLIP2_PREFIX if "qformer_config" in config.sub_configs else ""
            if prefix:
                config = config.text_config  # of the language part alone
                options |= {"config": config, "key_mapping": {rf"^{re.escape(prefix)}": ""}}
            if exact_gelu:
                _set_exact_gelu(name, config)
                options |= {"config": config}
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            loader: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            if bits is None:
                llm, report = load_in(loader, source, dtype, prefix, **options)
            else:
                options["output_loading_info"] = True
                llm, report = loader.from_pretrained(source, dtype=dtype, trust_remote_code=False, **options)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(
            f"language model {name!r} cannot be loaded: {one_line(error)} (give a hub name, a directory or a wheel)"
        ) from error
    if missing := sorted(report["missing_keys"]):  # drawn at random, and never trained
        raise UserError(
            f"language model {name!r} cannot be loaded: {len(missing)} of its weights are not in it, "
            f"{missing[0]} for one"
        )
    if prefix:
        unknown = sorted(key for key in report["unexpected_keys"] if not key.startswith(BLIP2_OTHERS))
        if unknown:
            raise UserError(
                f"language model {name!r}: {len(unknown)} keys of it are not of a {config.model_type!r}, "
                f"{BLIP2_PREFIX}{unknown[0]} for one"
            )
    words = llm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) < words // 2:  # transformers makes an empty one where its files are missing
        raise UserError(
            f"language model {name!r} cannot be loaded: its tokenizer has {len(tokenizer)} tokens and the model "
            f"{words}: are the tokenizer's files there?"
        )
    if len(tokenizer) > words:
        raise UserError(
            f"language model {name!r}: its tokenizer has {len(tokenizer)} tokens and its embedding {words} rows: call "
            f"resize_token_embeddings({len(tokenizer)}) of the model, save it in a folder, and give that"
        )
    if bits is not None:
        keep_4bit_gradients(llm)
    kind = EncoderDecoderLM if config.is_encoder_decoder else DecoderLM
    return kind(llm, tokenizer, template, end)


def _set_exact_gelu(name: str, config: Any) -> None:
    if "dense_act_fn" not in config.to_dict():
        raise UserError(f"language.exact_gelu is for T5 models; {name!r} is a {config.model_type!r}")
    config.dense_act_fn = "gelu"  # FlanT5's own setting is gelu_new, the tanh approximation


def is_encoder_decoder(name: str) -> bool:
    """Which kind a language model is, from its configuration alone.

    Raises:
        UserError: there is no such model.
    """
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(locate(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"language model {name!r} cannot be loaded: {one_line(error)} (give a hub name, a directory or a wheel)"
        ) from error
    return getattr(config, "text_config", config).is_encoder_decoder
