"""The plan of a run: what it computes, holds and sends, and how long that takes.

Time is arithmetic over an efficiency: the share of the accelerators' peak that a run reaches, which is the one thing
that cannot be computed. It is given, taken from what `openblip2 bench` measured, or assumed and said to be.
"""

import math
from dataclasses import dataclass

from openblip2.config import RunSettings, change
from openblip2.data.cache.features import bytes_of
from openblip2.data.cache.shards import Layout
from openblip2.errors import UserError
from openblip2.plan.former import Former
from openblip2.plan.frozen import Encoder, Language, count_encoder, count_language
from openblip2.plan.gpus import Cluster
from openblip2.plan.known import bert_sizes
from openblip2.plan.memory import Load, Memory, encoder_bytes, language_bytes, memory, ways_out, weight_bytes
from openblip2.plan.traffic import Flow, contrast, frozen_layers, gradients, negatives

ADAM_BYTES = 28  # of a trained weight in the optimizer's step: weight and moments read and written, gradient read
DAY = 86400.0


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one pair (2 for a multiply-add) of one part: forward, and backward where it is."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Plan:
    """All figures of a plan; bytes, seconds, floating-point operations.

    Attributes:
        work: of one pair, by part. seconds: of a step. bound: "compute" or "memory bandwidth".
        cache: bytes of a feature cache of all images, by precision. cache_seconds: the encoder over all of them.
        flows: what one accelerator sends in a step. reads: bytes of cached features that a step reads, all together.
    """

    settings: RunSettings
    cluster: Cluster
    efficiency: float
    measured: bool
    images: int
    cached: bool
    text: int
    encoder: Encoder
    language: Language | None
    former: Former
    trained: int
    pairs: int
    work: dict[str, Work]
    memory: Memory
    ways_out: list[tuple[str, Memory]]
    flows: list[Flow]
    seconds: float
    bound: str
    cache: dict[str, int]
    cache_seconds: float
    reads: int

    @property
    def step_pairs(self) -> int:
        return self.settings.train.batch * self.settings.train.accumulate

    @property
    def step_flops(self) -> float:
        return self.step_pairs * sum(part.both for part in self.work.values())

    @property
    def days(self) -> float:
        return self.settings.train.steps * self.seconds / DAY

    @property
    def network_seconds(self) -> float:
        """Of the chosen flows on the slowest link of the ring, one after the other."""
        return sum(flow.bytes for flow in self.flows if flow.chosen) / self.cluster.slowest_link


def make_plan(
    settings: RunSettings,
    cluster: Cluster,
    efficiency: float | None = None,
    images: int = 129_000_000,
    cached: bool | None = None,
    text: int | None = None,
    measured: bool = False,
) -> Plan:
    """The plan of a stage of pre-training.

    Args:
        settings: `train.batch` pairs over all accelerators.
        efficiency: share of the peak; None = the kind's own. measured: whether it was, for the words alone.
        images: in the data. cached: features come from a cache; None = as the settings have it.
        text: tokens that captions are padded to; None = as many as `data.max_tokens` allows.

    Raises:
        UserError: what cannot be planned, named.
    """
    _require_plannable(settings, cluster, images)
    text = settings.data.max_tokens if text is None else text
    if cached is None:
        cached = bool(settings.data.features) or not settings.data.augment
    efficiency = cluster.kind.efficiency[settings.stage] if efficiency is None else efficiency
    if not 0 < efficiency <= 1:
        raise UserError(f"--efficiency {efficiency:g}: it is a share of the peak, above 0 and at most 1")
    encoder = count_encoder(settings)
    former = Former(
        **bert_sizes(settings.qformer.start),
        queries=settings.qformer.queries,
        cross_every=settings.qformer.cross_every,
        patches=encoder.tokens,
        image_width=encoder.width,
        shared=settings.stage1.shared_width,
    )
    if text > former.positions or text < 4:
        raise UserError(f"--text-tokens {text}: from 4 to the {former.positions} that the Q-Former has places for")
    language = count_language(settings, text, cluster.kind.fused) if settings.stage == "stage2" else None
    n, train = cluster.count, settings.train
    pairs = math.ceil(train.batch / n)
    trained = trained_parameters(settings, former, language)
    load = Load(
        pairs=pairs,
        together=train.batch,
        text=text,
        half=cluster.kind.bf16 or cluster.kind.fused if train.precision == "auto" else train.precision == "bf16",
        trained=trained,
        linear=former.linear_weights(language is None),
    )
    work = work_of(settings, former, encoder, language, text, pairs, cached)
    found = memory(settings, load, former, encoder, language, cluster)
    chunks = train.accumulate * (math.ceil(pairs / train.chunk) if train.chunk else 1)
    flops = train.batch * train.accumulate * sum(part.both for part in work.values())
    compute = flops / (n * cluster.kind.flops * efficiency)
    whole = change(settings, {"train.parallel": "ddp"})
    streamed = 0 if cached else chunks * encoder_bytes(whole, encoder, load.half, cluster)
    if language is not None:
        streamed += 2 * chunks * language_bytes(whole, language, load.half, cluster)
    floor = (streamed + ADAM_BYTES * trained) / cluster.kind.bandwidth
    layouts = {kind: Layout(kind, encoder.tokens, encoder.width, 1) for kind in ("fp16", "int8")}
    return Plan(
        settings=settings,
        cluster=cluster,
        efficiency=efficiency,
        measured=measured,
        images=images,
        cached=cached,
        text=text,
        encoder=encoder,
        language=language,
        former=former,
        trained=trained,
        pairs=pairs,
        work=work,
        memory=found,
        ways_out=[] if found.fits else ways_out(settings, load, former, encoder, language, cluster),
        flows=flows_of(settings, former, encoder, language, load, cluster, chunks, cached),
        seconds=max(compute, floor),
        bound="compute" if compute >= floor else "memory bandwidth",
        cache={kind: bytes_of(layout, images) for kind, layout in layouts.items()},
        cache_seconds=images * 2 * encoder.multiply_adds / (n * cluster.kind.flops * efficiency),
        reads=train.batch * train.accumulate * layouts["fp16"].row_bytes if cached else 0,
    )


