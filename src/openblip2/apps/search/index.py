"""An index of a folder of pictures on the disk, made and kept up to date.

INDEX/index.json      root folder, the run and its weights' hash, Q and E, the next number
INDEX/pictures.jsonl  one row a picture: number, path below the root, bytes and time of the file
INDEX/vectors.faiss   their query vectors in 8 bits (vectors.py)
INDEX/thumbnails/     NUMBER.jpg, 256 px the longer way
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from openblip2.apps.search.vectors import Array, Vectors, require_faiss
from openblip2.data.images import THREADS, open_picture
from openblip2.data.web.tars import PICTURES
from openblip2.errors import UserError
from openblip2.evaluate.protocol import weights_digest
from openblip2.evaluate.ranking import image_vectors
from openblip2.hardware import computing
from openblip2.inference import load
from openblip2.inputs import features_of
from openblip2.matcher import Matcher
from openblip2.progress import Progress
from openblip2.runs import atomic_write, make_folder, read_json, write_json

SIDE = 256  # px, a thumbnail's longer side
GROUP = 64  # pictures at once
SAVED = 100  # groups after which what is done is written
CHECKED = 2000  # pictures among which quantised search is held to exact search
ASKED = 100  # vectors that are searched for there


class Row(NamedTuple):
    """A picture of the index: number, path below the root, and its file's bytes and time when it was read."""

    number: int
    path: str
    bytes: int
    time: int


@dataclass
class Index:
    """An opened index. `rows`: by number. `about`: what `index.json` holds."""

    folder: Path
    about: dict[str, Any]
    rows: dict[int, Row]
    vectors: Vectors

    @property
    def root(self) -> Path:
        return Path(self.about["root"])

    def path(self, number: int) -> Path:
        """A picture's file.

        Raises:
            UserError: it lies outside the root by now (a link), or is gone.
        """
        path = (self.root / self.rows[number].path).resolve()
        if not path.is_relative_to(self.root.resolve()) or not path.is_file():
            raise UserError(f"{path}: is gone since the index was made; run `openblip2 index` again")
        return path

    def thumbnail(self, number: int) -> Path:
        return self.folder / "thumbnails" / f"{number}.jpg"

    def save(self) -> None:
        """One file after another; `open_index` drops what is not in both of the first."""
        self.vectors.save(self.folder / "vectors.faiss")
        with atomic_write(self.folder / "pictures.jsonl") as draft, draft.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row._asdict()) + "\n" for row in self.rows.values())
        write_json(self.about, self.folder / "index.json")


@dataclass(frozen=True)
class Updated:
    """What an update did: pictures in the index now, added (changed ones too), gone, and a line for each skipped.

    `recall`: recall@10 of the 8 bits against exact search among `among` of the new pictures; None without any.
    """

    pictures: int
    added: int
    gone: int
    skipped: list[str]
    recall: float | None
    among: int


def open_index(folder: Path) -> Index:
    """What `update_index` wrote.

    Raises:
        UserError: it is none, or broken.
    """
    about = read_json(folder / "index.json")
    if not isinstance(about, dict) or not {"root", "run", "weights", "queries", "width", "next"} <= about.keys():
        raise UserError(f"{folder}: is no index; a folder that `openblip2 index` wrote")
    rows: dict[int, Row] = {}
    try:
        with (folder / "pictures.jsonl").open(encoding="utf-8") as file:
            for line in file:
                row = Row(**json.loads(line))
                rows[row.number] = row
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / 'pictures.jsonl'}: cannot be read; what `openblip2 index` wrote") from error
    vectors = Vectors.read(folder / "vectors.faiss", about["queries"], about["width"])
    there = vectors.numbers()
    if there != rows.keys():  # it was interrupted between two files: what is not in both is read again
        vectors.remove(np.array(sorted(there - rows.keys()), np.int64))
        rows = {number: row for number, row in rows.items() if number in there}
    about["next"] = max(about["next"], *rows, -1) + 1 if rows else about["next"]
    return Index(folder, about, rows, vectors)


def update_index(root: Path, run: str, folder: Path, progress: Progress) -> Updated:
    """Makes an index of all pictures below `root`, or brings one up to date: only new and changed files are read.

    Interrupted, it goes on where it was; killed, at its last `SAVED` groups.

    Raises:
        UserError: no folder, no stage-1 run, an index of another folder or of other weights, not one picture.
    """
    require_faiss()
    if not root.is_dir():
        raise UserError(f"{root}: is no folder; one with pictures")
    matcher = load(run)
    if not isinstance(matcher, Matcher):
        raise UserError(f"{run} is a stage-2 run; an index needs a stage-1 run")
    index = _opened_or_new(root, run, folder, matcher)
    there = {path: index_stat(root / path) for path in _pictures(root, folder)}
    if not there:  # a disk that is not mounted, perhaps: an existing index stays as it is
        raise UserError(f"{root}: not one picture in it")
    known = {row.path: row for row in index.rows.values()}
    gone = [row for path, row in known.items() if there.get(path) != (row.bytes, row.time)]
    kept = {row.path for row in index.rows.values()} - {row.path for row in gone}
    for row in gone:
        del index.rows[row.number]
        index.thumbnail(row.number).unlink(missing_ok=True)
    if gone:
        index.vectors.remove(np.array([row.number for row in gone]))
    fresh = sorted(there.keys() - kept)
    skipped: list[str] = []
    exact: list[Array] = []
    numbers: list[int] = []
    with (
        _saved_on_interrupt(index),
        progress.steps("pictures", len(fresh)) as bar,
        ThreadPoolExecutor(THREADS) as threads,
    ):
        for n, start in enumerate(range(0, len(fresh), GROUP), 1):
            part = fresh[start : start + GROUP]
            rows, vectors = _read(index, matcher, [(path, there[path]) for path in part], threads, skipped.append)
            if rows:
                index.vectors.add(np.array([row.number for row in rows]), vectors)
                index.rows |= {row.number: row for row in rows}
                if len(numbers) < CHECKED:
                    exact.append(vectors)
                    numbers += [row.number for row in rows]
            if n % SAVED == 0:
                index.save()
            bar.advance(count=len(part))
    if not index.rows:
        raise UserError(f"{root}: not one picture in it can be read; the first: {skipped[0]}")
    index.save()
    recall = recall_of(index.vectors, np.array(numbers), np.concatenate(exact)) if exact else None
    return Updated(len(index.rows), len(fresh) - len(skipped), len(gone), skipped, recall, len(numbers))


