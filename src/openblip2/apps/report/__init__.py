"""Reports on runs, each a self-contained HTML file: the demo's, with its goals, and the doctor's."""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from openblip2.apps.scenes.grammar import judge
from openblip2.apps.scenes.vocabulary import WORLDS
from openblip2.config import RunSettings, from_dict
from openblip2.data.images import open_picture
from openblip2.data.records import QUESTION_KINDS
from openblip2.evaluate.health import ITM_CHANCE, Finding, findings
from openblip2.evaluate.validation import normalise
from openblip2.runs import read_config, read_json, write_text
from openblip2.train.bookkeeping import read_log

WAYS = ("tr@1", "ir@1")  # finding a caption by its picture, and a picture by its caption


def write_report(
    path: Path, metrics: Mapping[str, Any], examples: Mapping[str, Any], stage1_log: Path, stage2_log: Path
) -> None:
    """Writes the report of a demo atomically. It needs matplotlib.

    Args:
        path: the HTML file.
        metrics: the contents of `metrics.json`.
        examples: captions, answers, retrieval and maps, as `demo.scores.score` returns them.
        stage1_log: the `log.jsonl` of stage 1, beside its `config.json`.
        stage2_log: the same for stage 2.

    Raises:
        UserError: a picture of the examples can no longer be opened.
    """
    _write(
        path,
        "report.html",
        m=metrics,
        captions=[_caption(one) for one in examples["captions"]],
        answers={name: [_answer(one) for one in answers] for name, answers in examples["answers"].items()},
        kinds=QUESTION_KINDS,
        found=examples["retrieval"],
        maps=examples["maps"],
        goals=goals(metrics),
        things=len(WORLDS[metrics["world"]]),
        settings=[read_json(log.with_name("config.json"))["settings"] for log in (stage1_log, stage2_log)],
        charts={
            "Stage 1": charts(read_log(stage1_log), ("itc", "itm", "itg")),
            "Stage 2": charts(read_log(stage2_log), ("alignment", "lm")),
        },
    )


def examine(run: Path) -> tuple[RunSettings, list[dict[str, Any]], list[Finding]]:
    """Returns the settings, the rows of the log, and the findings about the run.

    Raises:
        UserError: there is no run, or it has not started.
    """
    config = read_config(run)
    settings, rows = from_dict(config["settings"]), read_log(run / "log.jsonl")
    return settings, rows, findings(settings, rows, config.get("sizes", {}).get("vocabulary") or 30523)


def write_findings(
    path: Path, run: str, settings: RunSettings, rows: Sequence[Mapping[str, Any]], found: Sequence[Finding]
) -> None:
    """Writes a page with the results of `examine` and curves, atomically. It needs matplotlib."""
    chance = math.log(settings.train.batch)
    _write(path, "doctor.html", run=run, findings=found, charts=charts(rows, itc_chance=chance))


