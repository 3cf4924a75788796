"""Shards of a feature cache: their layout, how they are written, and how a row of one is read where it lies.

A shard is a safetensors file (`values [N, P, V]`; of int8 also `scales [N, P, 1]`, `centre` and `width [V]`) and a
.json that says whose rows they are, what was skipped and why, and each row's checksum. It is there when its .json is:
that is written last. Every file has a temporary name until it is whole and on the disk.

A checksum covers one row, so that a batch which reads 32 rows checks 32 rows: each once in a run, when it is first
read. It is a CRC-32, against broken disks and copies and not against people: 1.8 GB/s on one core, SHA-256 1.2.

Shapes: N rows of a shard, P patch tokens, V encoder width, n rows that are written.
"""

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openblip2.data.cache.int8 import channel_tables, dequantise, quantise
from openblip2.errors import UserError

# A change of these is a new `cache.VERSION`.
SHARD_PICTURES = 512  # at most: what an interruption costs
SHARD_BYTES = 256 * 2**20  # at most, unless one picture has more
HEADER = 1024  # bytes in front of a shard's tensors: the rows' place does not depend on their number

STORED = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
_TAGS = {"fp16": "F16", "bf16": "BF16", "int8": "I8"}
AGAIN = "run the same `openblip2 features` again, which makes it anew"


class Picture(NamedTuple):
    """A picture as the cache knows it: the record's id, and the file's size and time of change (ns), 0 if unknown."""

    id: str
    bytes: int
    changed: int


