"""The part that all studies share: it trains and scores the runs of all compared ways, once with each seed.

OUT/data/WORLD, OUT/features scenes, and their frozen features by each encoder
OUT/seed-N/STAGE-WAY         a run; a run that several ways share has the name of the first of them
    trained.json             what the finished run depends on; if that differs, only --overwrite trains it again
    scores.json, flops.json  figures of the test images (scores-WAY.json if a way adapts the model); FLOPs
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from openblip2.apps.demo.plan import with_steps
from openblip2.apps.scenes.draw import Split, draw_scenes
from openblip2.apps.scenes.vocabulary import World
from openblip2.apps.studies.scores import caption_values, retrieval_values, stored_features, training_flops
from openblip2.apps.studies.study import (
    FLOPS,
    TOKENS,
    TRAINING,
    WRITING,
    Plan,
    Points,
    Run,
    Study,
    Trial,
    Values,
    Way,
    digest_of,
    slug,
)
from openblip2.config import RunSettings, VisionSettings, change
from openblip2.data.records import Record, read_records
from openblip2.data.rows import RECORDS
from openblip2.data.text import clean_caption
from openblip2.errors import UserError
from openblip2.hardware import compute_dtype, device
from openblip2.inference.load import load
from openblip2.inference.matcher import Matcher
from openblip2.model.build import build_vision
from openblip2.progress import Progress
from openblip2.runs import cached_json
from openblip2.train.bookkeeping import read_log
from openblip2.train.encode import make_cache
from openblip2.train.recipes import train_stage
from openblip2.train.start import say_without_effect

DATA_SEED = 0
VALIDATIONS = 5  # per run
FORMAT = 2  # of scores.json: a number that changes with the list of figures
OWN = ("train.seed", "train.steps", "data.source", "data.features", "start")  # settings that a study sets itself


@dataclass(frozen=True)
class Runs:
    """Encodes, trains and scores in one folder. Finished results are read, unless they depend on something else.

    Attributes:
        overwrite: replace results that depend on something else, instead of raising an error.
        seconds: duration of training and scoring, by the file with the result.
    """

    out: Path
    progress: Progress
    overwrite: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    def cached(self, path: Path, of: Mapping[str, Any], make: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        """Like `cached_json`; also stores the seconds."""
        found = cached_json(path, of, make, self.overwrite)
        self.seconds[str(path)] = found["seconds"]
        return found

    def encode(self, settings: RunSettings, records: Sequence[Record], folder: Path) -> Path:
        """Encodes images with the encoder of the settings, and returns the folder with the features."""
        self.progress.doing(f"loading {settings.vision.name}")
        vision = build_vision(settings, compute_dtype(device(), settings.train.precision)).to(device())
        make_cache(vision, records, settings, folder, self.progress, settings.vision.name, replace=True)
        return folder

    def train(
        self,
        settings: RunSettings,
        records: Sequence[Record],
        folder: Path,
        start: Run | None = None,
        held_out: Sequence[Record] | None = None,
    ) -> Run:
        """Trains a run, unless it is finished and depends on the same settings, images and start.

        Args:
            start: the run that training starts from.
            held_out: the images that it is validated on; None = a fraction of `records`.
        """
        if start is not None:
            settings = change(settings, {"start": str(start.folder)})
        of = {
            "settings": asdict(settings),
            "pictures": digest_of(records),
            "validated": None if held_out is None else len(held_out),
            "start": start and start.of,
        }
        train = partial(train_stage, settings, records, folder, self.progress, held_out=held_out)
        return Run(folder, settings, self.cached(folder / "trained.json", of, train)["of"])


@dataclass(frozen=True)
class Work:
    """What all trials of a study share.

    Attributes:
        test: scenes with one caption each.
        encoded: the folder with the features of each encoder.
    """

    study: Study
    plan: Plan
    runs: Runs
    train: list[Record]
    test: list[Record]
    encoded: dict[VisionSettings, Path] = field(default_factory=dict)

    def features(self, settings: RunSettings) -> Path:
        """The features of all scenes by the encoder of the settings."""
        if settings.vision not in self.encoded:
            name = f"{len(self.encoded)}-{slug(settings.vision.name.split('/')[-1])}"
            folder = self.runs.out / "features" / name
            self.encoded[settings.vision] = self.runs.encode(settings, [*self.train, *self.test], folder)
        return self.encoded[settings.vision]


def prepare_work(study: Study, plan: Plan, out: Path, progress: Progress) -> Work:
    """Draws the scenes, unless they exist.

    Raises:
        UserError: a change to a setting that the study sets itself; errors of drawing.
    """
    varied = {name for way in study.ways for changes in way.stages.values() for name in changes}
    for name in plan.changes:
        if name in varied or name in OWN:
            raise UserError(
                f"--set {name}: the study {study.name} sets this itself; for steps, use --stage1-steps, --stage2-steps"
            )
    # Wrong settings are reported before anything is drawn.
    ways = [change(getattr(plan, s), _changes(plan, way, s)) for way in study.ways for s in way.stages]
    say_without_effect(f"ablate {study.name}", plan.changes, ways, progress, held_out=True)
    assert plan.scenes is not None
    data = out / "data" / plan.world
    train = _scenes(data / "train", plan.scenes, "train", plan.world)
    test = [
        replace(record, captions=(clean_caption(record.captions[0]),))
        for record in _scenes(data / "test", plan.test_scenes, "test", plan.world)
    ]
    return Work(study, plan, Runs(out, progress, plan.overwrite), train, test)


def run_trial(work: Work, way: Way, seed: int) -> Trial:
    """Trains and scores a way, unless that has been done."""
    values: Values = {}
    costs = {FLOPS: 0.0, TRAINING: 0.0}
    runs = train_way(work, way, seed)
    for stage, run in runs.items():
        costs[FLOPS] += _training_flops(work, run) / 1e12
        costs[TRAINING] += work.runs.seconds[str(run.folder / "trained.json")]
        if stage in work.study.scored:
            found = _scored(work, way, run)
            values |= found["values"]
            costs |= found["costs"]
    last = next(reversed(runs.values()))
    return Trial(values, _curves(last.folder), {stage: run.settings for stage, run in runs.items()}, costs)


def train_way(work: Work, way: Way, seed: int) -> dict[str, Run]:
    """The runs of a way, by stage; each stage starts from the one before."""
    records = work.train if way.records is None else way.records(work)
    runs: dict[str, Run] = {}
    for stage in way.stages:
        settings = _settings(work, way, stage)
        settings = change(settings, {"train.seed": seed, "data.features": str(work.features(settings))})
        folder = work.runs.out / f"seed-{seed}" / f"{stage}-{slug(_owner(work.study, way, stage).name)}"
        work.runs.progress.say(f"{folder}: {way.name}, seed {seed}")
        held_out = work.test[: work.plan.validated]
        runs[stage] = work.runs.train(
            settings, records[: way.pictures.get(stage)], folder, next(reversed(runs.values()), None), held_out
        )
    return runs


def _owner(study: Study, way: Way, stage: str) -> Way:
    """The first way with the same run of a stage. A run also depends on the stage that it starts from."""

    def depends_on(one: Way) -> list[Any]:
        stages = [name for name in one.stages if name <= stage]
        # Only the run of the last stage is validated (`_settings`).
        return [one.records, list(one.stages)[-1] == stage, *((one.stages[s], one.pictures.get(s)) for s in stages)]

    return next((one for one in study.ways if depends_on(one) == depends_on(way)), way)


def _settings(work: Work, way: Way, stage: str) -> RunSettings:
    """The settings of a stage that a way trains, except seed, features and start."""
    steps = work.plan.steps.get(stage, work.study.steps[stage])
    last = stage == "stage2" or way.stage2 is None  # the curves of other stages are not used
    common = {
        "data.source": str(work.runs.out / "data"),
        "train.validate_every": -(-steps // VALIDATIONS) if last else 0,
        "train.checkpoint_every": 0,
    }
    return change(with_steps(getattr(work.plan, stage), steps), common | _changes(work.plan, way, stage))


def _changes(plan: Plan, way: Way, stage: str) -> dict[str, Any]:
    """The changes to the settings of a stage; stage 1 refuses the settings `stage2.*`."""
    given = {name: value for name, value in plan.changes.items() if stage == "stage2" or "stage2." not in name}
    return {**given, **way.stages[stage]}


def _scored(work: Work, way: Way, run: Run) -> dict[str, Any]:
    """The figures of a run for every test image: from `scores.json` if it depends on the same run and images."""
    reranked = work.plan.reranked if work.study.reranks else 0
    features = work.features(run.settings)

    def score() -> dict[str, Any]:
        work.runs.progress.doing(f"scoring {run.folder}")
        model = load(run.folder)
        if way.adapt is not None:
            way.adapt(model)
        if isinstance(model, Matcher):
            values = retrieval_values(model, work.test, reranked, features, work.runs.progress)
            return {"values": values, "costs": {}}
        stored = stored_features(model, work.test, features)
        values, seconds = caption_values(model, work.test, stored, work.runs.progress)
        return {"values": values, "costs": {TOKENS: float(model.model.tokens), WRITING: seconds}}

    name = "scores.json" if way.adapt is None else f"scores-{slug(way.name)}.json"
    of = {"run": run.of, "test": digest_of(work.test), "reranked": reranked, "figures": FORMAT}
    return work.runs.cached(run.folder / name, of, score)


def _training_flops(work: Work, run: Run) -> float:
    def count() -> dict[str, Any]:
        model = load(run.folder)
        return {"flops": training_flops(model, stored_features(model, work.test, work.features(run.settings)))}

    of = {"run": run.of, "test": digest_of(work.test)}
    return work.runs.cached(run.folder / "flops.json", of, count)["flops"]


def _curves(run: Path) -> dict[str, Points]:
    """The values of a run's validations over its steps, by name."""
    rows = [row for row in read_log(run / "log.jsonl") if "validation" in row]
    names = [name for name, value in rows[0]["validation"].items() if isinstance(value, float)]
    return {name: [(row["step"], row["validation"][name]) for row in rows] for name in names}


def _scenes(folder: Path, count: int, split: Split, world: World) -> list[Record]:
    """The first `count` scenes of `split`, drawn unless they exist."""
    if (folder / RECORDS).is_file():
        found, _ = read_records(folder)
        if [record.id for record in found] == [f"{split}-{DATA_SEED}-{n:05d}" for n in range(count)]:
            return found
    return draw_scenes(folder, count, split, DATA_SEED, world=world)
