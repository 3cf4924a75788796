"""The models of one size, ours and transformers' BLIP-2, with the same random weights, and their inputs.

The running time does not depend on the weights. All encoders have the architecture of EVA-CLIP, the only one that
transformers' BLIP-2 supports.

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
from openblip2.weights.checkpoint import HF, OURS, rename

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
PAD, BOS, EOS, UNK, IMAGE = range(5)


@dataclass(frozen=True)
class Size:
    """One size: the models, each as (width, layers, heads, width of its MLPs), and batch sizes."""

    encoder: tuple[int, int, int, int]
    qformer: tuple[int, int, int, int]
    language: tuple[int, int, int, int]  # an OPT model
    patch: int = 14  # px
    side: int = 224  # px
    rerank_side: int = 364  # px: retrieval is fine-tuned at this size
    words: int = 50272  # vocabulary of the language model
    qformer_words: int = 30523
    queries: int = 32
    pairs: int = 16  # in a stage-1 step
    captions: int = 8  # in a stage-2 step
    pictures: int = 32  # captioned at once
    questions: int = 16  # about one picture
    candidates: int = 128  # re-ranked for one picture
    text: int = 12  # tokens of the longest caption; texts have at least 6 tokens
    new_tokens: int = 12


BERT_BASE = (768, 12, 12, 3072)
OPT_1B = (2048, 24, 32, 8192)
SIZES = {
    "tiny": Size(
        (32, 2, 4, 64),
        (24, 2, 3, 48),
        (32, 2, 4, 128),
        patch=8,
        side=32,
        rerank_side=64,
        words=600,
        qformer_words=500,
        queries=4,
        pairs=4,
        captions=3,
        pictures=4,
        questions=4,
        candidates=8,
        new_tokens=6,
    ),
    # The sizes of the demo's models: DINOv2-S, MiniLM-L6 and an LLM with 125M parameters.
    "laptop": Size((384, 11, 6, 1536), (384, 6, 12, 1536), (768, 12, 12, 3072), queries=16, pairs=32, captions=16),
    "vit-l": Size((1024, 23, 16, 4096), BERT_BASE, OPT_1B),
    "vit-g": Size((1408, 39, 16, 6144), BERT_BASE, OPT_1B),
}


def build_models(size: Size, device: torch.device, dtype: torch.dtype) -> tuple[Stage1, Stage2, Any]:
    """Our stage 1, our stage 2 and transformers' model: frozen parts in `dtype`, trained ones in fp32.

    All share the encoder. Stage 2 and transformers' model share the language model and have equal trained parts.
    """
    theirs = _transformers(size, device, dtype)
    vision = HFVision(theirs.vision_model, layer=-1, image_size=size.side)
    # A copy of the modules that shares the weights, so that changes to our modules do not affect theirs.
    shared = {id(p): p for p in theirs.language_model.parameters()}
    language = DecoderLM(copy.deepcopy(theirs.language_model, shared), tokenizer(size.words))
    with device:
        stage2 = Stage2(_qformer(size, vision.width, vocabulary=0), language, vision)
        stage1 = Stage1(_qformer(size, vision.width, size.qformer_words), vision)
    named = {name: p for name, p in stage2.named_parameters() if name.startswith(("qformer.", "projection."))}
    names, without = rename(named, OURS, HF)
    assert not without
    weights = theirs.state_dict()
    with torch.no_grad():
        for their_name, ours in names.items():
            named[ours].copy_(weights[their_name])
    stage2.qformer.image_norm.eps = theirs.config.vision_config.layer_norm_eps
    for model in (stage1, stage2, theirs):  # without dropout, whose masks would differ between the models
        model.eval()
    return stage1, stage2, theirs


def tokenizer(vocabulary: int) -> Any:
    """A tokenizer of the whole words "w5", "w6", ..., with `vocabulary` tokens in total."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(f"w{n}" for n in range(len(SPECIAL), vocabulary))]
    whole = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    names: dict[str, Any] = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=whole, **names)


def pictures(count: int, side: int, device: torch.device) -> Tensor:
    """Random images: uint8 `[count, 3, S, S]`."""
    random = torch.Generator().manual_seed(count)
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=random).to(device)


def jpeg(seed: int, side: int) -> bytes:
    """A JPEG of smooth shapes with a little noise, which has about as many bytes as a photograph."""
    random = np.random.default_rng(seed)
    shapes = Image.fromarray(random.integers(0, 256, (24, 24, 3), np.uint8))
    smooth = np.asarray(shapes.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
    file = io.BytesIO()
    noisy = smooth + random.integers(-9, 10, (side, side, 3))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def texts(count: int, longest: int, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random texts for the Q-Former, of 6 to `longest` tokens: `tokens [count, T]`, `valid [count, T]`."""
    random = torch.Generator().manual_seed(count)
    tokens = torch.randint(10, vocabulary - 1, (count, longest), generator=random)
    lengths = longest - torch.arange(count) % (longest - 5)
    valid = torch.arange(longest) < lengths[:, None]
    tokens[:, 0] = 1
    tokens[torch.arange(count), lengths - 1] = 2
    return tokens.where(valid, 0).to(device), valid.to(device)


def random_texts(count: int, longest: int, vocabulary: int) -> list[str]:
    """Random texts for the language model, of 6 to `longest` words."""
    random = torch.Generator().manual_seed(count + 1)
    ids = torch.randint(len(SPECIAL), vocabulary, (count, longest), generator=random).tolist()
    return [" ".join(f"w{n}" for n in row[: longest - i % (longest - 5)]) for i, row in enumerate(ids)]


def normalised(vision: HFVision, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalised images, as transformers expects them: `[B, 3, S, S]` floats."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (vision.mean, vision.std))
    return ((images.float() / 255 - mean) / std).to(dtype)


def _qformer(size: Size, image_width: int, vocabulary: int) -> QFormer:
    sizes: dict[str, Any] = {"vocabulary": vocabulary, "positions": 512, "dropout": 0.0}
    return QFormer(*size.qformer, queries=size.queries, image_width=image_width, **sizes)


def _transformers(size: Size, device: torch.device, dtype: torch.dtype) -> Any:
    import transformers as hf

    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    encoder, qformer, language = (dict(zip(names, s, strict=True)) for s in (size.encoder, size.qformer, size.language))
    ids: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "vocab_size": size.words}
    ids |= {"ffn_dim": language.pop("intermediate_size"), "word_embed_proj_dim": language["hidden_size"]}
    no_dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = hf.Blip2Config(
        vision_config=hf.Blip2VisionConfig(**encoder, patch_size=size.patch, image_size=size.side),
        qformer_config=hf.Blip2QFormerConfig(**qformer, **no_dropout),
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
    """Sets random weights. The same noise is repeated to save time. The scales of norms are near 1."""
    noise = 0.02 * torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        values = noise.repeat(-(-count // len(noise)))[:count].view(parameter.shape)
        parameter.copy_(values + (1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0))
