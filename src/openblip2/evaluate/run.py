"""The command `evaluate`: scores a run on data for one of four tasks, and writes scores, protocol and samples."""

import hashlib
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from openblip2 import __version__
from openblip2.data.images import RESIZE
from openblip2.data.records import Record
from openblip2.data.sources import Source
from openblip2.errors import UserError, number_of
from openblip2.evaluate.caption import score_captions
from openblip2.evaluate.pointing import score_pointing
from openblip2.evaluate.result import Options, PartialTexts, Result
from openblip2.evaluate.retrieval import score_retrieval
from openblip2.evaluate.vqa import METRICS, score_answers
from openblip2.hardware import compute_dtype, computing, device
from openblip2.inference.attend import BY
from openblip2.inference.captioner import Captioner
from openblip2.inference.inputs import group_of
from openblip2.inference.load import load
from openblip2.inference.matcher import Matcher
from openblip2.progress import Progress
from openblip2.runs import make_folder, read_config
from openblip2.train.bookkeeping import pictures_trained_on
from openblip2.train.encode import openable
from openblip2.train.parameters import saved_parameters

Task = Literal["caption", "vqa", "retrieval", "pointing"]
PACKAGES = ("openblip2", "torch", "transformers", "tokenizers", "pillow", "numpy", "pycocoevalcap", "spacy")
# The tasks that use each option; options that are not listed apply to all tasks.
_TASKS = {
    "prompt": ("caption",),
    "beams": ("caption", "vqa"),
    "metric": ("vqa",),
    "lemmatised": ("vqa",),
    "slow": ("caption",),
    "rerank": ("retrieval",),
    "strict": ("retrieval",),
    "by": ("pointing",),
    "features": ("retrieval",),
    "visual_tokens": ("caption", "vqa"),
}


def evaluate(task: str, run: str, source: Source, out: Path, options: Options, progress: Progress) -> Result:
    """Scores a run on data and writes `out` and, beside it, one line for each sample.

    Generated texts are stored beside `out`, so that an interrupted evaluation can continue with them.

    Raises:
        UserError: an unknown task, a run of the other stage, an option of another task, or nothing to score.
    """
    require_task(task, options)
    make_folder(out.parent)
    began = time.perf_counter()
    model = load(run, visual_tokens=options.visual_tokens)
    kind, stage = (Matcher, "stage-1") if task in ("retrieval", "pointing") else (Captioner, "stage-2")
    if not isinstance(model, kind):
        raise UserError(f"{run} is a {type(model).__name__}: {task} needs a {stage} run, or one fine-tuned from one")
    key = [task, run, __version__, weights_digest(model), options.visual_tokens]
    unfinished = out.with_suffix(".partial.jsonl")
    partial_texts = PartialTexts(unfinished, key)
    assert model.model.vision is not None
    chosen, side = source.records[: options.limit], model.model.vision.image_size
    with progress.steps("opening pictures", len(chosen)) as bar:
        records, bad = openable(chosen, side, lambda count: bar.advance(count=count))
    if not records:
        raise UserError(f"none of the {len(chosen)} pictures can be opened; the first: {bad[0]}")
    if isinstance(model, Matcher) and task == "pointing":
        result = score_pointing(model, records, options, progress)
    elif isinstance(model, Matcher):
        result = score_retrieval(model, records, options, progress)
    elif task == "caption":
        result = score_captions(model, records, options, progress, partial_texts)
    else:
        result = score_answers(model, records, options, progress, partial_texts, source.kind, source.known)
    result.skipped[:0] = [*source.skipped, *bad]
    result.protocol = _card(model, run, options.seed) | {"data": source.kind} | result.protocol
    result.protocol["zero_shot"] = model.settings.task == "pretraining"
    _warn(result, records, run)
    result.beside["seconds"] = round(time.perf_counter() - began, 1)
    result.write(out)
    unfinished.unlink(missing_ok=True)  # the result contains the texts
    return result


def require_task(task: str, options: Options) -> None:
    """Checks the task and its options, before a model is loaded.

    Raises:
        UserError: an unknown task, or an option that it does not use.
    """
    if task not in get_args(Task):
        raise UserError(f"unknown task {task!r}: it must be one of {', '.join(get_args(Task))}")
    for name, tasks in _TASKS.items():
        if getattr(options, name) != getattr(Options(), name) and task not in tasks:
            raise UserError(f"--{name.replace('_', '-')} is for {' and '.join(tasks)}, not for {task}")
    if options.metric is not None and options.metric not in METRICS:
        raise UserError(f"unknown metric {options.metric!r}: it must be one of {', '.join(METRICS)}")
    if options.by not in (None, *BY):
        raise UserError(f"--by {options.by}: it must be one of {', '.join(BY)}")


def _warn(result: Result, records: Sequence[Record], run: str) -> None:
    seen = overlap(records, run)
    result.protocol["pictures_of_training"] = "not known" if seen is None else len(seen)
    if seen:
        result.warnings.append(
            f"{len(seen)} of {len(records)} pictures are among those the run was trained on ({', '.join(seen[:5])}"
            f"{', ...' if len(seen) > 5 else ''}), so this is not a score on unseen pictures"
        )
    if result.skipped:
        result.warnings.append(
            f"{number_of(len(result.skipped), 'sample', 'was')} left out; the first: {result.skipped[0]}"
        )


def _card(model: Captioner | Matcher, source: str, seed: int) -> dict[str, Any]:
    """The part of the protocol that all tasks have: weights, frozen parts, image size, precision, seed, versions."""
    settings, versions = model.settings, {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):  # an optional package
            versions[package] = version(package)
    found: dict[str, Any] = {
        "checkpoint": source,
        "checkpoint_sha256": weights_digest(model),
        "image_encoder": settings.vision.name,
        "image_encoder_layer": settings.vision.layer,
        "image_size": settings.vision.image_size,
        "resize": RESIZE,
        "precision": str(compute_dtype(device(), settings.train.precision)).removeprefix("torch."),
        "seed": seed,
        "versions": versions | {"python": platform.python_version()},
    }
    if isinstance(model, Captioner):
        with computing(model.model, settings.train.precision):
            found["pictures_at_once"] = group_of(model.model)
        found |= {
            "language_model": settings.language.name,
            "language_weights": settings.language.dtype,
            "template": settings.language.template,
            "visual_tokens": model.model.tokens,
            "question_in_qformer": settings.qformer.question_in_qformer,
        }
    return found


def weights_digest(model: Captioner | Matcher) -> str:
    """SHA-256 of the names and weights that a run stores; it does not depend on the format of the file."""
    digest = hashlib.sha256()
    for name, parameter in sorted(saved_parameters(model.model).items()):
        digest.update(name.encode())
        digest.update(parameter.detach().float().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def overlap(records: Sequence[Record], source: str) -> list[str] | None:
    """The ids of images that the run, or a run that it started from, was trained on; None if no run has stored them."""
    runs: list[Path] = []
    run: Path | None = Path(source)
    while run is not None and run not in runs and (run / "config.json").is_file():
        runs.append(run)
        settings = read_config(run)["settings"]
        starts = [Path(start) for name in ("start", "text_start") if (start := settings.get(name))]
        # If runs were moved together, the start is found beside this run.
        found = [folder for start in starts for folder in (start, run.parent / start.name) if folder.is_dir()]
        run = found[0] if found else None
    seen = pictures_trained_on(records, runs)
    return None if seen is None else [record.id for record in seen]
