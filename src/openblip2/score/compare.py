"""Two results on the same samples: is one run better than the other, or only luckier?"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from openblip2.errors import UserError
from openblip2.evaluate.intervals import Interval, difference_interval
from openblip2.runs import read_json

Row = dict[str, Any]


def compare(first: Path, second: Path) -> dict[str, Interval]:
    """Each score's mean of the first result less that of the second, paired sample by sample, with its interval.

    Raises:
        UserError: no results, of two tasks, or of other samples.
    """
    a, b = _read(first), _read(second)
    if a["task"] != b["task"]:
        raise UserError(f"{first} is of {a['task']}, {second} of {b['task']}: compare results of one task")
    scores = _scores(a["task"], a["rows"])
    ours, theirs = ({_name(row): row for row in found["rows"]} for found in (a, b))
    if ours.keys() != theirs.keys():
        odd = next(iter(ours.keys() ^ theirs.keys()))
        raise UserError(
            f"{first} and {second} are of other samples, {' / '.join(map(str, odd))} for one: score the same data"
        )
    found: dict[str, Interval] = {}
    for name, (belongs, score) in scores.items():
        keys = [key for key, row in ours.items() if belongs(row)]
        mine, other = (np.array([score(rows[key]) for key in keys]) for rows in (ours, theirs))
        found[name] = difference_interval(mine, other, [ours[key]["image"] for key in keys])
    return found


def _scores(task: str, rows: list[Row]) -> dict[str, tuple[Callable[[Row], bool], Callable[[Row], float]]]:
    """By name: which rows a score is of, and a row's score."""
    if task == "vqa":
        found: dict[str, Any] = {"accuracy": (lambda row: True, lambda row: row["score"])}
        for kind in sorted({row["kind"] for row in rows}):
            found[f"accuracy, {kind}"] = (lambda row, kind=kind: row["kind"] == kind, lambda row: row["score"])
        return found
    if task == "caption":
        return {
            name: (lambda row: True, lambda row, name=name: row[name])
            for name in ("CIDEr-D", "ROUGE-L", "SPICE")
            if name in rows[0]
        }
    names = [key.removesuffix(" first right") for key in rows[0] if key.endswith(" first right")]
    return {
        f"{name} {way}@1": (
            lambda row, way=way: ("caption" in row) == (way == "ir"),
            lambda row, name=name: float(row[f"{name} first right"] == 1),
        )
        for name in names
        for way in ("tr", "ir")
    }


def _name(row: Row) -> tuple[Any, ...]:
    """What tells a sample from the others."""
    return (
        row["image"],
        row.get("question_id"),
        row.get("question"),
        row.get("caption") if "references" not in row else None,
    )


def _read(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict) or not {"task", "samples"} <= found.keys():
        raise UserError(f"{path}: no result of `openblip2 evaluate`")
    try:
        lines = (path.parent / Path(found["samples"]).name).read_text(encoding="utf-8").splitlines()
        return found | {"rows": [json.loads(line) for line in lines]}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: its samples, {found['samples']}, are missing or damaged: evaluate again") from error
