"""The captioner and the ranker: identified without loading them, and loaded."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from openblip2.capfilt.how import How, digest
from openblip2.capfilt.rankers import ClipRanker, RunRanker
from openblip2.config import to_dict
from openblip2.errors import UserError
from openblip2.inference.captioner import Captioner
from openblip2.inference.load import load
from openblip2.inference.matcher import Matcher
from openblip2.runs import read_json
from openblip2.weights.checkpoint import Checkpoint
from openblip2.weights.source import LAVIS_SUFFIXES, fetch, read_checkpoint

Ranker = RunRanker | ClipRanker
_WEIGHTS = (".json", ".safetensors", ".txt", ".model")


class Models(NamedTuple):
    """The names of both as the user gives them; captioner None: no captions are generated."""

    captioner: str | None
    ranker: str


def digests(models: Models, how: How) -> tuple[str | None, str]:
    """Digests of captioner and ranker: their weights and everything else that their results depend on.

    Raises:
        UserError: one does not exist, is of the wrong kind, or cannot do what the settings require.
    """
    captioner = None if models.captioner is None else _captioner(models.captioner)
    if not _is_run(models.ranker):
        if how.filter == "itm":
            raise UserError(f"--ranker {models.ranker} is no run of ours: --filter itm needs a stage-1 run")
        if not {"text_config", "vision_config"} <= read_json(_folder(models.ranker) / "config.json").keys():
            raise UserError(
                f"--ranker {models.ranker} does not compare pictures with texts: give a stage-1 run or a CLIP"
            )
        return captioner, _of_files(_folder(models.ranker))
    checkpoint = read_checkpoint(models.ranker)
    if checkpoint.settings.stage != "stage1":
        raise UserError(f"--ranker {models.ranker} is a stage-2 run, which cannot rank; give a stage-1 run or a CLIP")
    return captioner, _of_checkpoint(checkpoint)


def open_models(models: Models, how: How) -> tuple[Captioner | None, Ranker]:
    """Loads both, on a GPU if there is one.

    Raises:
        UserError: as `digests`, or a part cannot be loaded.
    """
    captioner = None if models.captioner is None else load(models.captioner)
    assert captioner is None or isinstance(captioner, Captioner)  # checked by `digests`
    if not _is_run(models.ranker):
        return captioner, ClipRanker(_folder(models.ranker))
    matcher = load(models.ranker)
    assert isinstance(matcher, Matcher)
    return captioner, RunRanker(matcher, how.filter == "itm")


def _captioner(name: str) -> str:
    checkpoint = read_checkpoint(name)
    if checkpoint.settings.stage == "stage1":
        raise UserError(f"--captioner {name} is a stage-1 run, which cannot write text; give a stage-2 run")
    if checkpoint.settings.qformer.question_in_qformer:
        raise UserError(f"--captioner {name} answers questions, which its Q-Former reads; give a run for captions")
    return _of_checkpoint(checkpoint)


def _folder(name: str) -> Path:
    path = Path(name).expanduser()
    return path if path.exists() else fetch(name)


def _is_run(name: str) -> bool:
    """Whether `read_checkpoint` reads it. If not, it may be a CLIP.

    Raises:
        UserError: it does not exist, or it contains no model.
    """
    folder = _folder(name)
    if folder.is_file():
        if folder.suffix not in LAVIS_SUFFIXES:
            raise UserError(f"{name} is no model: give a stage-1 run, or the folder of a CLIP")
        return True
    if not (folder / "config.json").is_file():
        raise UserError(f"{name} is no model (no config.json in it): give a stage-1 run, or the folder of a CLIP")
    config = read_json(folder / "config.json")
    return isinstance(config, dict) and ("settings" in config or config.get("model_type") == "blip-2")


def _of_checkpoint(checkpoint: Checkpoint) -> str:
    settings = to_dict(checkpoint.settings)
    parts = {part: dict(settings[part]) for part in ("vision", "language")}
    for part in parts.values():
        if Path(part["name"]).is_dir():  # by its content, wherever it is
            part["name"] = _of_files(Path(part["name"]))
    if checkpoint.settings.stage == "stage1":
        parts.pop("language")
    whitening = checkpoint.whitening
    return digest(
        {
            **parts,
            "stage": settings["stage"],
            "sizes": dict(checkpoint.sizes),
            **({"connector": settings["connector"]} if checkpoint.settings.connector.name != "qformer" else {}),
            "longest": settings["data"]["max_tokens"],
            "precision": settings["train"]["precision"],
            "trained": _of_tensors(checkpoint.trained),
            "tower": _of_tensors(checkpoint.tower.state_dict()) if checkpoint.tower else None,
            "whitening": _of_tensors({"mean": whitening.mean, "matrix": whitening.matrix}) if whitening else None,
        }
    )


def _of_tensors(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _of_files(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS):
        found.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()
