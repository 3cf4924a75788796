"""Batches of image-text pairs. Batch n of a run is a function of (seed, n): nothing has to be saved to resume.

Shapes: B pairs, P patch tokens, V encoder width, S side in px.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openblip2.data.features import Features
from openblip2.data.images import augment
from openblip2.data.records import Record
from openblip2.errors import UserError


@dataclass(frozen=True)
class PairBatch:
    """B pictures with one caption each; `features [B, P, V]` or `images [B, 3, S, S]` uint8, the other is None."""

    captions: list[str]
    ids: Tensor  # [B] int64, equal for the same picture
    features: Tensor | None = None
    images: Tensor | None = None


class Sampler:
    """Row numbers of batch n: a fresh shuffle in every epoch, cut into batches; the short rest goes to the next.

    Args:
        count: number of pictures. batch: B, at most `count`. seed: of the shuffles.
    """

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self.count, self.batch, self.seed = count, min(batch, count), seed

    def __call__(self, number: int) -> list[int]:
        first = number * self.batch
        rows: list[int] = []
        while len(rows) < self.batch:
            epoch, place = divmod(first + len(rows), self.count)
            order = torch.randperm(self.count, generator=_generator(self.seed, epoch, "epoch"))
            # A batch that crosses into the next epoch may meet a picture again; image ids make that harmless.
            rows += order[place : place + self.batch - len(rows)].tolist()
        return rows


class FeaturePairs:
    """Batches from frozen features computed beforehand. One of a picture's captions is drawn each time."""

    def __init__(self, features: Features, batch: int, seed: int) -> None:
        self.features, self.seed = features, seed
        self.sampler = Sampler(len(features), batch, seed)

    def __call__(self, number: int) -> PairBatch:
        rows = self.sampler(number)
        captions = draw_captions([self.features.records[row] for row in rows], self.seed, number)
        return PairBatch(captions, torch.tensor(rows), features=self.features.values[rows])


class ImagePairs:
    """Batches of freshly augmented pictures (random crop and flip, as the paper trains).

    A picture that cannot be opened is left out of its batch and reported once to `problem`.
    """

    def __init__(self, records: Sequence[Record], batch: int, seed: int, size: int, problem) -> None:
        self.records, self.seed, self.size, self.problem = list(records), seed, size, problem
        self.sampler = Sampler(len(self.records), batch, seed)
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
        return PairBatch(captions, torch.tensor(rows), images=torch.stack(images))


def draw_captions(records: Sequence[Record], seed: int, number: int) -> list[str]:
    """One caption of each record, drawn evenly."""
    generator = _generator(seed, number, "caption")
    places = torch.rand(len(records), generator=generator).tolist()
    return [r.captions[int(place * len(r.captions))] for r, place in zip(records, places, strict=True)]


def _generator(seed: int, number: int, purpose: str) -> torch.Generator:
    # Distinct streams for distinct purposes; the factor keeps (seed, number) pairs apart.
    salt = {"epoch": 1, "caption": 2, "crop": 3}[purpose]
    return torch.Generator().manual_seed((seed * 4 + salt) * 1_000_000_007 + number)
