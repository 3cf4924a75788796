"""Records as shards: what `openblip2 prepare` writes, in the form of img2dataset.

OUT/00000.tar         pictures as their files are, each with its captions (tars.py) and its record's id, "image_id"
OUT/00000_stats.json  "successes": how many; "count": of how many records; "skipped": why the others are not in it

A shard is there when its stats are. An interrupted run is gone on with: shards of the same records are not made again.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from openblip2.data.images import THREADS, open_picture
from openblip2.data.records import Record
from openblip2.data.web.shard_file import stats_path, write_stats
from openblip2.data.web.tars import PICTURES, Sample, write_tar
from openblip2.errors import UserError


class Written(NamedTuple):
    """How many shards there are now, and samples in them; one line for each record that was skipped."""

    shards: int
    samples: int
    skipped: list[str]


def write_shards(
    records: Sequence[Record],
    out: Path,
    size: int = 10_000,
    seed: int = 0,
    advance: Callable[[int], object] = lambda count: None,
) -> Written:
    """Writes shards of up to `size` records each, in an order that `seed` draws.

    Every picture is opened before it is taken; one that cannot be is skipped and named.

    Args:
        advance: is told how many more records are behind.

    Raises:
        UserError: `out` cannot be written to, or holds shards of other records; or no picture can be opened.
    """
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    shards = -(-len(records) // size)
    paths = [out / f"{number:05}.tar" for number in range(shards)]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}): give a folder that can be written to") from error
    if others := sorted({path.name for path in out.glob("*.tar")} - {path.name for path in paths}):
        raise UserError(f"{out} holds shards of other records ({others[0]}): give another folder, or remove them")
    samples, skipped = 0, list[str]()
    with ThreadPoolExecutor(THREADS) as threads:
        for number, path in enumerate(paths):
            part = [records[n] for n in order[number * size : (number + 1) * size]]
            done = _finished(path, part)
            if done:
                advance(len(part))
            good, bad = done or _write(path, part, f"{number:05}", threads, advance)
            samples += good
            skipped += bad
    if not samples:
        raise UserError(f"{out}: not one picture could be taken; the first: {skipped[0]}")
    return Written(shards, samples, skipped)


def _write(
    path: Path, records: Sequence[Record], shard: str, threads: ThreadPoolExecutor, advance: Callable[[int], object]
) -> tuple[int, list[str]]:
    skipped: list[str] = []
    digits = max(4, len(str(len(records) - 1)))  # img2dataset's keys: the shard's number, then the sample's
    with write_tar(path) as writer:
        for number, found in enumerate(threads.map(_take, records)):
            if isinstance(found, str):
                skipped.append(found)
            else:
                writer.add(found._replace(key=f"{shard}{number:0{digits}}"))
            advance(1)
    write_stats(path, writer.count, count=len(records), skipped=skipped, records=_digest(records))
    return writer.count, skipped


def _take(record: Record) -> Sample | str:
    """A record as a sample without a key, or why it cannot be one."""
    suffix = record.image.suffix.lower().removeprefix(".")
    try:
        if suffix not in PICTURES:
            raise UserError(f"{record.image}: no picture by its name; one of {', '.join(sorted(PICTURES))}")
        open_picture(record.image)
        content = record.image.read_bytes()
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{record.image}: cannot be read ({error.strerror}); the path of a picture"
    return Sample("", content, suffix, record.captions, {"image_id": record.id})


def _finished(path: Path, records: Sequence[Record]) -> tuple[int, list[str]] | None:
    """What an earlier run wrote of the same records; None where it wrote nothing."""
    stats = Path(stats_path(str(path)))
    if not path.exists() or not stats.exists():
        return None
    try:
        told = json.loads(stats.read_text(encoding="utf-8"))
        if told["records"] == _digest(records):
            return told["successes"], told["skipped"]
    except (ValueError, KeyError, TypeError):
        pass  # another program's stats: then so is the shard
    raise UserError(f"{path}: is of other records: give another folder, or remove it")


def _digest(records: Sequence[Record]) -> str:
    rows = json.dumps([(record.id, str(record.image), record.captions) for record in records])
    return hashlib.sha256(rows.encode()).hexdigest()
