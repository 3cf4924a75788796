"""What lies in one accelerator's memory at the fullest moment of a step, by item, and what to change where it is more.

The fullest moment is the end of the forward pass, with DDP's gradient buffers there from the step before. Each item is
a formula; only `CONTEXT` and `FRAGMENTS` are experience.
"""

from dataclasses import dataclass, replace
from typing import Any

from openblip2.config import RunSettings
from openblip2.model.fast.chunked_loss import CHUNK_BYTES, FEWEST_ROWS
from openblip2.plan.former import Former
from openblip2.plan.frozen import Encoder, Language
from openblip2.plan.gpus import GIB, Cluster
from openblip2.plan.kept import Arithmetic, kept_looking, kept_stage1, kept_stage2

CONTEXT = 0.8 * GIB  # of a GPU: its context, the libraries' buffers
FRAGMENTS = 0.05  # of all the rest: what a GPU's allocator cannot use
CPU_FRAGMENTS = 0.3  # and a CPU's, of what comes and goes in a step: its peak was 1.0 to 1.3 times what is planned
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "auto": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class Load:
    """What a step puts on one accelerator, apart from the settings that only change memory.

    Attributes:
        pairs: of this process. together: of all. text: T, padded. half: whether training computes in bf16.
        trained, linear: parameters that train, and of them those of linear layers.
    """

    pairs: int
    together: int
    text: int
    half: bool
    trained: int
    linear: int


