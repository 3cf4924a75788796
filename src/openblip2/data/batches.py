"""Batches of images with texts. Batch n of a run is a function of (seed, n), so nothing has to be saved to resume.

Shapes: B pairs, P patch tokens, V encoder width, S side in px.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from openblip2.data.features import StoredFeatures
from openblip2.data.images import augment, to_pixels
from openblip2.data.records import Record
from openblip2.data.samples import Samples, SimilarRows
from openblip2.data.text import names_side
from openblip2.distributed.collectives import gather, part_of, share, world_size
from openblip2.errors import UserError


@dataclass(frozen=True)
class PairBatch:
    """B images with one text each, and either `features [B, P, V]` or `images [B, 3, S, S]` uint8."""

    captions: list[str]  # answers if there are questions; with instructions, captions or answers
    ids: Tensor  # [B] int64, equal for the same picture and for the same caption
    features: Tensor | None = None
    images: Tensor | None = None
    questions: list[str] | None = None  # or whole instructions (`samples.Instructions`)
    names: list[str] | None = None  # names of the images: ids, or shards with members
    # [B, 2] int64, hashes of image and caption, if a process does not know the rows of the other processes. `ids` then
    # compare only the rows of this process.
    keys: Tensor | None = None


class Sampler:
    """Row numbers of batch n: every epoch is shuffled again and split into batches.

    Batches contain texts of all lengths. With texts of the same length, they would need less padding, but then "a cat
    above a dog" and "a cat to the left of a dog" would never be hard negatives of each other.

    Args:
        rows: number of rows.
        batch: B, at most the number of rows.
        similar: if given, the second half of a batch consists of rows similar to those of the first half.
        similar_from: the first batch with similar rows.
    """

    def __init__(
        self, rows: int, batch: int, seed: int, similar: SimilarRows | None = None, similar_from: int = 0
    ) -> None:
        self.rows, self.batch, self.seed = rows, min(batch, rows), seed
        self.similar, self.similar_from = similar, similar_from

    def __call__(self, number: int) -> list[int]:
        """The rows of batch `number`: `[B]`."""
        if self.similar is None or number < self.similar_from:
            return self._shuffled(number * self.batch, self.batch)
        others = self.batch // 2
        own = self.batch - others
        rows = self._shuffled(self.similar_from * self.batch + (number - self.similar_from) * own, own)
        places = torch.rand(others, generator=batch_generator(self.seed, number, "similar")).tolist()
        return rows + [self.similar(row, place) for row, place in zip(rows[:others], places, strict=True)]

    def _shuffled(self, begin: int, count: int) -> list[int]:
        """`count` rows from position `begin` on in the sequence of all epochs."""
        rows: list[int] = []
        while len(rows) < count:
            epoch, place = divmod(begin + len(rows), self.rows)
            order = torch.randperm(self.rows, generator=batch_generator(self.seed, epoch, "epoch"))
            # A batch that crosses into the next epoch may contain an image twice, which its ids take into account.
            rows += order[place : place + count - len(rows)].tolist()
        return rows


class Batches(ABC):
    """Batches by number.

    Args:
        records: records with the images.
        samples: their texts.
        batch: number of pairs in a batch of all processes.
        augmented: whether images are cropped and flipped at random; no flip if an image's texts say left or right.
        similar_from: the first batch with similar rows (`Sampler`), by each image's longest caption; None = no batch.
        part: (r, N): process r of N has a part of each batch of all processes, which does not depend on N.
    """

    def __init__(
        self,
        records: Sequence[Record],
        samples: Samples,
        batch: int,
        seed: int,
        augmented: bool = True,
        part: tuple[int, int] = (0, 1),
        similar_from: int | None = None,
    ) -> None:
        self.records, self.samples, self.part = list(records), samples, part
        self.seed, self.augmented = seed, augmented
        similar = None
        if similar_from is not None:
            similar = SimilarRows([max(self.records[n].captions, key=len) for n in samples.pictures])
        self.sampler = Sampler(len(samples.pictures), batch, seed, similar, similar_from or 0)
        # Differs from the paper, which also flips these images.
        self.sided = {n for n, record in enumerate(self.records) if augmented and names_side(record.texts)}

    def __call__(self, number: int, joined: bool = False) -> PairBatch:
        """This process's part of batch `number`, or with `joined` the batch of all processes."""
        rows, part = self.sampler(number), (0, 1) if joined else self.part
        pictures = [self.samples.pictures[row] for row in rows]
        texts, questions = self.samples.draw(rows, batch_generator(self.seed, number, "caption"))
        ids = pair_ids(pictures, texts)
        places, content = self._open(number, pictures, range(len(rows))[part_of(len(rows), *part)])
        return PairBatch(
            [texts[n] for n in places],
            ids[list(places)],
            questions=None if questions is None else [questions[n] for n in places],
            names=[self.records[pictures[n]].id for n in places],
            **content,
        )

    @abstractmethod
    def _open(self, number: int, pictures: Sequence[int], own: range) -> tuple[Sequence[int], dict[str, Tensor]]:
        """The positions in batch `number` with usable images, and their images or features as in `PairBatch`.

        Args:
            pictures: the record number of each row in the batch of all processes.
            own: the positions to open.
        """


