"""A cache of frozen features: a folder of shards and what made them.

CACHE/cache.json               what made it, the layout of its rows, how many pictures and shards it has
CACHE/shard-00000.safetensors  the rows of up to 512 pictures (data/cache/shards.py)
CACHE/shard-00000.json         whose they are, what was skipped and why, checksums

The rows' owners stand with their shard and not in cache.json, which would grow and be written anew with every shard.

Shapes: P patch tokens, V encoder width, n rows that are read.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openblip2.data.cache.shards import STORED, Layout, Picture, Shard, shard_path, write_whole
from openblip2.errors import UserError

VERSION = 1


class Cache:
    """A whole cache, opened for reading. No row is read before it is asked for.

    Attributes:
        made_by: what made it. layout: of its rows. pictures: all of them, by id. rows: the first row of each picture
            that has rows, by id. skipped: why a picture has none, by id.

    Raises:
        UserError: no cache, an unfinished one, one of another version, or a file of it that is missing or cut short.
    """

    def __init__(self, folder: Path) -> None:
        head = read_head(folder)
        if head is None:
            raise UserError(f"{folder} is no feature cache: give the folder that `openblip2 features ... --out` wrote")
        self.folder = folder
        self.made_by: dict[str, Any] = head["made_by"]
        self.layout = Layout(**head["layout"])
        self.pictures: dict[str, Picture] = {}
        self.rows: dict[str, int] = {}
        self.skipped: dict[str, str] = {}
        count = head["shards"]
        there = sum(shard_path(folder, n).with_suffix(".json").is_file() for n in range(count))
        if there < count:
            raise UserError(
                f"{folder} is unfinished ({there} of {count} shards are there): run the same `openblip2 features` "
                "again, which goes on"
            )
        self._shards = [Shard(folder, number, self.layout) for number in range(count)]
        self._firsts: list[int] = []  # the first row of each shard
        row = 0
        for shard in self._shards:
            self._firsts.append(row)
            self.skipped |= shard.skipped
            self.pictures |= {picture.id: picture for picture in shard.pictures}
            for n, id_ in enumerate(p.id for p in shard.pictures if p.id not in shard.skipped):
                self.rows[id_] = row + n * self.layout.entries
            row += shard.rows

    def read(self, rows: Sequence[int]) -> Tensor:
        """Rows `[n, P, V]` in any order, on the CPU: fp16 and bf16 as they are, int8 as bf16.

        Raises:
            UserError: a row is not what was written.
        """
        kind = torch.bfloat16 if self.layout.precision == "int8" else STORED[self.layout.precision]
        found = torch.empty(len(rows), self.layout.tokens, self.layout.width, dtype=kind)
        for n, row in enumerate(rows):
            # Of shards that begin alike all but the last are empty.
            number = bisect_right(self._firsts, row) - 1
            found[n].copy_(self._shards[number].read(row - self._firsts[number]))
        return found


def read_head(folder: Path) -> dict[str, Any] | None:
    """What `cache.json` holds (`made_by`, `layout`, `pictures`, `shards`), None if there is none.

    Raises:
        UserError: it is damaged, or of another version.
    """
    path = folder / "cache.json"
    if not path.is_file():
        return None
    try:
        head: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = head["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged or another program's; remove {folder} and make the cache anew") from error
    if version != VERSION:
        raise UserError(f"{path}: is of version {version}, this program reads {VERSION}; make the cache anew")
    if head.keys() != {"version", "made_by", "layout", "pictures", "shards"}:
        raise UserError(f"{path}: is damaged or another program's; remove {folder} and make the cache anew")
    return head


def write_head(folder: Path, made_by: dict[str, Any], layout: Layout, pictures: int) -> None:
    """Writes `cache.json`, before the first shard."""
    head = {"made_by": made_by, "layout": asdict(layout), "pictures": pictures, "shards": layout.shards(pictures)}
    write_whole(folder / "cache.json", {"version": VERSION} | head)
