"""Batches from shards: pictures decoded as they are needed, batch n a function of (seed, n).

What order the samples come in says `data/shard_order.py`, what stands in for bad ones `data/open_shards.py`. A batch
is that of all processes together; each has the rows that `distributed.part_of` gives it, and reads no others. The
rows stand by lane, so that processes whose number divides that of the lanes open no shard twice.

Pictures are decoded in threads: Pillow leaves Python free in decoding and resizing.

Shapes: B pairs of this process, S side in px.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from openblip2.data.batches import PairBatch, pair_ids
from openblip2.data.images import PictureFile, augment, to_pixels
from openblip2.data.mixture import Part
from openblip2.data.open_shards import OpenShards
from openblip2.data.readers import captions, picture, reader
from openblip2.data.shard_order import Order, Spot, Turns, generator
from openblip2.data.text import clean_caption
from openblip2.distributed import part_of, rank, world_size
from openblip2.errors import UserError

THREADS = min(16, os.cpu_count() or 1)  # that decode pictures


class Drawn(NamedTuple):
    """A sample as it is trained on; `pixels [3, S, S]` uint8, `picture` says which it is, `name` where it stands."""

    pixels: Tensor
    caption: str
    picture: str
    name: str


class ShardPairs:
    """Batches of pictures with one caption each, out of shards: freshly augmented, or plain.

    Args:
        parts: counted. batch: of all processes together. seed: of everything drawn. size: S.
        lanes: shards of a part that are read side by side (`data.open_shards`).
        problem: is told each sample, picture or shard that is skipped, once, from any thread.
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
    ) -> None:
        self.parts, self.batch, self.seed, self.size, self.lanes = list(parts), batch, seed, size, lanes
        self.augmented, self.readers = augmented, [reader(part.reader) for part in parts]
        self.orders = [
            Order(
                [n - held for n, held in zip(part.counts, part.held_out, strict=True)], lanes, seed, f"{n} {part.name}"
            )
            for n, part in enumerate(parts)
        ]
        self.turns = Turns([part.weight for part in parts], lanes, seed)
        self.shards = OpenShards(self.parts, self.orders, problem)
        self._threads = ThreadPoolExecutor(THREADS, "pictures")

    def __call__(self, number: int) -> PairBatch:
        """This process' rows of batch `number`: `images [B, 3, S, S]`."""
        spots = self.spots(number)
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
        )

    def spots(self, number: int) -> list[tuple[int, int, Spot]]:
        """Of this process' rows of batch `number`: part, position in the part's order, spot."""
        numbers = sorted(range(number * self.batch, (number + 1) * self.batch), key=lambda n: n % self.lanes)
        turns = [self.turns(n) for n in numbers[part_of(self.batch, rank(), world_size())]]
        return [(part, position, self.orders[part](position)) for part, position in turns]

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
