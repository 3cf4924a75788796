"""Batches from shards: images are decoded when they are needed, and batch n is a function of (seed, n).

A batch belongs to all processes together; each process reads only the rows that `distributed.part_of` assigns to it.
Rows are sorted by lane (shard_order.py), so if the number of processes divides the number of lanes, which divides the
batch, no two processes open the same shard.

A position without a good sample (a broken image, no caption, a shard that is cut off or missing) gets the next good
sample of the same shard in its shuffled order, which is then seen twice in the epoch; if there is none, the sample at
the same position in the lane's next shard. So batches are always full and depend only on the seed and their number, and
no process waits for another. Each problem is reported once.

Shapes: B pairs of this process, S image side in pixels.
"""

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from openblip2.data.batches import PairBatch, pair_ids
from openblip2.data.images import PictureFile, augment, to_pixels
from openblip2.data.text import MAX_CHARACTERS, MAX_WORDS, clean_caption, names_side
from openblip2.data.web.mixture import Part
from openblip2.data.web.shard_order import Order, PartTurns, Spot, generator
from openblip2.data.web.tars import Sample, Shard
from openblip2.distributed.collectives import part_of
from openblip2.errors import UserError

# Names of fields in the .json of a sample, from img2dataset or from the data sets' own tables.
COCO_NUMBERS = ("cocoid", "coco_id")
URLS = ("url", "URL", "coco_url", "image_url", "image_urls")
# URLs of data sets whose images have numbers.
ADDRESSES = {
    "coco": re.compile(r"(?:train|val|test)20\d\d/(?:COCO_\w+?_)?0*(\d+)\.jpg"),
    "vg": re.compile(r"VG_100K(?:_2)?/(\d+)\.jpg"),
}

THREADS = min(16, os.cpu_count() or 1)  # Pillow releases the GIL while it decodes and resizes
OPENING_THREADS = 4  # they wait for disks and networks, and more of them slow each other down


class OpenShards:
    """The current shard of each lane, and the next one, which is opened in advance.

    Args:
        problem: called with each problem once, by one thread at a time.
    """

    def __init__(self, parts: Sequence[Part], orders: Sequence[Order], problem: Callable[[str], object]) -> None:
        self.parts, self.orders = parts, orders
        self._tell, self._told, self._lock = problem, set[int](), threading.RLock()
        self._threads = ThreadPoolExecutor(OPENING_THREADS, "shards")
        self._open: dict[tuple[int, int], Future[Shard | None]] = {}  # by part and shard; None if it cannot be opened

    def turn_to(self, spots: Sequence[tuple[int, Spot]]) -> None:
        """Opens the shards of these spots and the shards that follow them, and closes all others.

        Called by one thread while no other thread reads.
        """
        needed = {(part, spot.shard) for part, spot in spots}
        last = {(part, spot.lane): spot for part, spot in spots}
        following = {(part, self.orders[part].after(spot)[1]) for (part, _), spot in last.items()}
        for name in [*sorted(needed), *sorted(following - needed)]:
            self._start(name)
        for name in self._open.keys() - needed - following:
            shard = self._open[name].result()
            if shard:  # None, for a shard that cannot be opened, is kept, so it is not tried again
                shard.close()
                del self._open[name]

    def samples(self, part: int, spot: Spot) -> Iterator[tuple[Shard, int]]:
        """The shard and number of a spot's sample, then of those that may replace it. Any thread may call it.

        Raises:
            UserError: the lane has no sample left to try.
        """
        order, held_out = self.orders[part], self.parts[part].held_out
        for _ in range(2 * len(order.counts)):
            shard = self._start((part, spot.shard)).result()
            numbers = order.within(spot.epoch, spot.shard)
            for n in range(len(numbers)):
                number = held_out[spot.shard] + numbers[(spot.place + n) % len(numbers)]
                if shard and number < len(shard) and number not in shard.bad:
                    yield shard, number
            epoch, following = order.after(spot)
            spot = Spot(spot.lane, epoch, following, spot.place % order.counts[following])
        raise UserError(f"{self.parts[part].name}: no usable sample is left; see skipped.jsonl for the reasons")

    def problem(self, line: str) -> None:
        with self._lock:
            if hash(line) not in self._told:
                self._told.add(hash(line))
                self._tell(line)

    def _start(self, name: tuple[int, int]) -> Future[Shard | None]:
        with self._lock:
            if name not in self._open:
                self._open[name] = self._threads.submit(self._opened, *name)
            return self._open[name]

    def _opened(self, part: int, number: int) -> Shard | None:
        url, count = self.parts[part].shards[number], self.parts[part].counts[number]
        try:
            shard = Shard(url, self.problem)
        except UserError as error:
            self.problem(f"{error}; its {count:,} samples are skipped")
            return None
        if len(shard) != count:
            what = "the missing ones are skipped" if len(shard) < count else "the additional ones are not used"
            self.problem(f"{url}: contains {len(shard):,} samples, but {count:,} were counted; {what}")
        return shard


