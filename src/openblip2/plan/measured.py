"""Efficiency from what `openblip2 bench --out` measured: the work of its stage-1 or stage-2 step over its seconds."""

import json
from pathlib import Path
from typing import Any

from openblip2.bench.cases import OURS
from openblip2.bench.sizes import SIZES, Size
from openblip2.errors import UserError
from openblip2.plan.former import Former

CASES = {"stage1": "stage1-features", "stage2": "stage2-features"}


def measured_efficiency(path: Path, stage: str) -> tuple[float, float]:
    """Share of the peak that a step reached, and that peak in floating-point operations a second.

    Raises:
        UserError: it is not a file of `openblip2 bench`, or the stage's case is not in it.
    """
    case = CASES[stage]
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        peak, figures = float(found["machine"]["matmul_flops"]), found["cases"].get(case)
        size = SIZES[found["size"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--measured {path}: it is no file of `openblip2 bench --out` ({type(error).__name__}: {error})"
        ) from error
    if figures is None:
        raise UserError(f"--measured {path}: the case {case} is not in it: run `openblip2 bench --case {case} --out`")
    if stage == "stage2":
        return float(figures["share_of_matmul_peak"]), peak
    return 6.0 * size.pairs * stage1_work(size) / figures[OURS]["seconds"] / peak, peak


def stage1_work(size: Size) -> int:
    """Multiply-adds of one pair of the bench's stage-1 step, forward."""
    return sum(former_of(size).stage1(size.text, size.pairs).values())


def former_of(size: Size) -> Former:
    """The Q-Former of a size of the bench."""
    patches = (size.side // size.encoder["patch_size"]) ** 2 + 1
    sizes = {**size.qformer, "queries": size.queries, "cross_every": 2, "patches": patches}
    return Former(**sizes, image_width=size.encoder["hidden_size"])
