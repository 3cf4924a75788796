"""How much of everything the demo takes, and the pictures it is about."""

from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal

from openblip2.config import RunSettings, change
from openblip2.data.corpora import easy_vqa_records, stamps_records
from openblip2.data.records import Record
from openblip2.data.scenes.draw import draw_scenes
from openblip2.presets import preset

# The stamps are 667 pictures to train on: the scenes' steps would show each of them dozens of times.
STAMPS = {
    "stage1": {
        "train.steps": 60,
        "stage1.matching_from": 20,
        "train.validate_every": 20,
        "optim.lr": 2e-4,
        "qformer.dropout": 0.1,
    },
    "stage2": {"train.steps": 60, "train.validate_every": 20, "qformer.dropout": 0.1},
}


@dataclass(frozen=True)
class Plan:
    """How much of everything. The defaults are the laptop's."""

    corpus: Literal["scenes", "stamps"] = "scenes"
    seed: int = 0
    train_scenes: int = 4000
    test_scenes: int = 500
    train_easy_vqa: int = 400  # of its 4,000 training pictures, as captions; its questions are never trained on
    asked: int = 400  # questions of each data set, drawn from its test part
    reranked: int = 16  # ITM looks at this many candidates
    pointed: int = 100  # test pictures of the pointing game
    looked: int = 9  # pictures whose maps are drawn
    stage1: RunSettings = field(default_factory=lambda: preset("stage1", "laptop"))
    stage2: RunSettings = field(default_factory=lambda: preset("stage2", "laptop"))


@dataclass(frozen=True)
class Corpus:
    """What is trained on; what is scored; questions by data set with those that a blind guesser may read."""

    train: list[Record]
    test: list[Record]
    questions: dict[str, tuple[list[Record], list[Record]]]  # data set -> (training pictures, test pictures)
    skipped: list[str]


def settings_of(plan: Plan, out: Path) -> tuple[RunSettings, RunSettings]:
    """The settings of both stages, bound to this demo's folders and seed."""
    common = {"data.source": str(out / "data"), "train.seed": plan.seed}
    own = STAMPS if plan.corpus == "stamps" else {"stage1": {}, "stage2": {}}
    return (
        change(plan.stage1, {**common, **own["stage1"]}),
        change(plan.stage2, {**common, **own["stage2"], "start": str(out / "stage1")}),
    )


def gather_corpus(plan: Plan, folder: Path) -> Corpus:
    """Draws or finds the pictures: training and test never share a noun with a colour, or a group of look-alikes."""
    if plan.corpus == "stamps":
        stamps = stamps_records(seed=plan.seed)
        return Corpus(stamps.train, stamps.test, {}, stamps.skipped)
    scenes = draw_scenes(folder / "train", plan.train_scenes, "train", plan.seed)
    test = draw_scenes(folder / "test", plan.test_scenes, "test", plan.seed)
    easy, easy_test = easy_vqa_records("train"), easy_vqa_records("test")
    captioned = Random(plan.seed).sample(easy, min(plan.train_easy_vqa, len(easy)))
    questions = {"scenes": (scenes, test), "easy-vqa": (easy, easy_test)}
    return Corpus(scenes + captioned, test, questions, [])
