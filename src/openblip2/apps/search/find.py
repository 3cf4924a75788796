"""Search an index for pictures that fit a text, or that are similar to a picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from openblip2.apps.search.index import Index, open_index
from openblip2.data.images import Picture, open_picture
from openblip2.errors import UserError
from openblip2.evaluate.run import weights_digest
from openblip2.inference.load import load
from openblip2.inference.matcher import Matcher


@dataclass(frozen=True)
class Hit:
    """A picture that was found.

    Attributes:
        number: in the index.
        path: of its file.
        similarity: cosine.
        match: probability by ITM, if it was re-ranked.
    """

    number: int
    path: Path
    similarity: float
    match: float | None = None


class ImageSearch:
    """Search an index with the model that made it.

    Args:
        index: or its folder.
        matcher: the model; None = it is loaded from where it was when the index was made.

    Raises:
        UserError: the run is missing, or its weights have changed.
    """

    def __init__(self, index: Index | Path, matcher: Matcher | None = None) -> None:
        self.index = index if isinstance(index, Index) else open_index(index)
        model = load(self.index.about["run"]) if matcher is None else matcher
        if not isinstance(model, Matcher) or weights_digest(model) != self.index.about["weights"]:
            raise UserError(
                f"{self.index.folder}: was made with other weights than this run has now ({self.index.about['run']}): "
                "index the folder again with this run"
            )
        self.matcher = model

    def by_text(self, text: str, best: int = 10, rerank: int = 0) -> list[Hit]:
        """The pictures that fit a text best, best first.

        Args:
            text: to search for.
            best: number of pictures.
            rerank: how many of the most similar pictures are sorted again by ITM, which opens their files. Missing
                and broken files come after the others of them.

        Raises:
            UserError: an empty text, or one longer than the run's text limit.
        """
        vector = np.array(self.matcher.embed_text(text), np.float32)
        hits = self._hits(self.index.vectors.best(vector, max(best, rerank)))
        return (self._rerank(hits[:rerank], text) + hits[rerank:])[:best]

    def by_picture(self, picture: Picture, best: int = 10) -> list[Hit]:
        """The pictures most similar to a picture.

        Args:
            picture: to search for.
            best: number of pictures.

        Raises:
            UserError: it cannot be opened.
        """
        vectors = self.matcher.features([open_picture(picture)]).projected[0]
        return self._hits(self.index.vectors.alike(vectors.numpy(), best))

    def _hits(self, scores: Sequence[tuple[int, float]]) -> list[Hit]:
        rows, root = self.index.rows, self.index.root
        # In 8 bits, a cosine of 1 can become slightly more.
        return [Hit(number, root / rows[number].path, min(score, 1.0)) for number, score in scores]

    def _rerank(self, hits: Sequence[Hit], text: str) -> list[Hit]:
        there = [hit for hit in hits if self.index.path(hit.number) is not None]
        scores = self.matcher.match([hit.path for hit in there], [text] * len(there)).tolist() if there else []
        pairs = [(hit, score) for hit, score in zip(there, scores, strict=True) if not math.isnan(score)]
        scored = {hit.number: replace(hit, match=score) for hit, score in pairs}
        rest = [hit for hit in hits if hit.number not in scored]  # their files are missing or broken now
        return sorted(scored.values(), key=lambda hit: -(hit.match or 0.0)) + rest
