"""The result of a study as Markdown that can be read on its own, and as a plot."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openblip2.apps.studies.design import is_share, sentence

# Distinguishable with any colour vision (Okabe and Ito, 2008); lines also differ in their marks, for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "osD^vPX"


def can_plot() -> bool:
    """Whether matplotlib is installed, the optional extra `plots`."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draws the contents of `ablation.json` as SVG or PNG, by the suffix of `path`.

    The left panel has a line for each way over the steps: the mean over seeds, with a band from the lowest to the
    highest seed; dashed with another image. Then there is a panel for each figure of the claims, with the score of
    each way and its 95 % interval over images.
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


def in_words(result: Mapping[str, Any]) -> str:
    """The contents of `ablation.json` as Markdown: what was run, verdicts, figures, settings that differ, limits."""
    pictures, seeds = result["pictures"], result["seeds"]
    run = [
        f"{pictures['train']:,} drawn scenes to train on",
        f"{pictures['test']:,} to score on, whose nouns have never been seen in their colours",
        *(f"stage {stage[-1]} {count} steps of {batch}" for stage, (count, batch) in result["steps"].items()),
        *(f"{label} {' and '.join(f'`{name}`' for name in names)}" for label, names in result["models"].items()),
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}",
    ]
    ranges = "; after the semicolon the range over seeds" if len(seeds) > 1 else ""
    trained = ", ".join(f"{name} {_minutes(way['seconds'])}" for name, way in result["ways"].items())
    one = "One seed: what another draw of the training would give is not in the intervals (`--seeds 0,1,2`)."
    lines = [
        f"# {sentence(result['question'])}",
        "",
        f"`openblip2 ablate {result['study']}`: {'; '.join(run)}.",
        f"Brackets: 95 % intervals, bootstrap over pictures{ranges}.",
        "",
        *map(_claim, result["claims"]),
        "",
        *_table(result["ways"]),
        "",
        *_differing(result["ways"]),
        "",
        *(f"- {note}" for note in (*result["notes"], *([one] if len(seeds) == 1 else []))),
        "",
        f"Training and scoring took {_minutes(result['seconds']['training and scoring'])}.",
        f"To train a way once: {trained}.",
    ]
    return "\n".join(lines) + "\n"


def _claim(claim: Mapping[str, Any]) -> str:
    figure, unit = claim["figure"], "points" if is_share(claim["figure"]) else "nats a token"
    value, low, high = (_number(figure, claim[key], "+") for key in ("difference", "low", "high"))
    seeds = ", ".join(_number(figure, seed, "+") for seed in claim["seeds"])
    return (
        f"- **{sentence(claim['verdict'])}.** Claim ({claim['source']}): {claim['says']}. {sentence(figure)}, "
        f"{claim['better']} less {claim['worse']}: {value} {unit} [{low}, {high}]"
        f"{f'; by seed {seeds}' if len(claim['seeds']) > 1 else ''}.{_sooner(claim)}"
    )


def _sooner(claim: Mapping[str, Any]) -> str:
    found = claim["sooner"]
    if found is None:
        return ""
    reached = f" In the curves {claim['worse']} ended at {found['level']:.2f}, step {found['at']}; {claim['better']}"
    if found["from"] is None:
        return f"{reached} did not come down to that to stay."
    first = ", the first look" if found["from"] == found["first_looked_at"] else ""
    return f"{reached} was no higher from step {found['from']} on{first}."


def _table(ways: Mapping[str, Any]) -> list[str]:
    """A row for each figure, a column for each way."""
    rows = [["", *ways]]
    for name in next(iter(ways.values()))["figures"]:
        label = f"{name}, {'%' if is_share(name) else 'nats a token'}"
        rows.append([label, *(_cell(name, way["figures"][name]) for way in ways.values())])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def _cell(name: str, figure: Mapping[str, Any]) -> str:
    score, low, high = (_number(name, figure[key]) for key in ("score", "low", "high"))
    seeds = [_number(name, pick(figure["seeds"])) for pick in (min, max)] if len(figure["seeds"]) > 1 else []
    return f"{score} [{low}, {high}{'; ' if seeds else ''}{' to '.join(seeds)}]"


def _number(figure: str, value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" if is_share(figure) else f"{value:{sign}.2f}"


def _differing(ways: Mapping[str, Any]) -> list[str]:
    """The settings of each way that are not the same in all ways."""
    lines = ["What differs between the ways:", ""]
    for name, way in ways.items():
        parts = [f"stage {stage[-1]}: {_settings(values)}" for stage, values in way["differs"].items()]
        parts += [f"stage 2 on {way['pictures']:,} pictures"] if way["pictures"] else []
        lines.append(f"- {name}: {'; '.join(parts)}")
    return lines


def _settings(values: Mapping[str, Any] | None) -> str:
    if values is None:
        return "none"
    return ", ".join(f"`{name}={value}`" for name, value in values.items()) or "as the others"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
