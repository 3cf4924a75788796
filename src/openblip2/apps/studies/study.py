"""What a study is made of: ways that are compared, claims about them, and the sizes of a study."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from openblip2.config import RunSettings
from openblip2.presets import preset

LOSS = "caption loss, right picture"
OTHER = "caption loss, another picture"
GAP = "caption loss, another picture less right picture"
LOWER = frozenset({LOSS})  # lower is better; for all other figures higher is better
BOTH = "recall@1, both ways, {}"  # by one of the scores below
SCORES = {"itc": "ITC alone", "itm": "re-ranked by ITM", "itm+itc": "re-ranked by ITM + ITC"}
WAYS = {"tr": "image to text", "ir": "text to image"}


def is_share(figure: str) -> bool:
    """Whether a figure is a fraction in [0, 1], shown in per cent; all others are nats per token."""
    return figure.startswith("recall")


def sentence(text: str) -> str:
    """With a capital first letter; the others stay as they are."""
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Way:
    """One of the ways that a study compares.

    Attributes:
        stage1: changes to the settings of stage 1, by dotted name; None = it is not trained. Ways with the same
            `stage1` share the run.
        stage2: the same for stage 2.
        pictures: number of images that stage 2 is trained on, from the beginning; None = all.
        web: train only on the web's half of the images, with these captions, one of `studies.web.WAYS`; "" = train on
            all images with their own captions.
    """

    name: str
    stage1: Mapping[str, Any] | None = field(default_factory=dict)
    stage2: Mapping[str, Any] | None = None
    pictures: int | None = None
    web: str = ""


@dataclass(frozen=True)
class Claim:
    """The claim that one way is better than another by a figure; `source` is who makes it."""

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
        steps: of each stage.
        notes: limits of the figures.
        reranks: whether retrieval is also scored after re-ranking by ITM.
        helper: trained on the clean half of the images, for the ways on the web's half; not scored.
    """

    name: str
    question: str
    ways: tuple[Way, ...]
    claims: tuple[Claim, ...]
    scored: tuple[str, ...]
    steps: Mapping[str, int]
    notes: tuple[str, ...] = ()
    reranks: bool = False
    helper: Way | None = None


@dataclass(frozen=True)
class Plan:
    """The sizes of a study; the defaults take ten to sixty minutes on two cores.

    Attributes:
        seeds: of training; the images are the same for all.
        scenes, test_scenes: numbers of training scenes (None = the study's own) and of test scenes.
        validated: number of test scenes that the curves are measured on.
        reranked: candidates that ITM scores.
        values: numbers of queries, of images in `warm-start`, side of the grid in `connector`; () = the study's own.
        steps: of a stage, instead of the study's.
        changes: to the settings of both stages.
        stage1, stage2: settings of the stages.
        weaker: changes that select the weaker image encoder.
        overwrite: train runs again that have other settings or data.
    """

    seeds: tuple[int, ...] = (0,)
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
            "vision.dtype": "fp32",  # in bf16 its features are 8 % off
        }
    )
