"""Writes records as shards in the format of img2dataset, for `openblip2 prepare`.

OUT/00000.tar         the unchanged image files, each with its captions (tars.py) and the id of its record, "image_id"
OUT/00000_stats.json  "successes": number of samples; "count": number of records; "skipped": why the others are missing

A shard gets its name when it is complete. Interrupted runs can continue: complete shards of the same records are kept.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from openblip2.data.images import THREADS, open_picture
from openblip2.data.records import Record
from openblip2.data.web import read_stats, write_stats
from openblip2.data.web.tars import PICTURES, Sample, shown, texts_of
from openblip2.errors import UserError
from openblip2.runs import atomic_write, locked, make_folder


@contextmanager
def write_tar(path: Path) -> Iterator["TarWriter"]:
    """Writes a shard, which gets its name when it is complete.

    Raises:
        UserError: another process is writing it, or the folder cannot be written to.
    """
    # Locked, because two parts of one job may write the same shard.
    with (
        locked(path.parent, f".{path.name}.lock"),
        atomic_write(path) as draft,
        tarfile.open(draft, "w", format=tarfile.PAX_FORMAT) as tar,
    ):
        yield TarWriter(path, tar)


class TarWriter:
    """A shard that is being written (`write_tar`).

    The same samples give the same bytes, because members have no time and no owner.
    """

    def __init__(self, path: Path, tar: tarfile.TarFile) -> None:
        self.path, self.count = path, 0
        self._tar, self._keys = tar, set[str]()

    def add(self, sample: Sample) -> None:
        """Appends a sample.

        The first caption is the .txt. The .json is `about`, and has "captions" if `about` lists exactly the sample's
        captions, or if there are several.

        Raises:
            UserError: a key that cannot be read back or is already used, or a suffix that is not an image's.
        """
        key, suffix, captions = sample.key, sample.suffix, sample.captions
        parts = key.split("/")
        unsafe = not key.isprintable() or "\\" in key or "." in parts[-1] or {"", ".", ".."} & set(parts)
        if unsafe or key in self._keys:
            raise UserError(f"{self.path}: key {ascii(key)[:80]} is unsafe or used twice: give a new name without dots")
        if suffix not in PICTURES:
            raise UserError(f"{self.path}: {shown(key)}: suffix {suffix!r} must be one of {sorted(PICTURES)}")
        self._keys.add(key)
        about = {name: value for name, value in sample.about.items() if name != "captions"}
        listed = sample.about.get("captions")
        if captions and isinstance(listed, list) and tuple(texts_of(listed)) == captions:
            about["captions"] = listed
        elif len(captions) > 1:
            about["captions"] = list(captions)
        self._write(f"{key}.{suffix}", sample.image)
        if captions:
            self._write(f"{key}.txt", captions[0].encode())
        if about:
            self._write(f"{key}.json", json.dumps(about, sort_keys=True).encode())
        self.count += 1

    def _write(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._tar.addfile(member, io.BytesIO(content))


def write_shards(
    records: Sequence[Record],
    out: Path,
    size: int = 10_000,
    seed: int = 0,
    advance: Callable[[int], object] = lambda count: None,
) -> tuple[int, int, list[str]]:
    """Writes shards of up to `size` records each, in random order.

    Returns the numbers of shards and samples, and one line for each record that was skipped because its image, which is
    opened first, cannot be opened.

    Args:
        advance: called with the number of records that were just processed.

    Raises:
        UserError: `out` cannot be written to or contains other shards than those of this call, or no image can be
            opened.
    """
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    paths = [out / f"{number:05}.tar" for number in range(-(-len(records) // size))]
    make_folder(out)
    if others := sorted({path.name for path in out.glob("*.tar")} - {path.name for path in paths}):
        raise UserError(
            f"{out} has shards of other records or of another --size ({others[0]}): give another folder, or remove them"
        )
    samples, skipped = 0, list[str]()
    with ThreadPoolExecutor(THREADS) as threads:
        for number, path in enumerate(paths):
            part = [records[n] for n in order[number * size : (number + 1) * size]]
            done = read_stats(path, "records", _digest(part))
            if done:
                advance(len(part))
            else:
                done = _write(path, part, threads, advance)
            samples += done["successes"]
            skipped += done["skipped"]
    if not samples:
        raise UserError(f"{out}: none of the pictures can be read; the first: {skipped[0]}")
    return len(paths), samples, skipped


def _write(
    path: Path, records: Sequence[Record], threads: ThreadPoolExecutor, advance: Callable[[int], object]
) -> dict[str, Any]:
    """Writes a shard and its stats, which it returns."""
    skipped: list[str] = []
    digits = max(4, len(str(len(records) - 1)))  # keys as in img2dataset: number of the shard, then of the sample
    with write_tar(path) as writer:
        for number, found in enumerate(threads.map(_take, records)):
            if isinstance(found, str):
                skipped.append(found)
            else:
                writer.add(found._replace(key=f"{path.stem}{number:0{digits}}"))
            advance(1)
        return write_stats(path, writer.count, count=len(records), skipped=skipped, records=_digest(records))


def _take(record: Record) -> Sample | str:
    """A record as a sample without a key, or what is wrong with it."""
    suffix = record.image.suffix.lower().removeprefix(".")
    try:
        if suffix not in PICTURES:
            raise UserError(f"{record.image}: its suffix must be one of {', '.join(sorted(PICTURES))}")
        open_picture(record.image)
        content = record.image.read_bytes()
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{record.image}: cannot be read ({error.strerror}): give a readable picture"
    return Sample("", content, suffix, record.captions, {"image_id": record.id})


def _digest(records: Sequence[Record]) -> str:
    rows = json.dumps([(record.id, str(record.image), record.captions) for record in records])
    return hashlib.sha256(rows.encode()).hexdigest()
