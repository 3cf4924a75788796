"""The query vectors of many pictures in 8 bits (faiss), and the pictures nearest to a vector.

A picture has Q vectors of length 1. As in ITC, its similarity to a text is that of its best vector.

Shapes: N pictures, Q queries, E shared space.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openblip2.errors import UserError, one_line
from openblip2.runs import atomic_write

Array = np.ndarray[Any, Any]
QUERIES = 100  # vectors that are searched for to compare search in 8 bits with exact search
RANGE = 4.0  # standard deviations of one of the E values of a random direction


class Vectors:
    """Vectors by the number of their picture; query q of picture n has the id n * Q + q.

    Args:
        queries: Q.
        width: E.
        index: of faiss; None = a new one.
    """

    def __init__(self, queries: int, width: int, index: Any = None) -> None:
        faiss = require_faiss()
        self.queries, self.width = queries, width
        if index is None:
            quantiser = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
            index = faiss.IndexIDMap2(quantiser)
        self.index = index

    def numbers(self) -> set[int]:
        """The numbers of all pictures."""
        ids = require_faiss().vector_to_array(self.index.id_map)
        return set((ids // self.queries).tolist())

    def add(self, numbers: list[int], vectors: Array) -> None:
        """Adds N new pictures with vectors `[N, Q, E]`."""
        rows = np.ascontiguousarray(vectors.reshape(-1, self.width), np.float32)
        if not self.index.is_trained:  # the range of the 8 bits: of these vectors, or the usual one if it is larger
            usual = np.full((1, self.width), RANGE / self.width**0.5, np.float32)
            self.index.train(np.concatenate([rows, usual, -usual]))
        self.index.add_with_ids(rows, self._ids(numbers))

    def remove(self, numbers: list[int]) -> None:
        """Removes N pictures."""
        self.index.remove_ids(self._ids(numbers))

    def best(self, query: Array, k: int) -> list[tuple[int, float]]:
        """Numbers and cosines of the k pictures whose best vector is nearest to `query [E]`, nearest first.

        Exact except for the 8 bits: the k * Q nearest vectors belong to at least k pictures.
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
        """The k pictures most similar to one with vectors `query [Q, E]`: by the mean over them of the best cosine.

        Only the 4k pictures nearest to each of the vectors are compared.
        """
        numbers = sorted({number for vector in query for number, _ in self.best(vector, 4 * k)})
        scores = [float((query @ self.of(number).T).max(axis=1).mean()) for number in numbers]
        return sorted(zip(numbers, scores, strict=True), key=lambda pair: -pair[1])[:k]

    def of(self, number: int) -> Array:
        """A picture's vectors, decoded from 8 bits: `[Q, E]`."""
        return np.stack([self.index.reconstruct(int(i)) for i in self._ids([number])])

    def save(self, path: Path) -> None:
        """Writes the index; an error leaves what was there before."""
        with atomic_write(path) as draft:
            require_faiss().write_index(self.index, str(draft))

    @classmethod
    def read(cls, path: Path, queries: int, width: int) -> "Vectors":
        """Reads what `save` wrote.

        Raises:
            UserError: the file is missing or broken, or its vectors have another number or width.
        """
        try:
            index = require_faiss().read_index(str(path))
        except RuntimeError as error:
            raise UserError(f"{path}: cannot be read ({one_line(error)[:100]}): run `openblip2 index` again") from error
        if index.d != width or index.ntotal % queries:
            problem = f"{index.ntotal} vectors of width {index.d}, but index.json says {queries} of width {width} "
            raise UserError(f"{path}: {problem}for each picture: run `openblip2 index` with a new folder")
        return cls(queries, width, index)

    def _ids(self, numbers: list[int]) -> Array:
        return (np.array(numbers, np.int64)[:, None] * self.queries + np.arange(self.queries)).reshape(-1)


def recall_of(vectors: Vectors, exact: Mapping[int, Array]) -> float:
    """The share of the ten nearest pictures by exact search that search in 8 bits finds, too.

    The queries are halfway between the vectors of two pictures, because texts are near pictures but not on them.

    Args:
        vectors: of the index.
        exact: the vectors `[Q, E]` before they were quantised, by the numbers of the pictures that are searched.
    """
    random = np.random.default_rng(0)
    rows, stored = np.stack(list(exact.values())), np.stack([vectors.of(number) for number in exact])
    flat = rows.reshape(-1, vectors.width)
    queries = flat[random.integers(len(flat), size=(QUERIES, 2))].sum(axis=1)
    queries /= np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-9)
    k = min(10, len(rows))

    def nearest(query: Array, rows: Array) -> set[int]:
        return set(np.argsort(-(rows @ query).max(axis=1), kind="stable")[:k].tolist())

    return float(np.mean([len(nearest(query, rows) & nearest(query, stored)) / k for query in queries]))


def require_faiss() -> Any:
    """faiss, or a `UserError` that says how to install it."""
    try:
        import faiss
    except ImportError as error:
        raise UserError("the vector index needs faiss: pip install 'openblip2[search]'") from error
    return faiss
