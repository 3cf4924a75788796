"""The content of a checkpoint in any format: settings, sizes, and the trained parts under openblip2's names.

Readers (`run`, `lavis`, `huggingface`) return a `Checkpoint`, writers take one, and `assemble` builds its model.

Shapes: Q queries, D Q-Former width, V encoder width, E shared space, W vocabulary, L language model width.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from openblip2.config import QFormerSettings, RunSettings, Stage1Settings
from openblip2.errors import UserError
from openblip2.model.build import build_qformer
from openblip2.model.language import LanguageModel
from openblip2.model.stage1 import Stage1
from openblip2.model.vision import HFVision, Vision, Whitening
from openblip2.weights.names import OURS, rename

BERT_HEADS = 12  # of BERT-base; the tensors do not show how many there are


@dataclass(frozen=True)
class Parts:
    """Parts that a user passes to replace those that the source names.

    Attributes:
        heads: attention heads of the Q-Former, if the source does not define them; None = BERT's 12.
        vision: the image encoder, as a name or as an object.
        language: the language model, as a name or as an object.
        tokenizer: the Q-Former's tokenizer, as a name, a folder, or an object.
        vision_heads: attention heads of the image encoder in a LAVIS file; None = those of ViT-g.
    """

    heads: int | None = None
    vision: str | Vision | None = None
    language: str | LanguageModel | None = None
    tokenizer: Any = None
    vision_heads: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read from its source.

    Attributes:
        source: where the tensors are, for messages.
        sizes: arguments of `QFormer`.
        settings: the settings, in which `vision.name` and `language.name` say where the frozen parts are.
        trained: tensors by openblip2's names, as in the file (memory-mapped, in the file's dtype).
        tower: an image encoder built from the same file; None = `settings.vision.name`.
        whitening: the whitening of the image features, if the model was trained with one.
        parts: the parts that the user passed.
        tokenizer: folder or name of the Q-Former's tokenizer, if the Q-Former reads text.
        carries: frozen parts that the source contains ("vision", "language"); a copy must contain them, too.
        measured: results of the last validation of a run, by name.
        left_out: one line for each thing in the source that is not used.
    """

    source: str
    settings: RunSettings
    sizes: Mapping[str, int]
    trained: Mapping[str, Tensor]
    tower: HFVision | None = None
    whitening: Whitening | None = None
    parts: Parts = Parts()
    tokenizer: str | None = None
    carries: frozenset[str] = frozenset()
    measured: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def width_of(checkpoint: Checkpoint, name: str) -> int:
    """The size of a tensor's first axis: V for "qformer.image_norm.weight", L for "projection.weight".

    Raises:
        UserError: the tensor is missing.
    """
    if name not in checkpoint.trained:
        raise UserError(f"{checkpoint.source} does not fit this model: missing: {name}")
    return checkpoint.trained[name].shape[0]


def carried(checkpoint: Checkpoint) -> frozenset[str]:
    """The frozen parts ("vision", "language") that a copy must contain: the source's and those passed as objects."""
    found = set(checkpoint.carries)
    for part in ("vision", "language"):
        given = getattr(checkpoint.parts, part)
        # No file format can store a caller's own encoder.
        if isinstance(given, str) or (part == "vision" and given is not None and not isinstance(given, HFVision)):
            found.discard(part)
        elif given is not None:
            found.add(part)
    return frozenset(found)


def sizes_of(trained: Mapping[str, Tensor], heads: int | None, source: str) -> dict[str, int]:
    """The Q-Former's sizes, read from its tensors: all arguments of `QFormer` but `queries`, `image_width`, dropout.

    Raises:
        UserError: a tensor that shows a size is missing, or `heads` does not divide the width.
    """

    def shape(name: str) -> Sequence[int]:
        if name not in trained:
            raise UserError(f"{source}: it has no {name} (openblip2's name): this is not a Q-Former of BLIP-2")
        return trained[name].shape

    width, layers = shape("qformer.queries")[-1], 1 + max(_layers(trained, "attention.query"), default=-1)
    heads = BERT_HEADS if heads is None else heads
    if heads < 1 or width % heads:
        raise UserError(
            f"{source}: the Q-Former's width {width} is not a multiple of {heads} heads: give the right number of heads"
        )
    text = "qformer.word_embeddings.weight" in trained
    return {
        "width": width,
        "layers": layers,
        "heads": heads,
        "ffn": shape("qformer.layers.0.query_ffn.widen.weight")[0],
        "vocabulary": shape("qformer.word_embeddings.weight")[0] if text else 0,
        "positions": shape("qformer.positions.weight")[0] if text else 512,
    }


