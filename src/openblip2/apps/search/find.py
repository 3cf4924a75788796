"""Pictures of an index that fit a text, or are like a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from openblip2.apps.search.index import Index, open_index
from openblip2.data.images import Picture
from openblip2.errors import UserError
from openblip2.evaluate.protocol import weights_digest
from openblip2.evaluate.ranking import image_vectors
from openblip2.hardware import computing
from openblip2.inference import load
from openblip2.inputs import features_of
from openblip2.matcher import Matcher


@dataclass(frozen=True)
class Hit:
    """A picture that was found: its number in the index, path, cosine, and where it was re-ranked ITM's probability."""

    number: int
    path: Path
    similarity: float
    match: float | None = None


class Finder:
    """An index and the model that it was made by.

    Args:
        matcher: that model, if it is loaded already; None = it is loaded from where the index says it lies.

    Raises:
        UserError: the run is gone, or has other weights now.
    """

    def __init__(self, index: Index | Path, matcher: Matcher | None = None) -> None:
        self.index = index if isinstance(index, Index) else open_index(index)
        found = load(self.index.about["run"]) if matcher is None else matcher
        if not isinstance(found, Matcher) or weights_digest(found) != self.index.about["weights"]:
            raise UserError(
                f"{self.index.folder}: was made by {self.index.about['run']} as it was then, and these weights are "
                "others; index the folder again with them"
            )
        self.matcher = found

    def by_text(self, text: str, best: int = 10, rerank: int = 0) -> list[Hit]:
        """The pictures that fit a text best.

        Args:
            rerank: so many of the best by similarity are put in the order of the ITM head's probability; 0 = none.
                Their files are opened; one that is gone keeps its place by similarity behind them.

        Raises:
            UserError: an empty text, or one longer than the run's text limit.
        """
        tokens, valid = self.matcher.tokenise([text])
        model = self.matcher.model
        place = model.temperature.device
        with torch.inference_mode(), computing(model, self.matcher.settings.train.precision):
            (vector,) = model.text_vectors(tokens.to(place), valid.to(place)).float().cpu().numpy()
        found = self._hits(self.index.vectors.best(vector, max(best, rerank)))
        if rerank:
            found = self._reranked(found[:rerank], text) + found[rerank:]
        return found[:best]

    def by_picture(self, picture: Picture, best: int = 10) -> list[Hit]:
        """The pictures most like one.

        Raises:
            UserError: it cannot be opened.
        """
        model = self.matcher.model
        with torch.inference_mode(), computing(model, self.matcher.settings.train.precision):
            (features,) = features_of(model, [picture])
            (vectors,) = image_vectors(model, features).float().cpu().numpy()
        return self._hits(self.index.vectors.alike(vectors, best))

    def _hits(self, found: Sequence[tuple[int, float]]) -> list[Hit]:
        rows, root = self.index.rows, self.index.root
        # 8 bits may make a cosine of 1 a little more.
        return [Hit(number, root / rows[number].path, min(score, 1.0)) for number, score in found if number in rows]

    def _reranked(self, hits: Sequence[Hit], text: str) -> list[Hit]:
        here: list[tuple[Hit, Path]] = []
        gone: list[Hit] = []
        for hit in hits:
            try:
                here.append((hit, self.index.path(hit.number)))
            except UserError:
                gone.append(hit)
        if not here:
            return gone
        scores = self.matcher.match([path for _, path in here], [text] * len(here)).tolist()
        found = [Hit(h.number, h.path, h.similarity, score) for (h, _), score in zip(here, scores, strict=True)]
        return sorted(found, key=lambda hit: -(hit.match or 0.0)) + gone
