"""The names of each weight in openblip2, in the authors' code (LAVIS) and in transformers, in one table.

A row names a module or a single parameter; the suffixes of a module's name (`.weight`, `.bias`) are the same in all
formats. `{n}` is the number of a layer. `None` means that the format has no such weight.
"""

import re
from collections.abc import Iterable

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
