"""The report as a whole, its tables and its loss curves. It shows failures as plainly as successes.

All that comes from outside (captions, questions, answers, names) is escaped; pictures are data URLs.
"""

import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from openblip2.data.records import QUESTION_KINDS
from openblip2.evaluate.levels import ITM_CHANCE
from openblip2.report.curves import Series, chart, smooth
from openblip2.report.examples import shown_answers, shown_captions, shown_maps, shown_retrieval
from openblip2.report.headline import goals_table, opening
from openblip2.report.markup import bar, duration, percent, table

LOSSES = {
    "itc": "Image-text contrast (ITC)",
    "itm": "Image-text matching (ITM)",
    "itg": "Captions from the Q-Former (ITG)",
}
PHASES = {
    "data": "finding or drawing the pictures",
    "features": "frozen features of the pictures",
    "stage1": "stage 1",
    "stage2": "stage 2",
    "evaluation": "scoring",
    "total": "all",
}
CAPTIONS = {
    "exact": "word for word one of the picture's own",
    "objects": "every object right, and none invented",
    "attributes": "every attribute right",
    "objects_and_attributes": "every object and attribute right",
    "relations": "no relation stated wrongly",
}


def write_report(
    path: Path, metrics: Mapping[str, Any], examples: Mapping[str, Any], stage1_log: Path, stage2_log: Path
) -> None:
    """Writes the report of a demo, whole or not at all.

    Args:
        path: the HTML file.
        metrics, examples: as `demo.run_demo` gathers them; the first become `metrics.json`.
        stage1_log, stage2_log: the `log.jsonl` of both runs, each beside its run's `config.json`.

    Raises:
        UserError: a picture of the examples can no longer be opened.
    """
    parts = {
        "Captions": _captions(metrics["caption"], examples["captions"]),
        "Questions and answers": _questions(metrics, examples),
        "Retrieval": _retrieval(metrics["retrieval"], examples["retrieval"]),
        "Goals": goals_table(metrics),
        "Where it looks": _looks(metrics["pointing"]) + shown_maps(examples["maps"]),
        "Training": _health(metrics["health"]) + _curves(stage1_log, stage2_log),
        "Does it look at the picture?": _grounding(metrics["grounding"]),
        "Time and memory": _time(metrics),
    }
    links = "".join(f'<a href="#{_anchor(name)}">{name}</a> ' for name in parts)
    sections = [
        f'<section aria-labelledby="{_anchor(name)}"><h2 id="{_anchor(name)}">{name}</h2>{part}</section>'
        for name, part in parts.items()
    ]
    first = opening(metrics, stage1_log, stage2_log)
    page = Template((files("openblip2.report") / "page.html").read_text(encoding="utf-8")).substitute(
        title="openblip2 demo: what was learnt",
        body="\n".join([first, f'<nav aria-label="Sections">{links}</nav>', *sections]),
    )
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(page, encoding="utf-8")
    os.replace(fresh, path)


def _captions(found: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [what.capitalize(), percent(found[name]), percent(found["chance"][name])] for name, what in CAPTIONS.items()
    ]
    return (
        f"<p>Greedy captions of {found['n']} held-out pictures. Chance: the same captions, each held to "
        "another of the pictures.</p>"
        + table(["Share of captions", "this run", "chance"], rows)
        + shown_captions(examples)
    )


def _questions(metrics: Mapping[str, Any], examples: Mapping[str, Any]) -> str:
    if not metrics["vqa"]:
        return "<p>Not measured: no questions come with this corpus.</p>"
    sets = [_asked(name, found, examples["answers"][name]) for name, found in metrics["vqa"].items()]
    return (
        "<p>An answer counts when it is the reference's, case, articles and punctuation aside. Beside it two "
        "guessers that have read all training questions but see no picture: one gives the commonest answer "
        "to the same question, the other the commonest answer of all.</p>" + "".join(sets)
    )


