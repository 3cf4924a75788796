"""The benchmark cases: our implementation and those it is compared with, on equal inputs, with equal outputs.

Shapes: B images, P patch tokens, V encoder width, T text tokens, Q queries, W vocabulary.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from openblip2.apps.bench.models import (
    BOS,
    EOS,
    IMAGE,
    Size,
    build_models,
    jpeg,
    normalised,
    pictures,
    random_texts,
    texts,
)
from openblip2.apps.bench.naive import naive_losses, naive_picture, naive_rerank
from openblip2.data.features import FeatureCache, StoredFeatures, writing
from openblip2.data.records import Record
from openblip2.data.web import write_stats
from openblip2.data.web.mixture import count_parts, read_parts
from openblip2.data.web.pairs import ShardPairs
from openblip2.data.web.tars import Sample
from openblip2.data.web.write_shards import write_tar
from openblip2.evaluate.ranking import rerank
from openblip2.hardware import computing
from openblip2.model.decoding import Decoding

SIDE = 256  # px, as img2dataset stores pictures by default
SIZE = 224  # px, the image size of training in the paper
PICTURES = 128  # in the loader case
OURS, NAIVE, THEIRS = "openblip2", "naive", "transformers"


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        candidates: Functions by name, including ours; all do the same work.
        samples: Number of samples in one run; `unit` says what a sample is.
        difference: The largest relative difference between the outputs.
        equal: The allowed difference.
    """

    name: str
    candidates: Mapping[str, Callable[[], Any]]
    samples: int
    unit: str
    difference: float
    equal: float


