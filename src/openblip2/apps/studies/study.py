"""The parts of a study: the ways that it compares, claims about them, and its sizes."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openblip2.apps.demo.plan import plan_for
from openblip2.apps.scenes.vocabulary import World
from openblip2.capfilt.models import digest
from openblip2.config import RunSettings
from openblip2.data.records import Record
from openblip2.inference.captioner import Captioner
from openblip2.inference.matcher import Matcher
from openblip2.presets import preset

LOSS = "caption loss, right picture"
OTHER = "caption loss, another picture"
GAP = "caption loss, another picture less right picture"
RIGHT = "captions right in every object and attribute"
ASKED = "questions answered right, zero-shot"
RANK = "effective rank of the visual tokens"
TOKENS, FLOPS = "visual tokens", "training, TFLOP"
TRAINING, WRITING = "training, seconds", "writing a caption, CPU seconds"
LOWER = frozenset({LOSS})  # lower is better; for all other figures higher is better
BOTH = "recall@1, both ways, {}"  # by one of the scores below
SCORES = {"itc": "ITC alone", "itm": "re-ranked by ITM", "itm+itc": "re-ranked by ITM + ITC"}
DIRECTIONS = {"tr": "image to text", "ir": "text to image"}

Points = list[tuple[int, float]]  # the points of a curve: step and value
Values = dict[str, list[float]]  # for each figure, one value per test image


@dataclass(frozen=True)
class Way:
    """One of the ways that a study compares. Ways with the same stage share its run.

    Attributes:
        stage1: changes to the settings of stage 1, by dotted name; None = it is not trained.
        stage2: the same for stage 2.
        pictures: number of images that a stage is trained on, from the beginning; stages that are not listed use all.
        records: returns the images for training from the `trials.Work`; None = the training images.
        adapt: changes the loaded model before it is scored, for ways that use the same run differently.
    """

    name: str
    stage1: Mapping[str, Any] | None = field(default_factory=dict)
    stage2: Mapping[str, Any] | None = None
    pictures: Mapping[str, int] = field(default_factory=dict)
    records: Callable[[Any], list[Record]] | None = None
    adapt: Callable[[Captioner | Matcher], object] | None = None

    @property
    def stages(self) -> dict[str, Mapping[str, Any]]:
        """The changes of each stage that is trained."""
        both = {"stage1": self.stage1, "stage2": self.stage2}
        return {stage: changes for stage, changes in both.items() if changes is not None}


@dataclass(frozen=True)
class Claim:
    """The claim that one way is better than another in one figure; `source` names who makes the claim."""

    says: str
    source: str
    figure: str
    better: str
    worse: str


@dataclass(frozen=True)
class Study:
    """A question, the ways that are compared to answer it, and claims about them.

    Attributes:
        scored: the stages whose runs are scored.
        steps: number of steps of each stage.
        notes: limitations of the figures.
        reranks: whether retrieval is also scored after re-ranking by ITM.
    """

    name: str
    question: str
    ways: tuple[Way, ...]
    claims: tuple[Claim, ...]
    scored: tuple[str, ...]
    steps: Mapping[str, int]
    notes: tuple[str, ...] = ()
    reranks: bool = False


@dataclass(frozen=True)
class Plan:
    """The sizes of a study; the defaults take ten to sixty minutes on two cores.

    Attributes:
        seeds: seeds of training; the images are the same for all.
        world: the set of nouns that scenes contain.
        scenes: number of training scenes; None = the study's own.
        validated: number of test scenes that the curves are measured on.
        reranked: number of candidates that ITM scores.
        values: the numbers that the study compares; () = its own.
        steps: number of steps of each stage, instead of the study's.
        changes: changes to the settings of both stages.
        overwrite: train runs again if they have other settings or data.
        weaker: changes that select the weaker image encoder.
    """

    seeds: tuple[int, ...] = (0,)
    world: World = "full"
    scenes: int | None = None
    test_scenes: int = 200
    validated: int = 64
    reranked: int = 16
    values: tuple[int, ...] = ()
    steps: Mapping[str, int] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    overwrite: bool = False
    stage1: RunSettings = field(default_factory=lambda: preset("stage1", "laptop"))
    stage2: RunSettings = field(default_factory=lambda: preset("stage2", "laptop"))
    weaker: Mapping[str, Any] = field(
        default_factory=lambda: {
            "vision.name": "wheel:efficientnet-lite0",
            "vision.layer": -1,
            "vision.image_size": 224,
            "vision.dtype": "fp32",  # in bf16, its features have an error of 8 %
        }
    )


def small_world(steps: Mapping[str, int], **options: Any) -> Plan:
    """A plan in the demo's small world with its settings and steps, so that ITM and stage 2 learn their tasks."""
    demo = plan_for("small")
    usual = {"stage1": demo.stage1.train.steps, "stage2": demo.stage2.train.steps}
    return Plan(world="small", stage1=demo.stage1, stage2=demo.stage2, steps={**usual, **steps}, **options)


@dataclass(frozen=True)
class Trial:
    """The outcome of one way with one seed.

    Attributes:
        curves: Curves of the last stage trained, by the name of a validation value.
        settings: Settings of each stage.
        costs: What training all stages took without the encoder, and what writing a caption takes, by name.
    """

    values: Values
    curves: dict[str, Points]
    settings: dict[str, RunSettings]
    costs: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A trained run; `of` is what it depends on."""

    folder: Path
    settings: RunSettings
    of: Any


def digest_of(records: Sequence[Record]) -> str:
    """A digest that identifies a list of images and captions."""
    return digest([(record.id, record.captions) for record in records])


def slug(name: str) -> str:
    """The name in lower-case letters and digits, with hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
