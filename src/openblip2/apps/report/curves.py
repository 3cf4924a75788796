"""Charts of a training log, drawn by matplotlib as SVG images."""

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from openblip2.evaluate.health import ITM_CHANCE

Point = tuple[float, float]

# Columns of a log: the title of each chart, and what its vertical axis shows.
COLUMNS = {
    "itc": ("Image-text contrast (ITC)", "loss"),
    "itm": ("Image-text matching (ITM)", "loss"),
    "itg": ("Captions from the Q-Former (ITG)", "loss"),
    "alignment": ("Soft prompt against the caption's embeddings (alignment)", "loss"),
    "lm": ("Captions from the language model", "loss"),
    "grad_norm": ("Norm of the gradient", "norm"),
    "lr": ("Learning rate", "rate"),
}
HELD_OUT = {"lm": {"loss_right": "held out, right picture", "loss_shuffled": "held out, another picture"}}
COLOURS = ("#1f6fc4", "#c2571a", "#7d3fb0")
MOST_POINTS = 300  # of a line: more than can be told apart


def charts(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str] = tuple(COLUMNS), itc_chance: float | None = None
) -> list[dict[str, Any]]:
    """A chart for each column of a training log, with held-out values where there are some.

    Args:
        rows: the rows of `log.jsonl`.
        names: of the columns, keys of `COLUMNS`; those that the log lacks are left out.
        itc_chance: the ITC loss of a model that knows nothing, if it is to be drawn.
    """
    drawn = []
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        reach = 0 if name == "lr" else len(points) // 50
        lines = {f"training, mean of {2 * reach + 1} steps" if reach else "training": smooth(points, reach)}
        for key, label in HELD_OUT.get(name, {name: "held out"}).items():
            lines[label] = [(row["step"], row["validation"][key]) for row in rows if key in row.get("validation", {})]
        if points:
            drawn.append(chart(*COLUMNS[name], lines, {"itm": ITM_CHANCE, "itc": itc_chance}.get(name)))
    return drawn


def chart(title: str, axis: str, lines: Mapping[str, Sequence[Point]], chance: float | None = None) -> dict[str, Any]:
    """Draws lines over steps, the vertical axis from zero.

    Args:
        title: of the chart.
        axis: what the vertical axis shows; a loss is in nats.
        lines: points by name; all lines after the first are dotted, for values measured now and then.
        chance: height of a dashed line.

    Returns:
        `title`, `svg`, and `alt`, a summary for those who do not see it.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no window, no state

    said, stream = [], BytesIO()
    # Text stays text, which is small; a fixed salt and no date: the same log gives the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure = Figure(figsize=(4.6, 3.4), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss in nats" if axis == "loss" else axis)
        for n, (name, points) in enumerate(lines.items()):
            if points:
                (begin, first), (end, last) = points[0], points[-1]
                look = f"{'o' if n or len(points) == 1 else ''}{':' if n else '-'}"
                axes.plot(*zip(*points, strict=True), look, color=COLOURS[n], markersize=5, label=f"{name}: {last:.3g}")
                said.append(f"{name}: {first:.3g} at step {begin:g}, {last:.3g} at step {end:g}")
        if chance is not None:
            said.append(f"chance: {chance:.4g}")
            axes.axhline(chance, color="black", linestyle="--", linewidth=1, label=said[-1])
        axes.set_xlim(left=0)
        heights = [y for points in lines.values() for _, y in points if math.isfinite(y)]
        axes.set_ylim(0, 1.05 * max([*heights, chance or 0]) or 1)
        axes.grid(axis="y", alpha=0.3)
        figure.legend(loc="outside lower left", frameon=False)
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return {"title": title, "svg": stream.getvalue(), "alt": f"{title}, {axis} over steps. {'; '.join(said)}."}


def smooth(points: Sequence[Point], reach: int) -> list[Point]:
    """At most `MOST_POINTS` of the points, each the mean of itself and `reach` neighbours on either side."""
    means = []
    for n in range(0, len(points), max(1, math.ceil(len(points) / MOST_POINTS))):
        near = [y for _, y in points[max(0, n - reach) : n + reach + 1]]
        means.append((points[n][0], sum(near) / len(near)))
    return means
