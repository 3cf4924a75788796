"""Reads and writes the authors' checkpoints (LAVIS `.pth`), a dict whose `model` holds only the trained parameters.

All names may start with a common prefix, which DistributedDataParallel, `torch.compile` or a LightningModule adds.
A file never contains the language model, and the image encoder only if it was fine-tuned. Only tensors and plain
values are unpickled.
"""

import math
import pickle
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from openblip2.compat import log
from openblip2.config import LanguageSettings, RunSettings, VisionSettings
from openblip2.errors import UserError, one_line
from openblip2.model.vision import HFVision
from openblip2.presets import FLANT5_XL, FLANT5_XXL, OPT_2_7B, OPT_6_7B, VIT_G, VIT_L
from openblip2.runs import atomic_write
from openblip2.weights.checkpoint import LAVIS, OURS, TOWER, Checkpoint, Parts, describe, listed, rename

TOWER_PREFIX = "visual_encoder."
EVA_WIDTH, EVA_HEADS = 1408, 16  # of ViT-g; the tensors do not show how many heads there are
EVA_EPS = 1e-6

# Tensors of such a file that are not used, and why.
LEFT_OUT = {
    "Qformer.bert.embeddings.position_ids": "a buffer: 0, 1, 2, ...",
    "Qformer.cls.predictions.decoder.weight": "tied to the word embeddings, checked to be equal",
    "Qformer.cls.predictions.decoder.bias": "the same as Qformer.cls.predictions.bias, checked to be equal",
}
_TIED = {
    "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
}

# The frozen parts that the paper's checkpoints were trained with, by the width at which the Q-Former is connected.
_ENCODERS: dict[int, VisionSettings] = {1408: VIT_G, 1024: VIT_L}
_LANGUAGE_MODELS: dict[tuple[str, int], LanguageSettings] = {
    ("opt_proj", 2560): OPT_2_7B,
    ("opt_proj", 4096): OPT_6_7B,
    ("t5_proj", 2048): FLANT5_XL,
    ("t5_proj", 4096): FLANT5_XXL,
}


def read_lavis(path: Path, parts: Parts) -> Checkpoint:
    """Reads a LAVIS checkpoint: stage 1, stage 2 with OPT or FlanT5, or a model fine-tuned from them.

    Raises:
        UserError: the file is damaged, contains code, has another architecture or unknown keys, or its frozen parts
            are unknown (`vision=` and `language=` name them).
    """
    model = _read_model(path)
    tower = {name: model.pop(name) for name in list(model) if name.startswith(TOWER_PREFIX)}
    for tied, to in _TIED.items():
        if tied in model and (to not in model or not torch.equal(model[tied], model[to])):
            raise UserError(f"{path}: {tied} is not equal to {to}: openblip2 needs a tied word head")
    left_out = [f"{name}: {why}" for name, why in LEFT_OUT.items() if name in model]
    names, unknown = rename((name for name in model if name not in LEFT_OUT), LAVIS, OURS)
    if "qformer.queries" not in names:
        raise UserError(
            f"{path}: no query_tokens in it: this is not a BLIP-2 of LAVIS (it contains {listed(list(model), 3)})"
        )
    if unknown:
        raise UserError(f"{path}: {len(unknown)} keys do not belong to BLIP-2: {listed(unknown)}")
    trained = {ours: model[theirs] for ours, theirs in names.items()}
    settings = _settings(path, model, trained, bool(tower), parts)
    of_text = ("qformer.word_embeddings.", "qformer.positions.")
    text = [name for name in trained if name.startswith(of_text) or ".text_" in name]
    if text and settings.stage == "stage2":
        left_out.append(f"the text path of the Q-Former, {len(text)} tensors: stage 2 does not read it")
        trained = {name: tensor for name, tensor in trained.items() if name not in text}
    settings, sizes = describe(trained, settings, parts.heads, str(path), LAVIS)
    encoder = None
    if parts.vision_heads is not None and not tower:
        raise UserError(f"{path}: vision_heads is given, but there is no image encoder in it: leave it out")
    if tower:
        encoder = _build_tower(path, tower, trained, parts.vision_heads)
        settings = replace(settings, vision=replace(settings.vision, layer=-1, image_size=encoder.image_size))
    return Checkpoint(
        source=str(path),
        settings=settings,
        sizes=sizes,
        trained=trained,
        tower=encoder,
        parts=parts,
        tokenizer=settings.qformer.start if settings.stage == "stage1" else None,
        carries=frozenset({"vision"} if tower else ()),
        left_out=tuple(left_out),
    )


