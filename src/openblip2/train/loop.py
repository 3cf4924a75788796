"""One training loop for every stage. It knows losses by name and parameters by name, and nothing of BLIP-2."""

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openblip2.config import OptimSettings, TrainSettings
from openblip2.errors import UserError
from openblip2.train.checkpoint import load_progress, save_progress, save_trained, trained_parameters
from openblip2.train.hardware import attention_kernel, computing, keep_freed_memory
from openblip2.train.optim import adamw, layer_rates, learning_rate
from openblip2.train.progress import Progress


class Log:
    """`log.jsonl`: one JSON object a line, appended as things happen. A resumed run drops what came after its step."""

    def __init__(self, path: Path, keep_steps: int | None = None) -> None:
        self.path = path
        kept = []
        if keep_steps is not None and path.exists():
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            kept = [row for row in rows if row.get("step", 0) <= keep_steps]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def fit(
    model: nn.Module,
    losses: Callable[[int], dict[str, Tensor]],
    run: Path,
    optim: OptimSettings,
    settings: TrainSettings,
    validate: Callable[[], dict[str, Any]],
    progress: Progress,
    resume: bool = False,
) -> None:
    """Trains what requires a gradient in `model` and writes `run`.

    Every batch is a function of its number and every random draw of (seed, number), so a run that is stopped and
    resumed takes the same steps as one that was not: bit-equal on CPU.

    Args:
        losses: batch number 0, 1, ... -> losses by name; their sum is minimised. Given under autocast.
        validate: measured every `validate_every` steps and at the end; called in eval mode without gradients.
        resume: continue from `run/resume`.

    Raises:
        UserError: nothing to resume, or a loss that is no longer finite (step and losses are named).
    """
    keep_freed_memory()
    trained = trained_parameters(model)
    optimizer = adamw(trained, optim, layer_rates(model, optim.layer_decay))
    done = load_progress(run, model, optimizer) if resume else 0
    log = Log(run / "log.jsonl", keep_steps=done if resume else None)
    with progress.steps("training", settings.steps, done) as bar, stop_requests() as asked:
        for step in range(done, settings.steps):
            began = time.perf_counter()
            parts = _accumulate(model, losses, step, settings)
            norm = nn.utils.clip_grad_norm_(trained.values(), optim.clip or math.inf, foreach=True)
            _require_finite(step + 1, parts, norm)
            rate = learning_rate(step, settings.steps, optim)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate"]
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - began
            log.write(
                {"step": step + 1, "loss": sum(parts.values()), **parts, "lr": rate}
                | {"grad_norm": float(norm), "seconds": round(seconds, 4)}
            )
            bar.advance(parts)
            if _due(step + 1, settings.validate_every, settings.steps):
                found = measure(model, validate, settings, step + 1)
                log.write({"step": step + 1, "validation": found})
                progress.say(f"step {step + 1}: " + _in_words(found))
            if asked or _due(step + 1, settings.checkpoint_every, 0):
                save_progress(run, model, optimizer, step + 1)
            if asked:
                raise KeyboardInterrupt
    save_trained(model, run / "model.safetensors")


def measure(
    model: nn.Module, validate: Callable[[], dict[str, Any]], settings: TrainSettings, step: int
) -> dict[str, Any]:
    """Runs `validate` in eval mode, without gradients, with draws that depend on the seed alone."""
    model.eval()
    torch.manual_seed(settings.seed)
    with torch.no_grad(), computing(model, settings.precision):
        found = validate()
    model.train()
    return found


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM instead of dying of them, so that a step is never half taken: the list's truth."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may handle signals
        return
    before = {kind: signal.signal(kind, lambda kind, _: asked.append(kind)) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _accumulate(
    model: nn.Module, losses: Callable[[int], dict[str, Tensor]], step: int, settings: TrainSettings
) -> dict[str, float]:
    """Adds up the gradients of the step's batches and returns the mean of each loss."""
    totals: dict[str, float] = {}
    for number in range(step * settings.accumulate, (step + 1) * settings.accumulate):
        torch.manual_seed(settings.seed * 1_000_003 + number)
        with attention_kernel(model):  # for the backward pass too: it may compute layers again
            with computing(model, settings.precision):
                parts = losses(number)
            (torch.stack(list(parts.values())).sum() / settings.accumulate).backward()
        for name, value in parts.items():
            totals[name] = totals.get(name, 0.0) + float(value.detach()) / settings.accumulate
    return totals


def _require_finite(step: int, parts: dict[str, float], norm: Tensor) -> None:
    values = {**parts, "grad_norm": float(norm)}
    broken = {name: value for name, value in values.items() if not math.isfinite(value)}
    if broken:
        raise UserError(
            f"step {step}: {', '.join(f'{name} = {value}' for name, value in broken.items())}; the last checkpoint is "
            "untouched: try a smaller optim.lr, optim.clip=1.0 or train.precision=fp32"
        )


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _in_words(found: dict[str, Any]) -> str:
    shown = (
        v if isinstance(v, str) else f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()
    )
    return ", ".join(shown)
