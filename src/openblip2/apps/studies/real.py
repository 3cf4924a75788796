"""`openblip2 bench-real`: both stages on real images of four sources, by cross-validation, with intervals.

packages -> images in groups of near-duplicates -> for each fold: stage 1 on all sources, stage 1 on stamps alone, and
stage 2 after the first -> the scores on the held-out stamps of all folds together.

Stage 1 has ITC alone, in batches of 128. With 5,000 short captions, ITM stays at chance level for hundreds of steps,
and larger batches improve retrieval most in the same time (docs/decisions.md, "Real pictures").

The test images of a fold share no group with its training images. A caption may be in both; scores are also given for
stamps with captions that were trained on and for stamps with new captions.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from openblip2.apps.corpora.fetch import fetch_packages
from openblip2.apps.corpora.prepare import by_fold, prepare_images
from openblip2.apps.studies.scores import hits
from openblip2.apps.studies.trials import Runs
from openblip2.config import RunSettings, change
from openblip2.data.records import Record, read_records
from openblip2.data.text import clean_caption
from openblip2.errors import UserError, require
from openblip2.evaluate.caption import score_captions
from openblip2.evaluate.result import Options, PartialTexts, difference_interval, mean_interval
from openblip2.evaluate.retrieval import score_retrieval
from openblip2.hardware import keep_freed_memory
from openblip2.inference.captioner import Captioner
from openblip2.inference.load import load
from openblip2.inference.matcher import Matcher
from openblip2.presets import preset
from openblip2.progress import Progress
from openblip2.runs import write_json

SOURCE = "stamps"  # scored for retrieval and captions; the other sources are only used for training
WAYS = ("tr@1", "ir@1")  # image to text, text to image

# Changes to the settings of each training: stage 1 on all sources and on stamps alone, the captioner.
_STAGE1 = {"stage1.objectives": ("itc",), "train.batch": 128}
CHANGES: dict[str, dict[str, Any]] = {
    "joint": {"train.steps": 100, **_STAGE1},
    "alone": {"train.steps": 30, **_STAGE1},
    "captions": {"train.steps": 60},
}


@dataclass(frozen=True)
class RealPlan:
    """The sizes of the study.

    Attributes:
        k: number of folds.
        folds: the folds that are run; the others are left out of the figures.
        seed: seed of the folds and of training.
        changes: changes to the settings, as in `CHANGES`.
        overwrite: train runs again if they have other settings or data.
        stage1: settings of stage 1.
        stage2: settings of the captioner.
    """

    k: int = 5
    folds: tuple[int, ...] = (0, 1, 2, 3, 4)
    seed: int = 0
    overwrite: bool = False
    changes: Mapping[str, dict[str, Any]] = field(default_factory=lambda: CHANGES)
    stage1: RunSettings = field(default_factory=lambda: preset("stage1", "laptop"))
    stage2: RunSettings = field(default_factory=lambda: preset("stage2", "laptop"))


def bench_real(out: Path, plan: RealPlan, progress: Progress) -> dict[str, Any]:
    """Runs the study in `out`, continuing where it was interrupted; returns the contents of `out/real.json`.

    Raises:
        UserError: no source can be fetched, or a fold is unknown.
    """
    if not plan.folds or not set(plan.folds) <= set(range(plan.k)):
        raise UserError(f"folds {', '.join(map(str, plan.folds))}: give numbers from 0 to {plan.k - 1}")
    require("scoring captions", "eval", "pycocoevalcap")  # checked now, not after the training
    keep_freed_memory()
    records = gather_images(out, progress)
    parts = by_fold(records, plan.k, plan.seed)
    runs = Runs(out, progress, plan.overwrite)
    runs.encode(plan.stage1, records, out / "features")
    rows: dict[str, list[dict[str, Any]]] = {}
    for number in plan.folds:
        progress.say(f"fold {number + 1} of {plan.k}")
        test = [record for record in parts[number] if _source(record) == SOURCE]
        train = [record for n, part in enumerate(parts) if n != number for record in part]
        for name, found in _fold(runs, number, train, test, plan).items():
            rows.setdefault(name, []).extend(found)
    figures = real_summary(rows, plan) | {"pictures": dict(Counter(map(_source, records)))}
    write_json(figures, out / "real.json")
    (out / "real.md").write_text(real_in_words(figures), encoding="utf-8")
    return figures


def gather_images(out: Path, progress: Progress) -> list[Record]:
    """The images in `out/data`, which are fetched and prepared if they do not exist."""
    if not (out / "data" / "records.jsonl").is_file():
        for line in fetch_packages(out / "packages", say=progress.say):
            progress.say(f"left out: {line}")
        progress.doing("preparing pictures")
        found = prepare_images(out / "packages", out / "data")
        progress.say(f"{len(found.records)} pictures; {len(found.skipped)} were skipped")
    records, skipped = read_records(out / "data")
    for line in skipped:
        progress.say(f"skipped: {line}")
    return [replace(r, captions=tuple(clean_caption(c) for c in r.captions)) for r in records]


def _fold(
    runs: Runs, number: int, train: list[Record], test: list[Record], plan: RealPlan
) -> dict[str, list[dict[str, Any]]]:
    """Trains the missing runs of a fold and scores them; returns rows of samples, by the name of the run.

    Each row also has its fold, the group of its image, and whether one of its captions was trained on.
    """
    folder, features = runs.out / f"fold-{number}", runs.out / "features"
    stamps = [record for record in train if _source(record) == SOURCE]
    common = {"data.features": str(features), "train.seed": plan.seed}
    first, rows = {}, {}
    for name, part in (("joint", train), ("alone", stamps)):
        first[name] = runs.train(change(plan.stage1, common | plan.changes[name]), part, folder / name / "stage1")
        matcher = load(first[name].folder)
        assert isinstance(matcher, Matcher)
        rows[name] = score_retrieval(matcher, test, Options(rerank=0, features=features), runs.progress).samples
    settings = change(plan.stage2, common | plan.changes["captions"])
    captioner = load(runs.train(settings, train, folder / "joint" / "stage2", first["joint"]).folder)
    assert isinstance(captioner, Captioner)
    rows["captions"] = score_captions(captioner, test, Options(beams=1), runs.progress, PartialTexts()).samples

    known = {caption for record in train for caption in record.captions}
    tested = {record.id: record for record in test}
    for row in (row for some in rows.values() for row in some):
        record = tested[row["image"]]
        captions = [row["caption"]] if "caption" in row and "references" not in row else record.captions
        row |= {"fold": number, "group": (record.facts or {}).get("group")}
        row["known"] = not known.isdisjoint(captions)
    return rows


def real_summary(rows: dict[str, list[dict[str, Any]]], plan: RealPlan) -> dict[str, Any]:
    """Scores with intervals over groups, and the differences that the study measures, paired by sample."""
    scores, differences = {}, {}
    for way in WAYS:
        right = {}
        for name in ("joint", "alone"):
            right[name], groups = _first_right(rows[name], way)
            scores[f"{name}: {way}"] = mean_interval(right[name], groups)
            for known, kind in ((True, "known captions"), (False, "new captions")):
                some, of = _first_right([row for row in rows[name] if row["known"] == known], way)
                if len(some):
                    scores[f"{name}: {way}, {kind}"] = mean_interval(some, of)
        differences[f"joint less alone, {way}"] = difference_interval(right["joint"], right["alone"], groups)
    captions = rows["captions"]
    groups = [row["group"] for row in captions]
    scores["captions: CIDEr-D"] = mean_interval(np.array([row["CIDEr-D"] for row in captions]), groups)
    exact = np.array([row["caption"] in row["references"] for row in captions])
    scores["captions: exactly a stamp's own"] = mean_interval(exact, groups)
    counts = [sum(row["fold"] == n for row in captions) for n in plan.folds]
    return {
        "folds": list(plan.folds),
        "k": plan.k,
        "scores": {name: asdict(score) for name, score in scores.items()},
        "differences": {name: asdict(difference) for name, difference in differences.items()},
        "stamps": sum(counts),
        "chance": float(np.mean([1 / count for count in counts])),
    }


def _first_right(rows: Sequence[dict[str, Any]], way: str) -> tuple[np.ndarray, list[Any]]:
    """`hits` of the images ("tr@1") or texts ("ir@1"), and the group of each."""
    groups = [row["group"] for row in rows if ("caption" in row) == (way == "ir@1")]
    return np.array(hits(rows, way[:2], "itc")), groups


def real_in_words(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    sources = ", ".join(f"{count:,} {name}" for name, count in figures["pictures"].items())
    lines = [
        f"{len(figures['folds'])} of {figures['k']} folds, {figures['stamps']} held-out stamps; trained on the rest of "
        f"{sources}. Recall among a fold's stamps, chance {100 * figures['chance']:.2f} %. 95 % intervals over groups.",
        "",
        "| figure | | 95 % interval |",
        "|---|---|---|",
    ]
    for kind, sign in (("scores", ""), ("differences", "+")):
        for name, found in figures[kind].items():
            value = f"{100 * found['score']:{sign}.1f}"
            lines.append(f"| {name} | {value} | {100 * found['low']:{sign}.1f} to {100 * found['high']:{sign}.1f} |")
    return "\n".join(lines) + "\n"


def _source(record: Record) -> str:
    return str((record.facts or {}).get("source"))
