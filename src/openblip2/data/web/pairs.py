"""Batches from shards: pictures decoded as they are needed, batch n a function of (seed, n).

What order the samples come in says shard_order.py, what stands in for bad ones open_shards.py. A batch
is that of all processes together; each has the rows that `distributed.part_of` gives it, and reads no others. The
rows stand by lane: where the number of processes divides that of the lanes, and that the batch, no two processes open
the same shard.

Pictures are decoded in threads: Pillow leaves Python free in decoding and resizing.

Shapes: B pairs of this process, S side in px.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from openblip2.data.batches import PairBatch, pair_ids
from openblip2.data.images import PictureFile, augment, to_pixels
from openblip2.data.text import clean_caption
from openblip2.data.web.mixture import Part
from openblip2.data.web.open_shards import OpenShards
from openblip2.data.web.readers import captions, picture, reader
from openblip2.data.web.shard_order import Order, Spot, Turns, generator
from openblip2.distributed.collectives import part_of
from openblip2.errors import UserError

THREADS = min(16, os.cpu_count() or 1)


class Drawn(NamedTuple):
    """A sample as it is trained on; `pixels [3, S, S]` uint8, `picture` says which it is, `name` where it stands."""

    pixels: Tensor
    caption: str
    picture: str
    name: str


class ShardPairs:
    """Batches of pictures with one caption each, out of shards: freshly augmented, or plain.

    Args:
        parts: counted.
        batch: of all processes together.
        seed: of everything drawn.
        size: S.
        lanes: shards of a part that are read side by side (`data.open_shards`).
        problem: is told each sample, picture or shard that is skipped, once, from any thread.
        part: (r, N), which rows of a batch are ours. All parts together are the same whatever N is.
        threads: that decode pictures; the batches are the same.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        batch: int,
        seed: int,
        size: int,
        lanes: int,
        problem: Callable[[str], object],
        augmented: bool = True,
        part: tuple[int, int] = (0, 1),
        threads: int = THREADS,
    ) -> None:
        self.parts, self.batch, self.seed, self.size, self.lanes = list(parts), batch, seed, size, lanes
        self.augmented, self.part, self.readers = augmented, part, [reader(part.reader) for part in parts]
        self.orders = [
            Order(
                [n - held for n, held in zip(part.counts, part.held_out, strict=True)], lanes, seed, f"{n} {part.name}"
            )
            for n, part in enumerate(parts)
        ]
        self.turns = Turns([part.weight for part in parts], lanes, seed)
        self.shards = OpenShards(self.parts, self.orders, problem)
        self._threads = ThreadPoolExecutor(threads, "pictures")

    def __call__(self, number: int) -> PairBatch:
        return self._make(number, self.part)

    def joined(self, number: int) -> PairBatch:
        """The batch of all processes."""
        return self._make(number, (0, 1))

    def _make(self, number: int, part: tuple[int, int]) -> PairBatch:
        spots = self.spots(number, part)
        self.shards.turn_to([(part, spot) for part, _, spot in spots])
        drawn = list(self._threads.map(self._draw, spots))
        texts, pictures = [one.caption for one in drawn], [one.picture for one in drawn]
        return PairBatch(
            texts,
            pair_ids(pictures, texts),
            images=torch.stack([one.pixels for one in drawn])
            if drawn
            else torch.zeros(0, 3, self.size, self.size).byte(),
            names=[one.name for one in drawn],
            keys=torch.tensor([(_hash(one.picture), _hash(one.caption)) for one in drawn]).long().view(-1, 2),
        )

    def spots(self, number: int, part: tuple[int, int] = (0, 1)) -> list[tuple[int, int, Spot]]:
        """Of the rows of batch `number`, or of a part of them: part of the mixture, position in its order, spot."""
        numbers = sorted(range(number * self.batch, (number + 1) * self.batch), key=lambda n: n % self.lanes)
        turns = [self.turns(n) for n in numbers[part_of(self.batch, *part)]]
        return [(n, position, self.orders[n](position)) for n, position in turns]

    def _draw(self, row: tuple[int, int, Spot]) -> Drawn:
        part, position, spot = row
        for opened, shard, number in self.shards.samples(part, spot):
            sample = shard.read(number)
            if sample is not None:
                where = f"{shard.url}: {sample.key}.{sample.suffix}"
                drawn = generator(self.seed, "sample", part, position)
                texts = [text for text in map(clean_caption, captions(sample, self.readers[part])) if text]
                try:
                    if not texts:
                        raise UserError(f"{where}: has no caption; text beside it")
                    text = texts[int(torch.rand((), generator=drawn).item() * len(texts))]
                    pixels = self._pixels(PictureFile(sample.image, where), drawn)
                    return Drawn(pixels, text, picture(sample, self.readers[part], shard.url), where)
                except UserError as error:
                    self.shards.problem(str(error))
            opened.bad.add(number)
        raise AssertionError("samples end in an error")

    def _pixels(self, image: PictureFile, drawn: torch.Generator) -> Tensor:
        return augment(image, self.size, drawn) if self.augmented else to_pixels([image], self.size)[0]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
