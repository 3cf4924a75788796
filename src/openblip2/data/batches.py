"""Batches of pictures with texts. Batch n of a run is a function of (seed, n): nothing has to be saved to resume.

Shapes: B pairs, P patch tokens, V encoder width, S side in px.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openblip2.data.features import StoredFeatures
from openblip2.data.images import augment, to_pixels
from openblip2.data.records import Record
from openblip2.data.samples import Samples
from openblip2.errors import UserError


@dataclass(frozen=True)
class PairBatch:
    """B pictures with one text each; `features [B, P, V]` or `images [B, 3, S, S]` uint8, the other is None."""

    captions: list[str]  # or answers, where there are questions
    ids: Tensor  # [B] int64, equal for the same picture and for the same caption
    features: Tensor | None = None
    images: Tensor | None = None
    questions: list[str] | None = None


class Sampler:
    """Row numbers of batch n: a fresh shuffle in every epoch, cut into batches.

    Pictures with captions of like length come together: out of every `WINDOW` batches' pictures, sorted by length,
    the batches are cut and shuffled. That saves padding, keeps shapes few, and makes a batch's captions of one kind,
    hence its negatives hard. An epoch's last window is short of nothing: it takes from the next epoch.

    Args:
        lengths: of each row's text, in words. batch: B, at most the number of rows. seed: of the shuffles.
    """

    WINDOW = 8

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed = list(lengths), min(batch, len(lengths)), seed

    def __call__(self, number: int) -> list[int]:
        """The rows of batch `number`: `[B]`."""
        window, place = divmod(number, self.WINDOW)
        rows = self._shuffled(window * self.WINDOW * self.batch, self.WINDOW * self.batch)
        rows.sort(key=lambda row: self.lengths[row])  # stable: equal lengths stay shuffled
        order = torch.randperm(self.WINDOW, generator=_generator(self.seed, window, "window"))
        first = int(order[place]) * self.batch
        return rows[first : first + self.batch]

    def _shuffled(self, first: int, count: int) -> list[int]:
        """`count` rows from the endless row of shuffled epochs, beginning at `first`."""
        rows: list[int] = []
        while len(rows) < count:
            epoch, place = divmod(first + len(rows), len(self.lengths))
            order = torch.randperm(len(self.lengths), generator=_generator(self.seed, epoch, "epoch"))
            # A batch that crosses into the next epoch may meet a picture again; image ids make that harmless.
            rows += order[place : place + count - len(rows)].tolist()
        return rows


class FeaturePairs:
    """Batches from frozen features computed beforehand, with the texts of `samples`, which is of the same records.

    `drawn`: one of a picture's random views, drawn each time, stands in place of the plain picture.
    """

    def __init__(self, features: StoredFeatures, samples: Samples, batch: int, seed: int, drawn: bool = False) -> None:
        self.features, self.samples, self.seed, self.drawn = features, samples, seed, drawn
        self.sampler = Sampler(samples.lengths, batch, seed)

    def __call__(self, number: int) -> PairBatch:
        rows = self.sampler(number)
        texts, questions = self.samples.draw(rows, _generator(self.seed, number, "caption"))
        pictures = [self.samples.pictures[row] for row in rows]
        views = None
        if self.drawn:
            generator = _generator(self.seed, number, "crop")
            views = torch.randint(self.features.views, (len(rows),), generator=generator).tolist()
        ids, features = pair_ids(pictures, texts), self.features.take(pictures, views)
        return PairBatch(texts, ids, features=features, questions=questions)


class ImagePairs:
    """Batches of pictures, freshly augmented (random crop and flip, as the paper trains) or plain.

    A picture that cannot be opened is left out of its batch and reported once to `problem`.
    """

    def __init__(
        self,
        records: Sequence[Record],
        samples: Samples,
        batch: int,
        seed: int,
        size: int,
        problem: Callable[[str], object],
        augmented: bool = True,
    ) -> None:
        self.records, self.samples = list(records), samples
        self.seed, self.size, self.problem, self.augmented = seed, size, problem, augmented
        self.sampler = Sampler(samples.lengths, batch, seed)
        self.bad: set[int] = set()

    def __call__(self, number: int) -> PairBatch:
        generator = _generator(self.seed, number, "crop")
        rows, images = [], []
        for row in self.sampler(number):
            picture = self.samples.pictures[row]
            if picture in self.bad:
                continue
            try:
                images.append(self._open(picture, generator))
                rows.append(row)
            except UserError as error:
                self.bad.add(picture)
                self.problem(str(error))
        if not rows:
            raise UserError(f"batch {number}: not one of its pictures can be opened; see the log for their names")
        texts, questions = self.samples.draw(rows, _generator(self.seed, number, "caption"))
        ids = pair_ids([self.samples.pictures[row] for row in rows], texts)
        return PairBatch(texts, ids, images=torch.stack(images), questions=questions)

    def _open(self, picture: int, generator: torch.Generator) -> Tensor:
        path = self.records[picture].image
        return augment(path, self.size, generator) if self.augmented else to_pixels([path], self.size)[0]


def pair_ids(pictures: Sequence[Hashable], captions: Sequence[str]) -> Tensor:
    """Which pairs of a batch belong together: `[B]` int64, equal for the same picture and for the same caption.

    Two pictures of a red circle are no negatives of each other's "a red circle".
    """
    of_picture: dict[Hashable, int] = {}
    of_caption: dict[str, int] = {}
    ids: list[int] = []
    for n, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        own = of_picture.get(picture, of_caption.get(caption, n))
        of_picture[picture] = of_caption[caption] = own
        ids.append(own)
    return torch.tensor(ids)


def _generator(seed: int, number: int, purpose: str) -> torch.Generator:
    # Distinct streams for distinct purposes; the factor keeps (seed, number) pairs apart.
    salt = {"epoch": 0, "caption": 1, "crop": 2, "window": 3}[purpose]
    return torch.Generator().manual_seed((seed * 4 + salt) * 1_000_000_007 + number)
