"""The images and captions of the CapFilt study: a clean half, and a half with noisy captions, called "the web"."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from random import Random
from shutil import rmtree
from typing import Any

from openblip2.apps.studies.frame import DATA_SEED, Work, train_way
from openblip2.apps.studies.study import Run, Way, digest_of
from openblip2.capfilt import capfilt
from openblip2.capfilt.shard import How
from openblip2.data.records import Record
from openblip2.data.web.tars import read_tar
from openblip2.data.web.write_shards import write_shards
from openblip2.errors import UserError

NOISE = 0.5  # fraction of the web's images that have another image's caption
SHARD = 250  # images per shard
FILTERS = {"capfilt": How(), "itm": How(captions=1, filter="itm")}


def clean_half(records: Sequence[Record]) -> list[Record]:
    """The images that CapFilt's captioner and ranker are trained on."""
    return list(records[: len(records) // 2])


def right_half(records: Sequence[Record]) -> list[Record]:
    """The other images ("the web"), each with its own first caption."""
    return [replace(record, captions=record.captions[:1]) for record in records[len(records) // 2 :]]


def web_half(records: Sequence[Record]) -> list[Record]:
    """The other images, of which a fraction `NOISE` have exchanged their captions."""
    half = right_half(records)
    swapped = Random("0/swapped").sample(range(len(half)), round(NOISE * len(half)))
    captions = [half[n].captions for n in [*swapped[1:], *swapped[:1]]]
    for n, texts in zip(swapped, captions, strict=True):
        half[n] = replace(half[n], captions=texts)
    return half


def filtered_half(work: Work, name: str) -> list[Record]:
    """The web's images that still have captions after CapFilt, with these captions; the same for all seeds."""
    helper = Way("captioner", {}, {}, records=lambda work: clean_half(work.train))
    models, noisy, out = train_way(work, helper, DATA_SEED), web_half(work.train), work.runs.out
    of = {"captioner": models["stage2"].of, "how": asdict(FILTERS[name]), "captions": digest_of(noisy)}
    run = partial(_run_capfilt, work, noisy, out / f"web-{name}", models, FILTERS[name])
    kept = work.runs.cached(out / f"web-{name}.json", of, run)["captions"]
    return [replace(record, captions=tuple(kept[record.id])) for record in noisy if record.id in kept]


def _run_capfilt(
    work: Work, records: Sequence[Record], out: Path, models: Mapping[str, Run], how: How
) -> dict[str, Any]:
    """Runs the code of the command `capfilt`; returns the captions by image, and the counts."""
    shards, progress = work.runs.out / "web", work.runs.progress
    for folder in (shards, out):
        rmtree(folder, ignore_errors=True)
    with progress.steps("shards", len(records)) as bar:
        write_shards(records, shards, SHARD, 0, lambda count: bar.advance(count=count))
    captioner, ranker = (str(models[stage].folder) for stage in ("stage2", "stage1"))
    written = capfilt(str(shards), captioner, ranker, out, how, progress)
    kept = {
        sample.about["image_id"]: list(sample.captions)
        for path in sorted(out.glob("*.tar"))
        for sample in read_tar(str(path), progress.say)
    }
    if not kept:
        raise UserError(f"{out}: CapFilt kept no picture: train captioner and ranker for longer (--stage1-steps)")
    return {"captions": kept, "counts": dict(written.counts)}
