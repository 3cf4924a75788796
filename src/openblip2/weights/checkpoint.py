"""The content of a checkpoint in any format: settings, sizes, and the trained parts under openblip2's names.

Readers (`run`, `lavis`, `huggingface`) return a `Checkpoint`, writers take one, and `assemble` builds its model. One
table, `TRAINED`, has the names of each weight in openblip2, in the authors' code (LAVIS) and in transformers.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from openblip2.config import RunSettings
from openblip2.errors import UserError
from openblip2.model.build import build_qformer
from openblip2.model.language import LanguageModel
from openblip2.model.stage1 import Stage1
from openblip2.model.vision import HFVision, Vision, Whitening

BERT_HEADS = 12  # of BERT-base; the tensors do not show how many there are

# A row names a module or a single parameter; the suffixes of a module's name (`.weight`, `.bias`) are the same in all
# formats. `{n}` is the number of a layer. `None` means that the format has no such weight.
OURS, LAVIS, HF, INSTRUCTBLIP = range(4)  # the columns of `TRAINED`; `TOWER` has only OURS and LAVIS

_LAYER = ("qformer.layers.{n}.", "Qformer.bert.encoder.layer.{n}.", "qformer.encoder.layer.{n}.")
_IN_LAYER = [
    ("attention.query", "attention.self.query", "attention.attention.query"),
    ("attention.key", "attention.self.key", "attention.attention.key"),
    ("attention.value", "attention.self.value", "attention.attention.value"),
    ("attention.out", "attention.output.dense", "attention.output.dense"),
    ("attention.norm", "attention.output.LayerNorm", "attention.output.LayerNorm"),
    ("cross.query", "crossattention.self.query", "crossattention.attention.query"),
    ("cross.key", "crossattention.self.key", "crossattention.attention.key"),
    ("cross.value", "crossattention.self.value", "crossattention.attention.value"),
    ("cross.out", "crossattention.output.dense", "crossattention.output.dense"),
    ("cross.norm", "crossattention.output.LayerNorm", "crossattention.output.LayerNorm"),
    ("query_ffn.widen", "intermediate_query.dense", "intermediate_query.dense"),
    ("query_ffn.narrow", "output_query.dense", "output_query.dense"),
    ("query_ffn.norm", "output_query.LayerNorm", "output_query.LayerNorm"),
    ("text_ffn.widen", "intermediate.dense", "intermediate.dense"),
    ("text_ffn.narrow", "output.dense", "output.dense"),
    ("text_ffn.norm", "output.LayerNorm", "output.LayerNorm"),
]

# InstructBLIP in transformers has the same names as its BLIP-2, except for these.
_INSTRUCTBLIP = {
    "qformer.word_embeddings": "qformer.embeddings.word_embeddings",
    "qformer.positions": "qformer.embeddings.position_embeddings",
    "qformer.norm": "qformer.embeddings.layernorm",
}

# The trained parts of both stages; the column of InstructBLIP is added below.
_TRAINED: list[tuple[str | None, ...]] = [
    ("qformer.queries", "query_tokens", "query_tokens"),
    ("qformer.image_norm", "ln_vision", "vision_model.post_layernorm"),
    ("qformer.word_embeddings", "Qformer.bert.embeddings.word_embeddings", "embeddings.word_embeddings"),
    ("qformer.positions", "Qformer.bert.embeddings.position_embeddings", "embeddings.position_embeddings"),
    ("qformer.norm", "Qformer.bert.embeddings.LayerNorm", "qformer.layernorm"),
    *(tuple(layer + part for layer, part in zip(_LAYER, row, strict=True)) for row in _IN_LAYER),
    ("vision_proj", "vision_proj", "vision_projection"),
    ("text_proj", "text_proj", "text_projection"),
    ("itm_head", "itm_head", "itm_head"),
    ("temperature", "temp", None),
    ("lm_head.dense", "Qformer.cls.predictions.transform.dense", None),
    ("lm_head.norm", "Qformer.cls.predictions.transform.LayerNorm", None),
    ("lm_head.bias", "Qformer.cls.predictions.bias", None),
    # LAVIS names the projection after the language model; for writing, the first matching row is used.
    ("projection", "opt_proj", "language_projection"),
    ("projection", "t5_proj", "language_projection"),
]
TRAINED = [(*row, _INSTRUCTBLIP.get(str(row[0]), row[2])) for row in _TRAINED]

# The image encoder EVA-CLIP ViT-g: `visual_encoder.` in LAVIS, `Blip2VisionModel` in transformers. It is a frozen part
# here and has transformers' names. The bias of qkv is left out, because LAVIS stores it in two parts (lavis.py).
TOWER: list[tuple[str | None, ...]] = [
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("encoder.layers.{n}.layer_norm1", "blocks.{n}.norm1"),
    ("encoder.layers.{n}.layer_norm2", "blocks.{n}.norm2"),
    ("encoder.layers.{n}.self_attn.qkv.weight", "blocks.{n}.attn.qkv.weight"),
    ("encoder.layers.{n}.self_attn.projection", "blocks.{n}.attn.proj"),
    ("encoder.layers.{n}.mlp.fc1", "blocks.{n}.mlp.fc1"),
    ("encoder.layers.{n}.mlp.fc2", "blocks.{n}.mlp.fc2"),
]


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


def carried(checkpoint: Checkpoint) -> frozenset[str]:
    """The frozen parts ("vision", "language") that a copy must contain: the source's and those passed as objects."""
    found = {"vision": checkpoint.parts.vision, "language": checkpoint.parts.language}
    # A name needs no copy, and no file format can store a caller's own encoder.
    return frozenset(
        part
        for part, given in found.items()
        if isinstance(given, HFVision | LanguageModel) or (given is None and part in checkpoint.carries)
    )


