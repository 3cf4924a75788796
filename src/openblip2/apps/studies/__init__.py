"""`openblip2 ablate`: the paper's ablations and ours at laptop size, one command for each.

scenes -> frozen features, once -> each way of the study trained and scored -> OUT/ablation.json, .md and .svg
"""

import importlib.util
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from openblip2.apps.studies.design import study_of
from openblip2.apps.studies.study import ASKED, LOWER, RANK, RIGHT, Claim, Plan, Points, Trial
from openblip2.apps.studies.trials import Work, prepare_work, run_trial
from openblip2.config import RunSettings
from openblip2.evaluate.result import difference_interval, mean_interval
from openblip2.hardware import keep_freed_memory
from openblip2.progress import Progress
from openblip2.runs import make_folder, write_json


def ablate(name: str, out: Path, plan: Plan, progress: Progress) -> dict[str, Any]:
    """Runs a study in `out`, continuing where it was interrupted; returns the contents of `out/ablation.json`.

    Raises:
        UserError: an unknown study, or a plan that does not fit it; errors of training and scoring.
    """
    study, plan = study_of(name, plan)
    make_folder(out)
    keep_freed_memory()
    began = time.perf_counter()
    work = prepare_work(study, plan, out, progress)
    trials = {way.name: [run_trial(work, way, seed) for seed in plan.seeds] for way in study.ways}
    result = ablation_summary(work, trials)
    result["seconds"]["this call"] = round(time.perf_counter() - began, 1)
    write_json(result, out / "ablation.json")
    (out / "ablation.md").write_text(ablation_in_words(result), encoding="utf-8")
    if can_plot():
        plot(result, out / "ablation.svg")
    else:
        progress.say("no plot: pip install 'openblip2[plots]' and run the same command again; it does not train again")
    return result


def ablation_summary(work: Work, trials: Mapping[str, Sequence[Trial]]) -> dict[str, Any]:
    """Figures, curves, changed settings, seconds and verdicts of all ways, as plain values."""
    study, plan = work.study, work.plan
    settings = [pair for of_way in trials.values() for pair in of_way[0].settings.items()]
    stages = sorted({stage for stage, _ in settings})
    ways = {
        way.name: {
            "pictures": dict(way.pictures),
            "changes": {stage: way.stages.get(stage) for stage in stages},
            "figures": {name: figure(trials[way.name], name) for name in trials[way.name][0].values},
            "curves": _curves(trials[way.name]),
            "costs": {
                name: mean(trial.costs[name] for trial in trials[way.name]) for name in trials[way.name][0].costs
            },
        }
        for way in study.ways
    }
    return {
        "study": study.name,
        "question": study.question,
        "pictures": {"train": len(work.train), "test": len(work.test), "validated": plan.validated},
        "seeds": list(plan.seeds),
        "steps": dict(sorted((stage, [one.train.steps, one.train.batch]) for stage, one in settings)),
        "models": _models(settings),
        "ways": ways,
        "claims": [judge_claim(claim, trials[claim.better], trials[claim.worse]) for claim in study.claims],
        "notes": list(study.notes),
        "seconds": {"training and scoring": round(sum(work.runs.seconds.values()), 1)},
    }


def figure(trials: Sequence[Trial], name: str) -> dict[str, Any]:
    """A figure of a way: the mean over seeds and test images, its interval over images, and the mean of each seed."""
    return {**asdict(mean_interval(_over_seeds(trials, name))), "seeds": _seeds(trials, name)}


def judge_claim(claim: Claim, better: Sequence[Trial], worse: Sequence[Trial]) -> dict[str, Any]:
    """Whether a claim holds here.

    Two sources of randomness are separated: the choice of test images (95 % intervals, paired bootstrap over images),
    and the seed of training. A claim is decided only if the interval of the paired difference and the difference of
    every seed are on the same side of 0.
    """
    found = difference_interval(_over_seeds(better, claim.figure), _over_seeds(worse, claim.figure))
    seeds = [b - w for b, w in zip(_seeds(better, claim.figure), _seeds(worse, claim.figure), strict=True)]
    if not found.excludes(0):
        verdict = "undecided: the interval of the difference contains 0"
    elif any(np.sign(seed) != np.sign(found.score) for seed in seeds):
        verdict = "undecided: the seeds disagree"
    else:
        verdict = "holds" if (found.score < 0) == (claim.figure in LOWER) else "does not hold"
    difference = {"difference": found.score, "low": found.low, "high": found.high, "n": found.n}
    return {**asdict(claim), **difference, "seeds": seeds, "verdict": verdict}


def _over_seeds(trials: Sequence[Trial], name: str) -> np.ndarray:
    """The mean over seeds for each image: [n]."""
    return np.mean([trial.values[name] for trial in trials], axis=0)


def _seeds(trials: Sequence[Trial], name: str) -> list[float]:
    return [float(np.mean(trial.values[name])) for trial in trials]


