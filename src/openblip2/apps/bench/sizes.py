"""Model sizes for the benchmark. Weights are random, because time does not depend on them.

All encoders have the architecture of EVA-CLIP, the only one that transformers' BLIP-2 supports.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Size:
    """One size: arguments of transformers' configurations, and batch sizes."""

    encoder: dict[str, int]
    qformer: dict[str, int]
    language: dict[str, int]  # OPT's
    queries: int = 32
    side: int = 224  # px
    rerank_side: int = 364  # px: retrieval is fine-tuned at this size
    pairs: int = 16  # of a stage-1 step
    captions: int = 8  # of a stage-2 step
    pictures: int = 32  # captioned at once
    questions: int = 16  # about one picture
    candidates: int = 128  # re-ranked for one picture
    text: int = 12  # tokens of the longest caption; texts are 6 tokens and more
    new_tokens: int = 12


def _encoder(width: int, layers: int, heads: int, mlp: int, patch: int = 14, side: int = 224) -> dict[str, int]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size", "image_size")
    return dict(zip(names, (width, layers, heads, mlp, patch, side), strict=True))


def _qformer(width: int, layers: int, heads: int, ffn: int, vocabulary: int = 30523) -> dict[str, int]:
    return {"width": width, "layers": layers, "heads": heads, "ffn": ffn, "vocabulary": vocabulary, "positions": 512}


def _opt(width: int, layers: int, heads: int, vocabulary: int = 50272) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * width,
        "word_embed_proj_dim": width,
        "vocab_size": vocabulary,
    }


BERT_BASE = _qformer(768, 12, 12, 3072)

SIZES = {
    "tiny": Size(
        encoder=_encoder(32, 2, 4, 64, patch=8, side=32),
        qformer=_qformer(24, 2, 3, 48, vocabulary=500),
        language=_opt(32, 2, 4, vocabulary=600),
        queries=4,
        side=32,
        rerank_side=64,
        pairs=4,
        captions=3,
        pictures=4,
        questions=4,
        candidates=8,
        new_tokens=6,
    ),
    "laptop": Size(  # as large as the demo's: DINOv2-S, MiniLM-L6, an LLM of 125M
        encoder=_encoder(384, 11, 6, 1536),
        qformer=_qformer(384, 6, 12, 1536),
        language=_opt(768, 12, 12),
        queries=16,
        pairs=32,
        captions=16,
    ),
    "vit-l": Size(encoder=_encoder(1024, 23, 16, 4096), qformer=BERT_BASE, language=_opt(2048, 24, 32)),
    "vit-g": Size(encoder=_encoder(1408, 39, 16, 6144), qformer=BERT_BASE, language=_opt(2048, 24, 32)),
}
