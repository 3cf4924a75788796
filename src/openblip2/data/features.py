"""Features of a frozen image encoder, computed once for each image and kept in memory or in a cache on disk.

CACHE/features.jsonl  first line: what the features were made with, their file and shape; then one line for each image
CACHE/features-X.bin  the features, one image after the other

Both files only grow, and features are on the disk before a line refers to them. A process that is killed at any moment
leaves at most an unfinished last line, or features without a line; the next process overwrites them.

Shapes: E entries of an image (the plain one, then random crops of it), P patch tokens, V encoder width, N images,
B images of a batch.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from openblip2.data.records import Record
from openblip2.errors import UserError
from openblip2.runs import locked

VERSION = 2
Made = dict[str, Any]
Say = Callable[[str], object]
CACHE_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class CachedPicture(NamedTuple):
    """A line of the index: the state of an image file, and the row of its features or the problem with it."""

    id: str
    bytes: int
    changed: int  # ns
    digest: str  # SHA-256
    row: int | None  # of the features; None if the image was skipped
    problem: str


class FeatureCache:
    """A cache that is open for reading. Only requested features are read.

    Attributes:
        made_by: What the features were made with: encoder, image size and so on, by name.
        shape: The shape of the features of an image, (E, P, V).
        pictures: The images of the cache, by id.
        count: Number of images with features.

    Raises:
        UserError: The folder is not a cache, has another version, or is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        lines = _index_lines(folder)
        if not lines:
            raise UserError(f"{folder} is not a feature cache: give a folder that `openblip2 features` wrote")
        again = f"remove {folder} and run the same command again"
        try:
            head = json.loads(lines[0])
            version, self.made_by, self.shape = head["version"], dict(head["made_by"]), tuple(head["shape"])
            self.path = folder / head["file"]  # it has a new name each time the cache is started again
            self.dtype = CACHE_DTYPES[self.made_by["precision"]]
            # An image that was encoded again, because its file had changed, has several lines; the last one is valid.
            self.pictures = {p.id: p for p in (CachedPicture(*json.loads(line)) for line in lines[1:])}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / 'features.jsonl'} is damaged: {again}") from error
        if version != VERSION:
            raise UserError(f"{folder} has version {version}, but this program reads {VERSION}: make a new cache")
        self.count = 1 + max((p.row for p in self.pictures.values() if p.row is not None), default=-1)
        found, expected = file_state(self.path)[0], self.count * picture_bytes(self.shape)
        if found < expected:
            raise UserError(f"{self.path} has {found:,} bytes instead of {expected:,}: {again}")
        shape = (self.count, *self.shape)
        self._values = np.memmap(self.path, np.int16, "r", shape=shape) if self.count else np.empty(shape, np.int16)

    def read(self, ids: Sequence[str], crops: Sequence[int] | None = None) -> Tensor:
        """Features `[B, P, V]` of images by id, on the CPU: of the plain images, or of one random crop of each."""
        rows = np.array([self.pictures[id_].row for id_ in ids], dtype=np.int64)
        # Indexing a memory map with arrays reads only these rows.
        values = self._values[rows, 0 if crops is None else 1 + np.array(crops, dtype=np.int64)]
        return torch.from_numpy(np.asarray(values)).view(self.dtype)

    def has(self, record: Record) -> bool:
        """Whether the image of a record is in the cache with its current content."""
        known = self.pictures.get(record.id)
        if known is None or known.bytes != (state := file_state(record.image))[0]:
            return False
        return known.changed == state[1] or known.digest == _digest(record.image)  # a copy of the file has another time


@dataclass(frozen=True)
class Features:
    """The features of `records` in memory: `values [N, P, V]`."""

    records: list[Record]
    values: Tensor

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True)
class StoredFeatures:
    """The features of `records` in a cache. `finish` is applied to features `[B, P, V]` after reading."""

    records: list[Record]
    cache: FeatureCache
    finish: Callable[[Tensor], Tensor]

    @property
    def views(self) -> int:
        """The number of random crops of each image."""
        return self.cache.shape[0] - 1

    def take(self, numbers: Sequence[int], views: Sequence[int] | None = None) -> Tensor:
        """Features `[B, P, V]` of records by number: of the plain images, or of one random crop of each (from 0)."""
        return self.finish(self.cache.read([self.records[number].id for number in numbers], views))

    def load(self) -> Features:
        """The features of all plain images, in memory."""
        return Features(self.records, self.take(range(len(self.records))))


def find_records(
    records: Sequence[Record], cache: FeatureCache, finish: Callable[[Tensor], Tensor]
) -> tuple[StoredFeatures, list[str]]:
    """The features of records in a cache, and one line for each record that was skipped when it was made.

    Raises:
        UserError: A record is not in the cache, or its file has another size. The file may be missing or a copy.
    """
    unknown = [record for record in records if record.id not in cache.pictures]
    if unknown:
        raise UserError(
            f"{len(unknown)} of {len(records)} pictures are not in {cache.folder}; the first is {unknown[0].image} (id "
            f"{unknown[0].id!r}): add them with `openblip2 features` and the same --out"
        )
    for record in records:
        now, then = file_state(record.image)[0], cache.pictures[record.id].bytes
        if now and then and now != then:
            raise UserError(
                f"{record.image} has {now:,} bytes, but had {then:,} when {cache.folder} was made: run the same "
                "`openblip2 features` command again"
            )
    good = [record for record in records if cache.pictures[record.id].row is not None]
    return StoredFeatures(good, cache, finish), [p for r in records if (p := cache.pictures[r.id].problem)]


