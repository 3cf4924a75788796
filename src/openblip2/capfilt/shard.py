"""Captions and filters one shard; the result depends only on the shard and the settings.

OUT/NAME.tar         its images with the best captions of their pools: "captions" in each .json is
                     [{"text": ..., "score": ..., "from": "web" or "captioner"}, ...], best first; the rest of the
                     .json is kept
OUT/NAME_log.jsonl   what was left out and why, one line each
OUT/NAME_stats.json  settings and counts; marks the shard as complete

Images are captioned in groups of 32 samples, in the order of the shard, and each group has its own random numbers. So
the output files do not depend on which process makes which shard.

BLIP-2 (Li et al. 2023), section 3.4: ten captions are sampled and pooled with those from the web, and the two that are
most similar to the image are kept. BLIP (Li et al. 2022), section 3.3: one caption is sampled, and every text that does
not match the image according to image-text matching is dropped.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from openblip2.capfilt.models import Ranker
from openblip2.data.images import THREADS, PictureFile, to_pixels
from openblip2.data.text import clean_caption
from openblip2.data.web import write_stats
from openblip2.data.web.tars import MAX_JSON, Sample, Shard
from openblip2.data.web.write_shards import write_tar
from openblip2.errors import UserError
from openblip2.inference.captioner import Captioner
from openblip2.model.decoding import Decoding
from openblip2.runs import write_text

GROUP = 32  # number of images that are captioned together
# Captions that are sampled at once, by type of device. On a CPU, fewer are faster, because a batch runs until its
# longest text ends: 0.20 s a caption instead of 0.37 (SmolLM2-135M, one core).
AT_ONCE = {"cuda": 320, "cpu": 64}
# The counts of a shard. The new shard contains "pictures", but not "broken" and "without captions".
COUNTS: tuple[str, ...] = ("samples", "pictures", "broken", "without captions", "captions", "captions by the captioner")


@dataclass(frozen=True)
class How:
    """Settings; the defaults are the paper's.

    Attributes:
        captions: number of captions to sample for each image.
        top_p: probability mass for nucleus sampling, in (0, 1].
        keep: number of captions to keep for each image, the best ones.
        filter: "similarity" ranks captions by their similarity to the image; "itm", as in BLIP, by the probability of
            a match, and drops those below `threshold`.
        threshold: lowest probability of a match for "itm", in [0, 1].
        seed: random seed for the sampled captions.

    Raises:
        UserError: a number is out of its range, or the filter is unknown.
    """

    captions: int = 10
    top_p: float = 0.9
    keep: int = 2
    filter: Literal["similarity", "itm"] = "similarity"
    threshold: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("captions", self.captions, 1), ("keep", self.keep, 1), ("seed", self.seed, 0)):
            if value < least:
                raise UserError(f"--{name} {value}: it must be a whole number, {least} or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: it must be above 0 and at most 1, for example 0.9")
        if not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold {self.threshold}: it must be a probability, from 0 to 1")
        if self.filter not in ("similarity", "itm"):
            raise UserError(f"--filter {self.filter}: it must be similarity or itm")


def pool(web: Iterable[str], written: Iterable[str]) -> dict[str, str]:
    """The different captions after cleaning as for training, those from the web first, and their origins."""
    origins: dict[str, str] = {}
    for origin, texts in (("web", web), ("captioner", written)):
        for text in texts:
            origins.setdefault(clean_caption(text), origin)  # the first of equal captions is kept
    origins.pop("", None)
    return origins


def best(scores: Sequence[float], keep: int, threshold: float | None = None) -> list[int]:
    """The numbers of at most `keep` captions with scores of at least `threshold`, the best and the earlier first.

    Raises:
        UserError: a score is not a number.
    """
    if not all(map(math.isfinite, scores)):
        raise UserError("the ranker gives scores that are not numbers: check that its weights are complete")
    left = [n for n, score in enumerate(scores) if threshold is None or score >= threshold]
    return sorted(left, key=lambda n: -scores[n])[:keep]


class Made(NamedTuple):
    """The result for a shard: the counts in its stats; `dead` says why it cannot be read at all."""

    name: str
    counts: dict[str, int]
    dead: str = ""


class _Ready(NamedTuple):
    """A sample with its pixels for captioner and ranker."""

    sample: Sample
    picture: np.ndarray[Any, Any]
    ranker_pixels: Tensor


class Maker:
    """Captions and filters shards.

    Args:
        settings: a digest of all settings, for the stats.
        advance: called with the number of images that were just processed.
    """

    def __init__(
        self, captioner: Captioner, ranker: Ranker, how: How, settings: str, advance: Callable[[int], object]
    ) -> None:
        self.captioner, self.ranker, self.how = captioner, ranker, how
        self.settings, self.advance = settings, advance

    def __call__(self, url: str, path: Path) -> Made:
        """Makes the shard `path` from the shard `url`.

        Raises:
            UserError: it cannot be written.
        """
        name, lines = path.stem, list[str]()
        try:
            shard = Shard(url, lines.append)
        except UserError as error:
            return Made(name, {}, str(error))
        counts = Counter(dict.fromkeys(COUNTS, 0))
        counts["samples"] = len(shard)
        try:
            with write_tar(path) as writer:
                for number, group in enumerate(self._groups(shard, counts, lines)):
                    seed = hashlib.blake2b(f"{self.how.seed} {name} {number}".encode(), digest_size=8).digest()
                    written = self._write(group, int.from_bytes(seed, "little") >> 1)
                    for sample in self._best(url, group, written, counts, lines):
                        try:
                            writer.add(sample)
                        except UserError as error:  # a key that could not be read back
                            lines.append(str(error))
                            counts["broken"] += 1
                counts["pictures"] = writer.count
                # Sorted, because they come from several threads.
                log = "".join(json.dumps({"skipped": line}) + "\n" for line in sorted(lines))
                write_text(log, path.with_name(f"{name}_log.jsonl"))
                write_stats(path, writer.count, counts=dict(counts), settings=self.settings)
        except OSError as error:
            problem = f"{error.filename or path}: {error.strerror}"
            raise UserError(f"{problem}: give another folder, with free space") from error
        finally:
            shard.close()
        return Made(name, dict(counts))

    def _groups(self, shard: Shard, counts: Counter[str], lines: list[str]) -> Iterator[list[_Ready]]:
        """The images that can be opened, in groups; the next group is opened while the models work on one."""
        numbers, open_one = range(len(shard)), partial(self._open, shard, lines)
        with ThreadPoolExecutor(THREADS) as threads:
            following = threads.map(open_one, numbers[:GROUP])
            for end in range(GROUP, len(shard) + GROUP, GROUP):
                found = list(following)
                following = threads.map(open_one, numbers[end : end + GROUP])
                ready = [one for one in found if one is not None]
                counts["broken"] += len(found) - len(ready)
                yield ready
                self.advance(len(found))

    def _open(self, shard: Shard, lines: list[str], number: int) -> _Ready | None:
        """A sample with its pixels, or None if it is bad; `lines` then says why."""
        sample = shard.read(number)
        if sample is None:
            return None
        picture = PictureFile(sample.image, f"{shard.url}: {sample.key}.{sample.suffix}")
        try:
            vision = self.captioner.model.vision
            assert vision is not None
            pixels = to_pixels([picture], vision.image_size)[0].permute(1, 2, 0).contiguous().numpy()
            return _Ready(sample, pixels, self.ranker.pixels(picture))
        except UserError as error:
            lines.append(str(error))
            return None

    def _write(self, group: Sequence[_Ready], seed: int) -> list[list[str]]:
        """The generated captions of each image."""
        if not group:
            return []
        count = self.how.captions
        pictures = [one.picture for one in group for _ in range(count)]  # the same object, which is encoded once
        prompts = [self.captioner.settings.language.prompts[0]] * len(pictures)
        decoding = Decoding(beams=1, sample=True, top_p=self.how.top_p)
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            torch.manual_seed(seed)
            at_once = AT_ONCE.get(self.captioner.model.projection.weight.device.type, 64)
            # Also in low precision, where a text depends on its batch: the group of a text is always the same.
            texts = self.captioner.generate(pictures, prompts, decoding, at_once=at_once)
        return [texts[start : start + count] for start in range(0, len(texts), count)]

    def _best(
        self,
        url: str,
        group: Sequence[_Ready],
        written: Sequence[Sequence[str]],
        counts: Counter[str],
        lines: list[str],
    ) -> list[Sample]:
        """The samples of a group with the best of their own and of the generated captions."""
        pools = [pool(one.sample.captions, texts) for one, texts in zip(group, written, strict=True)]
        pairs = [(n, text) for n, texts in enumerate(pools) for text in texts]
        pixels = [one.ranker_pixels for one in group]
        found = self.ranker.scores(pixels, [text for _, text in pairs], [n for n, _ in pairs]) if pairs else []
        following = iter(found)
        threshold = self.how.threshold if self.how.filter == "itm" else None
        samples: list[Sample] = []
        for (sample, _, _), origins in zip(group, pools, strict=True):
            texts, scores = list(origins.items()), [round(next(following), 6) for _ in origins]
            chosen = best(scores, self.how.keep, threshold)
            kept = [{"text": texts[n][0], "score": scores[n], "from": texts[n][1]} for n in chosen]
            if not kept:
                counts["without captions"] += 1
                lines.append(f"{url}: {sample.key}: none of its {len(texts)} captions is kept")
                continue
            counts["captions"] += len(kept)
            counts["captions by the captioner"] += sum(entry["from"] == "captioner" for entry in kept)
            about = sample.about | {"captions": kept}
            if len(json.dumps(about)) > MAX_JSON:  # it could not be read back
                about = {"captions": kept}
                lines.append(f"{url}: {sample.key}: its .json would be too long; only captions are kept")
            # "./000017", as tar itself writes names, becomes 000017.
            key = "/".join(part for part in sample.key.split("/") if part not in ("", "."))
            captions = tuple(entry["text"] for entry in kept)
            samples.append(sample._replace(key=key, captions=captions, about=about))
        return samples
