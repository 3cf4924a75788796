"""How much of everything the demo takes, and the pictures it is about."""

from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal

from openblip2.apps.corpora.installed import easy_vqa_records, stamps_records
from openblip2.apps.scenes.draw import draw_scenes
from openblip2.apps.scenes.vocabulary import WORLDS, World
from openblip2.config import RunSettings, change
from openblip2.data.records import Record
from openblip2.presets import preset

# How long it takes, for the first lines in the terminal: a measured figure of the small world, which is the default.
DURATION = "the small world took 22 minutes on two CPU cores with AVX512-bf16 (docs/results.md)"

# A dozen nouns can be told from lower layers, which know colours better. A linear map finds 99 % of the nouns and 99 %
# of the colours of unseen combinations in layer 5; in layer 8, the laptop preset's, 100 and 92 % (docs/decisions.md).
SMALL_LAYER = 5

# What differs from the laptop preset and from the fields of `DemoPlan`: of the small world, the full world, the stamps.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "small": {
        # Its questions are about its own dozen nouns; those of easy-VQA are about shapes it never draws.
        "plan": {"train_scenes": 3000, "test_scenes": 500, "train_easy_vqa": 0, "pointed": 40},
        "stage1": {
            "vision.layer": SMALL_LAYER,
            "optim.lr": 5e-4,
            # Half the laptop preset's batch: at equal seconds, more and smaller steps teach more (docs/decisions.md).
            "train.batch": 16,
            "train.steps": 900,
            "train.validate_every": 100,
            "train.checkpoint_every": 100,
            # A step with ITM takes more than twice as long as one without, and ITM learns nothing before ITC has. It
            # leaves its chance level 150 steps later; with similar captions before that, it takes longer.
            "stage1.itm_start_step": 200,
            "stage1.similar_start_step": 350,
        },
        "stage2": {
            "vision.layer": SMALL_LAYER,
            "train.batch": 12,
            "train.steps": 1500,
            "optim.min_lr": 5e-5,
            # A step before this one takes a ninth of the time of one after it.
            "stage2.lm_start_step": 1400,
            "train.validate_every": 700,
            "train.checkpoint_every": 300,
        },
    },
    # 18 times as many nouns, so more pictures and steps, and the laptop preset's layer, which knows nouns best.
    "full": {
        "plan": {"train_scenes": 8000},
        "stage1": {
            "optim.lr": 5e-4,
            "train.batch": 16,
            "train.steps": 2000,
            "train.validate_every": 200,
            "train.checkpoint_every": 100,
            "stage1.itm_start_step": 250,
            "stage1.similar_start_step": 450,
        },
        "stage2": {
            "train.batch": 12,
            "train.steps": 3000,
            "optim.min_lr": 5e-5,
            "stage2.lm_start_step": 2860,
            "train.validate_every": 1000,
            "train.checkpoint_every": 300,
        },
    },
    # 667 pictures to train on: the scenes' steps would show each of them dozens of times.
    "stamps": {
        "plan": {},
        "stage1": {
            "train.steps": 60,
            "stage1.itm_start_step": 20,
            "train.validate_every": 20,
            "optim.lr": 2e-4,
            "qformer.dropout": 0.1,
        },
        "stage2": {"train.steps": 60, "train.validate_every": 20, "qformer.dropout": 0.1},
    },
}


@dataclass(frozen=True)
class DemoPlan:
    """How much of everything; `plan_for` makes one.

    Attributes:
        corpus: drawn scenes, or Tux Paint's stamps.
        world: of the scenes.
        seed: of the scenes and of training.
        train_scenes: pictures drawn for training.
        test_scenes: pictures drawn for the test.
        train_easy_vqa: of easy-VQA's 4,000 training pictures, as captions; its questions are never trained on. 0:
            nothing of easy-VQA, no questions of its test either.
        asked: questions of each data set, drawn from its test part.
        reranked: how many candidates ITM ranks again.
        pointed: test pictures of the pointing game.
        looked: pictures whose maps are drawn.
        stage1: settings of stage 1.
        stage2: settings of stage 2.
    """

    corpus: Literal["scenes", "stamps"] = "scenes"
    world: World = "full"
    seed: int = 0
    train_scenes: int = 4000
    test_scenes: int = 500
    train_easy_vqa: int = 400
    asked: int = 400
    reranked: int = 16
    pointed: int = 100
    looked: int = 9
    stage1: RunSettings = field(default_factory=lambda: preset("stage1", "laptop"))
    stage2: RunSettings = field(default_factory=lambda: preset("stage2", "laptop"))


