"""A trial: one way of a study with one seed, trained by `train_stage` and scored on the test scenes.

OUT/data, OUT/features       scenes, and their frozen features by each encoder
OUT/seed-N/STAGE-WAY         a run; a stage-1 run that several ways share has the name of the first of them
    trained.json             what the finished run depends on; if that differs, only --overwrite trains it again
    scores.json              the figures of every test image
OUT/web, OUT/seed-N/web-WAY  of the study `capfilt` (studies/web.py)
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from openblip2.apps.scenes.draw import Split, draw_scenes
from openblip2.apps.studies import web
from openblip2.apps.studies.design import BOTH, GAP, LOSS, OTHER, SCORES, WAYS, Plan, Study, Way
from openblip2.config import RunSettings, VisionSettings, change, to_dict
from openblip2.data.feature_cache import FeatureCache
from openblip2.data.features import find_records
from openblip2.data.records import Record, read_records
from openblip2.data.rows import RECORDS
from openblip2.data.text import clean_caption
from openblip2.errors import UserError
from openblip2.evaluate.retrieval import score_retrieval
from openblip2.evaluate.validation import GROUP
from openblip2.hardware import compute_dtype, computing, device
from openblip2.inference.captioner import Captioner
from openblip2.inference.load import load
from openblip2.inference.matcher import Matcher
from openblip2.model.build import build_vision
from openblip2.model.likelihood import likelihoods
from openblip2.progress import Progress
from openblip2.runs import cached_json
from openblip2.train.encode import make_cache, whitened
from openblip2.train.recipes import train_stage

DATA_SEED = 0
LOOKS = 5  # validations of a run
OWN = ("train.seed", "train.steps", "data.source", "data.features", "start")  # settings that a study sets itself

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Trial:
    """The outcome of one way with one seed.

    Attributes:
        values: by figure, one for each test image.
        curves: by the name of a validation value, of the last stage trained.
        settings: by stage.
        seconds: of training, by run.
        scoring: seconds of scoring, by run.
    """

    values: dict[str, list[float]]
    curves: dict[str, Points]
    settings: dict[str, RunSettings]
    seconds: dict[str, float]
    scoring: dict[str, float]


@dataclass(frozen=True)
class Work:
    """What all trials of a study share.

    Attributes:
        test: scenes with one caption each.
        features: the folder with the features of each encoder.
    """

    study: Study
    plan: Plan
    out: Path
    train: list[Record]
    test: list[Record]
    features: dict[VisionSettings, Path]
    progress: Progress


def prepare_work(study: Study, plan: Plan, out: Path, progress: Progress) -> Work:
    """Draws the scenes and computes their features, unless they exist.

    Raises:
        UserError: a change to a setting that the study sets itself; errors of drawing and encoding.
    """
    varied = {name for way in study.ways for changes in (way.stage1, way.stage2) for name in changes or ()}
    for name in plan.changes:
        if name in varied or name in OWN:
            raise UserError(
                f"--set {name}: the study {study.name} sets it itself; steps: --stage1-steps, --stage2-steps"
            )
    change(plan.stage1, plan.changes)  # an unknown setting is reported before anything is drawn
    assert plan.scenes is not None
    train = _scenes(out / "data" / "train", plan.scenes, "train")
    test = [
        replace(record, captions=(clean_caption(record.captions[0]),))
        for record in _scenes(out / "data" / "test", plan.test_scenes, "test")
    ]
    work = Work(study, plan, out, train, test, {}, progress)
    for way in (*study.ways, *filter(None, [study.helper])):
        for stage in ("stage1", "stage2"):
            settings = _settings(work, way, stage)
            if settings is not None and settings.vision not in work.features:
                folder = out / "features" / f"{len(work.features)}-{_slug(settings.vision.name.split('/')[-1])}"
                progress.doing(f"loading {settings.vision.name}")
                vision = build_vision(settings, compute_dtype(device(), settings.train.precision)).to(device())
                make_cache(vision, [*train, *test], settings, folder, progress, settings.vision.name, replace=True)
                work.features[settings.vision] = folder
    return work


def run_trial(work: Work, way: Way, seed: int) -> Trial:
    """Trains and scores a way, unless that has been done."""
    folder, before = work.out / f"seed-{seed}", None
    values: dict[str, list[float]] = {}
    curves: dict[str, Points] = {}
    settings: dict[str, RunSettings] = {}
    seconds: dict[str, float] = {}
    scoring: dict[str, float] = {}
    half = _web(work, way, seed, scoring) if way.web else None
    for stage in ("stage1", "stage2"):
        found = _settings(work, way, stage)
        if found is None:
            continue
        same = (w for w in work.study.ways if (w.stage1, w.web) == (way.stage1, way.web))
        owner = next(same, way) if stage == "stage1" else way
        run = folder / f"{stage}-{_slug(owner.name)}"
        found = change(found, {"train.seed": seed, "data.features": str(work.features[found.vision])})
        records = work.train if stage == "stage1" else work.train[: way.pictures]
        records = records if half is None else half
        if before is not None:
            found = change(found, {"start": str(before[0])})
        work.progress.say(f"{run}: {way.name}, seed {seed}")
        done = _trained(work, found, records, run, before[1] if before else None, half is not None)
        before = (run, done["of"])
        settings[stage], seconds[str(run)], curves = found, done["seconds"], _curves(run)
        if stage in work.study.scored:
            scores = _scored(work, run, done["of"], work.features[found.vision])
            values |= scores["values"]
            scoring[f"{run}, scored"] = scores["seconds"]
    return Trial(values, curves, settings, seconds, scoring)


def _settings(work: Work, way: Way, stage: str) -> RunSettings | None:
    """The settings of a way's stage, except seed, features and start; None: it is not trained."""
    changes = way.stage1 if stage == "stage1" else way.stage2
    if changes is None:
        return None
    steps = work.plan.steps.get(stage, work.study.steps[stage])
    last = stage == "stage2" or way.stage2 is None  # the curves of other stages are not used
    common = {
        "data.source": str(work.out / "data"),
        "train.steps": steps,
        "train.validate_every": -(-steps // LOOKS) if last else 0,
        "train.checkpoint_every": 0,
    }
    joins = {"stage1.itm_start_step": steps * 3 // 7} if stage == "stage1" else {}  # as in the laptop preset, 60 of 140
    base = work.plan.stage1 if stage == "stage1" else work.plan.stage2
    return change(base, {**common, **joins, **work.plan.changes, **changes})


def _web(work: Work, way: Way, seed: int, seconds: dict[str, float]) -> list[Record]:
    """The web's half of the images with the captions that a way is trained on; adds the time it took to `seconds`."""
    right, swapped, how = web.right_half(work.train), web.web_half(work.train), web.WAYS[way.web]
    if how is None:
        return right if way.web == "right" else swapped
    assert work.study.helper is not None
    folder, of, runs = work.out / f"seed-{seed}", None, list[Path]()
    for stage in ("stage1", "stage2"):
        found = _settings(work, work.study.helper, stage)
        assert found is not None
        start = {"start": str(runs[0])} if runs else {}
        found = change(found, {"train.seed": seed, "data.features": str(work.features[found.vision]), **start})
        runs.append(folder / f"{stage}-{_slug(work.study.helper.name)}")
        done = _trained(work, found, web.clean_half(work.train), runs[-1], of, True)
        of, seconds[str(runs[-1])] = done["of"], done["seconds"]
    out = folder / f"web-{way.web}"
    made = cached_json(
        folder / f"web-{way.web}.json",
        {"captioner": of, "how": asdict(how), "captions": web.named(swapped)},
        lambda: web.filtered(swapped, work.out / "web", out, runs[1], runs[0], how, work.progress),
        work.plan.overwrite,
    )
    seconds[str(out)] = made["seconds"]
    return web.with_captions(swapped, made["captions"])


def _trained(
    work: Work, settings: RunSettings, records: Sequence[Record], run: Path, start: Any, captions: bool = False
) -> dict[str, Any]:
    """`run/trained.json`, after training unless it exists and depends on the same.

    Args:
        start: what the run that training starts from depends on.
        captions: whether the captions of the records are part of what the run depends on.
    """
    pictures = [*_named(records), *([web.named(records)] if captions else [])]
    of = {"settings": to_dict(settings), "pictures": pictures, "validated": work.plan.validated, "start": start}
    train = partial(train_stage, settings, records, run, work.progress, held_out=work.test[: work.plan.validated])
    return cached_json(run / "trained.json", of, train, work.plan.overwrite)


def _scored(work: Work, run: Path, of: Any, features: Path) -> dict[str, Any]:
    """`run/scores.json`, after scoring unless it exists and depends on the same."""
    best = work.plan.reranked if work.study.reranks else 0

    def score() -> dict[str, Any]:
        work.progress.doing(f"scoring {run}")
        model = load(run)
        if isinstance(model, Matcher):
            return {"values": retrieval_values(model, work.test, best, features, work.progress)}
        return {"values": caption_values(model, work.test, features)}

    of = {"run": of, "test": _named(work.test), "reranked": best}
    return cached_json(run / "scores.json", of, score, work.plan.overwrite)


def retrieval_values(
    matcher: Matcher, test: Sequence[Record], reranked: int, features: Path, progress: Progress
) -> dict[str, list[float]]:
    """By figure, for each test image: 1 if it, or its caption, found its partner among the first k, else 0.

    `reranked` is the number of candidates that ITM scores; 0: ITC alone.
    """
    rows = score_retrieval(matcher, test, reranked, progress, features).samples
    values: dict[str, list[float]] = {}
    for score, named in SCORES.items() if reranked else [("itc", SCORES["itc"])]:
        for k in (1, 5):
            for way, words in WAYS.items():
                ranks = [row[f"{score} first right"] for row in rows if ("caption" in row) == (way == "ir")]
                values[f"recall@{k}, {words}, {named}"] = [float(rank is not None and rank <= k) for rank in ranks]
        sides = (values[f"recall@1, {words}, {named}"] for words in WAYS.values())
        values[BOTH.format(named)] = [sum(pair) / 2 for pair in zip(*sides, strict=True)]
    return values


def caption_values(captioner: Captioner, test: Sequence[Record], features: Path) -> dict[str, list[float]]:
    """By figure, for each test image: the loss of its caption in nats per token, and how much another image adds.

    The other image is the one before it. Each image has the same weight, other than in `validation.grounding`.
    """
    model, prompt = captioner.model, captioner.settings.language.prompts[0]
    assert model.vision is not None
    stored, problems = find_records(test, FeatureCache(features), whitened(model.vision))
    assert not problems, problems
    with torch.inference_mode(), computing(model, captioner.settings.train.precision):
        parts = stored.load().values.split(GROUP)
        soft = torch.cat([model.soft_prompt(features=part.to(device())) for part in parts])
        found: dict[str, list[float]] = {LOSS: [], OTHER: []}
        for losses, prompts in ((found[LOSS], soft), (found[OTHER], soft.roll(1, dims=0))):
            for rows in torch.arange(len(test)).split(GROUP):
                captions = [test[n].captions[0] for n in rows.tolist()]
                losses += likelihoods(model.language, prompts[rows.to(device())], prompt, captions)[0].tolist()
    return found | {GAP: [other - right for right, other in zip(found[LOSS], found[OTHER], strict=True)]}


def _curves(run: Path) -> dict[str, Points]:
    """The values of a run's validations over its steps, by name."""
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "validation" in row]
    names = [name for name, value in rows[0]["validation"].items() if isinstance(value, float)]
    return {name: [(row["step"], row["validation"][name]) for row in rows] for name in names}


def _scenes(folder: Path, count: int, split: Split) -> list[Record]:
    """The first `count` scenes of `split`, drawn unless they exist."""
    if (folder / RECORDS).is_file():
        found, _ = read_records(folder)
        if [record.id for record in found] == [f"{split}-{DATA_SEED}-{n:05d}" for n in range(count)]:
            return found
    return draw_scenes(folder, count, split, DATA_SEED)


def _named(records: Sequence[Record]) -> list[Any]:
    """What identifies a list of scenes: scene n depends on its id alone."""
    return [len(records), records[0].id, records[-1].id]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
