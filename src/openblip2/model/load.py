"""Loads frozen models by name: from a hub, a directory, a wheel, or as part of a BLIP-2 model."""

import re
from pathlib import Path
from typing import Any

import torch

from openblip2.compat import keep_4bit_gradients, quiet_transformers
from openblip2.errors import UserError, one_line
from openblip2.model.language import DecoderLM, EncoderDecoderLM, LanguageModel
from openblip2.model.precision import load_in, loading, quantised_options, require_weights
from openblip2.model.template import PAPER_TEMPLATE
from openblip2.model.vision import CLIP_MEAN, CLIP_STD, HFVision, Triple, side_of
from openblip2.model.wheels import WHEELS, locate

BLIP2_PREFIX = "language_model."  # prefix of the language model's weights in a BLIP-2 of transformers
BLIP2_OTHERS = ("vision_model.", "qformer.", "query_tokens", "language_projection.")  # prefixes of the other parts


def load_language(
    name: str,
    template: str = PAPER_TEMPLATE,
    end: str | None = None,
    dtype: torch.dtype = torch.float32,
    bits: int | None = None,
    place: torch.device | None = None,
    exact_gelu: bool = False,
) -> LanguageModel:
    """Loads a frozen language model by hub name, directory, or wheel (`wheel:smollm2-135m-instruct`).

    Its configuration determines whether it is a decoder or an encoder-decoder. From a BLIP-2 of transformers, only the
    language model is read.

    Args:
        dtype: dtype of its weights.
        bits: 8 or 4 to quantise its linear layers; the other weights are in `dtype`.
        exact_gelu: the feed-forward layers of a T5 compute exact GELU instead of its tanh approximation.
        place: device of quantised weights, None = a GPU if there is one; other weights are on the CPU until moved.

    Raises:
        UserError: there is no such model, it is of neither kind, weights are missing or do not fit, or a package for
            quantisation is not installed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    options = {} if bits is None else quantised_options(bits, dtype, place)
    source = locate(name)
    with loading(f"language model {name!r}"):
        config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
        prefix = BLIP2_PREFIX if "qformer_config" in config.sub_configs else ""
        if prefix:
            config = config.text_config  # the configuration of the language model only
            options |= {"config": config, "key_mapping": {rf"^{re.escape(prefix)}": ""}}
        if exact_gelu:
            if "dense_act_fn" not in config.to_dict():
                raise UserError(f"language.exact_gelu is for T5 models; {name!r} is a {config.model_type!r}")
            config.dense_act_fn = "gelu"  # FlanT5's own setting is gelu_new, the tanh approximation
            options |= {"config": config}
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        loader: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        llm, report = load_in(loader, source, dtype, prefix, **options)
    require_weights(f"language model {name!r}", f"a {config.model_type!r}", report["missing_keys"])
    if prefix:
        unknown = sorted(key for key in report["unexpected_keys"] if not key.startswith(BLIP2_OTHERS))
        if unknown:
            raise UserError(
                f"language model {name!r}: {len(unknown)} keys do not belong to a {config.model_type!r}, "
                f"for example {BLIP2_PREFIX}{unknown[0]}"
            )
    words = llm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) < words // 2:  # transformers creates an empty one if its files are missing
        raise UserError(
            f"language model {name!r} cannot be loaded: its tokenizer has {len(tokenizer)} tokens and the model "
            f"{words}: check that the tokenizer's files are there"
        )
    if len(tokenizer) > words:
        raise UserError(
            f"language model {name!r}: its tokenizer has {len(tokenizer)} tokens, but its embedding has {words} rows: "
            f"call resize_token_embeddings({len(tokenizer)}) of the model, save it in a folder, and give that"
        )
    if bits is not None:
        keep_4bit_gradients(llm)
    kind = EncoderDecoderLM if config.is_encoder_decoder else DecoderLM
    return kind(llm, tokenizer, template, end)


def is_encoder_decoder(name: str) -> bool:
    """Whether a language model is an encoder-decoder, by its configuration; a `UserError` if there is no such model."""
    from transformers import AutoConfig

    with loading(f"language model {name!r}"):
        config: Any = AutoConfig.from_pretrained(locate(name), trust_remote_code=False)
    return getattr(config, "text_config", config).is_encoder_decoder


def load_vision(
    name: str, layer: int = -2, image_size: int | None = None, dtype: torch.dtype = torch.float32
) -> HFVision:
    """Loads a frozen image encoder; from a model with more parts (CLIP, SigLIP, BLIP-2), only the vision part.

    Args:
        name: a hub name, a directory, or a wheel ("wheel:dinov2-small").
        layer: hidden-state index, see `HFVision`.
        image_size: S in px; None = the side that the model's published preprocessing crops to, or, without one, the
            side for which its position embeddings were made.
        dtype: dtype of the weights and of the features.

    Raises:
        UserError: there is no such model, it is not an image encoder, its weights do not fit, or as for `HFVision`.
    """
    import transformers

    source, part = locate(name), f"image encoder {name!r}"
    config, part_of_larger = _vision_config(name, source)
    # The one vision model that AutoModel does not support; imported only if needed, because the import takes a second.
    own = config.model_type == "blip_2_vision_model"
    loader: Any = getattr(transformers, "Blip2VisionModel" if own else "AutoModel")
    prefix, mapping = ("vision_model.", {r"^vision_model\.": ""}) if part_of_larger else ("", None)
    with loading(part):
        encoder, report = load_in(loader, source, dtype, prefix, config=config, key_mapping=mapping)
    missing = (key for key in report["missing_keys"] if not key.startswith("pooler."))  # the pooler is never used
    require_weights(part, f"a {config.model_type!r}", missing)
    mean, std, published = _read_preprocessing(name, source)
    if image_size is None:
        image_size = published or side_of(encoder.config.image_size)
    return HFVision(encoder, layer, image_size, mean, std)


def last_useful_layer(name: str) -> int:
    """The layer to use: the second-to-last as in the paper; the last if an encoder has only one or was cut already.

    BLIP-2's own encoder is published without its last layer. Raises a `UserError` if there is no such encoder.
    """
    config, _ = _vision_config(name, locate(name))
    return -1 if config.model_type == "blip_2_vision_model" or config.num_hidden_layers == 1 else -2


def _vision_config(name: str, source: str) -> tuple[Any, bool]:
    """The configuration of the vision part, and whether it is part of a larger model."""
    from transformers import AutoConfig, Blip2VisionConfig

    from openblip2.model import encoders

    encoders.register()
    if Path(source).exists() and not Path(source, "config.json").is_file():
        raise UserError(f"image encoder {name!r} is not a model: give a directory with config.json and weights")
    try:
        with quiet_transformers():
            config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"image encoder {name!r} cannot be found: {one_line(error)} "
            f"(give a hub name, a directory, or one of {', '.join(WHEELS)})"
        ) from error
    part_of_larger = "vision_config" in config.sub_configs
    config = config.vision_config if part_of_larger else config
    if config.model_type == "instructblip_vision_model":  # the same encoder under another name, which AutoModel lacks
        config = Blip2VisionConfig(**{k: v for k, v in config.to_dict().items() if k != "model_type"})
    if not {"image_size", "patch_size", "num_hidden_layers"} <= config.to_dict().keys():
        raise UserError(f"image encoder {name!r} is a {config.model_type!r}: it must be a vision transformer")
    return config, part_of_larger


def _read_preprocessing(name: str, source: str) -> tuple[Triple, Triple, int | None]:
    """Mean, standard deviation and image side of the published preprocessing; CLIP's if a directory has none."""
    from transformers import ImageProcessingMixin

    files = ("preprocessor_config.json", "processor_config.json")
    if Path(source).is_dir() and not any(Path(source, file).is_file() for file in files):
        return CLIP_MEAN, CLIP_STD, None
    try:
        with quiet_transformers():
            fields, _ = ImageProcessingMixin.get_image_processor_dict(source)
        side = fields.get("crop_size") if fields.get("do_center_crop") else fields.get("size")
        side = None if side is None else side_of(side)
        if not fields.get("do_normalize", True):
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), side  # the encoder takes pixels in [0, 1]
        return tuple(fields["image_mean"]), tuple(fields["image_std"]), side
    except (OSError, KeyError, TypeError) as error:
        raise UserError(
            f"image encoder {name!r} has no usable image_mean and image_std in {files[0]}: {one_line(error)}"
        ) from error
