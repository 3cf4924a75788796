"""`openblip2 demo`: trains a Q-Former between two frozen models, and scores the result on unseen pictures.

pictures -> frozen features -> stage 1 -> stage 2 -> metrics.json and report.html
"""

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from openblip2.apps.demo.plan import DemoPlan, announcement, gather_corpus, settings_of
from openblip2.apps.demo.scores import score
from openblip2.apps.report import examine, write_report
from openblip2.config import RunSettings
from openblip2.data.features import Features, find_records
from openblip2.data.records import Record
from openblip2.data.text import clean_caption
from openblip2.errors import UserError, require
from openblip2.hardware import compute_dtype, device, keep_freed_memory, release_freed_memory
from openblip2.inference.captioner import Captioner
from openblip2.inference.load import load
from openblip2.inference.matcher import Matcher
from openblip2.model.build import build_vision
from openblip2.progress import Progress
from openblip2.runs import make_folder, require_absent, write_json
from openblip2.train.encode import make_cache, whitened
from openblip2.train.prepare import prepare
from openblip2.train.recipes import train_stage

OWN = ("data", "features", "stage1", "stage2", "maps", "metrics.json", "report.html")  # all that a demo writes
EXAMPLES = 5  # captions in `metrics.json`, of the first test pictures


def run_demo(out: Path, plan: DemoPlan, progress: Progress, overwrite: bool = False) -> dict[str, Any]:
    """Runs the demo in `out` and returns the contents of `out/metrics.json`. An interrupted demo is continued.

    Args:
        overwrite: Whether to start again if `out` contains a finished or interrupted demo.

    Raises:
        UserError: a required package is missing; the message says how to install it. Or `out` contains other files; or
            a finished demo, or runs with other settings, and `overwrite` is False.
    """
    require("the report", "demo", "matplotlib")  # checked now, not after the training
    require_absent(out / "metrics.json", overwrite)
    # Other files show that this is not a demo's folder: its `data` or `features` must not be replaced.
    if others := sorted(p.name for p in out.glob("[!.]*") if p.name not in OWN):
        raise UserError(f"{out} contains {others[0]}, which is not part of a demo: give another --out")
    make_folder(out)
    progress.say(announcement(plan, out))
    keep_freed_memory()
    seconds: dict[str, float] = {}
    stage1, stage2 = settings_of(plan, out)
    with _timed(seconds, "data"):
        corpus = gather_corpus(plan, out / "data")
        progress.say(f"{len(corpus.train)} pictures to train on, {len(corpus.test)} held out")
    with _timed(seconds, "features"):
        vision = build_vision(stage1, compute_dtype(device(), stage1.train.precision)).to(device())
        prepare(stage1, corpus.train, vision, out / "stage1", out / "features", progress)
        test = _cleaned(_encode(vision, corpus.test, stage1, out, "test", progress))
        asked = {
            name: _of_test(test, _asked_pictures(test.records, plan))
            if records is corpus.test
            else _encode(vision, _asked_pictures(records, plan), stage1, out, f"asked-{name}", progress)
            for name, (_, records) in corpus.questions.items()
        }
        del vision
    for stage, settings in (("stage1", stage1), ("stage2", stage2)):
        with _timed(seconds, stage):
            resume = not overwrite and (out / stage / "config.json").exists()
            train_stage(settings, corpus.train, out / stage, progress, resume, out / "features")
    release_freed_memory()
    with _timed(seconds, "evaluation"):
        progress.say("scoring on held-out pictures")
        matcher, captioner = load(out / "stage1"), load(out / "stage2")
        assert isinstance(matcher, Matcher)
        assert isinstance(captioner, Captioner)
        found, examples = score(matcher, captioner, test, asked, corpus, plan, out / "maps", progress)
    pictures = {"train": len(corpus.train), "test": len(test)}
    metrics: dict[str, Any] = {"world": plan.world, "pictures": pictures} | found
    metrics["health"] = {stage: _health(out / stage) for stage in ("stage1", "stage2")}
    metrics["examples"] = [
        {"image": one["image"], "caption": one["caption"], "reference": one["references"][0]}
        for one in examples["captions"][:EXAMPLES]
    ]
    metrics["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    metrics["seconds"]["total"] = round(sum(seconds.values()), 1)
    metrics["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    write_json(metrics, out / "metrics.json")
    write_report(out / "report.html", metrics, examples, out / "stage1" / "log.jsonl", out / "stage2" / "log.jsonl")
    return metrics


def _encode(vision, records: list[Record], settings: RunSettings, out: Path, name: str, progress: Progress) -> Features:
    cache = make_cache(vision, records, settings, out / "features" / name, progress, name, replace=True)
    features, problems = find_records(records, cache, whitened(vision))
    for line in problems:
        progress.say(f"skipped: {line}")
    return features.load()


def _cleaned(features: Features) -> Features:
    """Cleans the captions as the models expect them."""
    records = [replace(r, captions=tuple(clean_caption(c) for c in r.captions)) for r in features.records]
    return Features(records, features.values)


def _asked_pictures(records: Sequence[Record], plan: DemoPlan) -> list[Record]:
    """Pictures with one question each, enough for `plan.asked` questions."""
    random = Random(plan.seed)
    chosen = random.sample(list(records), min(plan.asked, len(records)))
    return [replace(record, questions=(random.choice(record.questions),)) for record in chosen]


def _of_test(test: Features, asked: Sequence[Record]) -> Features:
    """Features of some of the test pictures, which have been computed already."""
    rows = {record.id: row for row, record in enumerate(test.records)}
    return Features(list(asked), test.values[[rows[record.id] for record in asked]])


def _health(run: Path) -> dict[str, Any]:
    """The doctor's bad findings about a run, and the effective rank of its queries in the last validation, if known."""
    settings, rows, found = examine(run)
    ranks = [row["validation"]["effective_rank"] for row in rows if "effective_rank" in row.get("validation", {})]
    return {
        "bad": [one.in_words() for one in found if one.level == "bad"],
        "effective_rank": ranks[-1] if ranks else None,
        "queries": settings.qformer.queries,
    }


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - began