class Bench:
    """Makes the cases of one size, computed in `precision`."""

    def __init__(self, size: Size, device: torch.device, precision: str, dtype: torch.dtype) -> None:
        self.size, self.device, self.precision = size, device, precision
        self.one, self.two, self.theirs = build_models(size, device, dtype)
        self.vision: Any = self.two.vision
        self._folder = tempfile.TemporaryDirectory(prefix="openblip2-bench-")  # removed with this object

    def loader(self) -> Case:
        """Loads a batch of images: ours from a shard in one thread, the naive way with Pillow from files in memory.

        There is no random crop, because each way would draw a different one. A crop takes as much time as it saves by
        making the image smaller.
        """
        files = {f"{n:09}": jpeg(n, SIDE) for n in range(PICTURES)}
        shard = Path(self._folder.name, "00000.tar")
        with write_tar(shard) as writer:
            for key, file in files.items():
                writer.add(Sample(key, file, "jpg", (f"picture {key}",), {"url": key, "width": SIDE, "height": SIDE}))
        write_stats(shard, writer.count)
        parts = count_parts(read_parts(str(shard)), print)
        loader = ShardPairs(parts, PICTURES, 0, SIZE, 1, print, augmented=False, threads=1)
        order = [name.rpartition(": ")[2].removesuffix(".jpg") for name in loader(0).names or ()]

        def naive() -> Tensor:
            return torch.stack([naive_picture(files[key], SIZE) for key in order])

        return self._case("loader", {OURS: lambda: loader(0).images, NAIVE: naive}, PICTURES, "pictures", equal=0.0)

    def cache(self) -> Case:
        """The features of a batch: ours reads them from a feature cache on disk, the naive way runs the encoder."""
        images = pictures(self.size.pairs, self.size.side, self.device)
        cached = self._cache(self._encode(images))
        return self._case("cache", {OURS: cached, NAIVE: lambda: self._encode(images)}, len(images), "pictures")

    def stage1(self, name: str, from_images: bool) -> Case:
        """A step of stage 1, forward and backward, on features, or from images.

        From images, ours reads features from a cache; the naive way runs the encoder.
        """
        size, model = self.size, self.one
        images = pictures(size.pairs, size.side, self.device)
        features = self._encode(images)
        tokens, valid = texts(size.pairs, size.text, size.qformer_words, self.device)
        ids = torch.arange(size.pairs, device=self.device)
        negatives = ids.roll(1), ids.roll(2)
        cached = self._cache(features)

        def ours() -> dict[str, Tensor]:
            read = cached() if from_images else features
            return self._step(model, lambda: model.losses(tokens, valid, ids, features=read, negatives=negatives))

        def naive() -> dict[str, Tensor]:
            read = self._encode(images) if from_images else features
            return self._step(model, lambda: naive_losses(model, tokens, valid, ids, read, negatives))

        return self._case(name, {OURS: ours, NAIVE: naive}, size.pairs, "pairs")

    def stage2(self, name: str, cached: bool) -> Case:
        """A step of stage 2 from images; if `cached`, ours reads features from a cache.

        Transformers always runs the encoder.
        """
        size, model, theirs = self.size, self.two, self.theirs
        images = pictures(size.captions, size.side, self.device)
        read = self._cache(self._encode(images))
        captions = random_texts(size.captions, size.text, size.words)
        prompts = [""] * len(captions)
        rows = [[*[IMAGE] * size.queries, BOS, *model.language.tokenizer(c)["input_ids"], EOS] for c in captions]  # pyright: ignore
        ids, mask = _padded(rows, "right", self.device)
        labels = ids.masked_fill(mask == 0, -100)  # as transformers expects: no loss on padding ...
        labels[:, : size.queries + 1] = -100  # ... and none on queries and BOS
        pixels = normalised(self.vision, images, theirs.vision_model.dtype)

        def ours() -> dict[str, Tensor]:
            seen: dict[str, Any] = {"features": read()} if cached else {"images": images}
            return self._step(model, lambda: model.losses(prompts, captions, **seen))

        def transformers() -> dict[str, Tensor]:
            inputs = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask, "labels": labels}
            return self._step(theirs, lambda: {"lm": theirs(**inputs).loss})

        return self._case(name, {OURS: ours, THEIRS: transformers}, size.captions, "pictures")

    def captions(self, beams: int) -> Case:
        """Captions from pictures, without a prompt, all of the same length."""
        images = pictures(self.size.pictures, self.size.side, self.device)
        return self._generation(f"captions-{'beam' if beams > 1 else 'greedy'}", images, [""] * len(images), beams)

    def questions(self) -> Case:
        """Many questions about one image, which transformers gets again for each question."""
        size = self.size
        images = pictures(1, size.side, self.device).expand(size.questions, -1, -1, -1)
        asked = random_texts(size.questions, size.text, size.words)
        return self._generation("questions", images, asked, beams=1)

    def _generation(self, name: str, images: Tensor, prompts: list[str], beams: int) -> Case:
        size, model, theirs = self.size, self.two, self.theirs
        how = Decoding(size.new_tokens, size.new_tokens, beams)
        tokenizer: Any = model.language.tokenizer
        rows = [[*[IMAGE] * size.queries, BOS, *tokenizer(prompt)["input_ids"]] for prompt in prompts]
        ids, mask = _padded(rows, "left", self.device)

        def ours() -> list[str]:
            with self._computing(model):
                if name == "questions":
                    soft = model.soft_prompt(images=images[:1])
                    return model.language.generate(soft, prompts, how, pictures=[0] * len(prompts))
                return model.generate(prompts, how, images=images)

        def transformers() -> list[str]:
            pixels = normalised(self.vision, images, theirs.vision_model.dtype)
            with self._computing(theirs):
                found = theirs.generate(
                    pixel_values=pixels,
                    input_ids=ids,
                    attention_mask=mask,
                    num_beams=beams,
                    do_sample=False,
                    max_new_tokens=size.new_tokens,
                    min_new_tokens=size.new_tokens,
                )
            return [text.strip() for text in tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)]

        return self._case(name, {OURS: ours, THEIRS: transformers}, len(prompts), "texts")

    def rerank(self) -> Case:
        """ITM scores of the best candidates of one image, at the image size with which retrieval is fine-tuned."""
        size, model = self.size, self.one
        features = self._encode(pictures(1, size.rerank_side, self.device))
        tokens, valid = texts(size.candidates, size.text, size.qformer_words, self.device)
        scores = torch.linspace(0, 1, size.candidates, device=self.device)[None]

        def run(way: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
            with self._computing(model):
                return way(model, features, tokens, valid, scores, size.candidates)[0]

        ways = {OURS: lambda: run(rerank), NAIVE: lambda: run(naive_rerank)}
        return self._case("rerank", ways, size.candidates, "pairs")

    def _case(
        self,
        name: str,
        candidates: Mapping[str, Callable[[], Any]],
        samples: int,
        unit: str,
        equal: float | None = None,
    ) -> Case:
        found = [_numbers(run()) for run in candidates.values()]
        difference = max(_difference(found[0], other) for other in found[1:])
        # With random weights, all words are almost equally likely, so bf16 rounding may change texts. This is reported.
        if equal is None:
            equal = 1e-4 if self.precision == "fp32" else 1.0 if isinstance(found[0], list) else 3e-2
            equal = max(equal, 1e-3 if name in CACHED else 0.0)  # features in the cache are rounded to fp16
        return Case(name, candidates, samples, unit, difference, equal)

    def _step(self, model: nn.Module, losses: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Forward and backward, as in training, without the optimizer's step, which is the same for all."""
        with computing(model, self.precision):
            parts = losses()
        torch.stack(list(parts.values())).sum().backward()
        for parameter in model.parameters():
            parameter.grad = None
        return {name: value.detach() for name, value in parts.items()}

    @contextmanager
    def _computing(self, model: nn.Module) -> Iterator[None]:
        with torch.inference_mode(), computing(model, self.precision):
            yield

    def _cache(self, features: Tensor) -> Callable[[], Tensor]:
        """Writes features to a cache on disk. Returns a function that reads them from it, as training does."""
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        records = [Record(str(n), Path(f"{n}.png"), ()) for n in range(len(features))]
        with writing(folder, {"precision": "fp16"}, (1, *features.shape[1:]), print) as writer:
            writer.add(records, [None] * len(records), features[:, None])
        stored = StoredFeatures(records, FeatureCache(folder), lambda values: values)
        return lambda: stored.take(range(len(features))).to(self.device)

    def _encode(self, images: Tensor) -> Tensor:
        vision = self.vision
        before, vision.image_size = vision.image_size, images.shape[-1]
        try:
            with self._computing(vision):
                found = [vision(part) for part in images.split(16)]
        finally:
            vision.image_size = before
        return torch.cat(found).clone()  # a clone is not an inference tensor, so it can be used in training


CASES: dict[str, Callable[[Bench], Case]] = {
    "cache": Bench.cache,
    "loader": Bench.loader,
    "stage1-features": lambda bench: bench.stage1("stage1-features", from_images=False),
    "stage1-images": lambda bench: bench.stage1("stage1-images", from_images=True),
    "stage2-features": lambda bench: bench.stage2("stage2-features", cached=True),
    "stage2-images": lambda bench: bench.stage2("stage2-images", cached=False),
    "captions-beam": lambda bench: bench.captions(beams=5),
    "captions-greedy": lambda bench: bench.captions(beams=1),
    "questions": Bench.questions,
    "rerank": Bench.rerank,
}
CACHED = ("cache", "stage1-images", "stage2-features")  # ours reads a feature cache


def _padded(rows: list[list[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, padded with 0."""
    ids = pad_sequence([torch.tensor(row) for row in rows], True, padding_value=-1, padding_side=side).to(device)
    return ids.clamp(min=0), (ids >= 0).long()


def _numbers(output: Any) -> Any:
    if isinstance(output, dict):
        return torch.stack([value.float().cpu() for value in output.values()])
    return output.float().cpu() if isinstance(output, Tensor) else output


def _difference(mine: Any, theirs: Any) -> float:
    """The largest difference divided by the largest value; for texts, the share that differs."""
    if isinstance(mine, list):
        return sum(a != b for a, b in zip(mine, theirs, strict=True)) / len(mine)
    return float((mine - theirs).abs().max() / theirs.abs().max())