class ImagePairs(Batches):
    """Batches of images, with new random crops and flips each time (as in the paper) or plain.

    An image that cannot be opened is left out of its batch and reported once, so a process may have no image. Other
    arguments, also `options`: see `Batches`.

    Args:
        size: S.
        problem: called with a line for each image that cannot be opened.
    """

    def __init__(
        self,
        records: Sequence[Record],
        samples: Samples,
        batch: int,
        seed: int,
        size: int,
        problem: Callable[[str], object],
        **options: Any,
    ) -> None:
        super().__init__(records, samples, batch, seed, **options)
        self.size, self.problem, self.bad = size, problem, set[int]()

    def _open(self, number: int, pictures: Sequence[int], own: range) -> tuple[Sequence[int], dict[str, Tensor]]:
        # One seed for each image, so that its crop does not depend on which images were opened before it.
        seeds = torch.randint(2**62, (len(pictures),), generator=batch_generator(self.seed, number, "crop")).tolist()
        good, images = [], [torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)]
        for n in own:
            if pictures[n] in self.bad:
                continue
            path, mirror = self.records[pictures[n]].image, False if pictures[n] in self.sided else None
            random = torch.Generator().manual_seed(seeds[n])
            try:
                pixels = augment(path, self.size, random, mirror) if self.augmented else to_pixels([path], self.size)[0]
                images.append(pixels[None])
                good.append(n)
            except UserError as error:
                self.bad.add(pictures[n])
                self.problem(str(error))
        if not good and len(own) == len(pictures):
            raise UserError(f"batch {number}: none of its pictures can be opened; see the log for their names")
        return good, {"images": torch.cat(images)}


class FeaturePairs(Batches):
    """Batches of stored features: of a random crop of each image if augmented, otherwise of the plain image.

    Other arguments, also `options`: see `Batches`.
    """

    def __init__(self, features: StoredFeatures, samples: Samples, batch: int, seed: int, **options: Any) -> None:
        super().__init__(features.records, samples, batch, seed, **options)
        self.features = features

    def _open(self, number: int, pictures: Sequence[int], own: range) -> tuple[Sequence[int], dict[str, Tensor]]:
        views = None
        if self.augmented:
            random = batch_generator(self.seed, number, "crop")
            drawn = torch.randint(self.features.views, (len(pictures),), generator=random).tolist()
            # Every second view is flipped (train/encode.py); the view before it is not.
            views = [drawn[n] - drawn[n] % 2 if pictures[n] in self.sided else drawn[n] for n in own]
        return own, {"features": self.features.take([pictures[n] for n in own], views)}


def pair_ids(pictures: Sequence[Hashable], captions: Sequence[Hashable]) -> Tensor:
    """Which pairs of a batch belong together: `[B]` int64, the first row of each group.

    Rows with the same picture or the same caption are in one group: two pictures of a red circle are not negatives of
    each other's "a red circle". The order of the rows does not matter.
    """
    return torch.tensor(group_rows([enumerate(pair) for pair in zip(pictures, captions, strict=True)])).long()


def group_rows(keys: Sequence[Iterable[Hashable]]) -> list[int]:
    """The first row of each row's group. Rows with a common key are in one group, directly or through other rows."""
    above = list(range(len(keys)))  # a tree for each group, with its first row at the root

    def root(row: int) -> int:
        while above[row] != row:
            above[row] = row = above[above[row]]  # a shorter path for the next search
        return row

    owner: dict[Hashable, int] = {}
    for row, own in enumerate(keys):
        for key in own:
            first, other = sorted((root(owner.setdefault(key, row)), root(row)))
            above[other] = first
    return [root(row) for row in range(len(above))]


def joined_ids(batch: PairBatch, place: torch.device) -> Tensor:
    """The ids `[B]` of this process's rows in the batch of all processes, which must all call it.

    Args:
        place: the device of the backend's tensors.
    """
    if batch.keys is None or world_size() == 1:
        return batch.ids.to(place)
    shared = share(len(batch.keys))
    pictures, captions = gather(batch.keys.to(place), shared).T.tolist()
    return pair_ids(pictures, captions)[shared.own].to(place)


def batch_generator(seed: int, number: int, purpose: str) -> torch.Generator:
    """The random generator of batch or epoch `number` for one purpose."""
    # Distinct streams for distinct purposes; the factor keeps (seed, number) pairs apart.
    salt = {"epoch": 0, "caption": 1, "crop": 2, "similar": 3}[purpose]
    return torch.Generator().manual_seed((seed * 4 + salt) * 1_000_000_007 + number)


class Prefetcher:
    """`batches(number)`, read one batch ahead: while the model works on batch n, a thread reads batch n + 1.

    One thread is enough, because decoding and copying release the GIL. An error is raised when its batch is requested.
    For GPUs, batches are in pinned memory, from which they are copied while the model computes.

    Args:
        batches: number -> batch, which depends only on the number; called by one thread at a time.
        count: number of batches of the run.
    """

    def __init__(self, batches: Callable[[int], PairBatch], count: int) -> None:
        self.batches, self.count = batches, count
        self.thread = ThreadPoolExecutor(1, "batches")
        self.number, self.next = -1, Future[PairBatch]()  # what the thread reads

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


def drawn_prompts(prompts: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
    """One of the prompts for each of this process's `count` captions, drawn for all processes together."""
    if len(prompts) == 1:
        return [prompts[0]] * count
    # Drawn for all processes, so that prompts do not depend on the number of processes.
    shared = share(count)
    drawn = torch.randint(len(prompts), (shared.total,), generator=generator)[shared.own]
    return [prompts[int(n)] for n in drawn]