class CacheWriter:
    """Adds images to a cache that is open for writing. `cache` is the state before the new images."""

    def __init__(self, cache: FeatureCache, index: BinaryIO, values: BinaryIO) -> None:
        self.cache, self._index, self._values, self._row = cache, index, values, cache.count

    def add(self, records: Sequence[Record], problems: Sequence[str | None], features: Tensor) -> None:
        """Adds images. `problems` says why one has no features; `features [n, E, P, V]` are those of the others."""
        stored = features.to(self.cache.dtype).cpu()
        if not bool(stored.sum(dtype=torch.float32).isfinite()):
            precision = self.cache.made_by["precision"]
            raise UserError(
                f"{self.cache.folder}: a feature of {float(features.abs().max()):.3g} does not fit in {precision}; "
                "make the cache with `openblip2 features --precision bf16`"
            )
        _append(self._values, stored.contiguous().view(torch.int16).numpy().tobytes())
        lines = b""
        for record, problem in zip(records, problems, strict=True):
            row = None if problem else self._row
            picture = CachedPicture(record.id, *file_state(record.image), _digest(record.image), row, problem or "")
            lines += json.dumps(picture).encode() + b"\n"
            self._row += not problem
        _append(self._index, lines)


@contextmanager
def writing(
    folder: Path, made_by: Made, shape: Sequence[int], say: Say, records: Sequence[Record] = (), replace: bool = False
) -> Iterator[CacheWriter]:
    """Opens a cache for writing; waits for other processes that write it.

    Args:
        folder: The folder of the cache. A new cache is started if there is none.
        shape: The shape of the features of an image.
        say: Called with a line for the user.
        replace: Whether to start a new cache if the old one was made with something else or has none of `records`.

    Raises:
        UserError: It was made with something else, or is damaged; or the disk is full.
    """
    try:
        with locked(folder, say=say), (folder / "features.jsonl").open("ab") as index:
            if _outdated(folder, made_by, say, records, replace):
                index.truncate(0)
                for old in folder.glob("features-*.bin"):
                    old.unlink()  # processes that still read it can continue
                head = {"version": VERSION, "made_by": made_by, "shape": shape, "file": f"features-{uuid4().hex}.bin"}
                _append(index, json.dumps(head).encode() + b"\n")
            cache = FeatureCache(folder)
            require_same_cache(cache, made_by, "give another --out, or remove that folder")
            index.truncate(sum(map(len, _index_lines(folder))))
            with cache.path.open("ab") as values:
                values.truncate(cache.count * picture_bytes(cache.shape))
                yield CacheWriter(cache, index, values)
    except OSError as error:
        why = "the disk is full" if error.errno == ENOSPC else f"cannot be written ({error.strerror})"
        raise UserError(f"{folder}: {why}; free space and run the same again: finished features are kept") from error


def _outdated(folder: Path, made_by: Made, say: Say, records: Sequence[Record], replace: bool) -> bool:
    if not _index_lines(folder):
        return True
    if not replace:
        return False
    cache = FeatureCache(folder)
    try:
        require_same_cache(cache, made_by, "its features are computed again")
    except UserError as difference:
        say(str(difference))
        return True
    return not any(cache.has(record) for record in records)  # features of other images would only take space


def require_same_cache(cache: FeatureCache, ours: Made, way_out: str) -> None:
    """Checks that a cache was made with `ours`. The encoder's name may differ, because its weights are compared.

    Raises:
        UserError: It was made with something else; the message names the first difference.
    """
    theirs = cache.made_by
    for name, value in ours.items():
        if name != "encoder" and theirs.get(name) != value:
            there, here = theirs.get("encoder"), ours.get("encoder", theirs.get("encoder"))
            encoders = f" (encoder {there} in the cache, {here} now)" if there != here else ""
            difference = f"{name.replace('_', ' ')} {theirs.get(name)} in the cache, {value} now{encoders}"
            raise UserError(f"{cache.folder}: {difference}; {way_out}")


def picture_bytes(shape: Sequence[int]) -> int:
    """Bytes on the disk for the features of one image, of shape (E, P, V)."""
    return 2 * int(np.prod(shape))


def _index_lines(folder: Path) -> list[bytes]:
    """The lines of a cache's index without an unfinished last one; none if there is no index."""
    path = folder / "features.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]


def _append(file: BinaryIO, content: bytes) -> None:
    """Appends, and returns when the content is on the disk."""
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def file_state(path: Path) -> tuple[int, int]:
    """Size and time of change (ns) of a file; zeros if it does not exist or cannot be accessed."""
    try:
        state = path.stat()
    except OSError:
        return 0, 0
    return state.st_size, state.st_mtime_ns


def _digest(path: Path) -> str:
    """SHA-256 of a file; empty if it cannot be read, which is reported when the image is opened."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