def duration(seconds: float) -> str:
    """75.2 -> "1 min 15 s"."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{round(seconds) // 60} min {round(seconds) % 60} s"


def _write(path: Path, template: str, **values: Any) -> None:
    # Autoescaping, because captions, questions, names of runs and settings are untrusted text.
    templates = FileSystemLoader(Path(__file__).with_name("templates"))
    pages = Environment(
        loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters |= {"percent": percent, "duration": duration, "data_url": _data_url}
    pages.globals["thumbnail"] = _thumbnail
    write_text(pages.get_template(template).render(values), path)


@lru_cache(maxsize=512)
def _thumbnail(image: str, side: int) -> dict[str, Any]:
    """A picture with `side` px on its longer side, as PNG or JPEG, whichever is smaller."""
    picture = open_picture(Path(image))
    picture.thumbnail((side, side))
    forms = []
    for kind in ("png", "jpeg"):
        stream = BytesIO()
        picture.save(stream, kind, optimize=True, quality=85)
        forms.append(_data_url(stream.getvalue(), f"image/{kind}"))
    return {"src": min(forms, key=len), "width": picture.width, "height": picture.height}


def _data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _caption(example: Mapping[str, Any]) -> dict[str, Any]:
    """A caption as the report shows it; `marks` list which parts of it are right or wrong."""
    caption, references, facts = example["caption"], example["references"], example["facts"]
    marks = [("one of its own captions", True)] if caption in references else []
    if facts is not None:
        judged = judge(caption, facts)
        marks += [("objects", judged.objects), ("attributes", judged.attributes)]
        marks += [] if judged.relation is None else [("relation", judged.relation)]
    shown = {"image": example["image"], "alt": references[0], "said": caption, "reference": references[0]}
    return shown | {"marks": marks, "right": all(mark for _, mark in marks)}


def _answer(example: Mapping[str, Any]) -> dict[str, Any]:
    """An answer as the report shows it, in the form of a caption."""
    right = normalise(example["answer"]) == normalise(example["reference"])
    shown = {"alt": f"what is asked about: {example['question']}", "said": example["answer"]}
    return {**example, **shown, "marks": [("right" if right else "wrong", right)], "right": right}


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
MOST_POINTS = 300  # per line; more could not be distinguished


def charts(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str] = tuple(COLUMNS), itc_chance: float | None = None
) -> list[dict[str, Any]]:
    """Draws a chart for each column of a training log, with held-out values if there are any.

    Args:
        rows: the rows of `log.jsonl`.
        names: names of columns, keys of `COLUMNS`; columns that the log does not contain are left out.
        itc_chance: chance level of the ITC loss; None = it is not drawn.
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
    """Draws lines over steps; the vertical axis starts at zero.

    Args:
        title: title of the chart.
        axis: what the vertical axis shows; a loss is in nats.
        lines: points by name; all lines after the first are dotted, for values measured now and then.
        chance: value of a horizontal dashed line; None = no such line.

    Returns:
        `title`, `svg`, and `alt`, a text summary for readers who cannot see the chart.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no window, no state

    said, stream = [], BytesIO()
    # Text is stored as text, which is small. With a fixed salt and no date, the same log gives the same file.
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


@dataclass(frozen=True)
class Goal:
    """One goal in words. `met` is None if it was not measured."""

    what: str
    wanted: str
    reached: str
    met: bool | None


def goals(metrics: Mapping[str, Any]) -> list[Goal]:
    """The goals for the pictures of a demo, and the values that it reached, from the contents of `metrics.json`."""
    world, retrieval, loss = metrics["world"], metrics["retrieval"], metrics["grounding"]
    right, other = loss["loss_right"], loss["loss_shuffled"]
    recall, what = min(retrieval["itc"][way] for way in WAYS), "recall@1 both ways, ITC alone"
    most_minutes, most_memory, share = {"small": (12, 4, 0.85), "full": (60, 8, 0.4)}[world]
    gains = [retrieval["itm"][way] - retrieval["itc"][way] for way in WAYS]
    reached = f"{100 * gains[0]:+.1f} and {100 * gains[1]:+.1f} points to ITC's"
    exact = metrics["caption"]["objects_and_attributes"]
    halves = ("below half of another picture's", f"{right:.2f} and {other:.2f}", right < other / 2)
    bad = sum(len(run["bad"]) for run in metrics["health"].values())
    minutes, memory = metrics["seconds"]["total"] / 60, metrics["peak_memory_gb"]
    time = (f"at most {most_minutes}", f"{minutes:.1f}", minutes <= most_minutes)
    return [
        _at_least("captions with every object and attribute right", exact, share),
        Goal("caption loss with the right picture", *halves),
        *(_small_world(metrics) if world == "small" else [*_full_world(metrics), _at_least(what, recall, 0.6)]),
        Goal("recall@1 re-ranked by ITM", "ITC's or better, both ways", reached, min(gains) >= 0),
        Goal("bad findings of the doctor, both runs", "0", str(bad), bad == 0),
        Goal("minutes for everything, on two idle cores", *time),
        Goal("memory", f"at most {most_memory}\u00a0GB", f"{memory:.1f}\u00a0GB", memory <= most_memory),
    ]


def percent(share: float | None) -> str:
    """0.4567 -> "45.7 %"; None -> "not measured"."""
    return "not measured" if share is None else f"{100 * share:.1f}\u00a0%"


def _small_world(metrics: Mapping[str, Any]) -> list[Goal]:
    asked, run = metrics["vqa"]["scenes"], metrics["health"]["stage1"]
    blind = max(guesser.get("yes/no", {"accuracy": 0})["accuracy"] for guesser in asked["baselines"].values())
    above_blind = "10 points above the better blind guesser" + (f"'s {percent(blind)}" if "yes/no" in asked else "")
    rank = f"effective rank of {run['queries']} queries after stage 1"
    return [
        _at_least("open questions, zero-shot", asked.get("open", {}).get("accuracy"), 0.6),
        _at_least("yes/no questions, zero-shot", asked.get("yes/no", {}).get("accuracy"), blind + 0.1, above_blind),
        _at_least(rank, run["effective_rank"], 4, "at least 4", "{:.1f}".format),
    ]


def _full_world(metrics: Mapping[str, Any]) -> list[Goal]:
    pointing, found = metrics["pointing"], []
    if "easy-vqa" in metrics["vqa"]:
        asked = metrics["vqa"]["easy-vqa"]
        mine, blind = (way.get("open", way)["accuracy"] for way in (asked, asked["baselines"]["question_only"]))
        wanted = f"above {percent(blind)} (question only)"
        found = [Goal("open questions of easy-vqa, zero-shot", wanted, percent(mine), mine > blind)]
    twice = f"twice the centre's {percent(pointing['centre'])}"
    return [*found, _at_least("points at what a text names", pointing["pointing"], 2 * pointing["centre"], twice)]


def _at_least(
    what: str, value: float | None, least: float, wanted: str = "", words: Callable[[float], str] = percent
) -> Goal:
    reached = "not measured" if value is None else words(value)
    return Goal(what, wanted or f"at least {words(least)}", reached, None if value is None else value >= least)
