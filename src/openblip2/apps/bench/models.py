"""Models of a size with random weights: ours and transformers' BLIP-2 with the same weights.

Shapes: B images, S side in px, P patch tokens, V encoder width, T text tokens.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openblip2.apps.bench.sizes import Size
from openblip2.model.language import DecoderLM
from openblip2.model.qformer import QFormer
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2
from openblip2.model.vision import HFVision
from openblip2.weights.names import column, rename

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
PAD, BOS, EOS, UNK, IMAGE = range(5)


@dataclass(frozen=True)
class Pair:
    """Our stage 2 and transformers' model, which share encoder and language model and have equal trained parts; and a
    stage 1.
    """

    stage1: Stage1
    stage2: Stage2
    theirs: Any  # Blip2ForConditionalGeneration


def build_pair(size: Size, place: torch.device, dtype: torch.dtype) -> Pair:
    """Frozen parts in `dtype`, trained ones in fp32."""
    theirs = _transformers(size, place, dtype)
    vision = HFVision(theirs.vision_model, layer=-1, image_size=size.side)
    # A copy of the modules that shares the weights, so that changes to our modules do not affect theirs.
    shared = {id(p): p for p in theirs.language_model.parameters()}
    language = DecoderLM(copy.deepcopy(theirs.language_model, shared), tokenizer(size.language["vocab_size"]))
    with place:
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


def pictures(count: int, side: int, place: torch.device) -> Tensor:
    """uint8 `[count, 3, S, S]`."""
    random = torch.Generator().manual_seed(count)
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=random).to(place)


def texts(count: int, longest: int, vocabulary: int, place: torch.device) -> tuple[Tensor, Tensor]:
    """Q-Former texts of 6 to `longest` tokens: `tokens [count, T]`, `valid [count, T]`."""
    random = torch.Generator().manual_seed(count)
    tokens = torch.randint(10, vocabulary - 1, (count, longest), generator=random)
    lengths = longest - torch.arange(count) % (longest - 5)
    valid = torch.arange(longest) < lengths[:, None]
    tokens[:, 0] = 1
    tokens[torch.arange(count), lengths - 1] = 2
    return tokens.where(valid, 0).to(place), valid.to(place)


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


def _transformers(size: Size, place: torch.device, dtype: torch.dtype) -> Any:
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
    model.to_empty(device=place)
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
