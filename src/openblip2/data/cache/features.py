"""Frozen features of a set of pictures, computed once and reused in every step.

Shapes: N pictures, P patch tokens, V encoder width, S side in px, B pictures of a batch.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from openblip2.data.cache.folder import Cache, read_head, write_head
from openblip2.data.cache.shards import Layout, Picture, Shard, ShardWriter, shard_path, writing
from openblip2.data.cache.views import BATCH, encode_pictures, open_pictures
from openblip2.data.records import Record
from openblip2.errors import UserError

# What made a cache, in words for whoever has another one. Depth and precision change what the weights are and go first.
LABELS = {
    "image_size": "image size",
    "layer": "layers of the image encoder",
    "computed_in": "precision of the image encoder (vision.weights)",
    "weights": "weights of the image encoder",
    "mean": "mean of the pixels",
    "std": "deviation of the pixels",
    "transform": "transform of the pictures",
    "views": "views",
    "crops": "transform of the views",
    "seed": "seed of the views",
    "precision": "precision",
}


@dataclass(frozen=True)
class Features:
    """The features of `records`, row by row, in memory: `values [N, P, V]`."""

    records: list[Record]
    values: Tensor

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True)
class StoredFeatures:
    """The features of `records` where they lie in a cache: their rows are read when they are asked for.

    `finish`: what is done to rows `[B, P, V]` once they are read.
    """

    records: list[Record]
    cache: Cache
    finish: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def views(self) -> int:
        """How many random views there are of each picture, beside the plain one."""
        return self.cache.layout.entries - 1

    def take(self, numbers: Sequence[int], views: Sequence[int] | None = None) -> Tensor:
        """Features `[B, P, V]` of these records: of the plain pictures, or of one view (from 0) of each."""
        rows = [self.cache.rows[self.records[number].id] for number in numbers]
        if views is not None:
            rows = [row + 1 + view for row, view in zip(rows, views, strict=True)]
        return self.finish(self.cache.read(rows))

    def load(self) -> Features:
        """The features of all plain pictures, in memory."""
        return Features(self.records, self.take(range(len(self.records))))


def find_records(
    records: Sequence[Record], cache: Cache, finish: Callable[[Tensor], Tensor]
) -> tuple[StoredFeatures, list[str]]:
    """The records that have features in a cache, by their ids; and one line for each that was skipped there.

    Raises:
        UserError: a record is not in the cache, or its file has another size than when the cache was made. (Times of
            change are not compared, for copies have others; a file that is gone is not missed.)
    """
    unknown = [record for record in records if record.id not in cache.pictures]
    if unknown:
        raise UserError(
            f"{len(unknown)} of {len(records)} pictures are not in {cache.folder}, the first is {unknown[0].image} (id "
            f"{unknown[0].id!r}); make a cache of the same data"
        )
    for record in records:
        now, then = picture_of(record).bytes, cache.pictures[record.id].bytes
        if now and then and now != then:
            raise UserError(
                f"{record.image}: has {now:,} bytes, and had {then:,} when {cache.folder} was made; make the cache anew"
            )
    good = [record for record in records if record.id in cache.rows]
    return StoredFeatures(good, cache, finish), [cache.skipped[r.id] for r in records if r.id in cache.skipped]


def require_same(folder: Path, theirs: dict[str, Any], ours: dict[str, Any], way_out: str) -> None:
    """A cache made by `theirs` is one made by `ours`, in all that `ours` names.

    Raises:
        UserError: it is not; the message names what differs first.
    """
    for name, label in LABELS.items():
        if name in ours and theirs.get(name) != ours[name]:
            other = theirs.get("encoder") != ours.get("encoder", theirs.get("encoder"))
            encoders = f" (encoder {theirs.get('encoder')} there, {ours.get('encoder')} here)" if other else ""
            raise UserError(f"{folder}: {label} {theirs.get(name)} there, {ours[name]} here{encoders}; {way_out}")


def build_cache(
    records: Sequence[Record],
    encode: Callable[[Tensor], Tensor],
    size: int,
    folder: Path,
    made_by: dict[str, Any],
    layout: Layout,
    advance: Callable[[int], object],
    replace: bool = False,
) -> Cache:
    """Runs the frozen encoder over all pictures, into a cache; goes on where an interrupted build of it stopped.

    Pictures that cannot be opened are skipped and named in the cache.

    Args:
        encode: uint8 pictures `[n, 3, S, S]` -> features `[n, P, V]` of floats. size: S.
        made_by: what makes it, by the names of `LABELS`; `seed` is that of the views.
        layout: with 1 entry a picture the plain picture's, with more the plain one's and that of random views.
        advance: called after each batch with its number of pictures.
        replace: whether a cache of other pictures, or made by something else, gives way to the new one.

    Raises:
        UserError: there is such a cache in the way; not one picture can be opened; the disk is or would be full.
    """
    pictures = [picture_of(record) for record in records]
    if len({picture.id for picture in pictures}) < len(pictures):
        raise UserError(f"{folder}: two pictures have one id; give each its own (`id` in records.jsonl)")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    parts = [range(len(records))[n : n + layout.shard_pictures] for n in range(0, len(records), layout.shard_pictures)]
    try:
        missing = _missing(folder, made_by, layout, pictures, parts)
    except UserError:
        if not replace:
            raise
        remove_cache(folder)
        missing = list(range(len(parts)))
    require_room(folder, layout, sum(len(parts[number]) for number in missing))
    if missing:
        with writing(folder):
            write_head(folder, made_by, layout, len(records))
    for number, part in enumerate(parts):
        if number not in missing:
            advance(len(part))
            continue
        _write_shard(folder, number, [records[n] for n in part], encode, size, layout, made_by["seed"], advance)
    cache = Cache(folder)
    if not cache.rows:
        first = next(iter(cache.skipped.values()))
        remove_cache(folder)
        raise UserError(f"none of the {len(records)} pictures can be opened; the first: {first}")
    return cache


def picture_of(record: Record) -> Picture:
    """How a cache knows a record's picture."""
    try:
        stat = record.image.stat()
    except OSError:
        return Picture(record.id, 0, 0)
    return Picture(record.id, stat.st_size, stat.st_mtime_ns)


