"""Checkpoints of an unfinished run, from which it continues with the same steps as without an interruption.

RUN/resume/step-00000123/      one of the last `train.keep_checkpoints`
    model.safetensors          the saved parameters by name, not sharded, for any number of processes
    optimizer.safetensors      the optimizer's moments, by parameter and name
    progress.json              `Done`: the progress of the run
    manifest.json              size and SHA-256 of each file; written last

A folder gets its name only after all of it is on the disk, so a folder with another name is incomplete. A checkpoint
contains no state of a random generator, sampler or scheduler, because they have none: random draws are functions of
(seed, batch number), and the learning rate is a function of the step.
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
from torch import nn

from openblip2.config import RunSettings
from openblip2.distributed.collectives import is_first
from openblip2.distributed.data_parallel import full_tensor, like
from openblip2.distributed.launch import from_all, wait_for_all
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
from openblip2.train.parameters import fill_trained, save_trained, trained_parameters

# Settings of `train` that may change when a run is resumed. They control how steps are computed and saved; none of them
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
FORMAT = 2  # 1: from before batches were drawn from texts of all lengths, so that its batch n is different
_NAME = re.compile(r"step-(\d{8,})")
_MANIFEST = "manifest.json"
_FILES = {"model.safetensors", "optimizer.safetensors", "progress.json"}


@dataclass(frozen=True)
class Done:
    """The progress of a run: steps, batches drawn (the sampler's only state), and bad steps.

    `data` is a digest of the training data (`train/bookkeeping.py`); "" in checkpoints of older versions.
    """

    step: int = 0
    batches: int = 0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    data: str = ""


def write_checkpoint(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, done: Done, keep: int) -> None:
    """Writes a checkpoint and removes all but the last `keep`. All processes must call it; the first one writes.

    Raises:
        UserError: it cannot be written, for example because the disk is full; the previous one is unchanged.
    """
    final = run / "resume" / f"step-{done.step:08}"
    try:
        with atomic_write(final) if is_first() else nullcontext(final) as folder:
            if is_first():
                folder.mkdir(parents=True)
            # All processes take part, because sharded parameters (FSDP2) are gathered. Only the first one writes.
            save_trained(model, folder / "model.safetensors")
            moments = _moments(model, optimizer)
            if is_first():
                write_tensors(moments, folder / "optimizer.safetensors")
                write_json(asdict(done), folder / "progress.json")
                files = {path.name: _digest(path) for path in sorted(folder.iterdir())}
                write_json({"format": FORMAT, "step": done.step, "files": files}, folder / _MANIFEST)
        # Older checkpoints are removed only after the new one is on the disk.
        if is_first():
            keep_last(run, keep)
            for path in final.parent.glob("step-*.damaged"):
                shutil.rmtree(path)
    except OSError as error:
        raise UserError(
            f"{final}: the checkpoint of step {done.step} cannot be written ({one_line(error)}); the one before it is "
            "intact: free disk space, and continue with --resume"
        ) from error
    # No process may end the run, or the scheduler its job, before the checkpoint is complete.
    wait_for_all()


def find_checkpoint(run: Path, say: Callable[[str], object]) -> Path | None:
    """Returns the last intact checkpoint, or None if there is no checkpoint. All processes must call it.

    Incomplete checkpoints are removed. A damaged one is reported and renamed to `step-00000123.damaged`, and the one
    before it is used.

    Raises:
        UserError: there are checkpoints, but none of them is intact, or they were written by another version.
    """
    # The first process decides for all, because on a network disk they may not see the same files yet.
    step = from_all(_find(run / "resume", say) if is_first() else -1)[0]
    return None if step < 0 else run / "resume" / f"step-{step:08}"


def restore_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Done:
    """Restores what `write_checkpoint` saved, in every process; a `UserError` says what does not fit the model."""
    weights = folder / "model.safetensors"
    fill_trained(model, read_tensors(weights), str(weights))  # strict, so a checkpoint of another model fails here
    parameters = trained_parameters(model)
    for key, value in read_tensors(folder / "optimizer.safetensors").items():
        name, _, part = key.rpartition(":")
        if name not in parameters:
            raise UserError(f"{folder / 'optimizer.safetensors'}: {name} is not trained by this model")
        target = parameters[name]
        # Moments have the shape and sharding of their parameter; `step` is a single number.
        optimizer.state[target][part] = like(target, value) if part != "step" else value.to(target.device)
    return Done(**read_json(folder / "progress.json"))


def forget_checkpoints(run: Path) -> None:
    """Removes the weights and checkpoints that an older run left in the folder of a new run."""
    # A run with model.safetensors counts as finished, so --resume would not train.
    if is_first():
        for name in ("model.safetensors", "bad_batch.json"):
            (run / name).unlink(missing_ok=True)
        if (run / "resume").exists():
            shutil.rmtree(_aside(run / "resume", "old"))


def keep_last(run: Path, keep: int) -> None:
    """Removes all but the last `keep` checkpoints, in the first process only."""
    if is_first():
        for path in list(_steps(run / "resume").values())[:-keep]:
            shutil.rmtree(_aside(path, "old"))


def require_new(run: Path, overwrite: bool) -> None:
    """Checks that a new training in this folder, which need not exist, does not destroy earlier work.

    Raises:
        UserError: The folder holds a run and `overwrite` is False, or it holds another program's model.
    """
    finished, begun = (run / "model.safetensors").exists(), bool(_steps(run / "resume"))
    # Also with --overwrite, because another program's model may have the same file names.
    if finished or (run / "config.json").exists():
        try:
            read_config(run)
        except UserError as error:
            raise UserError(f"{run} contains files that do not belong to a run: give another --out") from error
    # A run writes these after config.json, so without config.json they are not from a run.
    elif foreign := [name for name in ("log.jsonl", "tokenizer") if (run / name).exists()]:
        raise UserError(f"{run} contains {foreign[0]}, which does not belong to a run: give another --out")
    if finished and not overwrite:
        raise UserError(f"{run} contains a finished run: give another --out, or add --overwrite to replace it")
    if begun and not overwrite:
        raise UserError(
            f"{run} contains a checkpoint of an unfinished run: add --resume to continue it, give another --out, or "
            "add --overwrite to start again"
        )


def require_same(settings: RunSettings, run: Path, last: Path | None, data: str) -> None:
    """Checks that a run may continue from its checkpoint `last`: same data digest, same settings that affect steps."""
    # Batches are drawn by position, so one picture more or less would change all later steps.
    then = read_json(last / "progress.json").get("data", "") if last else ""
    if then not in ("", data):
        raise UserError(
            f"--resume: the data have changed since {run} was started ({then} then; {data} now): give the same "
            "pictures and captions, or a new --out"
        )
    before = read_settings(run)
    # Settings that may change get their new values on both sides, so that they do not count as different.
    same = {name: getattr(settings.train, name) for name in MAY_CHANGE}
    then, now = asdict(replace(before, train=replace(before.train, **same))), asdict(settings)
    if then != now:
        parts = [name for name in now if isinstance(now[name], dict)]
        other = [f"{part}.{name}" for part in parts for name in now[part] if now[part][name] != then[part][name]]
        other += [name for name in now if name not in parts and now[name] != then[name]]
        raise UserError(
            f"--resume: {run / 'config.json'} has other settings ({', '.join(other)}); give the same "
            f"ones, or a new --out (only {', '.join(f'train.{name}' for name in MAY_CHANGE)} may change)"
        )


def _find(folder: Path, say: Callable[[str], object]) -> int:
    """The step of the last intact checkpoint; -1 if there is none."""
    if (folder / "progress.json").exists():
        raise UserError(
            f"{folder} contains a checkpoint of an older openblip2 (no manifest): finish the run with that version, or "
            "start again with --overwrite"
        )
    # Remove what a killed process was still writing or removing.
    for left in [*folder.parent.glob("resume.old"), *folder.glob("*step-*.new"), *folder.glob("step-*.old")]:
        shutil.rmtree(left)
    damaged: dict[Path, str] = {}  # checkpoint -> what is wrong with it
    # The latest first, because it is usually intact and then no other has to be read.
    for step, path in reversed(_steps(folder).items()):
        problem = _problem(path)
        if problem is None:
            for other, its in damaged.items():
                say(f"{other} is damaged ({its}): it is renamed, and {path.name} is used instead")
                _aside(other, "damaged")
            return step
        damaged[path] = problem
    if damaged:
        path, problem = next(iter(damaged.items()))
        raise UserError(
            f"{path} is damaged ({problem}), and no earlier checkpoint is intact: start again with --overwrite"
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
        return f"{_MANIFEST} lists no files"
    if manifest.get("format") != FORMAT:
        # Not damaged, so it must not be renamed: the version that wrote it can continue from it.
        raise UserError(
            f"{folder / _MANIFEST}: format {manifest.get('format')!r}, but this openblip2 reads {FORMAT}; continue "
            "with the version that wrote it"
        )
    if files.keys() != _FILES:
        return f"{_MANIFEST} lists the files {', '.join(sorted(files))}"
    for name, written in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _digest(folder / name) != written:
            return f"{name} has changed since it was written"
    return None


def _aside(path: Path, why: str) -> Path:
    """Renames a folder, so that a damaged or partly removed one is not mistaken for an intact checkpoint."""
    other = path.with_name(f"{path.name}.{why}")
    if other.exists():
        shutil.rmtree(other)
    return path.rename(other)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state by "parameter:name", which is gathered in the first process; empty in all others."""
    moments = {}
    for name, parameter in trained_parameters(model).items():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            # One by one, and freed at once in other processes: all moments are twice as large as all trained weights.
            full = full_tensor(value).cpu().contiguous()
            if is_first():
                moments[f"{name}:{key}"] = full
    return moments
