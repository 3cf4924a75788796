"""`openblip2 ablate`: the paper's ablations and ours at a laptop's size, each by one command.

scenes -> frozen features, once -> each way of the study trained and scored -> OUT/ablation.json, .md and .svg
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openblip2.apps.studies.design import Plan, study_of
from openblip2.apps.studies.report import can_plot, in_words, plot
from openblip2.apps.studies.trial import OWN, Trial, Work, prepare_work, run_trial
from openblip2.apps.studies.verdict import curve, figure, judge
from openblip2.config import RunSettings, to_dict
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
    result = summary(work, trials)
    result["seconds"]["this call"] = round(time.perf_counter() - began, 1)
    write_json(result, out / "ablation.json")
    (out / "ablation.md").write_text(in_words(result), encoding="utf-8")
    if can_plot():
        plot(result, out / "ablation.svg")
    else:
        progress.say("no plot: pip install 'openblip2[plots]', and the same command draws it without training again")
    return result


def summary(work: Work, trials: Mapping[str, Sequence[Trial]]) -> dict[str, Any]:
    """Figures, curves, settings that differ, seconds and verdicts of all ways, as plain values."""
    study, plan = work.study, work.plan
    every = [trial for found in trials.values() for trial in found]
    differing = _differing({name: found[0] for name, found in trials.items()})
    ways = {
        way.name: {
            "pictures": way.pictures,
            "differs": differing[way.name],
            "figures": {name: figure(trials[way.name], name) for name in trials[way.name][0].values},
            "curves": _curves(trials[way.name]),
            "seconds": round(sum(sum(t.seconds.values()) for t in trials[way.name]) / len(plan.seeds), 1),
        }
        for way in study.ways
    }
    runs = {run: seconds for trial in every for run, seconds in (trial.seconds | trial.scoring).items()}
    return {
        "study": study.name,
        "question": study.question,
        "pictures": {"train": len(work.train), "test": len(work.test), "validated": plan.validated},
        "seeds": list(plan.seeds),
        "steps": {
            stage: [settings.train.steps, settings.train.batch]
            for trial in reversed(every)
            for stage, settings in trial.settings.items()
        },
        "models": _models(every),
        "ways": ways,
        "claims": [judge(claim, trials[claim.better], trials[claim.worse]) for claim in study.claims],
        "notes": list(study.notes),
        "seconds": {"training and scoring": round(sum(runs.values()), 1)},
    }


def _curves(trials: Sequence[Trial]) -> dict[str, list[list[tuple[int, float]]]]:
    """For each seed: caption losses with the right and with another image, or recall@1, the mean of both directions."""
    if "loss_right" in trials[0].curves:
        return {name: curve(trials, name) for name in ("loss_right", "loss_shuffled")}
    sides = (curve(trials, "tr@1"), curve(trials, "ir@1"))
    return {
        "recall": [
            [(step, (one + other) / 2) for (step, one), (_, other) in zip(first, second, strict=True)]
            for first, second in zip(*sides, strict=True)
        ]
    }


def _models(trials: Sequence[Trial]) -> dict[str, list[str]]:
    """The names of the models by purpose; several names if the ways differ in a model."""
    names: dict[str, set[str]] = {}
    for trial in trials:
        for stage, settings in trial.settings.items():
            names.setdefault("image encoder", set()).add(settings.vision.name)
            names.setdefault("Q-Former from", set()).add(settings.qformer.start)
            if stage == "stage2":
                names.setdefault("language model", set()).add(settings.language.name)
    return {label: sorted(found) for label, found in names.items()}


def _differing(trials: Mapping[str, Trial]) -> dict[str, dict[str, dict[str, Any] | None]]:
    """For each way and stage, the settings that are not the same in all ways that train it; None: not trained."""
    found: dict[str, dict[str, dict[str, Any] | None]] = {name: {} for name in trials}
    for stage in ("stage1", "stage2"):
        flat = {name: _flat(trial.settings[stage]) for name, trial in trials.items() if stage in trial.settings}
        if not flat:
            continue
        first = next(iter(flat.values()))
        names = [key for key in first if any(values[key] != first[key] for values in flat.values())]
        for way, stages in found.items():
            stages[stage] = {key: flat[way][key] for key in names} if way in flat else None
    return found


def _flat(settings: RunSettings) -> dict[str, Any]:
    """Settings by dotted name, without those that a study sets itself."""
    found: dict[str, Any] = {}
    for name, value in to_dict(settings).items():
        found |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return {name: value for name, value in found.items() if name not in OWN}
