"""Models of a size with random weights: ours and transformers' BLIP-2 with the same weights; and their inputs.

Time does not depend on the weights. All encoders have the architecture of EVA-CLIP, the only one that transformers'
BLIP-2 supports.

Shapes: B images, S side in px, P patch tokens, V encoder width, T text tokens.
"""

import copy
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from openblip2.model.language import DecoderLM
from openblip2.model.qformer import QFormer
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2
from openblip2.model.vision import HFVision
from openblip2.weights.names import column, rename

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
PAD, BOS, EOS, UNK, IMAGE = range(5)


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


def _qformer_sizes(width: int, layers: int, heads: int, ffn: int, vocabulary: int = 30523) -> dict[str, int]:
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


BERT_BASE = _qformer_sizes(768, 12, 12, 3072)

SIZES = {
    "tiny": Size(
        encoder=_encoder(32, 2, 4, 64, patch=8, side=32),
        qformer=_qformer_sizes(24, 2, 3, 48, vocabulary=500),
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
        qformer=_qformer_sizes(384, 6, 12, 1536),
        language=_opt(768, 12, 12),
        queries=16,
        pairs=32,
        captions=16,
    ),
    "vit-l": Size(encoder=_encoder(1024, 23, 16, 4096), qformer=BERT_BASE, language=_opt(2048, 24, 32)),
    "vit-g": Size(encoder=_encoder(1408, 39, 16, 6144), qformer=BERT_BASE, language=_opt(2048, 24, 32)),
}


@dataclass(frozen=True)
class Pair:
    """Our stage 2 and transformers' model, which share encoder and language model and have equal trained parts; and a
    stage 1.
    """

    stage1: Stage1
    stage2: Stage2
    theirs: Any  # Blip2ForConditionalGeneration


def build_pair(size: Size, device: torch.device, dtype: torch.dtype) -> Pair:
    """Frozen parts in `dtype`, trained ones in fp32."""
    theirs = _transformers(size, device, dtype)
    vision = HFVision(theirs.vision_model, layer=-1, image_size=size.side)
    # A copy of the modules that shares the weights, so that changes to our modules do not affect theirs.
    shared = {id(p): p for p in theirs.language_model.parameters()}
    language = DecoderLM(copy.deepcopy(theirs.language_model, shared), tokenizer(size.language["vocab_size"]))
    with device:
        stage2 = Stage2(_qformer(size, vision.width, vocabulary=0), language, vision)
        stage1 = Stage1(_qformer(size, vision.width, size.qformer["vocabulary"]), vision)
    named = {name: p for name, p in stage2.named_parameters() if name.startswith(("qformer.", "projection."))}
    names, without = rename(named, column("openblip2"), column("hf"))
    assert not without
    weights = theirs.state_dict()
    with torch.no_grad():
        for their_name, ours in names.items():
            named[ours].copy_(weights[their_name])
    stage2.qformer.image_norm.eps = theirs.config.vision_config.layer_norm_eps
    for model in (stage1, stage2, theirs):  # without dropout, whose masks would differ between the models
        model.eval()
    return Pair(stage1, stage2, theirs)


def tokenizer(vocabulary: int) -> Any:
    """Whole words "w5", "w6", ...: as many as a language model knows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(f"w{n}" for n in range(len(SPECIAL), vocabulary))]
    whole = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    names: dict[str, Any] = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=whole, **names)


def pictures(count: int, side: int, device: torch.device) -> Tensor:
    """uint8 `[count, 3, S, S]`."""
    random = torch.Generator().manual_seed(count)
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=random).to(device)


def jpeg(seed: int, side: int) -> bytes:
    """Smooth shapes with a little noise: about as many bytes as a photograph."""
    random = np.random.default_rng(seed)
    shapes = Image.fromarray(random.integers(0, 256, (24, 24, 3), np.uint8))
    smooth = np.asarray(shapes.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
    file = io.BytesIO()
    noisy = smooth + random.integers(-9, 10, (side, side, 3))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def texts(count: int, longest: int, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Q-Former texts of 6 to `longest` tokens: `tokens [count, T]`, `valid [count, T]`."""
    random = torch.Generator().manual_seed(count)
    tokens = torch.randint(10, vocabulary - 1, (count, longest), generator=random)
    lengths = longest - torch.arange(count) % (longest - 5)
    valid = torch.arange(longest) < lengths[:, None]
    tokens[:, 0] = 1
    tokens[torch.arange(count), lengths - 1] = 2
    return tokens.where(valid, 0).to(device), valid.to(device)


def sentences(count: int, longest: int, vocabulary: int) -> list[str]:
    """Words for the language model, 6 to `longest` of them."""
    random = torch.Generator().manual_seed(count + 1)
    ids = torch.randint(len(SPECIAL), vocabulary, (count, longest), generator=random).tolist()
    return [" ".join(f"w{n}" for n in row[: longest - i % (longest - 5)]) for i, row in enumerate(ids)]


def normalised(vision: HFVision, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images as transformers expects them, `[B, 3, S, S]` floats."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (vision.mean, vision.std))
    return ((images.float() / 255 - mean) / std).to(dtype)


def _qformer(size: Size, image_width: int, vocabulary: int) -> QFormer:
    sizes = {**size.qformer, "vocabulary": vocabulary}
    return QFormer(**sizes, queries=size.queries, image_width=image_width, dropout=0.0)


def _transformers(size: Size, device: torch.device, dtype: torch.dtype) -> Any:
    import transformers as hf

    ids: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    encoder: dict[str, Any] = size.encoder
    language: dict[str, Any] = size.language
    qformer = size.qformer
    config = hf.Blip2Config(
        vision_config=hf.Blip2VisionConfig(**encoder),
        qformer_config=hf.Blip2QFormerConfig(
            hidden_size=qformer["width"],
            num_hidden_layers=qformer["layers"],
            num_attention_heads=qformer["heads"],
            intermediate_size=qformer["ffn"],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        text_config=hf.OPTConfig(**language, **ids),
        num_query_tokens=size.queries,
        image_token_index=IMAGE,
    )
    with torch.device("meta"):
        model: Any = hf.Blip2ForConditionalGeneration(config)
    model.to_empty(device=device)
    model.tie_weights()
    _fill(model)
    model.vision_model.to(dtype)
    model.language_model.to(dtype)
    model.requires_grad_(False)
    for part in (model.qformer, model.language_projection, model.vision_model.post_layernorm):
        part.float().requires_grad_(True)
    model.query_tokens.requires_grad_(True)
    return model


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Random weights, fast: the same noise is repeated. The scales of norms are near 1."""
    noise = 0.02 * torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        values = noise.repeat(-(-count // len(noise)))[:count].view(parameter.shape)
        parameter.copy_(values + (1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0))
