"""Features of a frozen image encoder that are used in place of images: in memory, or in a cache on disk.

Shapes: N images, P patch tokens, V encoder width, B images of a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openblip2.data.batches import Batches, PairBatch, Pairs, Part, Sampler, batch_generator
from openblip2.data.feature_cache import FeatureCache, file_state
from openblip2.data.records import Record
from openblip2.data.samples import Samples
from openblip2.data.text import names_side
from openblip2.distributed.collectives import part_of
from openblip2.errors import UserError


@dataclass(frozen=True)
class Features:
    """The features of `records` in memory: `values [N, P, V]`."""

    records: list[Record]
    values: Tensor

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True)
class StoredFeatures:
    """The features of `records` in a cache. `finish` is applied to features `[B, P, V]` after reading."""

    records: list[Record]
    cache: FeatureCache
    finish: Callable[[Tensor], Tensor]

    @property
    def views(self) -> int:
        """The number of random crops of each image."""
        return self.cache.shape[0] - 1

    def take(self, numbers: Sequence[int], views: Sequence[int] | None = None) -> Tensor:
        """Features `[B, P, V]` of records by number: of the plain images, or of one random crop of each (from 0)."""
        return self.finish(self.cache.read([self.records[number].id for number in numbers], views))

    def load(self) -> Features:
        """The features of all plain images, in memory."""
        return Features(self.records, self.take(range(len(self.records))))


def find_records(
    records: Sequence[Record], cache: FeatureCache, finish: Callable[[Tensor], Tensor]
) -> tuple[StoredFeatures, list[str]]:
    """The features of records in a cache, and one line for each record that was skipped when it was made.

    Raises:
        UserError: A record is not in the cache, or its file has another size. The file may be missing or a copy.
    """
    unknown = [record for record in records if record.id not in cache.pictures]
    if unknown:
        raise UserError(
            f"{len(unknown)} of {len(records)} pictures are not in {cache.folder}, the first is {unknown[0].image} (id "
            f"{unknown[0].id!r}): `openblip2 features` with these pictures and the same --out adds them"
        )
    for record in records:
        now, then = file_state(record.image)[0], cache.pictures[record.id].bytes
        if now and then and now != then:
            raise UserError(
                f"{record.image} has {now:,} bytes, and had {then:,} when {cache.folder} was made: run the same "
                "`openblip2 features` again"
            )
    good = [record for record in records if cache.pictures[record.id].row is not None]
    return StoredFeatures(good, cache, finish), [p for r in records if (p := cache.pictures[r.id].problem)]


class FeaturePairs(Batches):
    """Batches of features that were computed before training.

    Args:
        features: of the records.
        samples: texts of the same records.
        batch: pairs of the joined batch.
        seed: of everything random.
        drawn: whether to use a random one of each image's crops instead of the plain image, and none that is mirrored
            if a text of the image says left or right.
        part: which rows of the joined batch this process has. The joined batch does not depend on it.
    """

    def __init__(
        self,
        features: StoredFeatures,
        samples: Samples,
        batch: int,
        seed: int,
        drawn: bool = False,
        part: Part = (0, 1),
        mixed: int = 0,
    ) -> None:
        self.features, self.samples, self.seed, self.drawn, self.part = features, samples, seed, drawn, part
        self.sampler = Sampler(samples.lengths, batch, seed, mixed)
        self.sided = {n for n, record in enumerate(features.records) if drawn and names_side(record.texts)}

    def _make(self, number: int, part: Part) -> PairBatch:
        every = Pairs(self.samples, self.sampler(number), batch_generator(self.seed, number, "caption"))
        own = range(len(every.pictures))[part_of(len(every.pictures), *part)]
        views = None
        if self.drawn:
            random = batch_generator(self.seed, number, "crop")
            drawn = torch.randint(self.features.views, (len(every.pictures),), generator=random).tolist()
            # Every second view is mirrored (train/encode.py).
            views = [drawn[n] - drawn[n] % 2 if every.pictures[n] in self.sided else drawn[n] for n in own]
        pictures = [every.pictures[n] for n in own]
        names = [self.features.records[picture].id for picture in pictures]
        return every.take(own, names, features=self.features.take(pictures, views))
