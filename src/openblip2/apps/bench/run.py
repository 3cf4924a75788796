"""`openblip2 bench`: builds the models of a size, times the cases, prints a table and writes JSON."""

import gc
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from openblip2 import __version__
from openblip2.apps.bench.cases import CASES, Bench
from openblip2.apps.bench.measure import OURS, Case, Timing, alternate, matmul_peak
from openblip2.apps.bench.models import build_pair
from openblip2.apps.bench.sizes import SIZES
from openblip2.errors import UserError
from openblip2.hardware import compute_dtype, device, keep_freed_memory
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
        names: of cases; none = all.
        out: JSON file for the figures, written after each case.
        repeats: timed runs of each candidate.
        precision: "bf16", "fp32" or "auto", as `train.precision`.

    Raises:
        UserError: an unknown size or case, or outputs that are not equal.
    """
    if size not in SIZES:
        raise UserError(f"unknown size {size!r}: it must be one of {', '.join(SIZES)}")
    place = device()
    dtype = compute_dtype(place, precision)
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    if unknown := [name for name in names if name not in CASES]:
        raise UserError(f"unknown case {unknown[0]!r}: it must be one of {', '.join(CASES)}")
    keep_freed_memory()
    say(f"building {size} with random weights")
    bench = Bench(build_pair(SIZES[size], place, dtype), SIZES[size], place, precision)
    peak = matmul_peak(dtype, place)
    found: dict[str, Any] = {
        "machine": _machine(place, precision, peak),
        "size": size,
        "repeats": repeats,
        "cases": {},
    }
    for line in bench.pair.stage2.language.slow_paths():
        say(line)
    say(f"{found['machine']['name']}, {precision}, matrix products at {peak / 1e12:.2f} TFLOP/s")
    wanted = names or list(CASES)
    with progress.steps("cases", len(wanted), unit="cases") as bar:
        for name in wanted:
            say(_time(bench, name, found, repeats, place, peak))
            if out is not None:  # so that a later failure does not lose these figures
                write_json(found, out)
            bar.advance()
    return found


def _time(bench: Bench, name: str, found: dict[str, Any], repeats: int, place: torch.device, peak: float) -> str:
    """Adds the figures of a case to `found`, and returns them in words."""
    case = bench.case(name)
    if case.difference > case.equal:
        raise UserError(f"{name}: outputs differ by {case.difference:.1e} (allowed {case.equal:.0e}): nothing timed")
    timings = alternate(case.candidates, repeats, place)
    figures = _figures(case, timings)
    if name == COUNTED:
        with FlopCounterMode(display=False) as counted:
            case.candidates[OURS]()
        figures["share_of_matmul_peak"] = counted.get_total_flops() / timings[OURS].seconds / peak
    found["cases"][name] = figures
    words = _in_words(name, case, timings, figures)
    del case
    gc.collect()
    return words


def _figures(case: Case, timings: dict[str, Timing]) -> dict[str, Any]:
    mine = timings[OURS]
    others = [name for name in timings if name != OURS]
    return {
        "unit": case.unit,
        "samples": case.samples,
        "difference": case.difference,
        **{
            name: {
                "seconds": timing.seconds,
                "spread": timing.spread,
                "per_second": case.samples / timing.seconds,
                "peak_bytes": timing.peak,
            }
            for name, timing in timings.items()
        },
        "times_faster": {name: timings[name].seconds / mine.seconds for name in others},
        "times_the_memory": {
            name: mine.peak / theirs for name in others if mine.peak is not None and (theirs := timings[name].peak)
        },
    }


def _in_words(name: str, case: Case, timings: dict[str, Timing], figures: dict[str, Any]) -> str:
    parts = [
        f"{who} {case.samples / timing.seconds:.2f} {case.unit}/s"
        f" ({timing.seconds:.2f} s ± {50 * timing.spread:.0f} %"
        + (f", {timing.peak / 2**30:.2f} GiB)" if timing.peak is not None else ")")
        for who, timing in timings.items()
    ]
    parts += [f"{ratio:.2f} x {who}" for who, ratio in figures["times_faster"].items()]
    if case.unit == "texts" and case.difference:
        parts.append(f"{100 * case.difference:.0f} % of the texts differ, by rounding")
    if "share_of_matmul_peak" in figures:
        parts.append(f"{100 * figures['share_of_matmul_peak']:.0f} % of the matmul peak")
    return f"{name:16} " + "; ".join(parts)


def _machine(place: torch.device, precision: str, peak: float) -> dict[str, Any]:
    import transformers

    name = torch.cuda.get_device_name() if place.type == "cuda" else _processor()
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
