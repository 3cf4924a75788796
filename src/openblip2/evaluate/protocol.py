"""The protocol card: everything that a score depends on. It is written with the score."""

import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from openblip2.data.images import RESIZE
from openblip2.data.records import Record
from openblip2.data.trained_on import pictures_trained_on
from openblip2.hardware import compute_dtype, computing, device
from openblip2.inference.captioner import Captioner
from openblip2.inference.inputs import group_of
from openblip2.inference.matcher import Matcher
from openblip2.model.decoding import Decoding
from openblip2.runs import read_config
from openblip2.train.parameters import saved_parameters

PACKAGES = ("openblip2", "torch", "transformers", "tokenizers", "pillow", "numpy", "pycocoevalcap", "spacy")
WITHHELD = "the truth of this split is withheld: nothing is scored, the predictions are in the samples"


def card(model: Captioner | Matcher, source: str, seed: int) -> dict[str, Any]:
    """What a score of this model depends on in every task: weights, frozen parts, image size, precision, versions."""
    settings = model.settings
    found: dict[str, Any] = {
        "checkpoint": source,
        "checkpoint_sha256": weights_digest(model),
        "image_encoder": settings.vision.name,
        "image_encoder_layer": settings.vision.layer,
        "image_size": settings.vision.image_size,
        "resize": RESIZE,
        "precision": str(compute_dtype(device(), settings.train.precision)).removeprefix("torch."),
        "seed": seed,
        "versions": _versions(),
    }
    if isinstance(model, Captioner):
        with computing(model.model, settings.train.precision):
            found["pictures_at_once"] = group_of(model.model)
        found |= {
            "language_model": settings.language.name,
            "language_weights": settings.language.dtype,
            "template": settings.language.template,
            "question_in_qformer": settings.qformer.question_in_qformer,
        }
    return found


def decoding_card(decoding: Decoding) -> dict[str, Any]:
    """How text was generated; lengths in new tokens."""
    found: dict[str, Any] = {
        "beams": decoding.beams,
        "length_penalty": decoding.length_penalty if decoding.beams > 1 else None,
        "repetition_penalty": decoding.repetition_penalty,
        "most_new_tokens": decoding.max_new_tokens,
        "least_new_tokens": decoding.min_new_tokens,
        "generation_config": "the language model's own is not used",
    }
    if decoding.sample:
        found |= {"nucleus": decoding.top_p, "temperature": decoding.temperature, "top_k": 0}
    return found


def weights_digest(model: Captioner | Matcher) -> str:
    """SHA-256 of the names and weights that a run stores: the same for the same weights in another format."""
    digest = hashlib.sha256()
    for name, parameter in sorted(saved_parameters(model.model).items()):
        digest.update(name.encode())
        digest.update(parameter.detach().float().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def overlap(records: Sequence[Record], source: str) -> tuple[int | None, list[str]]:
    """How many of the images the run, or a run that it started from, was trained on, and the ids of the first of them.

    The number is None if no run has stored what it was trained on.
    """
    runs: list[Path] = []
    run: Path | None = Path(source)
    while run is not None and run not in runs and (run / "config.json").is_file():
        runs.append(run)
        settings = read_config(run)["settings"]
        starts = [Path(start) for name in ("start", "text_start") if (start := settings.get(name))]
        # Runs that were moved together are found beside this one.
        found = [folder for start in starts for folder in (start, run.parent / start.name) if folder.is_dir()]
        run = found[0] if found else None
    seen = pictures_trained_on(records, runs)
    return (None, []) if seen is None else (len(seen), [record.id for record in seen[:5]])


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an optional package
            continue
    return found | {"python": platform.python_version()}
