"""Batches of pictures with texts. Batch n of a run is a function of (seed, n): nothing has to be saved to resume.

Shapes: B pairs, P patch tokens, V encoder width, S side in px.
"""

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openblip2.data.features import StoredFeatures
from openblip2.data.images import augment, to_pixels
from openblip2.data.records import Record
from openblip2.data.samples import Samples
from openblip2.distributed.collectives import gather, part_of, share, world_size
from openblip2.errors import UserError


@dataclass(frozen=True)
class PairBatch:
    """B pictures with one text each; `features [B, P, V]` or `images [B, 3, S, S]` uint8, the other is None."""

    captions: list[str]  # or answers, where there are questions
    ids: Tensor  # [B] int64, equal for the same picture and for the same caption
    features: Tensor | None = None
    images: Tensor | None = None
    questions: list[str] | None = None
    names: list[str] | None = None  # ids of the pictures, for people
    # [B, 2] int64, hashes of picture and caption, where a process knows no other's: `ids` then are of its own rows.
    keys: Tensor | None = None


class Sampler:
    """Row numbers of batch n: a fresh shuffle in every epoch, cut into batches.

    Pictures with captions of like length come together: out of every `WINDOW` batches' pictures, sorted by length,
    the batches are cut and shuffled. That saves padding, keeps shapes few, and makes a batch's captions of one kind,
    hence its negatives hard. An epoch's last window is short of nothing: it takes from the next epoch.

    Args:
        lengths: of each row's text, in words.
        batch: B, at most the number of rows.
        seed: of the shuffles.
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


Part = tuple[int, int]  # (r, N): of each batch, which process r of N has


class FeaturePairs:
    """Batches from frozen features computed beforehand, with the texts of `samples`, which is of the same records.

    Args:
        batch: pairs of the joined batch.
        part: which of it this process has. What is drawn is drawn for the joined batch, whose parts together are the
            same whatever N is.
        drawn: one of a picture's random views, drawn each time, stands in place of the plain picture.
    """

    def __init__(
        self,
        features: StoredFeatures,
        samples: Samples,
        batch: int,
        seed: int,
        drawn: bool = False,
        part: Part = (0, 1),
    ) -> None:
        self.features, self.samples, self.seed, self.drawn, self.part = features, samples, seed, drawn, part
        self.sampler = Sampler(samples.lengths, batch, seed)

    def __call__(self, number: int) -> PairBatch:
        return self._make(number, self.part)

    def joined(self, number: int) -> PairBatch:
        """The batch of all processes."""
        return self._make(number, (0, 1))

    def _make(self, number: int, part: Part) -> PairBatch:
        every = _Pairs(self.samples, self.sampler(number), _generator(self.seed, number, "caption"))
        own = range(len(every.pictures))[part_of(len(every.pictures), *part)]
        views = None
        if self.drawn:
            generator = _generator(self.seed, number, "crop")
            drawn = torch.randint(self.features.views, (len(every.pictures),), generator=generator).tolist()
            views = [drawn[n] for n in own]
        pictures = [every.pictures[n] for n in own]
        names = [self.features.records[picture].id for picture in pictures]
        return every.take(own, names, features=self.features.take(pictures, views))


class ImagePairs:
    """Batches of pictures, freshly augmented (random crop and flip, as the paper trains) or plain.

    A picture that cannot be opened is left out of its batch and reported once to `problem`; of several processes, one
    may so be left with none.

    Args:
        batch, part: as for `FeaturePairs`.
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
        part: Part = (0, 1),
    ) -> None:
        self.records, self.samples, self.part = list(records), samples, part
        self.seed, self.size, self.problem, self.augmented = seed, size, problem, augmented
        self.sampler = Sampler(samples.lengths, batch, seed)
        self.bad: set[int] = set()

    def __call__(self, number: int) -> PairBatch:
        return self._make(number, self.part)

    def joined(self, number: int) -> PairBatch:
        """The batch of all processes."""
        return self._make(number, (0, 1))

    def _make(self, number: int, part: Part) -> PairBatch:
        every = _Pairs(self.samples, self.sampler(number), _generator(self.seed, number, "caption"))
        # One for each picture: what is drawn for it does not depend on who opened which before it.
        seeds = torch.randint(2**62, (len(every.pictures),), generator=_generator(self.seed, number, "crop")).tolist()
        good, images = [], [torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)]
        for n in range(len(every.pictures))[part_of(len(every.pictures), *part)]:
            picture = every.pictures[n]
            if picture in self.bad:
                continue
            try:
                images.append(self._open(picture, torch.Generator().manual_seed(seeds[n]))[None])
                good.append(n)
            except UserError as error:
                self.bad.add(picture)
                self.problem(str(error))
        if not good and part[1] == 1:
            raise UserError(f"batch {number}: not one of its pictures can be opened; see the log for their names")
        return every.take(good, [self.records[every.pictures[n]].id for n in good], images=torch.cat(images))

    def _open(self, picture: int, generator: torch.Generator) -> Tensor:
        path = self.records[picture].image
        return augment(path, self.size, generator) if self.augmented else to_pixels([path], self.size)[0]