def describe(
    trained: Mapping[str, Tensor], settings: RunSettings, heads: int | None, source: str, column: int
) -> tuple[RunSettings, dict[str, int]]:
    """The settings, updated with the values that the tensors show, and the Q-Former's sizes.

    No tensor may be missing, unexpected or of the wrong shape for a model of these sizes. A stage-1 checkpoint may lack
    both the temperature and the head of ITG, which transformers cannot store.

    Args:
        heads: attention heads of the Q-Former; None = BERT's 12.
        column: the column of `TRAINED` with the source's names, for messages.

    Returns:
        The settings, and all arguments of `QFormer` but `queries`, `image_width` and dropout.

    Raises:
        UserError: cross-attention is not in layers 0, n, 2n, ...; `heads` does not divide the width; or a tensor is
            missing, unexpected or of another shape.
    """

    def shape(name: str) -> Sequence[int]:
        if name not in trained:
            raise UserError(f"{source}: it has no {name} (openblip2's name): this is not a Q-Former of BLIP-2")
        return trained[name].shape

    layers, crossing = _layers(trained, "attention.query"), sorted(_layers(trained, "cross.query"))
    every = crossing[1] - crossing[0] if len(crossing) > 1 else max(len(layers), 1)
    if crossing != list(range(0, len(layers), every)):
        raise UserError(f"{source}: cross-attention is in layers {crossing}; it must be in 0, n, 2n, ...")
    queries, width = shape("qformer.queries")[1], shape("qformer.queries")[-1]
    heads = BERT_HEADS if heads is None else heads
    if heads < 1 or width % heads:
        raise UserError(
            f"{source}: the Q-Former's width {width} is not a multiple of {heads} heads: give the right number of heads"
        )
    settings = replace(settings, qformer=replace(settings.qformer, queries=queries, cross_every=every))
    if "vision_proj.weight" in trained:
        settings = replace(settings, stage1=replace(settings.stage1, shared_width=len(trained["vision_proj.weight"])))
    text = "qformer.word_embeddings.weight" in trained
    sizes = {
        "width": width,
        "layers": 1 + max(layers, default=-1),
        "heads": heads,
        "ffn": shape("qformer.layers.0.query_ffn.widen.weight")[0],
        "vocabulary": shape("qformer.word_embeddings.weight")[0] if text else 0,
        "positions": shape("qformer.positions.weight")[0] if text else 512,
    }
    wanted = _shapes(trained, settings, sizes)
    for what, names in (("missing", wanted.keys() - trained.keys()), ("unexpected", trained.keys() - wanted.keys())):
        if names:
            theirs, without = rename(sorted(names), OURS, column)
            raise UserError(f"{source}: {len(names)} keys are {what}: {listed(sorted([*theirs, *without]))}")
    for name, expected in wanted.items():
        if trained[name].shape != expected:
            theirs = next(iter(rename([name], OURS, column)[0]), name)
            raise UserError(f"{source}: {theirs} has shape {list(trained[name].shape)}, it must be {list(expected)}")
    return settings, sizes


def rename(
    names: Iterable[str], source: int, target: int, table: list[tuple[str | None, ...]] = TRAINED
) -> tuple[dict[str, str], list[str]]:
    """Translates names from one column to another: (new name -> old name, names without a counterpart)."""
    rows = {row[source]: row[target] for row in reversed(table) if row[source] is not None}
    found: dict[str, str] = {}
    without: list[str] = []
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        general = name if number is None else name[: number.start(1)] + "{n}" + name[number.end(1) :]
        # A row is a full name, or a name without its last part.
        row = next((part for part in (general, general.rpartition(".")[0]) if part in rows), None)
        new = rows[row] if row is not None else None
        if row is None or new is None:
            without.append(name)
            continue
        new += general[len(row) :]
        found[new if number is None else new.replace("{n}", number[1])] = name
    return found, without


def _shapes(trained: Mapping[str, Tensor], settings: RunSettings, sizes: Mapping[str, int]) -> dict[str, torch.Size]:
    """Name and shape of every trained parameter of a model of these sizes."""
    image_width, llm_width = (
        len(trained[name]) if name in trained else 1 for name in ("qformer.image_norm.weight", "projection.weight")
    )
    with torch.device("meta"):
        qformer = build_qformer(settings, image_width, sizes)
        if settings.stage == "stage1":
            writes = "temperature" in trained or any(name.startswith("lm_head.") for name in trained)
            stage1 = settings.stage1
            model: nn.Module = Stage1(qformer, None, stage1.shared_width, writes=writes)
            if not writes:
                del model.temperature
        else:
            model = nn.ModuleDict({"qformer": qformer, "projection": nn.Linear(qformer.width, llm_width)})
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def listed(names: Sequence[str], most: int = 6) -> str:
    """Joins the first few names into one line, and says how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _layers(trained: Mapping[str, Tensor], part: str) -> set[int]:
    pattern = re.compile(rf"qformer\.layers\.(\d+)\.{re.escape(part)}\.weight")
    return {int(found[1]) for name in trained if (found := pattern.fullmatch(name))}