@dataclass(frozen=True)
class Memory:
    """Bytes by item, on one accelerator that has `room`."""

    items: dict[str, float]
    room: float

    @property
    def total(self) -> float:
        return sum(self.items.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.room


def weight_bytes(named: str, half: bool, trained: bool = False) -> float:
    """Of one frozen weight by the setting `vision.weights` or `language.weights`."""
    return 4.0 if trained or (named == "auto" and not half) else BYTES[named]


def memory(
    settings: RunSettings, load: Load, f: Former, encoder: Encoder, language: Language | None, cluster: Cluster
) -> Memory:
    """The items of one accelerator; `language` None: stage 1."""
    half, kind = load.half, cluster.kind
    how = Arithmetic(
        2 if half else 4,
        kind.fused,
        settings.qformer.dropout > 0,
        round(weight_bytes(settings.vision.weights, half)),
        settings.train.checkpoint_activations,
    )
    features = how.features * encoder.numbers
    at_once = min(settings.train.chunk or load.pairs, load.pairs)
    chunked = at_once < load.pairs
    items = {"image encoder, frozen": encoder_bytes(settings, encoder, half, cluster)}
    if language is not None:
        items["language model, frozen"] = language_bytes(settings, language, half, cluster)
    items["trained weights"] = 4.0 * load.trained
    items["gradients"] = 4.0 * load.trained * (2 if chunked and cluster.count > 1 else 1)  # and the sums of chunks
    items["Adam's moments"] = 8.0 * load.trained
    if half:
        items["trained weights in bf16, by autocast"] = 2.0 * load.linear
    items["image features"] = float(load.pairs * features)
    if language is None:
        parts = kept_stage1(f, how, load.text, load.together)
        items["activations"] = float(at_once * sum(parts.values()))
        if "itm" in settings.stage1.objectives:
            items["chosen negatives"] = _chosen(f, how, load, at_once, features, cluster.count)
    else:
        parts = kept_stage2(f, how, language.width)
        kept = language.kept_checkpointed if how.checkpoint else language.kept
        items["activations"] = float(at_once * sum(parts.values()))
        items["activations of the language model"] = float(at_once * kept)
    activations = sum(size for name, size in items.items() if name.startswith("activations"))
    # Before there are activations, the encoder has the room to itself.
    encoding = at_once * encoder.working * how.features
    items["workspace"] = max(_loss_buffers(f, load, language, at_once, how), encoding - activations)
    if kind.fused:
        items["context and libraries"] = CONTEXT
        items["fragments"] = FRAGMENTS * sum(items.values())
    else:
        items["fragments"] = CPU_FRAGMENTS * (activations + items["workspace"])
    return Memory(items, kind.memory)


def encoder_bytes(settings: RunSettings, encoder: Encoder, half: bool, cluster: Cluster) -> float:
    """Of a frozen image encoder: whole, or with FSDP2 a share of its layers and two of them whole."""
    each = weight_bytes(settings.vision.weights, half)
    layers = each * encoder.in_layers
    return each * (encoder.parameters - encoder.in_layers) + _in_pieces(settings, layers, encoder, cluster)


def language_bytes(settings: RunSettings, language: Language, half: bool, cluster: Cluster) -> float:
    """The same of a frozen language model."""
    named = settings.language.weights
    plain = 2.0 if named in ("int8", "int4") else weight_bytes(named, half)
    of_linear = weight_bytes(named, half)
    layers = (language.in_layers - language.linear) * plain + language.linear * of_linear
    others = (language.parameters - language.in_layers) * plain
    return others + _in_pieces(settings, layers, language, cluster)


def _in_pieces(settings: RunSettings, layers: float, model: Encoder | Language, cluster: Cluster) -> float:
    if settings.train.parallel == "ddp" or cluster.count == 1:
        return layers
    # The layer that computes is whole, and so is the next one, which is fetched meanwhile.
    return layers / cluster.count + 2 * layers * model.largest_layer / model.in_layers


def _chosen(f: Former, how: Arithmetic, load: Load, at_once: int, features: int, processes: int) -> float:
    """Of ITM's wrong images: those fetched, what is kept of looking at them, and all keys and values side by side."""
    fetched = load.pairs * (processes - 1) / processes
    looked = at_once * (1 - at_once / load.together)
    behind = 2 * f.crossing * how.compute * f.patches * f.width
    joined = (at_once + looked) * behind if processes > 1 and at_once == load.pairs else 0.0
    copied = (load.pairs + fetched) * features if processes > 1 and at_once < load.pairs else 0.0
    return fetched * features + looked * kept_looking(f, how) + joined + copied


def ways_out(
    settings: RunSettings, load: Load, f: Former, encoder: Encoder, language: Language | None, cluster: Cluster
) -> list[tuple[str, Memory]]:
    """Changes of settings that make it fit, each with what is then needed; the least that helps stands first."""
    found: list[tuple[str, Memory]] = []
    train = settings.train

    def tried(**changes: Any) -> bool:
        changed = replace(settings, train=replace(train, **changes))
        result = memory(changed, load, f, encoder, language, cluster)
        if result.fits:
            words = (f"--set train.{name}={str(value).lower()}" for name, value in changes.items())
            found.append((" ".join(words), result))
        return result.fits

    def chunked(**changes: Any) -> None:
        size = (train.chunk or load.pairs) // 2
        while size and not tried(**changes, chunk=size):
            size //= 2

    if not train.checkpoint_activations:
        tried(checkpoint_activations=True)
    chunked()
    if train.parallel == "ddp" and cluster.count > 1:
        pieces = {"parallel": "fsdp2"}
        if not tried(**pieces) and not tried(**pieces, checkpoint_activations=True):
            chunked(**pieces)
    return found


def _loss_buffers(f: Former, load: Load, language: Language | None, at_once: int, how: Arithmetic) -> float:
    """Of the cross-entropy over words (`chunked_cross_entropy`), with three pieces of logits at a time."""
    words, width = (f.vocabulary, f.width) if language is None else (language.vocabulary, language.width)
    rows = at_once * (load.text - 1 if language is None else language.scored)
    piece = max(FEWEST_ROWS, CHUNK_BYTES // (4 * words))
    of_weight = 0 if language is not None else 4 * words * width + how.compute * words * width
    return 3.0 * 4 * words * min(rows, piece) + of_weight + 4 * rows * width
