"""From shards to batches: samples counted, some held out as a data folder of the run, pictures encoded as they come.

RUN/shards.json   which shards, with how many samples each: by it the order of samples is the same in every process and
                  after every start (data/web/mixture.py)
RUN/held_out/     the pictures to validate on, a data folder that `evaluate --data` takes too
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from openblip2.config import RunSettings
from openblip2.data.records import Record, read_records, write_records
from openblip2.data.text import clean_caption
from openblip2.data.web.mixture import (
    Part,
    count_parts,
    find_reader,
    hold_out,
    kept_parts,
    sample_captions,
    write_parts,
)
from openblip2.data.web.pairs import ShardPairs
from openblip2.data.web.tars import Shard
from openblip2.distributed.collectives import is_first, rank, world_size
from openblip2.errors import UserError
from openblip2.hardware import device
from openblip2.model.vision import Vision
from openblip2.model.whitening import fit_whitening
from openblip2.progress import Progress
from openblip2.train.encode import encode_now, openable
from openblip2.train.parameters import read_whitening, save_whitening
from openblip2.train.prepare import WHITENING_PICTURES, Prepared, cleaned
from openblip2.train.skipped import Skipped

HELD_OUT = "held_out"


def prepare_shards(
    settings: RunSettings,
    parts: Sequence[Part],
    vision: Vision,
    run: Path,
    progress: Progress,
    held_out: Sequence[Record] | None = None,
    resume: bool = False,
) -> Prepared:
    """Counts the shards, holds pictures out, and makes the batches.

    Args:
        parts: not counted yet.
        held_out: the pictures to validate on; None = the first samples of the first part, `data.held_out` of all its
            samples and `data.most_held_out` at most.
        resume: the run's own counts hold.

    Raises:
        UserError: settings that shards cannot have, no sample, or fewer than 2 pictures to validate on.
    """
    if settings.task not in ("pretraining", "caption", "retrieval"):
        raise UserError(f"{settings.task} is not trained on shards, which hold captions: give --data with questions")
    if settings.data.features:
        raise UserError("--features is of records: the pictures of shards are encoded as they come")
    batch, seed = settings.train.batch, settings.train.seed
    if batch < world_size():
        raise UserError(f"train.batch={batch} is the batch of all {world_size()} processes: at least one pair for each")
    problem = Skipped(run, progress)
    counted = kept_parts(run, parts) if resume or not is_first() else None
    if counted is None:
        with progress.steps("counting shards", sum(len(part.shards) for part in parts), unit="shards") as bar:
            counted = count_parts(parts, problem, bar.advance)
        if held_out is None:
            wanted = min(int(counted[0].samples * settings.data.held_out), settings.data.most_held_out)
            counted = hold_out(counted, wanted)
            _write_held_out(counted[0], wanted, run / HELD_OUT, problem)
        write_parts(counted, run)
    if held_out is None:
        held_out, _ = read_records(run / HELD_OUT)
    progress.say(f"{sum(part.samples for part in counted):,} samples of {sum(len(p.shards) for p in counted):,} shards")
    progress.doing("encoding what is held out")
    good, problems = openable([cleaned(record) for record in held_out], settings.vision.image_size)
    for line in problems:
        problem(line)
    if len(good) < 2:
        raise UserError(f"{len(good)} pictures to validate on can be opened; at least 2 (--held-out, data.held_out)")
    size, augment = settings.vision.image_size, settings.data.augment
    pairs = ShardPairs(
        counted, batch, seed, size, settings.data.open_shards, problem.in_training, augment, (rank(), world_size())
    )
    if settings.vision.whiten:
        _whiten(vision, pairs, settings, run)
    if settings.vision.trained:
        features = lambda: encode_now(vision, good)  # noqa: E731 - another one whenever the encoder is
    else:
        with torch.no_grad():
            seen = encode_now(vision, good)
        features = lambda: seen  # noqa: E731
    samples = sum(part.samples for part in counted)
    return Prepared(pairs, [], good, features, None, pairs.joined, samples)


def _write_held_out(part: Part, wanted: int, folder: Path, problem: Skipped) -> None:
    """The first `wanted` samples of a part as a data folder, without those that have no caption."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    reader, records = find_reader(part.reader), list[Record]()
    for url, held in zip(part.shards, part.held_out, strict=True):
        if not held:
            continue
        shard = Shard(url, problem)
        for number in range(min(held, len(shard))):
            sample = shard.read(number)
            texts = sample_captions(sample, reader) if sample else ()
            if sample and any(map(clean_caption, texts)):
                path = folder / f"{len(records):06}.{sample.suffix}"
                path.write_bytes(sample.image)
                records.append(Record(f"{Path(url).stem}/{sample.key}", path, texts))
        shard.close()
    if len(records) < 2:
        raise UserError(
            f"{wanted} samples are held out, {len(records)} of them with a caption: at least 2; give --held-out "
            "pictures, or a larger data.held_out"
        )
    write_records(records, folder)


def _whiten(vision: Vision, pairs: ShardPairs, settings: RunSettings, run: Path) -> None:
    """The run's whitening: that of the run it starts from, else fitted to the pictures of the first batches."""
    if not is_first():
        vision.whitening = read_whitening(run).to(device())
        return
    if settings.start:
        found = read_whitening(Path(settings.start))
    else:
        raw: list[torch.Tensor] = []
        with torch.no_grad():
            while sum(map(len, raw)) < WHITENING_PICTURES:
                images = pairs.joined(len(raw)).images
                assert images is not None
                raw.append(vision(images.to(device())).cpu())
        found = fit_whitening(torch.cat(raw))
    save_whitening(found, run)
    vision.whitening = found.to(device())
