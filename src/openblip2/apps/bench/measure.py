"""Fair timing: runs of all candidates in turn, medians and spread, and peak memory measured separately."""

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

OURS, NAIVE, THEIRS = "openblip2", "naive", "transformers"


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        candidates: functions by name, ours among them; each does the same work.
        samples: number of samples in one run.
        unit: what a sample is.
        difference: the largest relative difference between the outputs.
        equal: the allowed difference.
    """

    name: str
    candidates: Mapping[str, Callable[[], Any]]
    samples: int
    unit: str
    difference: float
    equal: float


@dataclass(frozen=True)
class Timing:
    """Time and memory of one candidate.

    Attributes:
        seconds: the median of its runs.
        spread: (slowest - fastest) / median.
        peak: bytes that a run needs at most in addition; None = not measured on this system.
    """

    seconds: float
    spread: float
    peak: int | None


def alternate(candidates: Mapping[str, Callable[[], Any]], repeats: int, place: torch.device) -> dict[str, Timing]:
    """Runs the candidates in turn, `repeats` times each, after a first run of each that measures memory."""
    peaks = {name: peak_memory(run, place) for name, run in candidates.items()}
    for run in candidates.values():  # measuring returned free memory to the system: a second run gets it back
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            seconds[name].append(_time(run, place))
    return {name: Timing(*_summary(values), peaks[name]) for name, values in seconds.items()}


def peak_memory(run: Callable[[], Any], place: torch.device) -> int | None:
    """Bytes that a run needs at most in addition to those in use before it; None if the system does not tell."""
    gc.collect()
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        run()
        return None
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide later allocations
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        run()
        return None
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def matmul_peak(dtype: torch.dtype, place: torch.device, side: int | None = None) -> float:
    """The fastest matrix product measured here, in floating-point operations a second."""
    side = side or (8192 if place.type == "cuda" else 2048)
    a, b = (torch.randn(side, side, device=place, dtype=dtype) for _ in range(2))
    best = min(_time(lambda: a @ b, place) for _ in range(12))
    return 2 * side**3 / best


def _time(run: Callable[[], Any], place: torch.device) -> float:
    if place.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if place.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _summary(values: list[float]) -> tuple[float, float]:
    median = statistics.median(values)
    return median, (max(values) - min(values)) / median


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(name + ":")]
    return 1024 * int(line.split()[1])
