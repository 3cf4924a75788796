"""The training loop for every stage. It handles losses and parameters by name and does not depend on BLIP-2."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openblip2.config import OptimSettings, TrainSettings
from openblip2.distributed.collectives import alone, is_first, mean_over_processes, rank, world_size
from openblip2.distributed.data_parallel import DataParallelLosses, clip_gradients
from openblip2.distributed.launch import from_all, highest
from openblip2.errors import Stopped, UserError, number_of
from openblip2.hardware import computing, keep_freed_memory, release_freed_memory
from openblip2.progress import Progress
from openblip2.runs import sync, write_json
from openblip2.train.bookkeeping import Log, open_tracker
from openblip2.train.parameters import adamw, layer_rates, learning_rate, save_trained, trained_parameters
from openblip2.train.resume import Done, forget_checkpoints, keep_last, restore_checkpoint, write_checkpoint


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
    """Trains the parameters of `model` that require a gradient and writes the run to `run`.

    Each batch depends only on its number and each random draw only on (seed, number), so a resumed run takes the same
    steps as an uninterrupted one: bit-equal on CPU. If the losses or gradients of a step are not finite in any
    process, all processes skip the step.

    Args:
        losses: Batch number 0, 1, ... -> losses by name; their sum is minimised. Called under autocast.
        validate: Called every `validate_every` steps and at the end, in eval mode without gradients.
        last: The checkpoint to continue from (`resume.find_checkpoint`); None = start anew and remove older results.
        samples: The samples of the last step in this process, reported if too many steps are bad.
        sparse: Whether some batches have losses that do not use all trained parameters (see `DataParallelLosses`).
        advise: Returns lines to print after a validation, from the rows of the log.
        data: A digest of the training data (`bookkeeping.data_digest`), stored in the checkpoints.

    Raises:
        UserError: A checkpoint cannot be read or written, or too many steps in a row were not finite.
        Stopped: The process was asked to stop; a checkpoint has been written.
    """
    keep_freed_memory()
    trained = trained_parameters(model)
    optimizer = adamw(trained, optim, layer_rates(model, optim.layer_decay))
    if last is None:
        forget_checkpoints(run)
    done = Done(data=data) if last is None else restore_checkpoint(last, model, optimizer)
    keep_last(run, settings.keep_checkpoints)  # an earlier process may have ended before this cleanup
    parallel_losses = DataParallelLosses(model, losses, sparse)
    track = open_tracker(settings.track if is_first() else "", run, asdict(settings) | asdict(optim))
    log = Log(run / "log.jsonl", None if last is None else done.step, is_first(), track)
    if log.torn:
        progress.say(f"{log.path}: {number_of(log.torn, 'line', 'was')} removed (not valid JSON)")

    saved = done.step

    def save() -> None:
        nonlocal saved
        if saved < done.step:
            # Sync the log first: a resumed run keeps its rows up to the checkpoint's step, so they must be on the disk.
            if log.writes:
                sync(log.path)
            write_checkpoint(run, model, optimizer, done, settings.keep_checkpoints)
            saved = done.step

    with progress.steps("training", settings.steps, done.step, "steps") as bar, stop_requests() as stops:

        def measure_and_log() -> None:
            # Validation may take minutes. It saves no state, so a request to stop interrupts it, and a resumed run
            # repeats it.
            try:
                with stops.interrupting():
                    measured = measure(model, validate, settings)
            except Stopped:
                save()
                raise
            log.write({"step": done.step, "validation": measured})
            progress.say(f"step {done.step}: " + _in_words(measured))
            for line in advise(log.rows()):
                progress.say(line)

        # The run may have ended during the validation of its last step. The first process decides for all, because
        # only its log is certain to be up to date.
        missing = from_all(done.step > 0 and done.step not in log.validated)[0]
        if missing and _due(done.step, settings.validate_every, settings.steps):
            measure_and_log()
        for step in range(done.step, settings.steps):
            began = time.perf_counter()
            parts = _accumulate(model, parallel_losses, step, settings)
            grad_norm = clip_gradients(trained.values(), optim.clip or math.inf)
            measured = {**parts, "grad_norm": grad_norm}
            broken = {name: f"{name} = {value}" for name, value in measured.items() if not math.isfinite(value)}
            # All processes must take the same branch, so one bad loss or one request to stop applies to all.
            is_bad, stop = highest([int(bool(broken)), stops.signal])
            rate = learning_rate(step, settings.steps, optim)
            if not is_bad:
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["rate"]
                optimizer.step()
            optimizer.zero_grad()  # also after a bad step, so that its gradients are not added to the next ones
            # Bad steps are counted, too, because the next batch number and the learning rate depend on the count.
            done = replace(
                done,
                step=done.step + 1,
                batches=done.batches + settings.accumulate,
                bad_steps=done.bad_steps + is_bad,
                bad_in_a_row=done.bad_in_a_row + 1 if is_bad else 0,
            )
            if is_bad:
                broken = {name: text for one in from_all(broken) for name, text in one.items()}
                progress.say(f"step {done.step} is left out ({done.bad_steps} so far): {', '.join(broken.values())}")
                row = {"bad": list(broken.values()), "bad_steps": done.bad_steps}
            else:
                row = {"loss": sum(parts.values()), **parts, "lr": rate, "grad_norm": grad_norm}
            log.write({"step": done.step, **row, "seconds": round(time.perf_counter() - began, 4)})
            bar.advance(parts)
            # Before a checkpoint is written, because a run resumed from it would only give up again.
            if done.bad_in_a_row >= settings.most_bad_steps:
                _give_up(run, done, broken, [row for rows in from_all(samples()) for row in rows])
            # Before validation, which may take longer than a scheduler waits after its signal.
            if stop or _due(done.step, settings.checkpoint_every, 0):
                save()
            if stop:
                raise Stopped(stop)
            if _due(done.step, settings.validate_every, settings.steps):
                measure_and_log()
        # Written last, because a run with this file counts as finished.
        save_trained(model, run / "model.safetensors")


def measure(model: nn.Module, validate: Callable[[], dict[str, Any]], settings: TrainSettings) -> dict[str, Any]:
    """Runs `validate` in eval mode without gradients, with random draws that depend on the seed alone."""
    model.eval()
    torch.manual_seed(settings.seed)
    try:
        # Each process evaluates all held-out pictures, because they are few; the results are the same everywhere.
        with alone(), torch.no_grad(), computing(model, settings.precision):
            return validate()
    finally:
        model.train()
        release_freed_memory()  # the next step maps pages again, which costs little once per validation


def _accumulate(model: nn.Module, losses: DataParallelLosses, step: int, settings: TrainSettings) -> dict[str, float]:
    """Accumulates the gradients of the step's batches and returns the mean of each loss, also over processes."""
    totals: dict[str, float] = {}
    numbers = range(step * settings.accumulate, (step + 1) * settings.accumulate)
    for number in numbers:
        # Seeded by the batch number, so that no generator state has to be saved. Dropout differs between processes;
        # draws for the joined batch must be the same in all of them and use a separate generator (`joint_draws`).
        torch.manual_seed(settings.seed * 1_000_003 + number + rank() * 2**40)
        with losses.batch(number == numbers[-1]):
            with computing(model, settings.precision):
                parts = losses(number)
            (torch.stack(list(parts.values())).sum() / settings.accumulate).backward()
        for name, value in parts.items():
            totals[name] = totals.get(name, 0.0) + float(value.detach()) / settings.accumulate
    return dict(zip(totals, mean_over_processes(list(totals.values())), strict=True))


