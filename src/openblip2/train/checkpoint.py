"""Runs on disk. Nothing is pickled: weights and optimizer moments are safetensors, the rest is JSON.

RUN/config.json          the resolved settings, with the versions that made it
RUN/model.safetensors    the trained parts, by name (the frozen ones are named in config.json), adapters among them
RUN/whitening.safetensors  what the frozen features are whitened by, if they are
RUN/tokenizer/           the Q-Former's tokenizer, where it reads text
RUN/trained_on.txt       which pictures it was trained on (data/trained_on.py)
RUN/log.jsonl            one line for each step and each validation
RUN/resume/              the last checkpoints of an unfinished run (train/resume.py)
"""

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openblip2.config import RunSettings, to_dict
from openblip2.distributed.collectives import is_first
from openblip2.distributed.full_tensor import fill, full_tensor
from openblip2.errors import UserError
from openblip2.model.whitening import Whitening

# Parts that had another name when a run wrote its weights: old name -> today's.
RENAMED = {
    "qformer.words.": "qformer.word_embeddings.",
    "image_head.": "vision_proj.",
    "text_head.": "text_proj.",
    "match_head.": "itm_head.",
    "word_head.": "lm_head.",
}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; a tied one stands once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def kept_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a run keeps, by name: those that train, and all of the Q-Former.

    What adapters (LoRA) freeze in the Q-Former is nowhere else; other frozen parts are where config.json says.
    """
    return {n: p for n, p in model.named_parameters() if p.requires_grad or n.startswith("qformer.")}


def save_trained(model: nn.Module, path: Path) -> None:
    """Writes the kept parameters to one safetensors file, under a temporary name first.

    All processes of a run must call: parameters in pieces are gathered one by one; the first process writes.
    """
    weights = {}
    for name, parameter in kept_parameters(model).items():
        whole = full_tensor(parameter).cpu().contiguous()
        if is_first():
            weights[name] = whole
    if is_first():
        write_tensors(weights, path)


def load_trained(model: nn.Module, path: Path) -> None:
    """Fills the kept parameters from a file, strictly: the same names and shapes on both sides.

    Raises:
        UserError: the file is missing or damaged, or holds other names or shapes; they are listed.
    """
    fill_trained(model, read_tensors(path), str(path))


def fill_trained(model: nn.Module, found: Mapping[str, Tensor], source: str) -> None:
    """Fills the kept parameters from tensors, strictly: the same names and shapes on both sides.

    Raises:
        UserError: `source` holds other names or shapes; they are listed.
    """
    wanted = kept_parameters(model)
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or extra:
        raise UserError(
            f"{source} does not fit this model: {_some('missing', missing)}{_some('unexpected', extra)}"
            "the run's config.json must describe the model that was trained"
        )
    for name, parameter in wanted.items():
        if found[name].shape != parameter.shape:
            raise UserError(
                f"{source} does not fit this model: {name} has shape {list(found[name].shape)}, "
                f"the model wants {list(parameter.shape)}"
            )
        fill(parameter, found[name])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; names in `RENAMED` are given as today's.

    Raises:
        UserError: no such file, or not a whole safetensors file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; a run holds model.safetensors (has its training finished?)")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); it may be truncated") from error
    for old, new in RENAMED.items():
        tensors = {new + name[len(old) :] if name.startswith(old) else name: part for name, part in tensors.items()}
    return tensors


def save_whitening(whitening: Whitening, run: Path) -> None:
    """Writes `RUN/whitening.safetensors`."""
    write_tensors({"mean": whitening.mean.cpu(), "matrix": whitening.matrix.cpu()}, run / "whitening.safetensors")


def read_whitening(run: Path) -> Whitening:
    """The whitening that a run was trained behind.

    Raises:
        UserError: it has none, or a damaged one.
    """
    found = read_tensors(run / "whitening.safetensors")
    if found.keys() != {"mean", "matrix"}:
        raise UserError(f"{run / 'whitening.safetensors'}: holds {sorted(found)}, not mean and matrix")
    return Whitening(found["mean"], found["matrix"])


def write_json(values: Any, path: Path) -> None:
    """Writes JSON under a temporary name and renames it, so that nobody reads half a file."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _put(fresh, path)


def make_folder(folder: Path) -> None:
    """Makes a folder to write to, with those above it, unless it is there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): give a folder that can be written to") from error


def require_absent(path: Path, overwrite: bool) -> None:
    """A result that exists is only replaced where the user asks for it; else, a `UserError`."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already: give another --out, or add --overwrite to replace it")


def write_config(run: Path, settings: RunSettings, sizes: Mapping[str, int]) -> None:
    """`config.json`: the resolved settings, the sizes read off the checkpoints, and the versions."""
    import transformers

    from openblip2 import __version__

    write_json(
        {
            "settings": to_dict(settings),
            "sizes": dict(sizes),
            "versions": {
                "openblip2": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        },
        run / "config.json",
    )


def read_config(run: Path) -> dict[str, Any]:
    """What `RUN/config.json` holds: at least `settings` and `sizes`.

    Raises:
        UserError: it is not a run, or sizes in it are none that a Q-Former can have.
    """
    wanted = "give the folder that `openblip2 train ... --out FOLDER` wrote"
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is not a run: {wanted}")
    saved = read_json(run / "config.json")
    if not isinstance(saved, dict) or not {"settings", "sizes"} <= saved.keys():
        raise UserError(f"{run} is not a run (its config.json is another program's): {wanted}")
    _check_sizes(saved["sizes"], run / "config.json")
    return saved


def _check_sizes(sizes: Any, path: Path) -> None:
    names = ("width", "layers", "heads", "ffn", "vocabulary", "positions")
    if not isinstance(sizes, dict) or sizes.keys() != set(names):
        raise UserError(f"{path}: sizes must name {', '.join(names)}")
    for name, size in sizes.items():
        least = 0 if name == "vocabulary" else 1  # stage 2 has no text path
        if type(size) is not int or size < least:
            raise UserError(f"{path}: sizes.{name} is {size!r}: it must be a whole number, {least} or more")
    if sizes["width"] % sizes["heads"]:
        raise UserError(f"{path}: width {sizes['width']} is not a multiple of {sizes['heads']} heads")


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        UserError: no such file, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes one safetensors file under a temporary name and renames it."""
    fresh = path.with_name(path.name + ".new")
    save_file(tensors, fresh)
    _put(fresh, path)


def sync(path: Path) -> None:
    """Sees to it that a file, or a folder's list of names, is on the disk and outlives a power cut."""
    if path.is_dir() and os.name != "posix":
        return  # elsewhere a folder cannot be opened
    file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _put(fresh: Path, path: Path) -> None:
    sync(fresh)  # a name must not be on the disk before what it names
    os.replace(fresh, path)
    sync(path.parent)


def _some(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{what}: {', '.join(names[:4])}{more}; " if names else ""