def _asked(name: str, found: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> str:
    columns = (found, found["baselines"]["question_only"], found["baselines"]["majority"])
    rows = [["all questions", str(found["n"]), *(percent(scores["accuracy"]) for scores in columns)]]
    rows += [
        [
            f"{kind} questions",
            str(found[kind]["n"]),
            *(percent(scores[kind]["accuracy"]) for scores in columns),
        ]
        for kind in QUESTION_KINDS
        if kind in found
    ]
    told = "Zero-shot: it was trained on captions only, never on a question. " if found["zero_shot"] else ""
    form = escape(found["prompt"].replace("{}", "…"))
    return (
        f"<h3>{escape(name)}</h3><p>{told}Asked as <code>{form}</code></p>"
        + table(["", "n", "this run", "question only", "commonest answer"], rows)
        + shown_answers(answers)
    )


def _retrieval(found: Mapping[str, Any], examples: Mapping[str, Any]) -> str:
    columns = {"tr@1": 1, "tr@5": 5, "ir@1": 1, "ir@5": 5}
    rows = [
        ["ITC alone", *(percent(found["itc"][name]) for name in columns)],
        *(
            [f"best {found[key]['reranked']} re-ranked by {by}", *(percent(found[key][name]) for name in columns)]
            for key, by in (("itm", "ITM"), ("itm+itc", "ITM + ITC"))
        ),
        ["chance", *(percent(min(1, k * found["chance"])) for k in columns.values())],
    ]
    head = ["", "caption at 1st place", "caption in first 5", "picture at 1st place", "picture in first 5"]
    return (
        f"<p>{found['n']} held-out pictures and the first caption of each: find one by the other. Pictures "
        "of the very same caption count as right.</p>" + table(head, rows) + shown_retrieval(examples)
    )


def _looks(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "<p>The pointing game was not played: nobody has said where things are in these pictures.</p>"
    names = {
        "pointing": "this run",
        "chance": "any place at random",
        "centre": "the picture's middle",
        "best fixed place": "the one place that is right most often, which nobody could know",
    }
    return (
        f"<p>The pointing game: what the ITC score of {found['texts']} texts such as \u201ca red cat\u201d depends on "
        f"most, in {found['n']} held-out pictures: does it lie on what is named?</p>"
        + table(["", "on the object"], [[what, percent(found[name])] for name, what in names.items()])
    )


def _health(found: Mapping[str, Any]) -> str:
    ranks = [
        f"<p>Effective rank of the {run['queries']} queries after {stage.replace('stage', 'stage ')}: "
        f"{run['effective_rank']:.1f} (1: all queries say the same).</p>"
        for stage, run in found.items()
        if run["effective_rank"] is not None
    ]
    bad = [f"<li>{stage}: {escape(line)}</li>" for stage, run in found.items() for line in run["bad"]]
    told = f"<p>What <code>openblip2 doctor</code> finds bad:</p><ul>{''.join(bad)}</ul>"
    return "".join(ranks) + (told if bad else "<p><code>openblip2 doctor</code> finds nothing bad in either run.</p>")


def _curves(stage1_log: Path, stage2_log: Path) -> str:
    first, second = _rows(stage1_log), _rows(stage2_log)
    charts = [
        chart(
            title,
            [_trained(first, loss), Series("held out", _held_out(first, loss), dotted=True)],
            ("chance", ITM_CHANCE) if loss == "itm" else None,
        )
        for loss, title in LOSSES.items()
    ]
    last = chart(
        "Captions from the language model",
        [
            _trained(second, "lm"),
            Series("held out, right picture", _held_out(second, "loss_right"), dotted=True),
            Series("held out, another picture", _held_out(second, "loss_shuffled"), dotted=True),
        ],
    )
    stages = {"Stage 1": "".join(charts), "Stage 2": last}
    return "".join(f'<h3>{name}</h3><div class="charts">{part}</div>' for name, part in stages.items())


def _trained(rows: Sequence[Mapping[str, Any]], loss: str) -> Series:
    points = [(row["step"], row[loss]) for row in rows if loss in row]
    reach = len(points) // 50
    name = f"training, mean of {2 * reach + 1} steps" if reach else "training"
    return Series(name, smooth(points, reach))


def _held_out(rows: Sequence[Mapping[str, Any]], loss: str) -> list[tuple[float, float]]:
    return [(row["step"], row["validation"][loss]) for row in rows if "validation" in row]


def _rows(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def _grounding(found: Mapping[str, Any]) -> str:
    verdict = found["verdict"][:1].upper() + found["verdict"][1:]
    rows = [
        ["with the right picture", f"{found['loss_right']:.3f}"],
        ["with another picture", f"{found['loss_shuffled']:.3f}"],
    ]
    return (
        f"<p><strong>{escape(verdict)}.</strong></p>"
        f"<p>The loss of the true caption of {found['n']} held-out pictures, once behind the right picture "
        "and once behind another. A model that writes what captions usually say, and does not look, scores "
        "the same on both.</p>" + table(["Caption loss, nats a token", ""], rows)
    )


def _time(metrics: Mapping[str, Any]) -> str:
    seconds = metrics["seconds"]
    rows = [
        [PHASES[name], duration(value), bar(value / max(seconds["total"], 1e-9))] for name, value in seconds.items()
    ]
    told = f"<p>Most memory in use at once: {metrics['peak_memory_gb']:.1f} GB.</p>"
    return table(["", "time", ""], rows) + told


def _anchor(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")
