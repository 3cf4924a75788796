"""An index of a folder of pictures on disk, and the pictures nearest to a vector.

INDEX/index.json      folder of the pictures, run, hash of its weights, Q, E
INDEX/pictures.jsonl  one row per picture: number, path in the folder, size and time of the file
INDEX/vectors.faiss   the query vectors of the pictures in 8 bits
INDEX/thumbnails/     NUMBER.jpg, at most 256 px wide and high

A picture has Q vectors of length 1. As in ITC, its similarity to a text is that of its best vector.

Shapes: N pictures, Q queries, E shared space.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from openblip2.errors import UserError, one_line
from openblip2.inference.matcher import Matcher
from openblip2.runs import atomic_write, read_json, write_json

Array = np.ndarray[Any, Any]
SIDE = 256  # px, the longer side of a thumbnail
RANGE = 4.0  # in standard deviations of one coordinate of a random unit vector


class Vectors:
    """The query vectors of pictures. The vector of query q of picture n has the id n * Q + q.

    Args:
        queries: Q.
        width: E.
        path: a file that `save` wrote; None = no vectors yet.

    Raises:
        UserError: the file is missing or broken, or its vectors have another number or width.
    """

    def __init__(self, queries: int, width: int, path: Path | None = None) -> None:
        faiss = require_faiss()
        self.queries, self.width = queries, width
        if path is None:
            quantiser = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
            self.index = faiss.IndexIDMap2(quantiser)
            return
        try:
            self.index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise UserError(f"{path}: cannot be read ({one_line(error)[:100]}): run `openblip2 index` again") from error
        if self.index.d != width or self.index.ntotal % queries:
            found = f"{self.index.ntotal} vectors of width {self.index.d}"
            problem = f"{found}, but index.json says {queries} of width {width} for each picture"
            raise UserError(f"{path}: {problem}: run `openblip2 index` with a new folder")

    def numbers(self) -> set[int]:
        """The numbers of all pictures."""
        return set((require_faiss().vector_to_array(self.index.id_map) // self.queries).tolist())

    def add(self, numbers: list[int], vectors: Array) -> None:
        """Adds N new pictures with vectors `[N, Q, E]`."""
        rows = np.ascontiguousarray(vectors.reshape(-1, self.width), np.float32)
        if not self.index.is_trained:  # sets the range of the 8 bits: that of `rows`, or the usual one if larger
            usual = np.full((1, self.width), RANGE / self.width**0.5, np.float32)
            self.index.train(np.concatenate([rows, usual, -usual]))
        self.index.add_with_ids(rows, self._ids(numbers))

    def remove(self, numbers: list[int]) -> None:
        """Removes N pictures."""
        self.index.remove_ids(self._ids(numbers))

    def best(self, query: Array, k: int) -> list[tuple[int, float]]:
        """Numbers and cosines of the k pictures whose best vector is nearest to `query [E]`, nearest first.

        Exact except for the rounding to 8 bits, because the k * Q nearest vectors belong to at least k pictures.
        """
        count = min(k * self.queries, self.index.ntotal)
        if not count:
            return []
        scores, ids = self.index.search(np.ascontiguousarray(query[None], np.float32), count)
        best: dict[int, float] = {}
        for score, i in zip(scores[0].tolist(), ids[0].tolist(), strict=True):
            best.setdefault(i // self.queries, score)
        return list(best.items())[:k]

    def alike(self, query: Array, k: int) -> list[tuple[int, float]]:
        """The k pictures most similar to one with vectors `query [Q, E]`, by the mean over queries of the best cosine.

        Only the 4k pictures nearest to each of the vectors are compared.
        """
        numbers = sorted({number for vector in query for number, _ in self.best(vector, 4 * k)})
        scores = [float((query @ self.of(number).T).max(axis=1).mean()) for number in numbers]
        return sorted(zip(numbers, scores, strict=True), key=lambda pair: -pair[1])[:k]

    def of(self, number: int) -> Array:
        """A picture's vectors, decoded from 8 bits: `[Q, E]`."""
        return np.stack([self.index.reconstruct(int(i)) for i in self._ids([number])])

    def save(self, path: Path) -> None:
        """Writes the index. After an error, the old file is unchanged."""
        with atomic_write(path) as draft:
            require_faiss().write_index(self.index, str(draft))

    def _ids(self, numbers: list[int]) -> Array:
        return (np.array(numbers, np.int64)[:, None] * self.queries + np.arange(self.queries)).reshape(-1)


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
        about: content of `index.json`.
        rows: the rows of the pictures by number.
    """

    folder: Path
    about: dict[str, Any]
    rows: dict[int, Row]
    vectors: Vectors

    @property
    def root(self) -> Path:
        return Path(self.about["root"])

    def path(self, number: int) -> Path | None:
        """The file of a picture; None if it is missing now, or is a link that leads out of the folder."""
        path = (self.root / self.rows[number].path).resolve()
        return path if path.is_relative_to(self.root.resolve()) and path.is_file() else None

    def thumbnail(self, number: int) -> Path:
        return self.folder / "thumbnails" / f"{number}.jpg"

    def add(self, rows: Sequence[Row], pictures: Sequence[Image.Image], matcher: Matcher) -> None:
        """Adds new pictures and writes their thumbnails."""
        self.vectors.add([row.number for row in rows], matcher.features(pictures).projected.numpy())
        for row, picture in zip(rows, pictures, strict=True):
            small = picture.copy()
            small.thumbnail((SIDE, SIDE))
            small.save(self.thumbnail(row.number), quality=85)
            self.rows[row.number] = row

    def remove(self, numbers: list[int]) -> None:
        """Removes pictures."""
        self.vectors.remove(numbers)
        for number in numbers:
            del self.rows[number]
            self.thumbnail(number).unlink(missing_ok=True)

    def save(self) -> None:
        """Writes the files one after another; `open_index` drops pictures that are not in both of the first two."""
        self.vectors.save(self.folder / "vectors.faiss")
        with atomic_write(self.folder / "pictures.jsonl") as draft, draft.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row._asdict()) + "\n" for row in self.rows.values())
        write_json(self.about, self.folder / "index.json")


def open_index(folder: Path) -> Index:
    """Opens what `update_index` wrote.

    Raises:
        UserError: the folder is not an index, or the index is broken.
    """
    about = read_json(folder / "index.json") if (folder / "index.json").exists() else None
    if not isinstance(about, dict) or not {"root", "run", "weights", "queries", "width"} <= about.keys():
        raise UserError(f"{folder}: is not an index: give a folder that `openblip2 index` wrote")
    try:
        with (folder / "pictures.jsonl").open(encoding="utf-8") as file:
            rows = {row.number: row for row in (Row(**json.loads(line)) for line in file)}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / 'pictures.jsonl'}: cannot be read: make the index again") from error
    vectors = Vectors(about["queries"], about["width"], folder / "vectors.faiss")
    # After an interruption between two files, pictures that are not in both are dropped, so that they are read again.
    numbers = vectors.numbers()
    vectors.remove(sorted(numbers - rows.keys()))
    return Index(folder, about, {number: row for number, row in rows.items() if number in numbers}, vectors)


def require_faiss() -> Any:
    """Returns faiss. Raises a `UserError` that says how to install it if it is missing."""
    try:
        import faiss
    except ImportError as error:
        raise UserError("the vector index needs faiss: pip install 'openblip2[search]'") from error
    return faiss
