"""One shard captioned and filtered: the result depends only on the shard and the settings.

OUT/NAME.tar         its images with the best captions of their pools: "captions" in each .json is
                     [{"text": ..., "score": ..., "from": "web" or "captioner"}, ...], best first; the rest of the
                     .json is kept
OUT/NAME_log.jsonl   what was left out and why, one line each
OUT/NAME_stats.json  settings and counts; marks the shard as complete

Images are captioned in groups of 32 samples, in the order of the shard, and each group has its own random numbers. So
the bytes do not depend on which process makes which shard.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from openblip2.capfilt.duplicates import FOLDER, Twin, captions_of
from openblip2.capfilt.models import Ranker, digest
from openblip2.capfilt.pool import How, Text, best, pool
from openblip2.data.images import THREADS, PictureFile, to_pixels
from openblip2.data.web.mixture import find_reader, sample_captions
from openblip2.data.web.shard_files import read_stats, write_stats
from openblip2.data.web.tars import MAX_JSON, Sample, Shard
from openblip2.data.web.write_shards import write_tar
from openblip2.errors import UserError
from openblip2.inference.captioner import Captioner
from openblip2.model.decoding import Decoding
from openblip2.runs import write_text

GROUP = 32  # images at once
AT_ONCE = 320  # captions at once: ten for each of 32 images
# The counts of a shard. The new shard contains "pictures", but not "broken", "duplicates" and "without captions".
COUNTS: tuple[str, ...] = (
    "samples",
    "pictures",
    "broken",
    "duplicates",
    "without captions",
    "captions",
    "captions by the captioner",
    "captions joined",
)


class Task(NamedTuple):
    """A shard to make.

    Attributes:
        name: of the shard, without .tar.
        url: of the shard that is read.
        out: the folder of the new shard.
        settings: their digest.
        twins: its images that occur more than once.
    """

    name: str
    url: str
    out: str
    settings: str
    twins: list[Twin]

    @property
    def path(self) -> Path:
        return Path(self.out) / f"{self.name}.tar"

    @property
    def of(self) -> str:
        """A digest of what the result depends on besides the settings."""
        return digest([self.name, self.twins])


class Made(NamedTuple):
    """The result for a shard: the counts in its stats; `dead` says why it cannot be read at all."""

    name: str
    counts: dict[str, int]
    dead: str = ""


@dataclass(frozen=True)
class _Ready:
    """A sample with its pixels for captioner and ranker, and the captions it has."""

    sample: Sample
    picture: np.ndarray[Any, Any] | None
    ranker_pixels: Tensor
    web: tuple[str, ...]


def finished(task: Task) -> Made | None:
    """The result of an earlier run; None if there is none, or if it was made together with other shards.

    Raises:
        UserError: the shard was made with other settings.
    """
    stats = read_stats(task.path, "settings", task.settings)
    return Made(task.name, stats["counts"]) if stats and stats["of"] == task.of else None


class Maker:
    """Captions and filters shards.

    Args:
        captioner: None to rank only.
        ranker: scores captions.
        how: the settings.
        advance: called with the number of images that were just processed.
    """

    def __init__(
        self,
        captioner: Captioner | None,
        ranker: Ranker,
        how: How,
        advance: Callable[[int], object] = lambda count: None,
    ) -> None:
        self.captioner, self.ranker, self.how, self.reader = captioner, ranker, how, find_reader(how.reader)
        self.advance = advance

    def __call__(self, task: Task) -> Made:
        """Makes a shard.

        Raises:
            UserError: it cannot be written.
        """
        lines: list[str] = []
        try:
            shard = Shard(task.url, lines.append)
        except UserError as error:
            return Made(task.name, {}, str(error))
        counts = Counter(dict.fromkeys(COUNTS, 0))
        counts["samples"] = len(shard)
        try:
            with write_tar(task.path) as writer:
                for number, group in enumerate(self._groups(task, shard, counts, lines)):
                    for sample in self._best(task, number, group, counts, lines):
                        try:
                            writer.add(sample)
                        except UserError as error:  # a key that could not be read back
                            lines.append(str(error))
                            counts["broken"] += 1
                counts["pictures"] = writer.count
                _write_log(task, lines)
            write_stats(task.path, writer.count, counts=dict(counts), settings=task.settings, of=task.of)
        except OSError as error:
            raise UserError(
                f"{error.filename or task.path}: {error.strerror}: give another folder, with free space"
            ) from error
        finally:
            shard.close()
        return Made(task.name, dict(counts))

    def _groups(self, task: Task, shard: Shard, counts: Counter[str], lines: list[str]) -> Iterator[list[_Ready]]:
        """The images that can be opened, in groups; the next group is opened while the models work on one."""
        later = {twin.position for twin in task.twins if twin.other < 0}
        joined = _joined(task)
        counts["duplicates"] = len(later)
        counts["captions joined"] = sum(map(len, joined.values()))
        numbers = [number for number in range(len(shard)) if number not in later]
        with ThreadPoolExecutor(THREADS) as threads:
            groups = [numbers[start : start + GROUP] for start in range(0, len(numbers), GROUP)]
            ahead = [threads.submit(self._open, shard, n, joined.get(n, ())) for n in (groups[0] if groups else ())]
            for following in [*groups[1:], []]:
                found = [one.result() for one in ahead]
                ahead = [threads.submit(self._open, shard, n, joined.get(n, ())) for n in following]
                lines += [one for one in found if isinstance(one, str) and one]
                ready = [one for one in found if isinstance(one, _Ready)]
                counts["broken"] += len(found) - len(ready)
                yield ready
                self.advance(len(found))

    def _open(self, shard: Shard, number: int, joined: tuple[str, ...]) -> _Ready | str:
        """A sample with its pixels, or what is wrong with it; "" if that was already reported."""
        sample = shard.read(number)
        if sample is None:
            return ""
        picture = PictureFile(sample.image, f"{shard.url}: {sample.key}.{sample.suffix}")
        try:
            pixels = None
            if self.captioner is not None:
                vision = self.captioner.model.vision
                assert vision is not None
                pixels = to_pixels([picture], vision.image_size)[0].permute(1, 2, 0).contiguous().numpy()
            captions = (*sample_captions(sample, self.reader), *joined)
            return _Ready(sample, pixels, self.ranker.pixels(picture), captions)
        except UserError as error:
            return str(error)

    def _best(
        self, task: Task, number: int, group: Sequence[_Ready], counts: Counter[str], lines: list[str]
    ) -> list[Sample]:
        """The samples of a group with their best captions."""
        written = self._write(task, number, group)
        pools = [pool(one.web, texts) for one, texts in zip(group, written, strict=True)]
        some = [n for n, texts in enumerate(pools) if texts]
        scores = dict(zip(some, self._scores([group[n] for n in some], [pools[n] for n in some]), strict=True))
        samples: list[Sample] = []
        for n, one in enumerate(group):
            threshold = self.how.threshold if self.how.filter == "itm" else None
            kept = [(pools[n][m], scores[n][m]) for m in best(scores.get(n, ()), self.how.keep, threshold)]
            if kept:
                samples.append(_with(one.sample, kept))
                if len(json.dumps(samples[-1].about)) > MAX_JSON:  # it could not be read back
                    samples[-1] = samples[-1]._replace(about={"captions": samples[-1].about["captions"]})
                    lines.append(f"{task.url}: {one.sample.key}: its .json would be too long; only captions are kept")
                counts["captions"] += len(kept)
                counts["captions by the captioner"] += sum(text.origin == "captioner" for text, _ in kept)
            else:
                counts["without captions"] += 1
                lines.append(f"{task.url}: {one.sample.key}: none of its {len(pools[n])} captions is kept")
        return samples

    def _write(self, task: Task, number: int, group: Sequence[_Ready]) -> list[list[str]]:
        """The generated captions of each image."""
        if self.captioner is None or not group:
            return [[] for _ in group]
        count = self.how.captions
        pictures = [one.picture for one in group for _ in range(count)]  # the same object, which is encoded once
        prompts = [self.captioner.settings.language.prompts[0]] * len(pictures)
        decoding = Decoding(beams=1, sample=True, top_p=self.how.top_p)
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            torch.manual_seed(_seed(self.how.seed, task.name, number))
            texts = self.captioner.generate(pictures, prompts, decoding, at_once=AT_ONCE)  # pyright: ignore
        return [texts[start : start + count] for start in range(0, len(texts), count)]

    def _scores(self, group: Sequence[_Ready], texts: Sequence[Sequence[Text]]) -> list[list[float]]:
        if not group:
            return []
        found = self.ranker.scores([one.ranker_pixels for one in group], [[text.text for text in own] for own in texts])
        return [[round(score, 6) for score in scores] for scores in found]


def _with(sample: Sample, kept: Sequence[tuple[Text, float]]) -> Sample:
    """The sample with other captions. "./000017", as tar itself writes names, becomes 000017."""
    listed = [{"text": text.text, "score": score, "from": text.origin} for text, score in kept]
    key = "/".join(part for part in sample.key.split("/") if part not in ("", "."))
    return sample._replace(
        key=key, captions=tuple(text.text for text, _ in kept), about=sample.about | {"captions": listed}
    )


def _joined(task: Task) -> dict[int, tuple[str, ...]]:
    """The captions of later duplicates, by the position of the first one."""
    by_shard: dict[str, list[Twin]] = {}
    for twin in task.twins:
        if twin.other >= 0:
            by_shard.setdefault(twin.shard, []).append(twin)
    found: dict[int, tuple[str, ...]] = {}
    for shard, twins in by_shard.items():
        texts = captions_of(Path(task.out) / FOLDER, shard, [twin.other for twin in twins])
        for twin, more in zip(twins, texts, strict=True):
            found[twin.position] = found.get(twin.position, ()) + more
    return found


def _seed(seed: int, name: str, group: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {name} {group}".encode(), digest_size=8).digest(), "little") >> 1


def _write_log(task: Task, lines: Sequence[str]) -> None:
    path = task.path.with_name(f"{task.name}_log.jsonl")
    # Sorted, because they come from several threads.
    write_text("".join(json.dumps({"skipped": line}) + "\n" for line in sorted(lines)), path)