def joint_draws(seed: int, number: int) -> torch.Generator:
    """The generator for random draws over the joined batch: negatives, prompts, and where captions are split."""
    # The seed is the same in all processes and differs from the seeds of dropout (`_accumulate`).
    return torch.Generator().manual_seed(seed * 1_000_003 + number + 2**60)


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _in_words(measured: dict[str, Any]) -> str:
    shown = (
        v if isinstance(v, str) else f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in measured.items()
    )
    return ", ".join(shown)


# Steps whose losses or gradients are not finite are left out and counted. One bad batch (a picture of one colour, a
# caption of one letter, an overflow) must not end a run of days, and skipping its step keeps the weights good. Many
# bad steps in a row mean that the weights or the data are bad, so they end the run.
def _give_up(run: Path, done: Done, broken: Mapping[str, str], samples: list[dict[str, Any]]) -> None:
    """Ends a run after its last bad step with a `UserError`; `RUN/bad_batch.json` gets the step's samples."""
    if is_first():
        row = {"step": done.step, "bad": list(broken.values()), "bad_in_a_row": done.bad_in_a_row, "samples": samples}
        write_json(row, run / "bad_batch.json")
    raise UserError(
        f"step {done.step}: {', '.join(broken.values())}; such steps are left "
        f"out, but this is number {done.bad_in_a_row} in a row (train.most_bad_steps): look at the samples in "
        f"{run / 'bad_batch.json'}, or try a smaller optim.lr, optim.clip=1.0 or train.precision=fp32"
    )


class StopRequests:
    """Requests to stop by Ctrl-C or by SIGTERM, which schedulers send before they take a machine away."""

    def __init__(self) -> None:
        self.signal = 0  # number of the first signal; 0 = none
        self._interrupts = False

    def handle(self, number: int, _: object = None) -> None:
        self.signal = self.signal or number
        if self._interrupts:
            raise Stopped(self.signal)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Lets a request interrupt the block at once with `Stopped`; the block must not change anything that is saved.

        This works with a single process only, because other processes would wait for an interrupted one.
        """
        if self.signal and world_size() == 1:
            raise Stopped(self.signal)
        try:
            self._interrupts = world_size() == 1
            yield
        finally:
            self._interrupts = False


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Collects Ctrl-C and SIGTERM, which would otherwise end the process in the middle of a step."""
    stops = StopRequests()
    main = threading.current_thread() is threading.main_thread()  # other threads may not handle signals
    before = {kind: signal.signal(kind, stops.handle) for kind in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield stops
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