def work_of(
    settings: RunSettings,
    former: Former,
    encoder: Encoder,
    language: Language | None,
    text: int,
    pairs: int,
    cached: bool = False,
) -> dict[str, Work]:
    """Floating-point operations of one pair by part, as our code computes them.

    With `train.chunk` the passes for ITC run once more without a graph; with `train.checkpoint_activations` what is
    trained through runs forward twice. A wrong image that is not among the `pairs` that go through at once is looked
    at again.
    """
    train, found = settings.train, {}
    at_once = min(pairs, train.chunk or pairs)
    if not cached:
        found["image encoder"] = Work(2.0 * encoder.multiply_adds, 0.0)
    again = 1 if train.checkpoint_activations else 0
    if language is None:
        of = {"ITM, 3 pairs": "itm", "ITG": "itg"}  # ITC is always computed: negatives come from it
        objectives = settings.stage1.objectives
        far = 1 - at_once / train.batch if "itm" in objectives else 0.0
        parts = former.stage1(text, train.batch, far, settings.stage1.detach_gathered)
        parts = {name: count for name, count in parts.items() if name not in of or of[name] in objectives}
        before = former.stage1(text, train.batch) if at_once < pairs else {}
    else:
        parts, before = former.stage2(language.width), {}
    for name, count in parts.items():
        layered = name.endswith(("pass", "pairs")) or name == "ITG"
        first = before.get(name, 0) if name in ("image keys and values", "query pass", "text pass") else 0
        found[name] = Work(2.0 * (count * (1 + (again if layered else 0)) + first), 4.0 * count)
    if language is not None:
        found["language model"] = Work(2.0 * language.forward * (1 + again), 2.0 * language.backward)
    return found


def trained_parameters(settings: RunSettings, former: Former, language: Language | None) -> int:
    """Parameters that train in a stage."""
    if language is None:
        return former.parameters(True) + former.heads_parameters(settings.stage1.contrast == "sigmoid")
    return former.parameters(False) + former.width * language.width + language.width


def flows_of(
    settings: RunSettings,
    former: Former,
    encoder: Encoder,
    language: Language | None,
    load: Load,
    cluster: Cluster,
    chunks: int,
    cached: bool,
) -> list[Flow]:
    """What one accelerator sends in a step; nothing of one alone."""
    n, batches = cluster.count, settings.train.accumulate
    if n == 1:
        return []
    found = [gradients(load.trained, n)]
    if language is None:
        found += contrast(former, load.pairs, n, batches)
        if "itm" in settings.stage1.objectives:
            found += negatives(former, load.pairs, n, load.text, batches)
    if settings.train.parallel == "fsdp2":
        if not cached:
            layers = encoder.in_layers * weight_bytes(settings.vision.weights, load.half)
            found.append(frozen_layers("image encoder", layers, n, chunks))
        if language is not None:
            layers = language.in_layers * weight_bytes(settings.language.weights, load.half)
            found.append(frozen_layers("language model", layers, n, 2 * chunks))
    return found


def _require_plannable(settings: RunSettings, cluster: Cluster, images: int) -> None:
    if settings.vision.trained or settings.qformer.reads_question:
        raise UserError("vision.trained and qformer.reads_question are of fine-tuning: a plan is for pre-training")
    if not settings.stage1.objectives:
        raise UserError("stage1.objectives=[]: there is nothing to train; name one more of itc, itm, itg")
    if settings.train.parallel == "fsdp2" and settings.language.weights in ("int8", "int4"):
        raise UserError(
            f"train.parallel=fsdp2 takes no weights of language.weights={settings.language.weights}: leave it at auto, "
            "or train.parallel at ddp"
        )
    if settings.qformer.lora or settings.language.lora:
        raise UserError("qformer.lora and language.lora: a plan counts no adapters; leave them at 0")
    if settings.train.batch < cluster.count:
        raise UserError(
            f"train.batch={settings.train.batch} leaves some of {cluster.count} accelerators without a pair"
        )
    if images < 1:
        raise UserError(f"--images {images}: give at least 1, for example 129M")
