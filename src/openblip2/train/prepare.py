"""From records to batches: captions cleaned, pictures held out, frozen features computed once.

Shapes: B pairs, P patch tokens, V encoder width, S image side in px.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from openblip2.config import RunSettings
from openblip2.data.batches import FeaturePairs, ImagePairs, PairBatch
from openblip2.data.features import Features, compute_features
from openblip2.data.records import Record
from openblip2.data.text import clean_caption
from openblip2.data.tokens import QFormerTokens
from openblip2.errors import UserError
from openblip2.model.vision import Vision
from openblip2.model.whitening import Whitening, fit_whitening
from openblip2.train.checkpoint import read_whitening, save_whitening
from openblip2.train.hardware import device
from openblip2.train.loop import Log
from openblip2.train.progress import Progress

WHITENING_PICTURES = 256  # enough for a covariance: each has a hundred patches and more


@dataclass(frozen=True)
class Prepared:
    """Training batches by number, the pictures they are drawn from, and the held-out pictures."""

    batches: Callable[[int], PairBatch]
    records: Sequence[Record]
    held_out: Features
    features: Features | None  # of the training pictures, when they are computed once


def prepare(
    settings: RunSettings,
    records: Sequence[Record],
    vision: Vision,
    run: Path,
    kept: Path,
    progress: Progress,
    skipped: Sequence[str] = (),
) -> Prepared:
    """Cleans captions, holds pictures out, and computes the features that are computed once.

    `skipped`: one line for each sample that was left out before; they and those left out here are named in
    `run/skipped.jsonl` and counted.
    """
    records = [replace(r, captions=tuple(clean_caption(c) for c in r.captions)) for r in records]
    count = min(int(len(records) * settings.data.held_out), settings.data.most_held_out)
    if count < 2 or len(records) - count < 2:
        raise UserError(
            f"{len(records)} pictures are too few: at least 2 to train on and 2 held out (data.held_out = "
            f"{settings.data.held_out}) are needed"
        )
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(settings.train.seed)).tolist()
    held, trained = [records[n] for n in sorted(order[:count])], [records[n] for n in sorted(order[count:])]

    run.mkdir(parents=True, exist_ok=True)
    log = Log(run / "skipped.jsonl")
    total = 0

    def problem(line: str) -> None:
        nonlocal total
        total += 1
        log.write({"skipped": line})
        progress.say(f"skipped ({total} so far): {line}")

    for line in skipped:
        problem(line)

    if settings.vision.whiten:
        vision.whitening = whitening_for(settings, vision, trained, run, kept, progress).to(device())

    def once(part: list[Record], name: str) -> Features:
        found = encode_all(vision, part, settings, kept / f"{name}.safetensors", name, progress)
        for line in found[1]:
            problem(line)
        return found[0]

    held_out = once(held, "held-out")
    if settings.data.augment:
        size = settings.vision.image_size
        pairs = ImagePairs(trained, settings.train.batch, settings.train.seed, size, problem)
        return Prepared(pairs, trained, held_out, None)
    features = once(trained, "training")
    pairs = FeaturePairs(features, settings.train.batch, settings.train.seed)
    return Prepared(pairs, features.records, held_out, features)


def whitening_for(
    settings: RunSettings, vision: Vision, records: Sequence[Record], run: Path, kept: Path, progress: Progress
) -> Whitening:
    """The run's whitening: the stage-1 run's if there is one to start from, else fitted to some training pictures."""
    if settings.start:
        found = read_whitening(Path(settings.start))
    else:
        sample = records[:: -(-len(records) // WHITENING_PICTURES)]
        raw, _ = encode_all(vision, sample, settings, kept / "whitening-sample.safetensors", "whitening", progress)
        found = fit_whitening(raw.values)
    save_whitening(found, run)
    return found


def encode_all(
    vision: Vision,
    records: Sequence[Record],
    settings: RunSettings,
    path: Path,
    name: str,
    progress: Progress,
) -> tuple[Features, list[str]]:
    """The frozen features of records, through the file at `path`; and one line for each bad picture."""
    made_by = f"{settings.vision.name} layer {settings.vision.layer} at {settings.vision.image_size} px"
    if settings.vision.weights != "auto":
        made_by += f" in {settings.vision.weights}"
    if vision.whitening is not None:
        made_by += f", whitened by {float(vision.whitening.matrix.double().square().sum()):.12g}"
    with progress.steps(f"features ({name})", -(-len(records) // 32)) as bar, torch.no_grad():
        return compute_features(
            records,
            lambda pixels: vision(pixels.to(device())),
            settings.vision.image_size,
            path,
            made_by,
            bar.advance,
        )


def name_long_captions(tokens: QFormerTokens, records: Sequence[Record], run: Path, progress: Progress) -> None:
    """Counts and names the captions that are cut at the token limit, as the paper cuts them."""
    owners = [(record, caption) for record in records for caption in record.captions]
    long = [owners[n] for n in tokens.too_long([caption for _, caption in owners])]
    if long:
        with (run / "skipped.jsonl").open("a", encoding="utf-8") as file:
            for record, caption in long:
                file.write(json.dumps({"cut": f"{record.id}: {caption}"}) + "\n")
        progress.say(
            f"{len(long)} captions have more than {tokens.longest} tokens and are cut there (data.max_tokens); the "
            f"first is of {long[0][0].id}; all are in {run / 'skipped.jsonl'}"
        )