def require_room(folder: Path, layout: Layout, pictures: int) -> None:
    """There is room on the disk for so many pictures more.

    Raises:
        UserError: there is not.
    """
    needed, free = bytes_of(layout, pictures), free_bytes(folder)
    if needed > free:
        raise UserError(
            f"{folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; another disk, fewer views, "
            "or `openblip2 features --precision int8`"
        )


def bytes_of(layout: Layout, pictures: int) -> int:
    """On the disk, of a cache of so many pictures; checksums and names are a thousandth more."""
    return pictures * layout.entries * layout.row_bytes + layout.shards(pictures) * layout.shard_bytes(0)


def free_bytes(folder: Path) -> int:
    """Free on the disk of a folder that may have to be made yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def remove_cache(folder: Path) -> None:
    """Removes the files of a cache, whole or not, and nothing else."""
    for path in [folder / "cache.json", *folder.glob("cache.json.new"), *folder.glob("shard-*")]:
        path.unlink(missing_ok=True)


def _missing(
    folder: Path, made_by: dict[str, Any], layout: Layout, pictures: Sequence[Picture], parts: Sequence[range]
) -> list[int]:
    """The shards that have to be written yet, of a cache that may be there in part."""
    head = read_head(folder)
    if head is None:
        remove_cache(folder)  # shards that nothing vouches for
        return list(range(len(parts)))
    require_same(folder, head["made_by"], made_by, "give another --out, or remove that folder")
    if Layout(**head["layout"]) != layout or head["pictures"] != len(pictures):
        raise UserError(
            f"{folder}: is of {head['pictures']} pictures, here are {len(pictures)}; give another --out, or remove it"
        )
    missing: list[int] = []
    for number, part in enumerate(parts):
        try:
            shard = Shard(folder, number, layout)
            shard.check()
        except UserError:  # missing or damaged: made anew either way
            missing.append(number)
            continue
        changed = [n for n, picture in zip(part, shard.pictures, strict=True) if pictures[n] != picture]
        if changed:
            raise UserError(
                f"{folder}: the picture {pictures[changed[0]].id!r} is another one, or has changed since; give another "
                "--out, or remove that folder"
            )
    return missing


def _write_shard(
    folder: Path,
    number: int,
    records: Sequence[Record],
    encode: Callable[[Tensor], Tensor],
    size: int,
    layout: Layout,
    seed: int,
    advance: Callable[[int], object],
) -> None:
    skipped: dict[str, str] = {}
    shard_path(folder, number).with_suffix(".json").unlink(missing_ok=True)
    with writing(folder):
        writer = ShardWriter(folder, number, layout)
        try:
            known = [picture_of(record) for record in records]
            for n, batch in enumerate(open_pictures(records, size, layout.entries - 1, seed)):
                for record, picture in zip(records[n * BATCH : n * BATCH + len(batch)], batch, strict=True):
                    if isinstance(picture, str):
                        skipped[record.id] = picture
                for features in encode_pictures(encode, [p for p in batch if isinstance(p, Tensor)]):
                    writer.add(features)
                advance(len(batch))
            writer.close(known, skipped)
        except BaseException:  # an interruption too leaves no half of a shard
            writer.abandon()
            raise
