"""An index of a folder of pictures on disk: make it and keep it up to date.

INDEX/index.json      folder of the pictures, run, hash of its weights, Q, E, the next number
INDEX/pictures.jsonl  one row per picture: number, path in the folder, size and time of the file
INDEX/vectors.faiss   their query vectors in 8 bits (vectors.py)
INDEX/thumbnails/     NUMBER.jpg, at most 256 px wide and high
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from openblip2.apps.search.vectors import Array, Vectors, require_faiss
from openblip2.data.images import PICTURE_SUFFIXES, THREADS, Picture, left_out, open_picture
from openblip2.errors import UserError
from openblip2.evaluate.ranking import image_vectors
from openblip2.evaluate.run import weights_digest
from openblip2.hardware import computing
from openblip2.inference.inputs import features_of
from openblip2.inference.load import load
from openblip2.inference.matcher import Matcher
from openblip2.progress import Progress
from openblip2.runs import atomic_write, make_folder, read_json, write_json

SIDE = 256  # px, the longer side of a thumbnail
GROUP = 64  # pictures that are read together
SAVE_EVERY = 100  # groups
CHECKED = 2000  # pictures among which search in 8 bits is compared with exact search
QUERIES = 100  # vectors that are searched for in this comparison


class Row(NamedTuple):
    """A picture of the index: number, path in the folder, and its file's bytes and time (ns) when it was read."""

    number: int
    path: str
    bytes: int
    time: int


@dataclass
class Index:
    """An open index.

    Attributes:
        folder: of the index.
        about: content of `index.json`.
        rows: by number.
        vectors: of the same pictures.
    """

    folder: Path
    about: dict[str, Any]
    rows: dict[int, Row]
    vectors: Vectors

    @property
    def root(self) -> Path:
        return Path(self.about["root"])

    def path(self, number: int) -> Path:
        """The file of a picture.

        Raises:
            UserError: it is missing, or a link that leads out of the folder.
        """
        path = (self.root / self.rows[number].path).resolve()
        if not path.is_relative_to(self.root.resolve()) or not path.is_file():
            raise UserError(f"{path}: is missing since the index was made: run `openblip2 index` again")
        return path

    def thumbnail(self, number: int) -> Path:
        return self.folder / "thumbnails" / f"{number}.jpg"

    def save(self) -> None:
        """Writes the files one after another; `open_index` drops pictures that are not in both of the first two."""
        self.vectors.save(self.folder / "vectors.faiss")
        with atomic_write(self.folder / "pictures.jsonl") as draft, draft.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row._asdict()) + "\n" for row in self.rows.values())
        write_json(self.about, self.folder / "index.json")


@dataclass(frozen=True)
class Updated:
    """What an update did.

    Attributes:
        pictures: in the index now.
        added: new and changed ones.
        gone: deleted and changed ones.
        skipped: a line for each file that could not be read, and for each kind of pictures that were left out.
        recall: recall@10 of the 8 bits compared with exact search; None without new pictures.
        among: number of new pictures among which it was measured.
    """

    pictures: int
    added: int
    gone: int
    skipped: list[str]
    recall: float | None
    among: int


def open_index(folder: Path) -> Index:
    """Opens what `update_index` wrote.

    Raises:
        UserError: it is not an index, or broken.
    """
    about = read_json(folder / "index.json")
    if not isinstance(about, dict) or not {"root", "run", "weights", "queries", "width", "next"} <= about.keys():
        raise UserError(f"{folder}: is not an index: give a folder that `openblip2 index` wrote")
    try:
        with (folder / "pictures.jsonl").open(encoding="utf-8") as file:
            rows = {row.number: row for row in (Row(**json.loads(line)) for line in file)}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / 'pictures.jsonl'}: cannot be read: make the index again") from error
    vectors = Vectors.read(folder / "vectors.faiss", about["queries"], about["width"])
    numbers = vectors.numbers()
    if numbers != rows.keys():  # interrupted between two files: pictures that are not in both are read again
        vectors.remove(np.array(sorted(numbers - rows.keys()), np.int64))
        rows = {number: row for number, row in rows.items() if number in numbers}
    about["next"] = max(about["next"], *rows, -1) + 1 if rows else about["next"]
    return Index(folder, about, rows, vectors)