class DrawnSample(NamedTuple):
    """A sample in the form that is used in training."""

    pixels: Tensor  # [3, S, S] uint8
    caption: str  # one of its captions, cleaned
    picture: str  # the identifier of its image
    name: str  # its shard and member


class ShardPairs:
    """Batches from shards: images with one caption each. Arguments that are not listed here: see `Batches`.

    Args:
        parts: the parts, with counted samples.
        size: S.
        lanes: number of shards of a part that are read at the same time (`data.open_shards`).
        problem: called once with each sample, image or shard that is skipped, by any thread.
        threads: number of threads that decode images; the batches do not depend on it.
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
        self.augmented, self.part = augmented, part
        self.orders = []
        for n, part_ in enumerate(parts):
            counts = [count - held for count, held in zip(part_.counts, part_.held_out, strict=True)]
            self.orders.append(Order(counts, lanes, seed, f"{n} {part_.name}"))
        self.turns = PartTurns([part.weight for part in parts], lanes, seed)
        self.shards = OpenShards(self.parts, self.orders, problem)
        self._threads = ThreadPoolExecutor(threads, "pictures")

    def __call__(self, number: int, joined: bool = False) -> PairBatch:
        """This process's part of batch `number`, or with `joined` the batch of all processes."""
        # Rows are sorted by lane. Each is a part of the mixture, a position in the order of this part, and its spot.
        numbers = sorted(range(number * self.batch, (number + 1) * self.batch), key=lambda n: n % self.lanes)
        own = part_of(self.batch, *((0, 1) if joined else self.part))
        rows = [(n, position, self.orders[n](position)) for n, position in map(self.turns, numbers[own])]
        self.shards.turn_to([(part, spot) for part, _, spot in rows])
        drawn = list(self._threads.map(self._draw, rows))
        texts, pictures = [one.caption for one in drawn], [one.picture for one in drawn]
        empty = torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8)
        return PairBatch(
            texts,
            pair_ids(pictures, texts),
            images=torch.stack([one.pixels for one in drawn]) if drawn else empty,
            names=[one.name for one in drawn],
            keys=torch.tensor([(_hash(one.picture), _hash(one.caption)) for one in drawn]).long().view(-1, 2),
        )

    def _draw(self, row: tuple[int, int, Spot]) -> DrawnSample:
        part, position, spot = row
        for shard, number in self.shards.samples(part, spot):
            sample = shard.read(number)
            if sample is not None:
                name = f"{shard.url}: {sample.key}.{sample.suffix}"
                random = generator(self.seed, "sample", part, position)
                try:
                    caption, sided = self._caption(sample.captions, name, random)
                    image = PictureFile(sample.image, name)
                    if self.augmented:
                        pixels = augment(image, self.size, random, mirror=False if sided else None)
                    else:
                        pixels = to_pixels([image], self.size)[0]
                    return DrawnSample(pixels, caption, picture_of(sample, shard.url), name)
                except UserError as error:
                    self.shards.problem(str(error))
            shard.bad.add(number)
        raise AssertionError("`samples` ends with an error")

    def _caption(self, captions: Sequence[str], name: str, random: torch.Generator) -> tuple[str, bool]:
        """One of the captions, cleaned, and whether one of them says left or right."""
        texts = [text for one in captions if (text := clean_caption(one, len(one)))]
        if not texts:
            raise UserError(f"{name}: has no caption: add a .txt file with the same name")
        text = texts[int(torch.rand((), generator=random).item() * len(texts))]
        if (cut := clean_caption(text)) != text:
            most = f"give at most {MAX_WORDS} words and {MAX_CHARACTERS:,} characters"
            self.shards.problem(f"{name}: a caption is cut after {cut[-20:]!r}; {most}")
        return cut, names_side(texts)


def picture_of(sample: Sample, shard: str) -> str:
    """The identifier of a sample's image: its number in COCO or Visual Genome, its URL, or its shard and key.

    COCO has five captions for each image, and Visual Genome shares images with it. Two samples with the same image are
    not negatives of each other.
    """
    numbers = (sample.about.get(name) for name in COCO_NUMBERS)
    number = next((n for n in numbers if isinstance(n, int | str) and not isinstance(n, bool) and str(n).strip()), None)
    if number is not None:
        return f"coco:{str(number).lstrip('0') or 0}"
    url = next((url for name in URLS if isinstance(url := sample.about.get(name), str) and url), None)
    if url is None:
        return f"{shard}:{sample.key}"
    for collection, pattern in ADDRESSES.items():
        if match := pattern.search(url):
            return f"{collection}:{match[1]}"
    return url


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
