"""Pictures that stand in the shards more than once: by their url, or what else the reader knows a picture by.

The first in the order of (shard, position) is kept. The others are left out, and their captions join its own.

OUT/urls/NAME.npy    uint64 [N + 1, 2], of each of the N samples a hash of its address, 0 = none, and where its captions
                     begin
OUT/urls/NAME.jsonl  the captions of each, a line of JSON

A first pass over the headers and the texts of all shards writes these, once. No picture is read, though a remote shard
is copied whole. Then one sort finds what is double: 100 million samples take 2.6 GB, their hashes, the order and the
sorted hashes (measured: 20 million, 0.52 GB). The chance that any two of so many addresses share a hash of 64 bits is 3
in 10,000.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from openblip2.data.web.readers import Reader, captions, picture, reader
from openblip2.data.web.tars import Sample, Shard
from openblip2.errors import UserError
from openblip2.runs import atomic_write

FOLDER = "urls"
THREADS = 4  # that read shards: they wait for disks and networks


class Twin(NamedTuple):
    """A sample that is not what it was alone.

    Attributes:
        position: in its shard.
        shard, other: where a later copy stands, whose captions it gets; "", -1: it is itself a later copy, and left
            out.
    """

    position: int
    shard: str
    other: int


class Duplicates:
    """What is double among shards.

    Args:
        names: of the shards, as in `FOLDER`, in their order. What has no index there holds nothing that is known.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self.names, self.folder = names, folder
        hashes = [
            _read(path)[:-1, 0].copy() if (path := _index(folder, name)).exists() else np.zeros(0, np.uint64)
            for name in names
        ]
        self.starts = np.cumsum([0, *map(len, hashes)])  # number of the first sample of each shard, over all
        self.later, self.first = _twins(np.concatenate(hashes))
        self._by_first = np.argsort(self.first, kind="stable")
        self._firsts = self.first[self._by_first]

    def pictures(self, shard: int) -> int:
        """How many samples of a shard are to be captioned: those that are no later copies."""
        start, end = self.starts[shard], self.starts[shard + 1]
        return int(end - start - np.diff(np.searchsorted(self.later, (start, end)))[0])

    def of(self, shard: int) -> list[Twin]:
        """What concerns the samples of a shard, by its number: first what is left out, then who gets captions."""
        start, end = self.starts[shard], self.starts[shard + 1]
        left_out = self.later[slice(*np.searchsorted(self.later, (start, end)))] - start
        gets = self._by_first[slice(*np.searchsorted(self._firsts, (start, end)))]
        owners = np.searchsorted(self.starts, self.later[gets], side="right") - 1
        places = (self.later[gets] - self.starts[owners]).tolist()
        joins = zip((self.first[gets] - start).tolist(), owners.tolist(), places, strict=True)
        return [*(Twin(n, "", -1) for n in left_out.tolist()), *(Twin(n, self.names[int(s)], m) for n, s, m in joins)]


def write_index(
    shards: Sequence[tuple[str, str]],
    folder: Path,
    how: str,
    problem: Callable[[str], object],
    first: Sequence[int],
    advance: Callable[[], object],
) -> None:
    """The first pass: the index of each shard that has none yet, a pair of name and address each.

    Processes may share the work: each begins with its own, and finds what others have done in the meantime.

    Args:
        how: the reader.
        problem: is told which shards cannot be opened: they are tried again the next time.
        first: the numbers of the shards to begin with.
        advance: is called after each shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    order = [*first, *sorted(set(range(len(shards))) - set(first))]

    def index(number: int) -> str | None:
        name, url = shards[number]
        try:
            if not _index(folder, name).exists():
                _write(url, _index(folder, name), reader(how))
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(THREADS) as threads:
        for wrong in threads.map(index, order):
            if wrong:
                problem(wrong)
            advance()


def captions_of(folder: Path, shard: str, numbers: Sequence[int]) -> list[tuple[str, ...]]:
    """The captions of some samples of a shard, as the first pass found them."""
    path = _index(folder, shard)
    begins = _read(path, "r")[:, 1]
    found = []
    with path.with_suffix(".jsonl").open("rb") as file:
        for number in numbers:
            file.seek(int(begins[number]))
            found.append(tuple(json.loads(file.readline())))
    return found


def _index(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _read(path: Path, mapped: Literal["r"] | None = None) -> np.ndarray[Any, Any]:
    try:
        return np.load(path, mmap_mode=mapped, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: is damaged: remove it, and it is made again") from error


def _write(url: str, path: Path, how: Reader) -> None:
    shard = Shard(url, lambda line: None)  # what is wrong in it is said when it is captioned
    rows, place = [], 0
    try:  # other processes may be at the same shard
        with atomic_write(path.with_suffix(".jsonl"), concurrent=True) as draft, draft.open("wb") as file:
            for number in range(len(shard)):
                texts, about = shard.texts(number)
                sample = Sample(shard.key(number), b"", "", texts, about)
                rows.append((_hash(sample, how, url), place))
                place += file.write(json.dumps(captions(sample, how)).encode() + b"\n")
    finally:
        shard.close()
    with atomic_write(path, concurrent=True) as draft, draft.open("wb") as file:  # last: it says that both are there
        np.save(file, np.array([*rows, (0, place)], np.uint64), allow_pickle=False)


def _hash(sample: Sample, how: Reader, url: str) -> int:
    """0: nothing says which picture it is."""
    name = picture(sample, how, url)
    if name == f"{url}:{sample.key}":
        return 0
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest(), "little") or 1


def _twins(hashes: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The numbers of samples that stood before, in order, and for each of the first one that is the same: int64."""
    order = np.argsort(hashes, kind="stable")  # of equal ones the first comes first
    ranked = hashes[order]
    again = np.zeros(len(order), bool)
    again[1:] = (ranked[1:] == ranked[:-1]) & (ranked[1:] != 0)
    del ranked
    involved = again.copy()
    involved[:-1] |= again[1:]
    numbers, again = order[involved], again[involved]
    firsts = numbers[~again][np.cumsum(~again) - 1] if len(numbers) else numbers
    later, first = numbers[again], firsts[again]
    by_place = np.argsort(later, kind="stable")
    return later[by_place], first[by_place]
