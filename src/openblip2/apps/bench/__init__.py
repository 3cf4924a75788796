"""`openblip2 bench`: this package, a naive implementation and transformers' BLIP-2, with equal weights and inputs.

The cases of a size are timed in turn. Peak memory is measured separately.
"""

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from openblip2 import __version__
from openblip2.apps.bench.cases import CASES, OURS, Bench, Case
from openblip2.apps.bench.models import SIZES
from openblip2.errors import UserError
from openblip2.hardware import compute_dtype, keep_freed_memory
from openblip2.hardware import device as default_device
from openblip2.progress import Progress
from openblip2.runs import write_json

COUNTED = "stage2-features"  # the case whose share of the measured peak is reported


def run_bench(
    size: str,
    names: Sequence[str],
    out: Path | None,
    repeats: int,
    precision: str,
    say: Callable[[str], None],
    progress: Progress,
) -> dict[str, Any]:
    """Times the cases of a size.

    Args:
        size: One of `SIZES`.
        names: Names of cases; empty = all.
        out: JSON file for the figures, written after each case.
        repeats: Timed runs of each candidate.
        precision: "bf16", "fp32" or "auto", as `train.precision`.
        say: Called with each line of results.

    Raises:
        UserError: The size or a case is unknown, or outputs are not equal.
    """
    if size not in SIZES:
        raise UserError(f"unknown size {size!r}: it must be one of {', '.join(SIZES)}")
    if unknown := [name for name in names if name not in CASES]:
        raise UserError(f"unknown case {unknown[0]!r}: it must be one of {', '.join(CASES)}")
    device = default_device()
    dtype = compute_dtype(device, precision)
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    keep_freed_memory()
    say(f"building {size} with random weights")
    bench = Bench(SIZES[size], device, precision, dtype)
    peak = matmul_peak(dtype, device)
    machine, cases = _machine(device, precision, peak), {}
    for line in bench.two.language.slow_paths():
        say(line)
    say(f"{machine['name']}, {precision}, matrix products at {peak / 1e12:.2f} TFLOP/s")
    found = {"machine": machine, "size": size, "repeats": repeats, "cases": cases}
    wanted = names or list(CASES)
    with progress.steps("cases", len(wanted), unit="cases") as bar:
        for name in wanted:
            cases[name] = _measure(CASES[name](bench), repeats, device, peak)
            gc.collect()
            say(_in_words(name, cases[name]))
            if out is not None:  # so that a later failure does not lose these figures
                write_json(found, out)
            bar.advance()
    return found


def _measure(case: Case, repeats: int, device: torch.device, peak: float) -> dict[str, Any]:
    """The figures of a case: those of each candidate by name, and our time and memory relative to the others'."""
    if case.difference > case.equal:
        raise UserError(
            f"{case.name}: outputs differ by {case.difference:.1e} (allowed {case.equal:.0e}): the case was not timed"
        )
    timings = alternate(case.candidates, repeats, device)
    for timing in timings.values():
        timing["per_second"] = case.samples / timing["seconds"]
    mine, others = timings[OURS], {name: timing for name, timing in timings.items() if name != OURS}
    figures = {"unit": case.unit, "samples": case.samples, "difference": case.difference, **timings}
    figures["times_faster"] = {name: timing["seconds"] / mine["seconds"] for name, timing in others.items()}
    figures["times_the_memory"] = {
        name: mine["peak_bytes"] / timing["peak_bytes"]
        for name, timing in others.items()
        if mine["peak_bytes"] is not None and timing["peak_bytes"]
    }
    if case.name == COUNTED:
        with FlopCounterMode(display=False) as counted:
            case.candidates[OURS]()
        figures["share_of_matmul_peak"] = counted.get_total_flops() / mine["seconds"] / peak
    return figures


def _in_words(name: str, figures: Mapping[str, Any]) -> str:
    parts = []
    for who in (OURS, *figures["times_faster"]):
        timing = figures[who]
        memory = "" if timing["peak_bytes"] is None else f", {timing['peak_bytes'] / 2**30:.2f} GiB"
        spread = f"{timing['seconds']:.2f} s ± {50 * timing['spread']:.0f} %{memory}"
        parts.append(f"{who} {timing['per_second']:.2f} {figures['unit']}/s ({spread})")
    parts += [f"{ratio:.2f} x {who}" for who, ratio in figures["times_faster"].items()]
    if figures["unit"] == "texts" and figures["difference"]:
        parts.append(f"{100 * figures['difference']:.0f} % of the texts differ because of rounding")
    if "share_of_matmul_peak" in figures:
        parts.append(f"{100 * figures['share_of_matmul_peak']:.0f} % of the matmul peak")
    return f"{name:16} " + "; ".join(parts)


def alternate(
    candidates: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Runs the candidates in turn, `repeats` times each, after a first run of each that measures memory.

    Returns:
        For each candidate, the median of its `seconds`, their `spread` (slowest - fastest, relative to the median), and
        `peak_bytes`, as `peak_memory`.
    """
    peaks = {name: peak_memory(run, device) for name, run in candidates.items()}
    for run in candidates.values():  # `peak_memory` returned free memory to the system: this run allocates it again
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            seconds[name].append(_time(run, device))
    found: dict[str, dict[str, Any]] = {}
    for name, values in seconds.items():
        median = statistics.median(values)
        spread = (max(values) - min(values)) / median
        found[name] = {"seconds": median, "spread": spread, "peak_bytes": peaks[name]}
    return found


def peak_memory(run: Callable[[], Any], device: torch.device) -> int | None:
    """The peak memory of a run in bytes, minus the memory in use before it; None if the system cannot report it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide later allocations
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except (AttributeError, OSError):  # only Linux has these
        run()
        return None
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """The fastest matrix product measured here, in floating-point operations per second."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = min(_time(lambda: a @ b, device) for _ in range(12))
    return 2 * side**3 / best


def _time(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(name + ":")]
    return 1024 * int(line.split()[1])


def _machine(device: torch.device, precision: str, peak: float) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else _processor()
    return {
        "name": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "precision": precision,
        "matmul_flops": peak,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "openblip2": __version__,
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
