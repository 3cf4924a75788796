"""A trial: one way of a study with one seed, trained by `train_stage` and scored on the test scenes.

OUT/data, OUT/features       scenes, and their frozen features by each encoder
OUT/seed-N/STAGE-WAY         a run; a stage-1 run that several ways share has the name of the first of them
    trained.json             what the finished run depends on; if that differs, only --overwrite trains it again
    scores.json              the figures of every test image
OUT/web, OUT/seed-N/web-WAY  of the study `capfilt` (studies/web.py)
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from openblip2.apps.scenes.draw import Split, draw_scenes
from openblip2.apps.studies import web
from openblip2.apps.studies.study import BOTH, GAP, LOSS, OTHER, SCORES, WAYS, Plan, Study, Way
from openblip2.config import RunSettings, VisionSettings, change, to_dict
from openblip2.data.features import FeatureCache, find_records
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
        values: By figure, one for each test image.
        curves: By the name of a validation value, of the last stage trained.
        settings: By stage.
    """

    values: dict[str, list[float]]
    curves: dict[str, Points]
    settings: dict[str, RunSettings]


@dataclass(frozen=True)
class Run:
    """A trained run; `of` is what it depends on."""

    folder: Path
    settings: RunSettings
    of: Any


@dataclass(frozen=True)
class Work:
    """What all trials of a study share.

    Attributes:
        test: scenes with one caption each.
        features: the folder with the features of each encoder.
        seconds: that training and scoring took, by the file with the result.
    """

    study: Study
    plan: Plan
    out: Path
    train: list[Record]
    test: list[Record]
    progress: Progress
    features: dict[VisionSettings, Path] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


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
    work = Work(study, plan, out, train, test, progress)
    for way in (*study.ways, *filter(None, [study.helper])):
        for stage in ("stage1", "stage2"):
            if getattr(way, stage) is None:
                continue
            settings = _settings(work, way, stage)
            if settings.vision not in work.features:
                folder = out / "features" / f"{len(work.features)}-{_slug(settings.vision.name.split('/')[-1])}"
                progress.doing(f"loading {settings.vision.name}")
                vision = build_vision(settings, compute_dtype(device(), settings.train.precision)).to(device())
                make_cache(vision, [*train, *test], settings, folder, progress, settings.vision.name, replace=True)
                work.features[settings.vision] = folder
    return work


def run_trial(work: Work, way: Way, seed: int) -> Trial:
    """Trains and scores a way, unless that has been done."""
    values: dict[str, list[float]] = {}
    curves: dict[str, Points] = {}
    settings: dict[str, RunSettings] = {}
    half = _web(work, way, seed) if way.web else None
    run: Run | None = None
    for stage in ("stage1", "stage2"):
        if getattr(way, stage) is None:
            continue
        records = work.train if stage == "stage1" else work.train[: way.pictures]
        run = _trained(work, way, stage, seed, records if half is None else half, run)
        settings[stage], curves = run.settings, _curves(run.folder)
        if stage in work.study.scored:
            values |= _scored(work, run)
    return Trial(values, curves, settings)


def _settings(work: Work, way: Way, stage: str) -> RunSettings:
    """The settings of a stage that a way trains, except seed, features and start."""
    steps = work.plan.steps.get(stage, work.study.steps[stage])
    last = stage == "stage2" or way.stage2 is None  # the curves of other stages are not used
    common = {
        "data.source": str(work.out / "data"),
        "train.steps": steps,
        "train.validate_every": -(-steps // LOOKS) if last else 0,
        "train.checkpoint_every": 0,
    }
    if stage == "stage1":
        common["stage1.itm_start_step"] = steps * 3 // 7  # as in the laptop preset, 60 of 140
    return change(getattr(work.plan, stage), {**common, **work.plan.changes, **getattr(way, stage)})


def _web(work: Work, way: Way, seed: int) -> list[Record]:
    """The web's half of the images with the captions that a way is trained on."""
    right, swapped, how = web.right_half(work.train), web.web_half(work.train), web.WAYS[way.web]
    if how is None:
        return right if way.web == "right" else swapped
    helper, clean = work.study.helper, web.clean_half(work.train)
    assert helper is not None
    ranker = _trained(work, helper, "stage1", seed, clean, None)
    captioner = _trained(work, helper, "stage2", seed, clean, ranker)
    out = work.out / f"seed-{seed}" / f"web-{way.web}"
    of = {"captioner": captioner.of, "how": asdict(how), "captions": web.digest(swapped)}
    folders = work.out / "web", out, captioner.folder, ranker.folder
    made = _cached(work, out.with_suffix(".json"), of, lambda: web.filtered(swapped, *folders, how, work.progress))
    return web.with_captions(swapped, made["captions"])


def _trained(work: Work, way: Way, stage: str, seed: int, records: Sequence[Record], start: Run | None) -> Run:
    """A stage of a way, trained unless a finished run depends on the same."""
    settings = _settings(work, way, stage)
    same = (w for w in work.study.ways if (w.stage1, w.web) == (way.stage1, way.web))
    owner = next(same, way) if stage == "stage1" else way
    folder = work.out / f"seed-{seed}" / f"{stage}-{_slug(owner.name)}"
    settings = change(settings, {"train.seed": seed, "data.features": str(work.features[settings.vision])})
    if start is not None:
        settings = change(settings, {"start": str(start.folder)})
    work.progress.say(f"{folder}: {way.name}, seed {seed}")
    of = {
        "settings": to_dict(settings),
        "pictures": web.digest(records),
        "validated": work.plan.validated,
        "start": start and start.of,
    }
    train = partial(train_stage, settings, records, folder, work.progress, held_out=work.test[: work.plan.validated])
    return Run(folder, settings, _cached(work, folder / "trained.json", of, train)["of"])


def _scored(work: Work, run: Run) -> dict[str, list[float]]:
    """The figures of a run for every test image: from `scores.json` if that depends on the same."""
    reranked = work.plan.reranked if work.study.reranks else 0
    features = work.features[run.settings.vision]

    def score() -> dict[str, Any]:
        work.progress.doing(f"scoring {run.folder}")
        model = load(run.folder)
        if isinstance(model, Matcher):
            return {"values": retrieval_values(model, work.test, reranked, features, work.progress)}
        return {"values": caption_values(model, work.test, features)}

    of = {"run": run.of, "test": web.digest(work.test), "reranked": reranked}
    return _cached(work, run.folder / "scores.json", of, score)["values"]


def _cached(work: Work, path: Path, of: Mapping[str, Any], make: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """As `cached_json`; also notes the seconds."""
    found = cached_json(path, of, make, work.plan.overwrite)
    work.seconds[str(path)] = found["seconds"]
    return found


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


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
