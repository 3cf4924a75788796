"""The plan of a demo (its sizes and settings), and its pictures."""

from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from openblip2.apps.corpora.easy_vqa import easy_vqa_records
from openblip2.apps.scenes.draw import draw_scenes
from openblip2.apps.scenes.vocabulary import WORLDS, World
from openblip2.config import RunSettings, change
from openblip2.data.records import Record
from openblip2.presets import preset

# How long the demo takes, for the announcement: measured times of the small world, the default.
DURATION = "the small world took 12 to 14 minutes on two CPU cores; others may need twice as long (docs/results.md)"

# For a dozen nouns, a lower layer is better, because it separates colours better. On unseen combinations, a linear map
# finds 99 % of nouns and 99 % of colours in layer 5; in layer 8 (laptop preset), 100 and 92 % (docs/decisions.md).
SMALL_LAYER = 5

# With the plain maximum over the queries, ITC soon trains a single query (docs/decisions.md, "ITC trained one query").
SMOOTH_MAXIMUM = 0.03

# Changes to the laptop preset and to the defaults of `DemoPlan`, by world.
RECIPES: dict[World, dict[str, dict[str, Any]]] = {
    "small": {
        # Its questions are about its dozen nouns; those of easy-VQA are about shapes, which this world does not draw.
        "plan": {"train_scenes": 3000, "test_scenes": 500, "train_easy_vqa": 0, "pointed": 40},
        "stage1": {
            "vision.layer": SMALL_LAYER,
            "optim.lr": 5e-4,
            # Half the laptop preset's batch: in the same time, more and smaller steps are better (docs/decisions.md).
            "train.batch": 16,
            "train.steps": 800,
            "train.validate_every": 200,
            "train.checkpoint_every": 100,
            # A step with ITM takes more than twice as long as one without, and ITM learns only after ITC has learned.
            # Its loss leaves chance level after 150 steps of ITM; if similar captions start earlier, it takes longer.
            "stage1.itm_start_step": 200,
            "stage1.similar_start_step": 350,
            "stage1.smooth_maximum": SMOOTH_MAXIMUM,
        },
        "stage2": {
            "vision.layer": SMALL_LAYER,
            "train.batch": 12,
            "train.steps": 1500,
            "optim.min_lr": 5e-5,
            # Steps before this one take a ninth of the time of later steps.
            "stage2.lm_start_step": 1400,
            "train.validate_every": 700,
            "train.checkpoint_every": 300,
        },
    },
    # 18 times as many nouns need more pictures and steps, and the laptop preset's layer, which separates nouns best.
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
            "stage1.smooth_maximum": SMOOTH_MAXIMUM,
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
}


@dataclass(frozen=True)
class DemoPlan:
    """The sizes and settings of a demo; `plan_for` creates it.

    Attributes:
        world: the set of nouns that scenes contain.
        seed: seed of the scenes and of training.
        train_easy_vqa: how many of easy-VQA's 4,000 training pictures are used, with captions; its questions are never
            trained on. 0 = easy-VQA is not used at all, not even its test questions.
        asked: number of questions of each data set, drawn from its test part.
        reranked: number of candidates that ITM re-ranks.
        pointed: number of test pictures for the pointing game.
        looked: number of pictures whose maps are drawn.
    """

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
    """Training pictures, test pictures, and questions by data set; blind guessers know the training questions."""

    train: list[Record]
    test: list[Record]
    questions: dict[str, tuple[list[Record], list[Record]]]  # data set -> (training pictures, test pictures)


def plan_for(world: World = "small", seed: int = 0, budget: float = 1) -> DemoPlan:
    """The plan of a demo.

    Args:
        world: the set of nouns that scenes contain.
        seed: seed of the scenes and of training.
        budget: factor by which the usual number of steps of both stages is multiplied.
    """
    recipe = RECIPES[world]
    stages = [change(preset(stage, "laptop"), recipe[stage]) for stage in ("stage1", "stage2")]
    first, second = (with_steps(one, max(1, round(budget * one.train.steps))) for one in stages)
    return DemoPlan(world, seed, stage1=first, stage2=second, **recipe["plan"])


def with_steps(settings: RunSettings, steps: int) -> RunSettings:
    """Sets the number of steps. With fewer, ITM, similar captions and language model start proportionally earlier."""
    first, share = settings.stage1, steps / settings.train.steps
    begins = {"itm_start_step": first.itm_start_step, "similar_start_step": first.similar_start_step}
    changes: dict[str, Any] = {f"stage1.{name}": round(min(1, share) * step) for name, step in begins.items() if step}
    if settings.stage2.lm_start_step:
        changes["stage2.lm_start_step"] = min(round(share * settings.stage2.lm_start_step), steps - 1)
    return change(settings, {"train.steps": steps, **changes})


def announcement(plan: DemoPlan, out: Path) -> str:
    """What the demo will do, in the order in which it does it, and how long that takes."""
    first, second = plan.stage1, plan.stage2
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
        f"  2. run the image encoder once on each picture, at {first.vision.image_size} px",
        f"  3. train the Q-Former on pictures and captions (stage 1): {steps[0]}",
        f"  4. train it to write captions with the language model (stage 2): {steps[1]}",
        f"  5. caption, ask about and search the test pictures, and write {out / 'report.html'}",
        f"Time: {DURATION}.",
    )
    return "\n".join(lines)


def settings_of(plan: DemoPlan, out: Path) -> tuple[RunSettings, RunSettings]:
    """The settings of both stages, with this demo's folders and seed."""
    common = {"data.source": str(out / "data"), "train.seed": plan.seed}
    return change(plan.stage1, common), change(plan.stage2, {**common, "start": str(out / "stage1")})


def gather_corpus(plan: DemoPlan, folder: Path) -> Corpus:
    """Draws the pictures. Training and test share no noun-colour combination."""
    scenes = draw_scenes(folder / "train", plan.train_scenes, "train", plan.seed, world=plan.world)
    test = draw_scenes(folder / "test", plan.test_scenes, "test", plan.seed, world=plan.world)
    if not plan.train_easy_vqa:
        return Corpus(scenes, test, {"scenes": (scenes, test)})
    easy, easy_test = easy_vqa_records("train"), easy_vqa_records("test")
    captioned = Random(plan.seed).sample(easy, min(plan.train_easy_vqa, len(easy)))
    questions = {"scenes": (scenes, test), "easy-vqa": (easy, easy_test)}
    return Corpus(scenes + captioned, test, questions)
