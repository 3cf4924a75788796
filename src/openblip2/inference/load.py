"""`load`: a trained model from a run, a checkpoint of LAVIS or transformers, or the hub."""

from pathlib import Path
from typing import Any

from openblip2.inference.captioner import Captioner
from openblip2.inference.matcher import Matcher
from openblip2.inference.pretrained import read_trained
from openblip2.model.language import LanguageModel
from openblip2.model.stage2 import Stage2
from openblip2.model.vision import Vision


def load(
    source: str | Path,
    device: str | None = None,
    *,
    precision: str | None = None,
    heads: int | None = None,
    vision: str | Vision | None = None,
    language: str | LanguageModel | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    language_dtype: str | None = None,
    vision_heads: int | None = None,
    visual_tokens: int | None = None,
) -> "Matcher | Captioner":
    """A trained model: a `Matcher` from stage 1, a `Captioner` from stage 2.

    Args:
        source: a run of ours, a LAVIS `.pth`, or transformers' BLIP-2 or InstructBLIP: a path, or a name on the hub.
        device: "cpu", "cuda", ...; None = a GPU if there is one.
        precision: "auto", "bf16" or "fp32" instead of the run's own (`train.precision`).
        heads: attention heads of the Q-Former, which no LAVIS file tells; None = BERT's 12.
        vision, language, tokenizer: the image encoder, the language model and the Q-Former's tokenizer, by name or
            ready, instead of those that the source names. A run that was trained with a caller's own needs them here.
        revision: branch, tag or commit on the hub.
        language_dtype: as the setting `language.dtype`, "int8" for one, instead of the source's own.
        vision_heads: attention heads of an image encoder in a LAVIS file, which does not tell them; None = ViT-g's 16,
            if it is as wide as ViT-g.
        visual_tokens: the language model reads only so many of them, the first ones; for a model that was trained with
            `stage2.elastic_tokens`. None = all.

    Raises:
        UserError: none of these, an unfinished or damaged one, or keys, sizes or parts that do not fit.
    """
    parts = {"heads": heads, "vision": vision, "language": language, "tokenizer": tokenizer}
    trained = read_trained(
        source, device, precision, revision, language_dtype, visual_tokens, vision_heads=vision_heads, **parts
    )
    return (Captioner if isinstance(trained.model, Stage2) else Matcher)(**trained._asdict())
