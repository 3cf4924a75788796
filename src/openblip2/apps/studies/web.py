"""The two halves of the images in the study `capfilt`: clean ones, and ones with captions as noisy as the web's.

OUT/web                       the noisy half as shards: some captions are another image's
OUT/seed-N/stage2-captioner   trained on the clean half, from stage1-captioner, which is also the ranker
OUT/seed-N/web-WAY            the shards after CapFilt, by the same code as the command `capfilt`
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from shutil import rmtree
from typing import Any

from openblip2.capfilt.models import Models
from openblip2.capfilt.models import digest as digest_of
from openblip2.capfilt.pool import How
from openblip2.capfilt.run import capfilt
from openblip2.data.records import Record
from openblip2.data.web.tars import read_tar
from openblip2.data.web.write_shards import write_shards
from openblip2.errors import UserError
from openblip2.progress import Progress

NOISE = 0.5  # fraction of the web's images that have another image's caption
SHARD = 250  # images per shard
WAYS: dict[str, How | None] = {
    "right": None,
    "swapped": None,
    "capfilt": How(),
    "itm": How(captions=1, filter="itm"),
}


def clean_half(records: Sequence[Record]) -> list[Record]:
    """The images that captioner and ranker are trained on."""
    return list(records[: len(records) // 2])


def web_half(records: Sequence[Record]) -> list[Record]:
    """The other images, each with one caption; a fraction `NOISE` of them have exchanged their captions."""
    half = right_half(records)
    swapped = Random("0/swapped").sample(range(len(half)), round(NOISE * len(half)))
    given = [half[n].captions for n in [*swapped[1:], *swapped[:1]]]
    for n, texts in zip(swapped, given, strict=True):
        half[n] = replace(half[n], captions=texts)
    return half


def right_half(records: Sequence[Record]) -> list[Record]:
    """The other images, each with its own first caption."""
    return [replace(record, captions=record.captions[:1]) for record in records[len(records) // 2 :]]


def filtered(
    records: Sequence[Record], shards: Path, out: Path, captioner: Path, ranker: Path, how: How, progress: Progress
) -> dict[str, Any]:
    """`{"captions": captions after CapFilt by image, "counts": its counts}`.

    Args:
        records: the web's half.
        shards: the folder they are written to; an existing one is replaced.
        out: the folder of the shards after CapFilt; an existing one is replaced.

    Raises:
        UserError: as `capfilt`; or no image has a caption left.
    """
    for folder in (shards, out):
        rmtree(folder, ignore_errors=True)
    with progress.steps("shards", len(records)) as bar:
        write_shards(records, shards, SHARD, 0, lambda count: bar.advance(count=count))
    models = Models(str(captioner), str(ranker))
    written = capfilt(str(shards), models, out, how, progress)
    found = {
        sample.about["image_id"]: list(sample.captions)
        for path in sorted(out.glob("*.tar"))
        for sample in read_tar(str(path), progress.say)
    }
    if not found:
        raise UserError(f"{out}: CapFilt left no picture: train captioner and ranker for longer (--stage1-steps)")
    return {"captions": found, "counts": dict(written.counts)}


def with_captions(records: Sequence[Record], captions: Mapping[str, Sequence[str]]) -> list[Record]:
    """The records that have captions left, with these."""
    return [replace(record, captions=tuple(captions[record.id])) for record in records if record.id in captions]


def digest(records: Sequence[Record]) -> str:
    """A digest that identifies a list of images and captions."""
    return digest_of([(record.id, record.captions) for record in records])
