"""Checkpoints of an unfinished run, from which it goes on with the same steps that it would have taken.

RUN/resume/step-00000123/      one of the last `train.keep_checkpoints`
    model.safetensors          the kept parameters, whole and by name, however many processes there were
    optimizer.safetensors      the optimizer's moments, by parameter and name
    progress.json              `Done`: how far the run is
    manifest.json              bytes and SHA-256 of each file; written last

A folder gets its name when all of it is on the disk: one under another name was never finished. No state of a random
generator, sampler or scheduler is in it, for they have none: a run's draws are functions of (seed, number of the
batch), its learning rate one of the step.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from openblip2.config import RunSettings
from openblip2.distributed.collectives import is_first
from openblip2.distributed.data_parallel import full_tensor, like
from openblip2.distributed.launch import from_first, wait_for_all
from openblip2.errors import UserError, one_line
from openblip2.runs import (
    atomic_write,
    read_config,
    read_json,
    read_settings,
    read_tensors,
    write_json,
    write_tensors,
)
from openblip2.train.parameters import load_trained, save_trained, trained_parameters

# Settings of `train` that may change when a run goes on. They say how steps are computed and saved; none of them
# changes the result of a step, except by rounding.
MAY_CHANGE = (
    "parallel",
    "checkpoint_activations",
    "validate_every",
    "checkpoint_every",
    "keep_checkpoints",
    "most_bad_steps",
    "track",
)
FORMAT = 2  # 1: before batches were drawn from texts of all lengths, so that batch n is another one
_NAME = re.compile(r"step-(\d{8,})")
_MANIFEST = "manifest.json"
_FILES = {"model.safetensors", "optimizer.safetensors", "progress.json"}


@dataclass(frozen=True)
class Done:
    """How far a run is: steps, batches drawn (the sampler's whole position), and `bad_*`: see `train/bookkeeping.py`.

    `data`: the digest of what it is trained on (`train/bookkeeping.py`); "" in checkpoints of older versions.
    """

    step: int = 0
    batches: int = 0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    data: str = ""


def write_checkpoint(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, done: Done, keep: int) -> None:
    """Writes a checkpoint and removes all but the last `keep`. All processes must call; the first one writes.

    Raises:
        UserError: it cannot be written, for want of room, say; the last one is untouched.
    """
    final = run / "resume" / f"step-{done.step:08}"
    try:
        with atomic_write(final) if is_first() else nullcontext(final) as folder:
            if is_first():
                folder.mkdir(parents=True)
            # All processes: parameters in pieces (FSDP2) are gathered. Only the first one writes.
            save_trained(model, folder / "model.safetensors")
            moments = _moments(model, optimizer)
            if is_first():
                write_tensors(moments, folder / "optimizer.safetensors")
                write_json(asdict(done), folder / "progress.json")
                files = {path.name: _digest(path) for path in sorted(folder.iterdir())}
                write_json({"format": FORMAT, "step": done.step, "files": files}, folder / _MANIFEST)
        # Older checkpoints go only when the new one is on the disk.
        if is_first():
            keep_last(run, keep)
            for path in final.parent.glob("step-*.damaged"):
                shutil.rmtree(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{final}: the checkpoint of step {done.step} cannot be written ({one_line(error)}); the one before it is "
            "whole: make room, and go on with --resume"
        ) from error
    # No process may end the run, or the scheduler its job, before the checkpoint is there.
    wait_for_all()


def find_checkpoint(run: Path, say: Callable[[str], object]) -> Path | None:
    """The last checkpoint that is as it was written, or None where there is none. All processes must call.

    What was never finished is removed. A damaged checkpoint is named, put aside as `step-00000123.damaged`, and the one
    before it is taken.

    Raises:
        UserError: there are checkpoints, and not one of them is whole; or they are of another version.
    """
    # The first process decides for all: on a network disk they may not see the same files yet.
    step = from_first(_find(run / "resume", say) if is_first() else -1)
    return None if step < 0 else run / "resume" / f"step-{step:08}"


def restore_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Done:
    """Puts model and optimizer back where `write_checkpoint` found them. Every process reads the whole.

    Raises:
        UserError: it does not fit the model.
    """
    load_trained(model, folder / "model.safetensors")  # strict: a wrong checkpoint ends here
    parameters = trained_parameters(model)
    for key, value in read_tensors(folder / "optimizer.safetensors").items():
        name, _, part = key.rpartition(":")
        if name not in parameters:
            raise UserError(f"{folder / 'optimizer.safetensors'}: {name} is not trained by this model")
        target = parameters[name]
        # Moments are as large as their parameter and in the same pieces; `step` is one number.
        optimizer.state[target][part] = like(target, value) if part != "step" else value.to(target.device)
    return Done(**read_json(folder / "progress.json"))


def forget_checkpoints(run: Path) -> None:
    """Removes the weights and checkpoints that an older run left in the folder of one that begins."""
    # A run with model.safetensors is finished: --resume would not train.
    if is_first():
        for name in ("model.safetensors", "bad_batch.json"):
            (run / name).unlink(missing_ok=True)
        if (run / "resume").exists():
            shutil.rmtree(_aside(run / "resume", "old"))


def keep_last(run: Path, keep: int) -> None:
    """Removes all but the last `keep` checkpoints. The first process does."""
    if is_first():
        for path in list(_steps(run / "resume").values())[:-keep]:
            shutil.rmtree(_aside(path, "old"))


def require_new(run: Path, overwrite: bool) -> None:
    """Checks that a training that begins in this folder destroys no earlier work.

    Args:
        run: The output folder, which need not exist.
        overwrite: Whether a run in the folder may be replaced.

    Raises:
        UserError: The folder holds a run and `overwrite` is False, or it holds another program's model.
    """
    finished, begun = (run / "model.safetensors").exists(), bool(_steps(run / "resume"))
    # Not even with --overwrite: another program's model has the same file names.
    if finished or (run / "config.json").exists():
        try:
            read_config(run)
        except UserError as error:
            raise UserError(f"{run} holds files that are not of a run: give another --out") from error
    # A run writes these after its config.json.
    elif foreign := [name for name in ("log.jsonl", "tokenizer") if (run / name).exists()]:
        raise UserError(f"{run} holds {foreign[0]}, which is not of a run: give another --out")
    if finished and not overwrite:
        raise UserError(f"{run} holds a finished run: give another --out, or add --overwrite to replace it")
    if begun and not overwrite:
        raise UserError(
            f"{run} holds a checkpoint of an unfinished run: add --resume to continue it, give another --out, or add "
            "--overwrite to begin again"
        )


def require_same(settings: RunSettings, run: Path, last: Path | None, data: str) -> None:
    """Whether a run may go on from its checkpoint `last` with these settings, and with data of this digest.

    Raises:
        UserError: it was begun with others, which say what its steps are.
    """
    # Batches are drawn by number: with one picture more or less, all later steps would be others.
    then = read_json(last / "progress.json").get("data", "") if last else ""
    if then not in ("", data):
        raise UserError(
            f"--resume: the data have changed since {run} was begun ({then} then; {data} now): give the same pictures "
            "and captions, or a new --out"
        )
    before = read_settings(run)
    # Compared with the new values of what may change.
    same = {name: getattr(settings.train, name) for name in MAY_CHANGE}
    then, now = asdict(replace(before, train=replace(before.train, **same))), asdict(settings)
    if then != now:
        parts = [name for name in now if isinstance(now[name], dict)]
        other = [f"{part}.{name}" for part in parts for name in now[part] if now[part][name] != then[part][name]]
        other += [name for name in now if name not in parts and now[name] != then[name]]
        raise UserError(
            f"--resume: {run / 'config.json'} was trained with other settings ({', '.join(other)}); give the same "
            f"ones, or a new --out (only {', '.join(f'train.{name}' for name in MAY_CHANGE)} may change)"
        )


def _find(folder: Path, say: Callable[[str], object]) -> int:
    """The step of the last whole checkpoint; -1 = there is none."""
    if (folder / "progress.json").exists():
        raise UserError(
            f"{folder} holds a checkpoint of an older openblip2, without a manifest: finish the run with that one, or "
            "begin again with --overwrite"
        )
    # What a killed process was still writing or removing.
    for left in [*folder.parent.glob("resume.old"), *folder.glob("*step-*.new"), *folder.glob("step-*.old")]:
        shutil.rmtree(left)
    damaged: dict[Path, str] = {}  # and why
    # The latest first: usually it is whole, and no other has to be read.
    for step, path in reversed(_steps(folder).items()):
        problem = _problem(path)
        if problem is None:
            for other, its in damaged.items():
                say(f"{other} is damaged ({its}): it is put aside and {path.name} is taken")
                _aside(other, "damaged")
            return step
        damaged[path] = problem
    if damaged:
        path, problem = next(iter(damaged.items()))
        raise UserError(
            f"{path} is damaged ({problem}), and no checkpoint before it is whole: begin again with --overwrite"
        )
    return -1


def _steps(folder: Path) -> dict[int, Path]:
    """The finished checkpoints by step, the oldest first."""
    if not folder.is_dir():
        return {}
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in named if match))


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = read_json(folder / _MANIFEST)
    except UserError as error:
        return str(error)
    if not isinstance(manifest, dict) or not isinstance(files := manifest.get("files"), dict):
        return f"{_MANIFEST} names no files"
    if manifest.get("format") != FORMAT:
        # Not damaged: it must not be put aside, the version that wrote it can go on from it.
        raise UserError(
            f"{folder / _MANIFEST}: format {manifest.get('format')!r}, this openblip2 reads {FORMAT}; go on with the "
            "version that wrote it"
        )
    if files.keys() != _FILES:
        return f"{_MANIFEST} names {', '.join(sorted(files))}"
    for name, written in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _digest(folder / name) != written:
            return f"{name} is not as it was written"
    return None


def _aside(path: Path, why: str) -> Path:
    """Renames a folder before it is removed, so that one that is half removed is not taken for a whole one."""
    other = path.with_name(f"{path.name}.{why}")
    if other.exists():
        shutil.rmtree(other)
    return path.rename(other)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state by "parameter:name"; empty but in the first process, which gathers them one by one."""
    moments = {}
    for name, parameter in trained_parameters(model).items():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            # One by one, and dropped at once in the other processes: all moments are twice as large as what trains.
            full = full_tensor(value).cpu().contiguous()
            if is_first():
                moments[f"{name}:{key}"] = full
    return moments