@dataclass(frozen=True)
class Layout:
    """What rows look like: `entries` rows a picture, each `[P, V]`."""

    precision: str
    tokens: int
    width: int
    entries: int

    @property
    def value_bytes(self) -> int:
        """Of a row's values."""
        return self.tokens * self.width * STORED[self.precision].itemsize

    @property
    def row_bytes(self) -> int:
        """Of a row with its scales."""
        return self.value_bytes + (4 * self.tokens if self.precision == "int8" else 0)

    @property
    def table_bytes(self) -> int:
        """Of what stands once in a shard, in front of its rows."""
        return 8 * self.width if self.precision == "int8" else 0

    @property
    def shard_pictures(self) -> int:
        return max(1, min(SHARD_PICTURES, SHARD_BYTES // (self.entries * self.row_bytes)))

    def shards(self, pictures: int) -> int:
        """How many shards so many pictures make."""
        return -(-pictures // self.shard_pictures)

    def shard_bytes(self, rows: int) -> int:
        """Of a shard's file."""
        return HEADER + self.table_bytes + rows * self.row_bytes

    def header(self, rows: int) -> bytes:
        """The safetensors header of a shard: `HEADER` bytes, its JSON padded with spaces."""
        shapes: dict[str, tuple[str, list[int], int]] = {}
        if self.precision == "int8":
            shapes["centre"] = shapes["width"] = ("F32", [self.width], 4 * self.width)
        shapes["values"] = (_TAGS[self.precision], [rows, self.tokens, self.width], rows * self.value_bytes)
        if self.precision == "int8":
            shapes["scales"] = ("F32", [rows, self.tokens, 1], rows * self.tokens * 4)
        fields, at = {}, 0
        for name, (tag, shape, size) in shapes.items():
            fields[name] = {"dtype": tag, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        return (HEADER - 8).to_bytes(8, "little") + json.dumps(fields).encode().ljust(HEADER - 8)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What the disk refuses ends in one line."""
    try:
        yield
    except OSError as error:
        why = "the disk is full" if error.errno == ENOSPC else f"cannot be written ({error.strerror})"
        raise UserError(
            f"{folder}: {why}; whole shards are kept: make room, or mend what is wrong, and run the same again"
        ) from error


class ShardWriter:
    """Writes one shard, batch by batch: nothing but scales and checksums is held in memory."""

    def __init__(self, folder: Path, number: int, layout: Layout) -> None:
        self.folder, self.layout = folder, layout
        self.path = shard_path(folder, number)
        self.fresh = self.path.with_name(self.path.name + ".new")
        self.scales: list[Tensor] = []
        self.checksums: list[int] = []
        self.tables: tuple[Tensor, Tensor] | None = None
        self.file = self.fresh.open("wb")
        self.file.write(bytes(HEADER))

    def add(self, features: Tensor) -> None:
        """Appends rows `[n, P, V]` of floats; on a GPU they are packed there, and half or a quarter of them travels.

        Raises:
            UserError: values that the precision cannot hold. OSError: the disk is full.
        """
        if self.layout.precision != "int8":
            stored, scales = features.to(STORED[self.layout.precision]), None
            if not bool(stored.sum(dtype=torch.float32).isfinite()):  # a third of the time of asking each
                raise UserError(
                    f"{self.folder}: a feature of {float(features.abs().max()):.3g} cannot be kept in "
                    f"{self.layout.precision}; make the cache with `openblip2 features --precision bf16`"
                )
        else:
            if self.tables is None:
                self.tables = channel_tables(features)
                self.file.write(_bytes(torch.stack(self.tables)))
            stored, scales = quantise(features, *self.tables)
            scales = scales.cpu()
            self.scales.append(scales)
        begin = zlib.crc32(_bytes(torch.stack(self.tables))) if self.tables else 0
        stored = stored.cpu()
        for n, row in enumerate(stored):
            own = zlib.crc32(_bytes(row), begin)
            self.checksums.append(own if scales is None else zlib.crc32(_bytes(scales[n]), own))
        self.file.write(_bytes(stored))

    def close(self, pictures: Sequence[Picture], skipped: dict[str, str]) -> None:
        """Ends the file, gives it its name, and says whose rows it holds: from here on the shard is there."""
        if not self.checksums:
            self.add(torch.zeros(0, self.layout.tokens, self.layout.width))
        for scales in self.scales:
            self.file.write(_bytes(scales))
        self.file.seek(0)
        self.file.write(self.layout.header(len(self.checksums)))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.fresh, self.path)
        about = {"pictures": [list(p) for p in pictures], "skipped": skipped, "checksums": self.checksums}
        write_whole(self.path.with_suffix(".json"), about | {"crc32": _crc_of(about)})

    def abandon(self) -> None:
        """Leaves nothing behind of a shard that was not closed."""
        self.fresh.unlink(missing_ok=True)
        with suppress(OSError):  # the full disk again, for what was still to be flushed of a file that is gone
            self.file.close()


class Shard:
    """A shard on disk, opened for reading. No row is read before it is asked for.

    Attributes:
        pictures: all of them, in order. skipped: why a picture has no row, by id. rows: N.

    Raises:
        UserError: it is missing, damaged (its .json) or cut short.
    """

    def __init__(self, folder: Path, number: int, layout: Layout) -> None:
        self.path, self.layout = shard_path(folder, number), layout
        beside = self.path.with_suffix(".json")
        try:
            about: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8"))
            if about.pop("crc32") != _crc_of(about):
                raise ValueError
        except FileNotFoundError as error:
            raise UserError(f"{beside}: no such file; {AGAIN}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{beside}: is damaged; {AGAIN}") from error
        self.pictures = [Picture(*picture) for picture in about["pictures"]]
        self.skipped: dict[str, str] = about["skipped"]
        self._checksums: list[int] = about["checksums"]
        self.rows = len(self._checksums)
        self._checked = bytearray(self.rows)
        self._map: Tensor | None = None
        wanted, found = layout.shard_bytes(self.rows), self.path.stat().st_size if self.path.is_file() else 0
        if found != wanted:
            raise UserError(f"{self.path}: has {found:,} bytes and not {wanted:,}, it is cut short; {AGAIN}")

    def read(self, row: int) -> Tensor:
        """One row `[P, V]`, as it lies on the disk, or int8 as fp32.

        Raises:
            UserError: it is not what was written.
        """
        layout = self.layout
        values, scales, tables = self._raw(row)
        if not self._checked[row]:
            self._check(row, values, scales, tables)
        stored = values.view(STORED[layout.precision]).view(layout.tokens, layout.width)
        if layout.precision != "int8":
            return stored
        # Copies, for fp32 must begin at a multiple of 4 and the file's scales need not.
        steps = scales.clone().view(torch.float32)[:, None]
        centre, width = tables.clone().view(torch.float32).view(2, -1)
        return dequantise(stored, steps, centre, width)

    def check(self) -> None:
        """Reads all of it.

        Raises:
            UserError: a row, or the header, is not what was written.
        """
        with self.path.open("rb") as file:
            if file.read(HEADER) != self.layout.header(self.rows):
                raise UserError(f"{self.path}: is damaged (its header); {AGAIN}")
        for row in range(self.rows):
            self._check(row, *self._raw(row))

    def _raw(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """The bytes of a row: its values, its scales, and the shard's tables (the last two empty but in int8)."""
        layout = self.layout
        if self._map is None:
            # A private map: the system keeps in memory of it what it likes, and no file stays open.
            size = layout.shard_bytes(self.rows)
            self._map = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)
        values = HEADER + layout.table_bytes
        scales = values + self.rows * layout.value_bytes
        many, few = layout.value_bytes, layout.row_bytes - layout.value_bytes
        return (
            self._map[values + row * many : values + (row + 1) * many],
            self._map[scales + row * few : scales + (row + 1) * few],
            self._map[HEADER:values],
        )

    def _check(self, row: int, values: Tensor, scales: Tensor, tables: Tensor) -> None:
        found = 0
        for part in (tables, values, scales):
            found = zlib.crc32(part.numpy().data, found)
        if found != self._checksums[row]:
            raise UserError(f"{self.path}: is damaged (row {row} of {self.rows}); {AGAIN}")
        self._checked[row] = 1


def shard_path(folder: Path, number: int) -> Path:
    """A shard's safetensors file; its .json is beside it."""
    return folder / f"shard-{number:05}.safetensors"


def write_whole(path: Path, values: Any) -> None:
    """Writes JSON that is on the disk before it has its name."""
    fresh = path.with_name(path.name + ".new")
    try:
        with fresh.open("w", encoding="utf-8") as file:
            json.dump(values, file, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the names too
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _crc_of(values: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
