"""The query vectors of many pictures, quantised to 8 bits, and the pictures that fit a vector best; kept by faiss.

A picture has Q vectors of length 1, and fits a text as well as the best of them does, as in ITC.

Shapes: N pictures, Q queries, E shared space.
"""

from pathlib import Path
from typing import Any

import numpy as np

from openblip2.errors import UserError, one_line
from openblip2.runs import atomic_write

Array = np.ndarray[Any, Any]
USUAL = 4.0  # standard deviations of one value of E, if the direction is any


class Vectors:
    """Vectors by the number of their picture, whose `queries` vectors stand under Q * number + query.

    Args:
        index: what faiss holds; None = nothing yet.
    """

    def __init__(self, queries: int, width: int, index: Any = None) -> None:
        faiss = require_faiss()
        self.queries, self.width = queries, width
        if index is None:
            quantiser = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
            index = faiss.IndexIDMap2(quantiser)
        self.index = index

    def __len__(self) -> int:
        return self.index.ntotal // self.queries

    def numbers(self) -> set[int]:
        """Of the pictures that are there."""
        ids = require_faiss().vector_to_array(self.index.id_map)
        return set((ids // self.queries).tolist())

    def add(self, numbers: Array, vectors: Array) -> None:
        """Pictures that are not there yet: `numbers [N]` int64, `vectors [N, Q, E]`."""
        rows = np.ascontiguousarray(vectors.reshape(-1, self.width), np.float32)
        if not self.index.is_trained:  # the 8 bits' range: that of the first pictures, and what few would go beyond
            usual = np.full((1, self.width), USUAL / self.width**0.5, np.float32)
            self.index.train(np.concatenate([rows, usual, -usual]))
        self.index.add_with_ids(rows, self._ids(numbers).reshape(-1))

    def remove(self, numbers: Array) -> None:
        """Pictures that are there: `[N]`."""
        self.index.remove_ids(self._ids(numbers).reshape(-1))

    def best(self, wanted: Array, k: int) -> list[tuple[int, float]]:
        """The k pictures whose best vector is nearest to `wanted [E]`, the best first: numbers and cosines.

        Exact but for the 8 bits: of the k * Q nearest vectors no fewer than k pictures are the owners.
        """
        count = min(k * self.queries, self.index.ntotal)
        if not count:
            return []
        scores, ids = self.index.search(np.ascontiguousarray(wanted[None], np.float32), count)
        found: dict[int, float] = {}
        for score, place in zip(scores[0].tolist(), ids[0].tolist(), strict=True):
            found.setdefault(place // self.queries, score)
        return list(found.items())[:k]

    def alike(self, wanted: Array, k: int) -> list[tuple[int, float]]:
        """The k pictures most like one whose vectors are `wanted [Q, E]`: by the mean of their nearest ones' cosines.

        Candidates are the 4k pictures nearest to each of the vectors.
        """
        numbers = sorted({number for vector in wanted for number, _ in self.best(vector, 4 * k)})
        scores = [float((wanted @ self.of(number).T).max(axis=1).mean()) for number in numbers]
        return sorted(zip(numbers, scores, strict=True), key=lambda pair: -pair[1])[:k]

    def of(self, number: int) -> Array:
        """A picture's vectors as they come out of 8 bits: `[Q, E]`."""
        return np.stack([self.index.reconstruct(int(place)) for place in self._ids(np.array([number]))[0]])

    def save(self, path: Path) -> None:
        """Whole, or not at all."""
        with atomic_write(path) as draft:
            require_faiss().write_index(self.index, str(draft))

    @classmethod
    def read(cls, path: Path, queries: int, width: int) -> "Vectors":
        """What `save` wrote.

        Raises:
            UserError: it is missing, broken, or of other sizes.
        """
        try:
            index = require_faiss().read_index(str(path))
        except RuntimeError as error:
            raise UserError(
                f"{path}: cannot be read ({one_line(error)[:100]}); what `openblip2 index` wrote"
            ) from error
        if index.d != width or index.ntotal % queries:
            raise UserError(f"{path}: {index.ntotal} vectors of width {index.d}; {queries} a picture, of width {width}")
        return cls(queries, width, index)

    def _ids(self, numbers: Array) -> Array:
        return np.asarray(numbers, np.int64)[:, None] * self.queries + np.arange(self.queries)


def require_faiss() -> Any:
    """The library, or a `UserError` that says how to get it."""
    try:
        import faiss
    except ImportError as error:
        raise UserError("the vector index needs faiss: pip install 'openblip2[search]'") from error
    return faiss
