"""Finds a checkpoint by name, recognises its format from its files, and builds a model from it.

Frozen parts are loaded or passed by the caller; the connector is built from its sizes and filled with weights.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from openblip2.config import RunSettings, change
from openblip2.errors import UserError, one_line, refuse_lfs_pointer
from openblip2.hardware import compute_dtype
from openblip2.model.build import build_language, build_stage1, build_stage2, build_vision, with_parts
from openblip2.model.language import LanguageModel
from openblip2.model.load import last_useful_layer, load_vision
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2
from openblip2.model.vision import FrozenVision, frozen_vision
from openblip2.runs import read_json
from openblip2.train.parameters import fill_trained
from openblip2.weights.checkpoint import Checkpoint, Parts
from openblip2.weights.huggingface import load_tokenizer, read_huggingface
from openblip2.weights.lavis import read_lavis
from openblip2.weights.run import read_run

KINDS = "an openblip2 run, a LAVIS .pth file, or a folder or hub name of transformers' BLIP-2 or InstructBLIP"
LAVIS_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
# Files that may be downloaded from a hub: JSON, tokenizers, safetensors. No pickles, no code.
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jsonl"]


def read_checkpoint(source: str | Path, parts: Parts | None = None, revision: str | None = None) -> Checkpoint:
    """Reads an openblip2 run, a LAVIS `.pth`, or transformers' BLIP-2 or InstructBLIP, from a path or by its hub name.

    Args:
        parts: frozen parts that replace those that the source names.
        revision: branch, tag or commit on the hub.

    Raises:
        UserError: the source is none of these, or it cannot be read completely.
    """
    parts = parts or Parts()
    path = Path(source).expanduser()
    refuse_lfs_pointer(path)
    if path.is_file():
        if path.suffix not in LAVIS_SUFFIXES:
            raise UserError(f"{path} is not a run and does not end in {', '.join(LAVIS_SUFFIXES)}: give {KINDS}")
        return read_lavis(path, parts)
    if parts.vision_heads is not None:
        raise UserError(f"{source}: vision_heads is for a LAVIS .pth with an image encoder in it: leave it out")
    folder = path if path.is_dir() else fetch_repository(str(source), revision)
    if not (folder / "config.json").is_file():
        raise UserError(f"{source} is not a run (no config.json in it): give {KINDS}")
    config = read_json(folder / "config.json")
    if isinstance(config, dict) and {"settings", "sizes"} <= config.keys():
        return read_run(folder, parts)
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind in ("blip-2", "instructblip"):
        # A hub name also works on another machine; with a revision, only the folder identifies the weights.
        return read_huggingface(folder, str(folder if path.is_dir() or revision else source), parts)
    raise UserError(
        f"{source} is not a run (its config.json has model_type {kind!r}, another architecture): give {KINDS}"
    )


def fetch_repository(name: str, revision: str | None = None) -> Path:
    """The folder of a hub repository, downloaded if it is not on this machine; no pickles, no code.

    Raises:
        UserError: it is not on this machine and cannot be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{name} is not a run (no such file, folder or hub name): give {KINDS}")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise UserError(f"{name} is not on this machine and cannot be downloaded: {one_line(error)}") from error


def assemble(checkpoint: Checkpoint, place: torch.device, precision: str) -> tuple[Stage1 | Stage2, RunSettings]:
    """Builds the model in eval mode; returns it with its settings, which name the parts that it uses.

    Args:
        precision: as `train.precision`.

    Raises:
        UserError: a frozen part is not available or does not fit, or the tensors do not match the model.
    """
    checkpoint = replace(checkpoint, settings=change(checkpoint.settings, {"train.precision": precision}))
    dtype, trained = compute_dtype(place, precision), checkpoint.trained
    vision, checkpoint = find_vision(checkpoint, dtype)
    settings = checkpoint.settings
    if settings.stage == "stage1":
        model: Stage1 | Stage2 = build_stage1(settings, vision, checkpoint.sizes, writes="lm_head.bias" in trained)
        # transformers stores no temperature. Scores do not need it, and without ITG's head a model cannot be trained.
        trained = {"temperature": torch.tensor(settings.stage1.temperature), **trained}
    else:
        # The names of a connector's tensors begin with the connector's name.
        held = {name.partition(".")[0] for name in trained} - {"vision", "language", "projection"}
        if held and settings.connector.name not in held:
            raise UserError(
                f"{checkpoint.source} contains a connector {min(held)!r}, but the settings name "
                f"{settings.connector.name!r}: set connector.name in config.json to the one it was trained with"
            )
        language, checkpoint = find_language(checkpoint, dtype, place)
        settings = checkpoint.settings
        model = build_stage2(settings, vision, checkpoint.sizes, language=language)
    fill_trained(model, trained, checkpoint.source)
    return model.to(place).eval(), settings


def find_vision(checkpoint: Checkpoint, dtype: Any) -> tuple[FrozenVision, Checkpoint]:
    """The image encoder that was passed, is in the file or is named in the settings, and a checkpoint that names it.

    Args:
        dtype: of its weights if the settings do not define it; "auto": as in their file.
    """
    given, settings = checkpoint.parts.vision, checkpoint.settings
    if isinstance(given, str):
        vision: FrozenVision = load_vision(given, last_useful_layer(given), dtype=dtype)
    elif given is not None:
        vision = frozen_vision(given)
    elif checkpoint.tower is not None:
        vision = checkpoint.tower if dtype == "auto" else checkpoint.tower.to(dtype)
    else:
        vision = build_vision(settings, dtype)
    if checkpoint.whitening is not None:
        vision.whitening = checkpoint.whitening
    width = checkpoint.sizes.get("image_width") or _width(checkpoint, "qformer.image_norm.weight")
    if vision.width != width:
        name = settings.connector.name
        raise UserError(
            f"{checkpoint.source}: its connector {name!r} needs features of width {width}, but the image encoder "
            f"gives {vision.width}"
        )
    if given is not None:
        settings = with_parts(settings, vision)
        if isinstance(given, str):  # the name as given, because a wheel is loaded from a folder
            settings = replace(settings, vision=replace(settings.vision, name=given))
    return vision, replace(checkpoint, settings=settings)


def find_language(checkpoint: Checkpoint, dtype: Any, place: torch.device) -> tuple[LanguageModel, Checkpoint]:
    """The language model that was passed or is named in the settings, and a checkpoint that names it; see above."""
    given, settings = checkpoint.parts.language, checkpoint.settings
    if isinstance(given, LanguageModel):
        language: LanguageModel = given
        settings = with_parts(settings, language=language)
    else:
        if given is not None:
            settings = replace(settings, language=replace(settings.language, name=given))
        language = build_language(settings, dtype, place)
    width = _width(checkpoint, "projection.weight")
    if language.width != width:
        raise UserError(
            f"{checkpoint.source}: its projection needs a language model of width {width}, not {language.width}"
        )
    return language, replace(checkpoint, settings=settings)


def _width(checkpoint: Checkpoint, name: str) -> int:
    if name not in checkpoint.trained:
        raise UserError(f"{checkpoint.source} does not fit this model: missing: {name}")
    return len(checkpoint.trained[name])


def find_tokenizer(checkpoint: Checkpoint) -> Any:
    """The Q-Former's tokenizer: the one that was passed, or the source's.

    Raises:
        UserError: no tokenizer is found.
    """
    given = checkpoint.parts.tokenizer
    if given is not None and not isinstance(given, str | Path):
        return given
    advice = "give the one that the Q-Former was trained with as tokenizer="
    return load_tokenizer(str(given or checkpoint.tokenizer), advice)