def write_lavis(checkpoint: Checkpoint, tower: HFVision | None, to_t5: bool, out: Path) -> list[str]:
    """Writes the `.pth` file `out`; returns one line for each thing that it cannot store or that reading left out.

    Args:
        tower: the image encoder, if the file should contain it.
        to_t5: whether the language model is an encoder-decoder.
    """
    if checkpoint.settings.vision.whiten:
        raise UserError(
            "a LAVIS file cannot store the whitening of the image features (vision.whiten), which the model needs"
        )
    names, without = rename(checkpoint.trained, OURS, LAVIS)
    model = {name: checkpoint.trained[ours].detach().contiguous() for name, ours in names.items()}
    if to_t5:
        model = {re.sub("^opt_proj", "t5_proj", name): tensor for name, tensor in model.items()}
    for tied, to in _TIED.items():
        if "Qformer.cls.predictions.bias" in model:
            model[tied] = model[to]
    if (positions := model.get("Qformer.bert.embeddings.position_embeddings.weight")) is not None:
        model["Qformer.bert.embeddings.position_ids"] = torch.arange(len(positions))[None]
    notes = [f"{part}: LAVIS cannot store it" for part in without]
    if "temperature" not in checkpoint.trained and checkpoint.settings.stage == "stage1":
        notes.append("the source had no temperature and no ITG head: they are not in the file either")
    if checkpoint.settings.stage == "stage2":
        notes.append(f"the language model, {checkpoint.settings.language.name}: LAVIS files never contain it")
    if tower is None:
        notes.append(
            f"the image encoder, {checkpoint.settings.vision.name}: LAVIS files contain it only if it was trained"
        )
    else:
        model |= _tower_as_lavis(tower)
        config: Any = tower.encoder.config
        if (config.hidden_size, config.num_attention_heads) != (EVA_WIDTH, EVA_HEADS):
            notes.append(
                f"the image encoder's {config.num_attention_heads} attention heads: LAVIS files do not say how many "
                f"there are; load it with vision_heads={config.num_attention_heads}"
            )
    try:
        with atomic_write(out) as draft:
            torch.save({"model": model}, draft)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{out} cannot be written: {one_line(error)}") from error
    # Some tensors that reading left out are written here, so they are not reported as left out.
    return [line for line in checkpoint.left_out if line.partition(":")[0] not in model] + notes


def projection_name(language: str) -> str | None:
    """LAVIS' name of the projection to one of the paper's language models; None for other models."""
    return next((name for (name, _), model in _LANGUAGE_MODELS.items() if model.name == language), None)