def _curves(trials: Sequence[Trial]) -> dict[str, list[Points]]:
    """For each seed: caption losses with the right and with another image, or recall@1, the mean of both directions."""
    if "loss_right" in trials[0].curves:
        return {name: [trial.curves[name] for trial in trials] for name in ("loss_right", "loss_shuffled")}
    sides = [zip(trial.curves["tr@1"], trial.curves["ir@1"], strict=True) for trial in trials]
    return {"recall": [[(step, (tr + ir) / 2) for (step, tr), (_, ir) in side] for side in sides]}


def _models(settings: Sequence[tuple[str, RunSettings]]) -> dict[str, list[str]]:
    """The names of the models by purpose; several names if the ways differ in a model."""
    names = {
        "image encoder": {one.vision.name for _, one in settings},
        "Q-Former from": {one.qformer.start for _, one in settings},
        "language model": {one.language.name for stage, one in settings if stage == "stage2"},
    }
    return {label: sorted(found) for label, found in names.items() if found}


# Distinguishable with any colour vision (Okabe and Ito, 2008); lines also differ in their marks, for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "osD^vPX"


def can_plot() -> bool:
    """Whether matplotlib is installed, the optional extra `plots`."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draws the contents of `ablation.json` as SVG or PNG, by the suffix of `path`.

    The left panel has a line for each way over the steps: the mean over seeds, with a band from the lowest to the
    highest seed; dashed for another image. Then there is a panel for each figure of the claims, with the score of
    each way and its 95 % interval over images.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no state

    ways, figures = result["ways"], list(dict.fromkeys(claim["figure"] for claim in result["claims"]))
    page = Figure(figsize=(5.2 + 3.4 * len(figures), 3.9), layout="constrained")
    panels = page.subplots(1, 1 + len(figures), squeeze=False, width_ratios=[1.5] + [1] * len(figures))
    first, *others = panels[0]  # a study of one number has no claims, and so only the first panel
    page.suptitle(sentence(result["question"]), fontsize=12, fontweight="bold")
    looks = {name: (COLOURS[n % len(COLOURS)], MARKS[n % len(MARKS)]) for n, name in enumerate(ways)}
    _draw_curves(first, ways, looks)
    for panel, figure in zip(others, figures, strict=True):
        scale = 100 if is_share(figure) else 1
        for row, (name, way) in enumerate(ways.items()):
            if figure not in way["figures"]:  # it belongs to a stage that this way does not train
                continue
            found, (colour, mark) = way["figures"][figure], looks[name]
            score, low, high = (scale * found[key] for key in ("score", "low", "high"))
            panel.plot([low, high], [row, row], color=colour, linewidth=2)
            panel.plot([score], [row], mark, color=colour, markersize=7)
            panel.annotate(
                _number(found["score"], figure), (score, row), (0, 8), textcoords="offset points", ha="center"
            )
        panel.set_yticks([])
        panel.set_ylim(len(ways) - 0.4, -0.6)
        panel.set_xlabel(_label(figure), wrap=True)
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
    panel.set_ylabel("caption loss, nats per token" if losses else "recall@1, both ways, ITC alone")
    panel.set_xlabel("step of stage 2 (dashed: with another picture)" if losses else "step of stage 1")
    panel.set_xlim(left=0)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, frameon=False)


def ablation_in_words(result: Mapping[str, Any]) -> str:
    """The contents of `ablation.json` as Markdown, by the template `ablation.md` beside this file."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"sentence": sentence, "thousands": "{:,}".format, "label": _label}
    templates.filters |= {"number": _number, "cell": _cell}
    templates.tests["share"] = is_share
    # Of all ways, in order.
    figures, costs = (
        dict.fromkeys(name for way in result["ways"].values() for name in way[kind]) for kind in ("figures", "costs")
    )
    return templates.get_template("ablation.md").render(result, figures=figures, costs=costs)


def _cell(found: Mapping[str, Any], figure: str) -> str:
    score, low, high = (_number(found[key], figure) for key in ("score", "low", "high"))
    seeds = [_number(pick(found["seeds"]), figure) for pick in (min, max)] if len(found["seeds"]) > 1 else []
    return f"{score} [{low}, {high}{'; ' if seeds else ''}{' to '.join(seeds)}]"


def is_share(figure: str) -> bool:
    """Whether a figure is a fraction in [0, 1], shown in per cent."""
    return figure in (RIGHT, ASKED) or figure.startswith("recall")


def sentence(text: str) -> str:
    """Capitalises the first letter; the others stay as they are."""
    return text[:1].upper() + text[1:]


def _label(figure: str) -> str:
    return figure if figure == RANK else f"{figure}, {'%' if is_share(figure) else 'nats per token'}"


def _number(value: float, figure: str, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" if is_share(figure) else f"{value:{sign}.2f}"
