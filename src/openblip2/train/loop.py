"""One training loop for every stage. It knows losses by name and parameters by name, and nothing of BLIP-2."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openblip2.config import OptimSettings, TrainSettings
from openblip2.distributed.collectives import alone, is_first, mean_over_processes, rank
from openblip2.distributed.data_parallel import DataParallelLosses, clip_gradients
from openblip2.distributed.launch import from_all, from_first, highest
from openblip2.errors import Stopped
from openblip2.hardware import attention_kernel, computing, keep_freed_memory
from openblip2.progress import Progress
from openblip2.train.bad_steps import count_step, give_up, not_finite
from openblip2.train.log import Log, tell
from openblip2.train.optim import adamw, layer_rates, learning_rate
from openblip2.train.parameters import save_trained, trained_parameters
from openblip2.train.resume import Done, forget_checkpoints, keep_last, read_checkpoint, write_checkpoint
from openblip2.train.stopping import stop_requests


def fit(
    model: nn.Module,
    losses: Callable[[int], dict[str, Tensor]],
    run: Path,
    optim: OptimSettings,
    settings: TrainSettings,
    validate: Callable[[], dict[str, Any]],
    progress: Progress,
    last: Path | None = None,
    samples: Callable[[], list[dict[str, Any]]] = list,
    sparse: bool = False,
    advise: Callable[[list[dict[str, Any]]], list[str]] = lambda rows: [],
    data: str = "",
) -> None:
    """Trains what requires a gradient in `model` and writes `run`.

    Every batch is a function of its number and every random draw of (seed, number), so a run that is stopped and
    resumed takes the same steps as one that was not: bit-equal on CPU. A step whose losses or gradients are not finite
    in any process is taken in none.

    Args:
        losses: batch number 0, 1, ... -> losses by name; their sum is minimised. Given under autocast.
        validate: measured every `validate_every` steps and at the end; called in eval mode without gradients.
        last: the checkpoint to go on from (`resume.find_checkpoint`); None = begin, and remove what an older run left.
        samples: what the last step was made of, in this process, for the case that it is bad.
        advise: what is to be said of the log's rows after a validation.
        data: what is trained on (`data.trained_on.data_digest`), kept in the checkpoints.
        sparse: whether there are batches whose losses do not depend on all that trains (see `DataParallelLosses`).

    Raises:
        UserError: a checkpoint cannot be read or written, or too many steps in a row were not finite.
        Stopped: the process was asked to stop; a checkpoint is written.
    """
    keep_freed_memory()
    trained = trained_parameters(model)
    optimizer = adamw(trained, optim, layer_rates(model, optim.layer_decay))
    if last is None:
        forget_checkpoints(run)
    done = Done(data=data) if last is None else read_checkpoint(last, model, optimizer)
    keep_last(run, settings.keep_checkpoints)  # a process may have ended between writing one and this
    together = DataParallelLosses(model, losses, sparse)
    told = tell(settings.track if is_first() else "", run, asdict(settings) | asdict(optim))
    log = Log(run / "log.jsonl", None if last is None else done.step, is_first(), told)
    if log.torn:
        progress.say(f"{log.path}: {log.torn} lines were no JSON and are dropped")

    saved = done.step

    def save() -> None:
        nonlocal saved
        if saved < done.step:
            log.to_disk()
            write_checkpoint(run, model, optimizer, done, settings.keep_checkpoints)
            saved = done.step

    with progress.steps("training", settings.steps, done.step, "steps") as bar, stop_requests() as stops:

        def look() -> None:
            try:
                with stops.breaking_off():
                    found = measure(model, validate, settings)
            except Stopped:
                save()
                raise
            log.write({"step": done.step, "validation": found})
            progress.say(f"step {done.step}: " + _in_words(found))
            for line in advise(log.rows()):
                progress.say(line)

        unseen = done.step > 0 and done.step not in log.validated
        if from_first(unseen) and _due(done.step, settings.validate_every, settings.steps):
            look()  # the process ended in the middle of it
        for step in range(done.step, settings.steps):
            began = time.perf_counter()
            parts = _accumulate(model, together, step, settings)
            grad_norm = clip_gradients(trained.values(), optim.clip or math.inf)
            broken = not_finite({**parts, "grad_norm": grad_norm})
            # What one process finds or is asked is so for all.
            is_bad, stop = highest([int(bool(broken)), stops.signal])
            rate = learning_rate(step, settings.steps, optim)
            if not is_bad:
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["rate"]
                optimizer.step()
            optimizer.zero_grad()
            done = count_step(done, settings.accumulate, bool(is_bad))
            if is_bad:
                broken = {name: text for found in from_all(broken) for name, text in found.items()}
                progress.say(f"step {done.step} is left out ({done.bad_steps} so far): {', '.join(broken.values())}")
                row = {"bad": list(broken.values()), "bad_steps": done.bad_steps}
            else:
                row = {"loss": sum(parts.values()), **parts, "lr": rate, "grad_norm": grad_norm}
            log.write({"step": done.step, **row, "seconds": round(time.perf_counter() - began, 4)})
            bar.advance(parts)
            if done.bad_in_a_row >= settings.most_bad_steps:
                give_up(run, done, broken, [row for rows in from_all(samples()) for row in rows])
            # Before a look, which may take longer than a scheduler waits.
            if stop or _due(done.step, settings.checkpoint_every, 0):
                save()
            if stop:
                raise Stopped(stop)
            if _due(done.step, settings.validate_every, settings.steps):
                look()
        save_trained(model, run / "model.safetensors")


def measure(model: nn.Module, validate: Callable[[], dict[str, Any]], settings: TrainSettings) -> dict[str, Any]:
    """Runs `validate` in eval mode, without gradients, with draws that depend on the seed alone."""
    model.eval()
    torch.manual_seed(settings.seed)
    try:
        with alone(), torch.no_grad(), computing(model, settings.precision):  # all processes do the same
            return validate()
    finally:
        model.train()


def _accumulate(model: nn.Module, together: DataParallelLosses, step: int, settings: TrainSettings) -> dict[str, float]:
    """Adds up the gradients of the step's batches and returns the mean of each loss, over processes too."""
    totals: dict[str, float] = {}
    numbers = range(step * settings.accumulate, (step + 1) * settings.accumulate)
    for number in numbers:
        # Dropout is each process' own; what must be one draw of the joined batch has a generator (recipes.py).
        torch.manual_seed(settings.seed * 1_000_003 + number + rank() * 2**40)
        # The kernel is for the backward pass too: it may compute layers again.
        with together.batch(number == numbers[-1]), attention_kernel(model):
            with computing(model, settings.precision):
                parts = together(number)
            (torch.stack(list(parts.values())).sum() / settings.accumulate).backward()
        for name, value in parts.items():
            totals[name] = totals.get(name, 0.0) + float(value.detach()) / settings.accumulate
    return dict(zip(totals, mean_over_processes(list(totals.values())), strict=True))


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _in_words(found: dict[str, Any]) -> str:
    shown = (
        v if isinstance(v, str) else f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()
    )
    return ", ".join(shown)