@contextmanager
def _saved_on_interrupt(index: Index) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        index.save()  # what is not yet in both of its files is dropped and read again
        raise


def recall_of(vectors: Vectors, numbers: Array, exact: Array, seed: int = 0) -> float:
    """The share of the ten nearest pictures by exact search that the 8 bits find, too, among the pictures `numbers`.

    Asked are `ASKED` vectors between two pictures' own, as texts lie beside pictures and not on them.

    Args:
        exact: `[N, Q, E]`, the pictures' vectors before they were quantised.
    """
    random = np.random.default_rng(seed)
    flat = exact.reshape(-1, exact.shape[-1])
    asked = flat[random.integers(len(flat), size=(ASKED, 2))].sum(axis=1)
    asked /= np.maximum(np.linalg.norm(asked, axis=1, keepdims=True), 1e-9)
    stored = np.stack([vectors.of(int(number)) for number in numbers])
    k = min(10, len(numbers))

    def nearest(one: Array, rows: Array) -> set[int]:
        return set(np.argsort(-(rows @ one).max(axis=1), kind="stable")[:k].tolist())

    return float(np.mean([len(nearest(one, exact) & nearest(one, stored)) / k for one in asked]))


def index_stat(path: Path) -> tuple[int, int]:
    """By which a changed file is told: its bytes, and its time in nanoseconds."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _opened_or_new(root: Path, run: str, folder: Path, matcher: Matcher) -> Index:
    weights = weights_digest(matcher)
    if (folder / "index.json").is_file():
        index = open_index(folder)
        if index.root != root.resolve():
            raise UserError(f"{folder}: is an index of {index.root}, not of {root}; give another --out")
        if index.about["weights"] != weights:
            raise UserError(f"{folder}: was made by other weights ({index.about['run']}); give another --out")
        return index
    queries, width = matcher.model.qformer.queries.shape[1], matcher.model.vision_proj.out_features
    if folder.exists() and any(path.name != ".lock" for path in folder.iterdir()):
        raise UserError(f"{folder}: is not empty and no index; give a new folder")
    make_folder(folder / "thumbnails")
    about = {"root": str(root.resolve()), "run": str(Path(run).resolve()) if Path(run).exists() else run}
    about |= {"weights": weights, "queries": queries, "width": width, "next": 0}
    return Index(folder, about, {}, Vectors(queries, width))


def _pictures(root: Path, index: Path) -> Iterator[str]:
    """Paths below the root; links are not followed, hidden folders and the index itself left out."""
    for place, folders, files in os.walk(root):
        here = Path(place)
        folders[:] = [f for f in folders if not f.startswith(".") and (here / f).resolve() != index.resolve()]
        for file in files:
            path = here / file
            if path.suffix.lower().removeprefix(".") in PICTURES and path.is_file() and not path.is_symlink():
                yield path.relative_to(root).as_posix()


def _read(
    index: Index,
    matcher: Matcher,
    files: Sequence[tuple[str, tuple[int, int]]],
    threads: ThreadPoolExecutor,
    problem: Callable[[str], object],
) -> tuple[list[Row], Array]:
    """Rows and vectors `[n, Q, E]` of the files that are pictures, with their thumbnails on the disk."""
    rows: list[Row] = []
    pictures: list[Image.Image] = []
    for (path, (size, time)), found in zip(files, threads.map(lambda f: _open(index.root / f[0]), files), strict=True):
        if isinstance(found, str):
            problem(found)
            continue
        row = Row(index.about["next"], path, size, time)
        index.about["next"] += 1
        small = found.copy()
        small.thumbnail((SIDE, SIDE))
        small.save(index.thumbnail(row.number), quality=85)
        rows.append(row)
        pictures.append(found)
    model = matcher.model
    if not rows:
        return [], np.zeros((0, 1, 1), np.float32)
    with torch.inference_mode(), computing(model, matcher.settings.train.precision):
        vectors = torch.cat([image_vectors(model, part) for part in features_of(model, pictures)])
    return rows, vectors.float().cpu().numpy()


def _open(path: Path) -> Image.Image | str:
    try:
        return open_picture(path)
    except UserError as error:
        return str(error)
