"""Images that occur more than once in the shards, by their url or another identity that the reader knows.

The first one in the order of (shard, position) is kept. The others are left out, and it gets their captions.

OUT/urls/NAME.npy    uint64 [N + 1, 2]: for each of N samples a hash of its identity, 0 = none, and the position of its
                     captions in NAME.jsonl
OUT/urls/NAME.jsonl  the captions of each sample, a line of JSON

A first pass over the headers and texts of all shards writes these files. No image is read, but a remote shard is copied
completely. One sort then finds the duplicates: 100 million samples take 2.6 GB for their hashes, the order and the
sorted hashes (measured: 20 million, 0.52 GB). The probability that any two of so many identities have the same 64-bit
hash is 3 in 10,000.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from openblip2.data.web.mixture import Reader, find_reader, sample_captions, sample_picture
from openblip2.data.web.tars import Sample, Shard
from openblip2.errors import UserError
from openblip2.runs import atomic_write

FOLDER = "urls"
THREADS = 4  # that read shards, and mostly wait for disks and networks


class Twin(NamedTuple):
    """A sample that is one of several with the same image.

    Attributes:
        position: in its shard.
        shard: of a later duplicate, whose captions the sample gets; "" if it is itself a later duplicate and left out.
        other: the position of the later duplicate in that shard; -1 if there is none.
    """

    position: int
    shard: str
    other: int


class Duplicates:
    """The duplicates among shards.

    Args:
        names: of the shards, in their order. A shard without an index counts as empty.
        folder: of the index.
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
        """The number of samples of a shard that are not later duplicates."""
        start, end = self.starts[shard], self.starts[shard + 1]
        return int(end - start - np.diff(np.searchsorted(self.later, (start, end)))[0])

    def of(self, shard: int) -> list[Twin]:
        """The duplicates of a shard, by its number: first samples to leave out, then samples that get captions."""
        start, end = self.starts[shard], self.starts[shard + 1]
        left_out = self.later[slice(*np.searchsorted(self.later, (start, end)))] - start
        gets = self._by_first[slice(*np.searchsorted(self._firsts, (start, end)))]
        owners = np.searchsorted(self.starts, self.later[gets], side="right") - 1
        positions = (self.later[gets] - self.starts[owners]).tolist()
        joins = zip((self.first[gets] - start).tolist(), owners.tolist(), positions, strict=True)
        return [*(Twin(n, "", -1) for n in left_out.tolist()), *(Twin(n, self.names[int(s)], m) for n, s, m in joins)]


def write_index(
    shards: Sequence[tuple[str, str]],
    folder: Path,
    how: str,
    problem: Callable[[str], object],
    first: Sequence[int],
    advance: Callable[[], object],
) -> None:
    """The first pass: writes the index of each shard that has none yet.

    Processes may share the work: each begins with its own shards and then skips those that others have finished.

    Args:
        shards: name and address of each.
        folder: of the index.
        how: the name of the reader.
        problem: called with each shard that cannot be opened; it is tried again the next time.
        first: the numbers of the shards to begin with.
        advance: called after each shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    order = [*first, *sorted(set(range(len(shards))) - set(first))]

    def index(number: int) -> str | None:
        name, url = shards[number]
        try:
            if not _index(folder, name).exists():
                _write(url, _index(folder, name), find_reader(how))
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(THREADS) as threads:
        for wrong in threads.map(index, order):
            if wrong:
                problem(wrong)
            advance()


def captions_of(folder: Path, shard: str, numbers: Sequence[int]) -> list[tuple[str, ...]]:
    """The captions of some samples of a shard, from the index."""
    path = _index(folder, shard)
    begins = _read(path, "r")[:, 1]
    captions = []
    with path.with_suffix(".jsonl").open("rb") as file:
        for number in numbers:
            file.seek(int(begins[number]))
            captions.append(tuple(json.loads(file.readline())))
    return captions


def _index(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _read(path: Path, mapped: Literal["r"] | None = None) -> np.ndarray[Any, Any]:
    try:
        return np.load(path, mmap_mode=mapped, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: is damaged: remove it, and it is written again") from error


def _write(url: str, path: Path, how: Reader) -> None:
    shard = Shard(url, lambda line: None)  # its problems are reported when it is captioned
    rows, offset = [], 0
    try:  # other processes may write the same index
        with atomic_write(path.with_suffix(".jsonl"), concurrent=True) as draft, draft.open("wb") as file:
            for number in range(len(shard)):
                texts, about = shard.texts(number)
                sample = Sample(shard.key(number), b"", "", texts, about)
                rows.append((_hash(sample, how, url), offset))
                offset += file.write(json.dumps(sample_captions(sample, how)).encode() + b"\n")
    finally:
        shard.close()
    with atomic_write(path, concurrent=True) as draft, draft.open("wb") as file:  # last, it marks both as complete
        np.save(file, np.array([*rows, (0, offset)], np.uint64), allow_pickle=False)


def _hash(sample: Sample, how: Reader, url: str) -> int:
    """0 if nothing identifies the image."""
    name = sample_picture(sample, how, url)
    if name == f"{url}:{sample.key}":
        return 0
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest(), "little") or 1


def _twins(hashes: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The numbers of the later duplicates, in order, and for each the number of the first sample like it: int64."""
    order = np.argsort(hashes, kind="stable")  # stable: the first of equal samples comes first
    ranked = hashes[order]
    again = np.zeros(len(order), bool)
    again[1:] = (ranked[1:] == ranked[:-1]) & (ranked[1:] != 0)
    del ranked
    involved = again.copy()
    involved[:-1] |= again[1:]
    numbers, again = order[involved], again[involved]
    firsts = numbers[~again][np.cumsum(~again) - 1] if len(numbers) else numbers
    later, first = numbers[again], firsts[again]
    by_position = np.argsort(later, kind="stable")
    return later[by_position], first[by_position]
