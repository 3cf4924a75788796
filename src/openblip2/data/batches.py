"""Batches of image-text pairs. Batch n of a run is a function of (seed, n): nothing has to be saved to resume.

Shapes: B pairs, P patch tokens, V encoder width, S side in px.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openblip2.data.features import StoredFeatures
from openblip2.data.images import augment
from openblip2.data.records import Record
from openblip2.errors import UserError


@dataclass(frozen=True)
class PairBatch:
    """B pictures with one caption each; `features [B, P, V]` or `images [B, 3, S, S]` uint8, the other is None."""

    captions: list[str]
    ids: Tensor  # [B] int64, equal for the same picture and for the same caption
    features: Tensor | None = None
    images: Tensor | None = None


class Sampler:
    """Row numbers of batch n: a fresh shuffle in every epoch, cut into batches.

    Pictures with captions of like length come together: out of every `WINDOW` batches' pictures, sorted by length,
    the batches are cut and shuffled. That saves padding, keeps shapes few, and makes a batch's captions of one kind,
    hence its negatives hard. An epoch's last window is short of nothing: it takes from the next epoch.

    Args:
        lengths: of each picture's captions, in words. batch: B, at most the number of pictures. seed: of the shuffles.
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


def caption_lengths(records: Sequence[Record]) -> list[int]:
    """Words in the longest caption of each record."""
    return [max(len(caption.split()) for caption in record.captions) for record in records]


class FeaturePairs:
    """Batches from frozen features computed beforehand. One of a picture's captions is drawn each time.

    `drawn`: so is one of its random views, in place of the plain picture.
    """

    def __init__(self, features: StoredFeatures, batch: int, seed: int, drawn: bool = False) -> None:
        self.features, self.seed, self.drawn = features, seed, drawn
        self.sampler = Sampler(caption_lengths(features.records), batch, seed)

    def __call__(self, number: int) -> PairBatch:
        rows = self.sampler(number)
        captions = draw_captions([self.features.records[row] for row in rows], self.seed, number)
        views = None
        if self.drawn:
            generator = _generator(self.seed, number, "crop")
            views = torch.randint(self.features.views, (len(rows),), generator=generator).tolist()
        return PairBatch(captions, pair_ids(rows, captions), features=self.features.take(rows, views))


class ImagePairs:
    """Batches of freshly augmented pictures (random crop and flip, as the paper trains).

    A picture that cannot be opened is left out of its batch and reported once to `problem`.
    """

    def __init__(self, records: Sequence[Record], batch: int, seed: int, size: int, problem) -> None:
        self.records, self.seed, self.size, self.problem = list(records), seed, size, problem
        self.sampler = Sampler(caption_lengths(self.records), batch, seed)
        self.bad: set[int] = set()

    def __call__(self, number: int) -> PairBatch:
        generator = _generator(self.seed, number, "crop")
        rows, images = [], []
        for row in self.sampler(number):
            if row in self.bad:
                continue
            try:
                images.append(augment(self.records[row].image, self.size, generator))
                rows.append(row)
            except UserError as error:
                self.bad.add(row)
                self.problem(str(error))
        if not rows:
            raise UserError(f"batch {number}: not one of its pictures can be opened; see the log for their names")
        captions = draw_captions([self.records[row] for row in rows], self.seed, number)
        return PairBatch(captions, pair_ids(rows, captions), images=torch.stack(images))


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


def draw_captions(records: Sequence[Record], seed: int, number: int) -> list[str]:
    """One caption of each record, drawn evenly."""
    generator = _generator(seed, number, "caption")
    places = torch.rand(len(records), generator=generator).tolist()
    return [r.captions[int(place * len(r.captions))] for r, place in zip(records, places, strict=True)]


def _generator(seed: int, number: int, purpose: str) -> torch.Generator:
    # Distinct streams for distinct purposes; the factor keeps (seed, number) pairs apart.
    salt = {"epoch": 0, "caption": 1, "crop": 2, "window": 3}[purpose]
    return torch.Generator().manual_seed((seed * 4 + salt) * 1_000_000_007 + number)