def settings_from_tensors(trained: Mapping[str, Tensor], start: RunSettings, source: str) -> RunSettings:
    """The settings, updated with the values that the tensors show.

    Raises:
        UserError: cross-attention is not in layers 0, n, 2n, ...
    """
    crossing = sorted(_layers(trained, "cross.query"))
    every = crossing[1] - crossing[0] if len(crossing) > 1 else max(len(_layers(trained, "attention.query")), 1)
    layers = len(_layers(trained, "attention.query"))
    if crossing != list(range(0, layers, every)):
        raise UserError(f"{source}: cross-attention is in layers {crossing}; it must be in 0, n, 2n, ...")
    qformer: QFormerSettings = replace(start.qformer, queries=trained["qformer.queries"].shape[1], cross_every=every)
    stage1: Stage1Settings = start.stage1
    if "vision_proj.weight" in trained:
        stage1 = replace(stage1, shared_width=trained["vision_proj.weight"].shape[0])
    return replace(start, qformer=qformer, stage1=stage1)


def require_whole(
    trained: Mapping[str, Tensor], settings: RunSettings, sizes: Mapping[str, int], source: str, column: int
) -> None:
    """Checks that no tensor is missing, unexpected or of the wrong shape for a model of these sizes.

    A stage-1 checkpoint may lack both the temperature and the head of ITG, which transformers cannot store.

    Args:
        column: the column of `names.TRAINED` with the source's names, for the message.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape.
    """
    wanted = _shapes(trained, settings, sizes)
    missing, extra = sorted(wanted.keys() - trained.keys()), sorted(trained.keys() - wanted.keys())
    for what, names in (("missing", missing), ("unexpected", extra)):
        if names:
            theirs, without = rename(names, OURS, column)
            raise UserError(f"{source}: {len(names)} keys are {what}: {listed(sorted([*theirs, *without]))}")
    for name, shape in wanted.items():
        if trained[name].shape != shape:
            theirs = next(iter(rename([name], OURS, column)[0]), name)
            raise UserError(f"{source}: {theirs} has shape {list(trained[name].shape)}, it must be {list(shape)}")


def _shapes(trained: Mapping[str, Tensor], settings: RunSettings, sizes: Mapping[str, int]) -> dict[str, torch.Size]:
    """Name and shape of every trained parameter of a model of these sizes."""
    image_width = trained["qformer.image_norm.weight"].shape[0] if "qformer.image_norm.weight" in trained else 1
    with torch.device("meta"):
        qformer = build_qformer(settings, image_width, sizes)
        if settings.stage == "stage1":
            writes = "temperature" in trained or any(name.startswith("lm_head.") for name in trained)
            stage1 = settings.stage1
            model: nn.Module = Stage1(qformer, None, stage1.shared_width, writes=writes)
            if not writes:
                del model.temperature
        else:
            llm_width = trained["projection.weight"].shape[0] if "projection.weight" in trained else 1
            model = nn.ModuleDict({"qformer": qformer, "projection": nn.Linear(qformer.width, llm_width)})
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def listed(names: Sequence[str], most: int = 6) -> str:
    """Joins the first few names into one line, and says how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _layers(trained: Mapping[str, Tensor], part: str) -> set[int]:
    pattern = re.compile(rf"qformer\.layers\.(\d+)\.{re.escape(part)}\.weight")
    return {int(found[1]) for name in trained if (found := pattern.fullmatch(name))}