class _Pairs:
    """The pairs of a joined batch before any picture is opened."""

    def __init__(self, samples: Samples, rows: Sequence[int], generator: torch.Generator) -> None:
        self.pictures = [samples.pictures[row] for row in rows]
        self.texts, self.questions = samples.draw(rows, generator)
        self.ids = pair_ids(self.pictures, self.texts)

    def take(self, places: Sequence[int], names: list[str], **seen: Tensor) -> PairBatch:
        """The pairs at these places; `seen`: their pictures, by the names of `PairBatch`."""
        texts = [self.texts[n] for n in places]
        questions = None if self.questions is None else [self.questions[n] for n in places]
        return PairBatch(texts, self.ids[list(places)], questions=questions, names=names, **seen)


def pair_ids(pictures: Sequence[Hashable], captions: Sequence[Hashable]) -> Tensor:
    """Which pairs of a batch belong together: `[B]` int64, the first row of each group.

    Rows with the same picture or the same caption are in one group, and so are rows that other rows connect. The order
    of the rows does not matter. Two pictures of a red circle are no negatives of each other's "a red circle".
    """
    above = list(range(len(pictures)))  # a tree for each group, with its first row at the root

    def root(row: int) -> int:
        while above[row] != row:
            above[row] = row = above[above[row]]  # a shorter way for the next search
        return row

    seen: dict[Hashable, int] = {}
    for n, pair in enumerate(zip(pictures, captions, strict=True)):
        for key in enumerate(pair):  # (0, picture) and (1, caption)
            first, own = sorted((root(seen.setdefault(key, n)), root(n)))
            above[own] = first
    return torch.tensor([root(n) for n in range(len(above))], dtype=torch.int64)


def joined_ids(batch: PairBatch, place: torch.device) -> Tensor:
    """Our rows' ids `[B]` as they are in the joined batch. `place`: where the backend's tensors lie; all must ask."""
    if batch.keys is None or world_size() == 1:
        return batch.ids.to(place)
    shared = share(len(batch.keys))
    pictures, captions = gather(batch.keys.to(place), shared).T.tolist()
    return pair_ids(pictures, captions)[shared.own].to(place)


def _generator(seed: int, number: int, purpose: str) -> torch.Generator:
    # Distinct streams for distinct purposes; the factor keeps (seed, number) pairs apart.
    salt = {"epoch": 0, "caption": 1, "crop": 2, "window": 3}[purpose]
    return torch.Generator().manual_seed((seed * 4 + salt) * 1_000_000_007 + number)


class Prefetcher:
    """`batches(number)`, made one ahead: while the model works on batch n, a thread reads batch n + 1.

    A thread is enough, because decoding and copying release Python's lock. A batch depends on its number alone, so the
    batches are the same. An error in making one is raised where it is asked for. For GPUs, batches are in pinned
    memory, from which they are copied while the model computes.

    Args:
        batches: number -> batch; called from one thread at a time.
        count: batches of the run; none is made after them.
    """

    def __init__(self, batches: Callable[[int], PairBatch], count: int) -> None:
        self.batches, self.count = batches, count
        self.thread = ThreadPoolExecutor(1, "batches")
        self.number, self.next = -1, Future[PairBatch]()  # what is being made

    def __call__(self, number: int) -> PairBatch:
        batch = (self.next if number == self.number else self.thread.submit(self._make, number)).result()
        self.number = number + 1
        if self.number < self.count:
            self.next = self.thread.submit(self._make, self.number)
        return batch

    def _make(self, number: int) -> PairBatch:
        batch = self.batches(number)
        if not torch.cuda.is_available():
            return batch
        images, features = (None if part is None else part.pin_memory() for part in (batch.images, batch.features))
        return replace(batch, images=images, features=features)
