"""A study as one picture: what validations measured over the steps, and the figures that its claims are about."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openblip2.apps.studies.design import is_share, sentence

# Told apart by people with any colour vision (Okabe and Ito 2008), in print too: lines differ in marks as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "osD^vPX"


def can_plot() -> bool:
    """Whether matplotlib is here, the optional extra `plots`."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draws what `ablation.json` holds, as SVG or PNG by the name of `path`.

    On the left a line for each way (the mean over seeds, a band from the lowest to the highest), dashed with another
    picture. Behind it a panel for each figure of the claims: each way's score with its 95 % interval over pictures.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no state

    ways, figures = result["ways"], list(dict.fromkeys(claim["figure"] for claim in result["claims"]))
    page = Figure(figsize=(5.2 + 3.4 * len(figures), 3.9), layout="constrained")
    first, *others = page.subplots(1, 1 + len(figures), width_ratios=[1.5] + [1] * len(figures))
    page.suptitle(sentence(result["question"]), fontsize=12, fontweight="bold")
    looks = {name: (COLOURS[n % len(COLOURS)], MARKS[n % len(MARKS)]) for n, name in enumerate(ways)}
    _draw_curves(first, ways, looks)
    for panel, figure in zip(others, figures, strict=True):
        scale, digits, unit = (100, 1, "%") if is_share(figure) else (1, 2, "nats a token")
        for row, (name, way) in enumerate(ways.items()):
            found, (colour, mark) = way["figures"][figure], looks[name]
            score, low, high = (scale * found[key] for key in ("score", "low", "high"))
            panel.plot([low, high], [row, row], color=colour, linewidth=2)
            panel.plot([score], [row], mark, color=colour, markersize=7)
            panel.annotate(f"{score:.{digits}f}", (score, row), (0, 8), textcoords="offset points", ha="center")
        panel.set_yticks([])
        panel.set_ylim(len(ways) - 0.4, -0.6)
        panel.set_xlabel(f"{figure}, {unit}", wrap=True)
        panel.set_title("test scenes, 95 % intervals", fontsize=9)
        panel.grid(axis="x", alpha=0.3)
    page.savefig(path)


def _draw_curves(panel: Any, ways: Mapping[str, Any], looks: Mapping[str, tuple[str, str]]) -> None:
    for name, way in ways.items():
        colour, mark = looks[name]
        for kind, seeds in way["curves"].items():
            steps = [step for step, _ in seeds[0]]
            columns = [[value for _, value in rows] for rows in zip(*seeds, strict=True)]
            means = [sum(column) / len(column) for column in columns]
            other = kind == "loss_shuffled"
            look = {"linestyle": "--", "alpha": 0.5} if other else {"label": name}
            panel.plot(steps, means, marker=mark, markersize=4, color=colour, **look)
            panel.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.12)
    losses = any("loss_right" in way["curves"] for way in ways.values())
    panel.set_ylabel("caption loss, nats a token" if losses else "recall@1, both ways, ITC alone")
    panel.set_xlabel("step of stage 2 (dashed: with another picture)" if losses else "step of stage 1")
    panel.set_xlim(left=0)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, frameon=False)