def update_index(root: Path, run: str, folder: Path, progress: Progress) -> Updated:
    """Indexes all pictures of a folder, or updates its index: only new and changed files are read.

    After an interruption, the next call continues; after a kill, from the last `SAVE_EVERY` groups.

    Args:
        root: folder of pictures.
        run: of stage 1.
        folder: of the index.
        progress: shows how far it is.

    Raises:
        UserError: no such folder, not a stage-1 run, an index of another folder or of other weights, no pictures.
    """
    require_faiss()
    if not root.is_dir():
        raise UserError(f"{root}: is not a folder: give a folder of pictures")
    matcher = load(run)
    if not isinstance(matcher, Matcher):
        raise UserError(f"{run} is a stage-2 run: an index needs a stage-1 run")
    index = _open_or_new(root, run, folder, matcher)
    names = list(_files(root, folder))
    others = [f"{root}: {line}" for line in left_out(names)]
    files = {name: _stat(root / name) for name in names if os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES}
    if not files:  # perhaps a disk that is not mounted: an existing index does not change
        raise UserError("; ".join([f"{root}: no pictures in it", *others]))
    gone = [row for row in index.rows.values() if files.get(row.path) != (row.bytes, row.time)]
    for row in gone:
        del index.rows[row.number]
        index.thumbnail(row.number).unlink(missing_ok=True)
    if gone:
        index.vectors.remove(np.array([row.number for row in gone]))
    new = sorted(files.keys() - {row.path for row in index.rows.values()})
    skipped: list[str] = []
    exact: list[Array] = []
    checked: list[int] = []
    with progress.steps("pictures", len(new)) as bar, ThreadPoolExecutor(THREADS) as threads:
        try:
            for n, start in enumerate(range(0, len(new), GROUP), 1):
                group = {path: files[path] for path in new[start : start + GROUP]}
                rows, vectors, problems = _read(index, matcher, group, threads)
                skipped += problems
                if rows:
                    index.vectors.add(np.array([row.number for row in rows]), vectors)
                    index.rows |= {row.number: row for row in rows}
                if rows and len(checked) < CHECKED:
                    exact.append(vectors)
                    checked += [row.number for row in rows]
                if n % SAVE_EVERY == 0:
                    index.save()
                bar.advance(count=len(group))
        except KeyboardInterrupt:
            index.save()
            raise
    if not index.rows:
        raise UserError(f"{root}: none of its pictures can be read; the first: {skipped[0]}")
    index.save()
    recall = recall_of(index.vectors, np.array(checked), np.concatenate(exact)) if exact else None
    return Updated(len(index.rows), len(new) - len(skipped), len(gone), others + skipped, recall, len(checked))


def vectors_of(matcher: Matcher, pictures: Sequence[Picture]) -> Array:
    """The query vectors of pictures: `[N, Q, E]`."""
    model = matcher.model
    with torch.inference_mode(), computing(model, matcher.settings.train.precision):
        vectors = torch.cat([image_vectors(model, features) for features in features_of(model, pictures)])
    return vectors.float().cpu().numpy()


def recall_of(vectors: Vectors, numbers: Array, exact: Array) -> float:
    """The share of the ten nearest pictures by exact search that search in 8 bits finds, too.

    The queries are halfway between the vectors of two pictures, because texts are near pictures but not on them.

    Args:
        vectors: of the index.
        numbers: of the pictures that are searched.
        exact: `[N, Q, E]`, the pictures' vectors before they were quantised.
    """
    random = np.random.default_rng(0)
    flat = exact.reshape(-1, exact.shape[-1])
    queries = flat[random.integers(len(flat), size=(QUERIES, 2))].sum(axis=1)
    queries /= np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-9)
    stored = np.stack([vectors.of(int(number)) for number in numbers])
    k = min(10, len(numbers))

    def nearest(query: Array, rows: Array) -> set[int]:
        return set(np.argsort(-(rows @ query).max(axis=1), kind="stable")[:k].tolist())

    return float(np.mean([len(nearest(query, exact) & nearest(query, stored)) / k for query in queries]))


def _stat(path: Path) -> tuple[int, int]:
    """Bytes and time: a file with others has changed."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _open_or_new(root: Path, run: str, folder: Path, matcher: Matcher) -> Index:
    weights = weights_digest(matcher)
    if (folder / "index.json").is_file():
        index = open_index(folder)
        if index.root != root.resolve():
            raise UserError(f"{folder}: is an index of {index.root}, not of {root}: give another --out")
        if index.about["weights"] != weights:
            raise UserError(f"{folder}: was made with other weights ({index.about['run']}): give another --out")
        return index
    if folder.exists() and any(path.name != ".lock" for path in folder.iterdir()):
        raise UserError(f"{folder}: is not empty and not an index: give a new folder")
    make_folder(folder / "thumbnails")
    queries, width = matcher.model.connector.tokens, matcher.model.vision_proj.out_features
    about = {"root": str(root.resolve()), "run": str(Path(run).resolve()) if Path(run).exists() else run}
    about |= {"weights": weights, "queries": queries, "width": width, "next": 0}
    return Index(folder, about, {}, Vectors(queries, width))


def _files(root: Path, index: Path) -> Iterator[str]:
    """Paths of files in a folder, without links, hidden folders and the index itself."""
    for parent, folders, files in os.walk(root):
        here = Path(parent)
        folders[:] = [f for f in folders if not f.startswith(".") and (here / f).resolve() != index.resolve()]
        for file in files:
            path = here / file
            if path.is_file() and not path.is_symlink():
                yield path.relative_to(root).as_posix()


def _read(
    index: Index, matcher: Matcher, files: Mapping[str, tuple[int, int]], threads: ThreadPoolExecutor
) -> tuple[list[Row], Array, Sequence[str]]:
    """Rows and vectors `[n, Q, E]` of files, and why others cannot be read. Writes thumbnails."""
    rows: list[Row] = []
    pictures: list[Image.Image] = []
    problems: list[str] = []
    for path, picture in zip(files, threads.map(_open, (index.root / path for path in files)), strict=True):
        if isinstance(picture, str):
            problems.append(picture)
            continue
        row = Row(index.about["next"], path, *files[path])
        index.about["next"] += 1
        small = picture.copy()
        small.thumbnail((SIDE, SIDE))
        small.save(index.thumbnail(row.number), quality=85)
        rows.append(row)
        pictures.append(picture)
    return rows, vectors_of(matcher, pictures) if rows else np.zeros((0, 1, 1), np.float32), problems


def _open(path: Path) -> Image.Image | str:
    """The picture, or why it cannot be opened."""
    try:
        return open_picture(path)
    except UserError as error:
        return str(error)