@dataclass(frozen=True)
class Corpus:
    """What is trained on; what is scored; questions by data set with those that a blind guesser may read."""

    train: list[Record]
    test: list[Record]
    questions: dict[str, tuple[list[Record], list[Record]]]  # data set -> (training pictures, test pictures)
    skipped: list[str]


def plan_for(corpus: Literal["scenes", "stamps"], world: World = "small", seed: int = 0, budget: float = 1) -> DemoPlan:
    """The plan of a demo.

    Args:
        corpus: what the pictures are.
        world: of the scenes; the stamps have none.
        seed: of the scenes and of training.
        budget: both stages take so many times their usual steps.
    """
    recipe = RECIPES[world if corpus == "scenes" else corpus]
    stages = [change(preset(stage, "laptop"), recipe[stage]) for stage in ("stage1", "stage2")]
    first, second = (with_steps(one, max(1, round(budget * one.train.steps))) for one in stages)
    return DemoPlan(corpus, world, seed, stage1=first, stage2=second, **recipe["plan"])


def with_steps(settings: RunSettings, steps: int) -> RunSettings:
    """A run of another number of steps. Fewer leave ITM, similar rows and the language model their shares of them."""
    first, share = settings.stage1, steps / settings.train.steps
    begins = {"itm_start_step": first.itm_start_step, "similar_start_step": first.similar_start_step}
    changes: dict[str, Any] = {f"stage1.{name}": round(min(1, share) * step) for name, step in begins.items() if step}
    if settings.stage2.lm_start_step:
        changes["stage2.lm_start_step"] = min(round(share * settings.stage2.lm_start_step), steps - 1)
    return change(settings, {"train.steps": steps, **changes})


def announcement(plan: DemoPlan, out: Path) -> str:
    """What the demo will do, in the order in which it does it, and how long that takes."""
    first, second = plan.stage1, plan.stage2
    pictures = "find Tux Paint's stamps, pictures with sentences, and hold some of them out"
    if plan.corpus == "scenes":
        nouns = WORLDS[plan.world]
        things = ", ".join(nouns) if len(nouns) < 20 else f"{', '.join(nouns[:6])}, ..."
        pictures = (
            f"draw {plan.train_scenes:,} pictures of {len(nouns)} things ({things}), and {plan.test_scenes:,} more as "
            "a test, in which no thing has a colour that it has in training"
        )
    steps = [f"{s.train.steps:,} steps of {s.train.batch} pictures" for s in (first, second)]
    if aligned := second.stage2.lm_start_step:
        steps[1] += f", the first {aligned:,} without running the language model"
    lines = (
        f"Teaches a frozen language model ({second.language.name}) to read the features of a frozen image encoder "
        f"({first.vision.name}). It will",
        f"  1. {pictures}",
        f"  2. run the image encoder over each picture once, at {first.vision.image_size} px",
        f"  3. train the Q-Former on pictures and captions (stage 1): {steps[0]}",
        f"  4. train it to write captions with the language model (stage 2): {steps[1]}",
        f"  5. caption, ask about and search the test pictures, and write {out / 'report.html'}",
        f"How long that takes: {DURATION}.",
    )
    return "\n".join(lines)


def settings_of(plan: DemoPlan, out: Path) -> tuple[RunSettings, RunSettings]:
    """The settings of both stages, bound to this demo's folders and seed."""
    common = {"data.source": str(out / "data"), "train.seed": plan.seed}
    return change(plan.stage1, common), change(plan.stage2, {**common, "start": str(out / "stage1")})


def gather_corpus(plan: DemoPlan, folder: Path) -> Corpus:
    """Draws or finds the pictures: training and test never share a noun with a colour, or a group of look-alikes."""
    if plan.corpus == "stamps":
        stamps = stamps_records(seed=plan.seed)
        return Corpus(stamps.train, stamps.test, {}, stamps.skipped)
    scenes = draw_scenes(folder / "train", plan.train_scenes, "train", plan.seed, world=plan.world)
    test = draw_scenes(folder / "test", plan.test_scenes, "test", plan.seed, world=plan.world)
    if not plan.train_easy_vqa:
        return Corpus(scenes, test, {"scenes": (scenes, test)}, [])
    easy, easy_test = easy_vqa_records("train"), easy_vqa_records("test")
    captioned = Random(plan.seed).sample(easy, min(plan.train_easy_vqa, len(easy)))
    questions = {"scenes": (scenes, test), "easy-vqa": (easy, easy_test)}
    return Corpus(scenes + captioned, test, questions, [])
