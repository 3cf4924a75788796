"""`load`: loads a trained model from a run, a checkpoint of LAVIS or transformers, or the hub."""

from pathlib import Path
from typing import Any

from openblip2.inference.captioner import Captioner
from openblip2.inference.matcher import Matcher
from openblip2.inference.pretrained import read_trained
from openblip2.model.language import LanguageModel
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
    """Loads a trained model: a `Matcher` from stage 1, a `Captioner` from stage 2.

    Args:
        source: an openblip2 run, a LAVIS `.pth`, or transformers' BLIP-2 or InstructBLIP: a path, or a name on the hub.
        device: "cpu", "cuda", ...; None = a GPU if there is one.
        precision: "auto", "bf16" or "fp32", instead of the run's `train.precision`.
        heads: attention heads of the Q-Former, which LAVIS files do not state; None = 12, as in BERT.
        vision, language, tokenizer: the image encoder, the language model and the Q-Former's tokenizer, by name or
            as objects, instead of those that the source names. A run that was trained with custom objects needs them.
        revision: branch, tag or commit on the hub.
        language_dtype: like the setting `language.dtype`, for example "int8", instead of the source's value.
        vision_heads: attention heads of an image encoder in a LAVIS file, which does not state them; None = 16, as in
            ViT-g, if the encoder is as wide as ViT-g.
        visual_tokens: the language model reads only this number of visual tokens, the first ones; for a model that was
            trained with `stage2.elastic_tokens`. None = all.

    Raises:
        UserError: the source is none of these, unfinished or damaged, or its keys, sizes or parts do not fit.
    """
    parts = {"heads": heads, "vision": vision, "language": language, "tokenizer": tokenizer}
    more = {"language_dtype": language_dtype, "vision_heads": vision_heads, "visual_tokens": visual_tokens}
    return read_trained((Captioner, Matcher), source, device, precision, revision, **more, **parts)
