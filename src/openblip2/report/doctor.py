"""The doctor: what a run's settings and log say of its health, in words and as one HTML file."""

import json
import os
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from openblip2.config import RunSettings, from_dict
from openblip2.errors import UserError
from openblip2.evaluate.health import Finding, Row, findings
from openblip2.evaluate.levels import ITM_CHANCE, itc_chance
from openblip2.report.curves import Series, chart, smooth
from openblip2.train.checkpoint import read_config

NAMES = {
    "itc": "Image-text contrast (ITC)",
    "itm": "Image-text matching (ITM)",
    "itg": "Captions from the Q-Former (ITG)",
    "lm": "Captions from the language model",
    "grad_norm": "Norm of the gradient",
    "lr": "Learning rate, times 10,000",
}
HELD_OUT = {"lm": ("loss_right", "loss_shuffled")}
WORDS = {"good": "✓", "note": "Note:", "bad": "✗"}


def examine(run: Path) -> tuple[RunSettings, list[dict[str, Any]], list[Finding]]:
    """Settings, rows of the log, findings.

    Raises:
        UserError: no run, or one that has not begun.
    """
    config = read_config(run)
    settings = from_dict(config["settings"])
    rows: list[dict[str, Any]] = []
    try:
        lines = (run / "log.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{run / 'log.jsonl'}: cannot be read ({error.strerror}); a run that has begun") from error
    for n, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif n < len(lines) - 1:  # the last line may be half written: the run may be running
            raise UserError(f"{run / 'log.jsonl'}: line {n + 1} is no row of a log; what `openblip2 train` wrote")
    if not rows:
        raise UserError(f"{run / 'log.jsonl'}: has no step yet; look again later")
    vocabulary = config.get("sizes", {}).get("vocabulary") or 30523
    return settings, rows, findings(settings, rows, vocabulary)


def write_page(path: Path, run: str, settings: RunSettings, rows: Sequence[Row], found: Sequence[Finding]) -> None:
    """Writes the page, whole or not at all."""
    items = "".join(
        f'<li class="{"good" if one.level == "good" else "bad" if one.level == "bad" else ""}">{WORDS[one.level]} '
        f"<strong>{escape(one.about)}</strong>: {escape(one.seen)}."
        f"{f' <em>Try: {escape(one.advice)}.</em>' if one.advice else ''}</li>"
        for one in found
    )
    bad = sum(one.level == "bad" for one in found)
    told = f"{bad} of {len(found)} findings are bad" if bad else f"nothing bad in {len(found)} findings"
    body = (
        f"<header><h1>{escape(run)}: {told}</h1></header><ul>{items}</ul>"
        f'<section><h2>Curves</h2><div class="charts">{"".join(_charts(settings, rows))}</div></section>'
    )
    page = Template((files("openblip2.report") / "page.html").read_text(encoding="utf-8"))
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(page.substitute(title=f"openblip2 doctor: {escape(run)}", body=body), encoding="utf-8")
    os.replace(fresh, path)


def _charts(settings: RunSettings, rows: Sequence[Row]) -> list[str]:
    levels = {"itm": ("chance", ITM_CHANCE)}
    if settings.stage1.contrast == "softmax":
        levels["itc"] = ("chance", itc_chance(settings.train.batch))
    drawn = []
    for name, title in NAMES.items():
        scale = 1e4 if name == "lr" else 1.0
        points = [(row["step"], scale * row[name]) for row in rows if name in row]
        if not points:
            continue
        reach = len(points) // 50 if name != "lr" else 0
        series = [Series(f"training, mean of {2 * reach + 1} steps" if reach else "training", smooth(points, reach))]
        for other in HELD_OUT.get(name, (name,)):
            held = [(row["step"], row["validation"][other]) for row in rows if other in row.get("validation", {})]
            series.append(
                Series(f"held out{', another picture' if other == 'loss_shuffled' else ''}", held, dotted=True)
            )
        drawn.append(chart(title, series, levels.get(name)))
    return drawn