def _read_model(path: Path) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals([Namespace]):  # plain values, in which many trainers store settings
            # torch's older format is not a zip file, and cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        named = f" ({code[1]})" if code else ""
        raise UserError(
            f"{path}: it contains more than tensors{named}, and openblip2 never runs code from a file; save "
            "only model.state_dict()"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a complete {path.suffix} file: {one_line(error)}; it may be truncated") from error
    inside = content if isinstance(content, Mapping) else {}
    model = next((inside[key] for key in ("model", "state_dict") if key in inside), content)
    if not isinstance(model, Mapping) or not all(isinstance(value, Tensor) for value in model.values()):
        raise UserError(
            f"{path}: not a BLIP-2 of LAVIS: it must be a dict with tensors by name under 'model' or 'state_dict'"
        )
    return _without_prefix(path, dict(model))


def _without_prefix(path: Path, model: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the prefix that all their names share, such as `module.` or `model._orig_mod.`."""
    prefix = next((name.removesuffix("query_tokens") for name in model if name.endswith(".query_tokens")), "")
    if not prefix or not all(name.startswith(prefix) for name in model):
        return model
    log.warning("openblip2: %s: all names begin with %r, which is removed", path, prefix)
    return {name.removeprefix(prefix): tensor for name, tensor in model.items()}


def _settings(
    path: Path, model: Mapping[str, Tensor], trained: Mapping[str, Tensor], with_tower: bool, parts: Parts
) -> RunSettings:
    """The stage and frozen parts of a file; parts passed by the user take precedence over those of the paper."""
    width = len(trained.get("qformer.image_norm.weight", ()))
    if width not in _ENCODERS and parts.vision is None and not with_tower:
        raise UserError(f"{path}: its image encoder (width {width}) is not one of the paper's: give it with vision=")
    settings = RunSettings(vision=_ENCODERS.get(width, VIT_G))
    projection = next((name for name in ("opt_proj", "t5_proj") if f"{name}.weight" in model), None)
    if projection is None:
        return settings
    width = len(model[f"{projection}.weight"])
    language = _LANGUAGE_MODELS.get((projection, width))
    if language is None and parts.language is None:
        raise UserError(f"{path}: its language model (width {width}) is not one of the paper's: give it with language=")
    default = OPT_2_7B if projection == "opt_proj" else FLANT5_XL
    return replace(settings, stage="stage2", language=language or default)


def _build_tower(path: Path, tower: Mapping[str, Tensor], trained: Mapping[str, Tensor], heads: int | None) -> HFVision:
    """Builds `Blip2VisionModel` from `visual_encoder.*`; it uses the file's own tensors."""
    from transformers import Blip2VisionConfig, Blip2VisionModel

    plain = {name.removeprefix(TOWER_PREFIX): tensor for name, tensor in tower.items()}
    biases = {name: plain.pop(name) for name in list(plain) if name.endswith((".q_bias", ".v_bias"))}
    names, unknown = rename(plain, LAVIS, OURS, TOWER)
    if unknown:
        raise UserError(
            f"{path}: the image encoder in it is not EVA-CLIP, the only one supported in LAVIS files: "
            f"{listed([TOWER_PREFIX + name for name in unknown])}"
        )
    width = len(trained["qformer.image_norm.weight"])
    heads = EVA_HEADS if heads is None and width == EVA_WIDTH else heads or 0
    if heads < 1 or width % heads:
        raise UserError(
            f"{path}: its image encoder is {width} wide, and no tensor says how many attention heads it has: give "
            f"vision_heads (--vision-heads of convert), a divisor of {width}"
        )
    tensors = {ours: plain[theirs] for ours, theirs in names.items()}
    for part in ("weight", "bias"):  # transformers stores it in the encoder, where openblip2 does not use it
        tensors[f"post_layernorm.{part}"] = trained[f"qformer.image_norm.{part}"]
    try:
        for block in {name.rpartition(".")[0] for name in biases}:
            query, value = biases[f"{block}.q_bias"], biases[f"{block}.v_bias"]
            number = block.split(".")[1]
            tensors[f"encoder.layers.{number}.self_attn.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
        patch, positions = tensors["embeddings.patch_embedding.weight"], tensors["embeddings.position_embedding"]
        config: Any = Blip2VisionConfig(
            hidden_size=width,
            patch_size=patch.shape[-1],
            image_size=math.isqrt(positions.shape[1] - 1) * patch.shape[-1],
            intermediate_size=tensors["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=sum(name.endswith(".layer_norm1.weight") for name in tensors),
            num_attention_heads=heads,
            layer_norm_eps=EVA_EPS,
        )
        with torch.device("meta"):
            encoder = Blip2VisionModel(config)
        encoder.load_state_dict(tensors, assign=True)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: its image encoder ({TOWER_PREFIX}*) is not complete: {reason[:200]}") from error
    return HFVision(encoder, layer=-1, image_size=config.image_size)


def _tower_as_lavis(tower: HFVision) -> dict[str, Tensor]:
    tensors = dict(tower.encoder.state_dict())
    found: dict[str, Tensor] = {}
    for name in [name for name in tensors if name.endswith("qkv.bias")]:
        query, key, value = tensors.pop(name).chunk(3)
        if key.any():
            raise UserError(f"the image encoder's {name} has a bias for keys, which LAVIS' EVA-CLIP does not have")
        block = f"{TOWER_PREFIX}blocks.{name.split('.')[2]}.attn."
        found |= {block + "q_bias": query.contiguous(), block + "v_bias": value.contiguous()}
    names, without = rename(tensors, OURS, LAVIS, TOWER)
    assert set(without) == {"post_layernorm.weight", "post_layernorm.bias"}, without
    return found | {TOWER_PREFIX + theirs: tensors[ours].contiguous() for theirs, ours in names.items()}
