"""The paper's models in full size, on the meta device, so that no weights are loaded or allocated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from torch import nn

import tiny_models
from openblip2.config import change
from openblip2.model.build import parts_table
from openblip2.model.language import DecoderLM, EncoderDecoderLM
from openblip2.model.qformer import QFormer
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2
from openblip2.model.vision import HFVision
from openblip2.presets import PRESETS, preset


def vit_g() -> hf.PreTrainedModel:
    """EVA-CLIP ViT-g/14 as published for BLIP-2: 39 of its 40 layers."""
    sizes: dict[str, Any] = {"hidden_size": 1408, "intermediate_size": 6144, "num_attention_heads": 16}
    config = hf.Blip2VisionConfig(**sizes, num_hidden_layers=39, image_size=224, patch_size=14, qkv_bias=True)
    return hf.Blip2VisionModel(config)


def vit_l() -> hf.PreTrainedModel:
    """CLIP's ViT-L/14: 24 layers."""
    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    return hf.CLIPVisionModel(hf.CLIPVisionConfig(**sizes, num_hidden_layers=24, image_size=224, patch_size=14))


def opt(width: int, ffn: int) -> hf.PreTrainedModel:
    sizes: dict[str, Any] = {"vocab_size": 50272, "max_position_embeddings": 2048, "word_embed_proj_dim": width}
    sizes |= {"hidden_size": width, "ffn_dim": ffn, "num_hidden_layers": 32, "num_attention_heads": 32}
    return hf.OPTForCausalLM(hf.OPTConfig(**sizes))


def flan_t5(width: int, ffn: int, heads: int) -> hf.PreTrainedModel:
    sizes: dict[str, Any] = {"vocab_size": 32128, "d_model": width, "d_ff": ffn, "d_kv": 64, "num_heads": heads}
    sizes |= {"num_layers": 24, "num_decoder_layers": 24, "feed_forward_proj": "gated-gelu"}
    llm = hf.T5ForConditionalGeneration(hf.T5Config(**sizes))
    # transformers ties the output embedding if only sizes are given, but FlanT5's files contain a separate one.
    llm.lm_head = nn.Linear(width, 32128, bias=False)
    return llm


FROZEN: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "Salesforce/blip2-itm-vit-g": vit_g,
    "openai/clip-vit-large-patch14": vit_l,
    "facebook/opt-2.7b": lambda: opt(2560, 10240),
    "facebook/opt-6.7b": lambda: opt(4096, 16384),
    "google/flan-t5-xl": lambda: flan_t5(2048, 5120, 32),
    "google/flan-t5-xxl": lambda: flan_t5(4096, 10240, 64),
}

# Parameters of a layer: 12 V^2 + 13 V; in ViT-g, whose FFN has width 6144, 4 V^2 + 2 x 6144 V + 6144 + 9 V.
# ViT-g: 39 x 25,250,176 + patches 588 V + V + positions 257 V + class token V + last norm 2 V, V = 1408.
VIT_G = 985_952_256
# ViT-L: the published 303,179,776 minus the last layer, 12,596,224.
VIT_L = 290_583_552
# OPT: layers 32 x (12 L^2 + 13 L), embeddings (50,272 words + 2,050 positions) x L, last norm 2 L, L = 2560 and 4096.
OPT_2_7B, OPT_6_7B = 2_651_596_800, 6_658_473_984
# As published: the sizes of T5 1.1, from which FlanT5 was fine-tuned.
FLANT5_XL, FLANT5_XXL = 2_849_757_184, 11_135_332_352


class Counts(NamedTuple):
    vision: int
    language: int
    trained: str  # table 2 of the paper, in millions; test_stage2 tests an exact count


STAGE2 = {
    "vit-l-opt-2.7b": Counts(VIT_L, OPT_2_7B, "104M"),
    "vit-g-opt-2.7b": Counts(VIT_G, OPT_2_7B, "107M"),
    "vit-g-opt-6.7b": Counts(VIT_G, OPT_6_7B, "108M"),
    "vit-l-flant5-xl": Counts(VIT_L, FLANT5_XL, "103M"),
    "vit-g-flant5-xl": Counts(VIT_G, FLANT5_XL, "107M"),
    "vit-g-flant5-xxl": Counts(VIT_G, FLANT5_XXL, "108M"),
}
# Parameters of the whole model according to the Hugging Face Hub, in billions.
PUBLISHED = {
    "vit-g-opt-2.7b": "3.74",
    "vit-g-opt-6.7b": "7.75",
    "vit-g-flant5-xl": "3.94",
    "vit-g-flant5-xxl": "12.2",
}
# test_stage1 tests the exact count with ViT-g. ViT-L is 384 narrower, so 6 layers have keys and values that are smaller
# by 384 x 768 each, and the norm has 2 x 384 fewer weights.
STAGE1 = {"vit-l": (VIT_L, "183.2M"), "vit-g": (VIT_G, "186.7M")}


def encoder(stage: str, name: str) -> HFVision:
    settings = preset(stage, name).vision
    return HFVision(FROZEN[settings.name](), settings.layer, settings.image_size)


def counted(model: nn.Module) -> dict[str, int]:
    assert all(parameter.is_meta for parameter in model.parameters())
    table = parts_table(model)
    found = {part: count for part, count, kind in table if kind == "frozen"}
    return {**found, "trained": sum(count for _, count, kind in table if kind == "trained")}


@pytest.mark.parametrize("name", STAGE1)
def test_stage_1_in_full_size(name: str) -> None:
    with torch.device("meta"):
        vision = encoder("stage1", name)
        model = Stage1(QFormer(image_width=vision.width), vision)
    assert vision.layers == {"vit-l": 23, "vit-g": 39}[name]
    frozen, trained = STAGE1[name]
    found = counted(model)
    assert found["vision"] == frozen
    assert f"{found['trained'] / 1e6:.1f}M" == trained


@pytest.mark.parametrize("name", STAGE2)
def test_stage_2_in_full_size(name: str) -> None:
    with torch.device("meta"):
        vision = encoder("stage2", name)
        llm = FROZEN[preset("stage2", name).language.name]()
        kind = EncoderDecoderLM if llm.config.is_encoder_decoder else DecoderLM
        language = kind(llm, tiny_models.tokenizer())
        model = Stage2(QFormer(image_width=vision.width, vocabulary=0), language, vision)
    found, wanted = counted(model), STAGE2[name]
    assert (found["vision"], found["language"]) == (wanted.vision, wanted.language)
    assert f"{found['trained'] / 1e6:.0f}M" == wanted.trained
    if name in PUBLISHED:  # there, the norm of the image features is the encoder's last norm, counted once
        assert f"{(sum(found.values()) - 2 * 1408) / 1e9:.3g}" == PUBLISHED[name]


def test_the_presets_are_the_papers_models() -> None:
    """The models of table 2; the batch size depends on the ViT in stage 1 and on the language model in stage 2."""
    assert {"laptop", *STAGE1} == PRESETS["stage1"].keys()
    assert {"laptop", *STAGE2} == PRESETS["stage2"].keys()
    vision = {"vit-l": "openai/clip-vit-large-patch14", "vit-g": "Salesforce/blip2-itm-vit-g"}
    language = {"opt-2.7b": "facebook/opt-2.7b", "opt-6.7b": "facebook/opt-6.7b"}
    language |= {"flant5-xl": "google/flan-t5-xl", "flant5-xxl": "google/flan-t5-xxl"}
    for name in STAGE1:
        settings = preset("stage1", name)
        assert settings.vision.name == vision[name]
        assert (settings.train.steps, settings.train.batch) == (250_000, {"vit-l": 2320, "vit-g": 1680}[name])
        assert (settings.optim.lr, settings.optim.min_lr) == (1e-4, 1e-5)
    for name in STAGE2:
        settings, family = preset("stage2", name), name[6:].split("-")[0]
        assert (settings.vision.name, settings.language.name) == (vision[name[:5]], language[name[6:]])
        assert (settings.train.steps, settings.train.batch) == (80_000, {"opt": 1920, "flant5": 1520}[family])
        assert (settings.optim.lr, settings.optim.min_lr) == (1e-4, 5e-5)
        assert settings.language.end == {"opt": "\n", "flant5": None}[family]
        assert (
            settings.language.question
            == {"opt": "Question: {} Answer:", "flant5": "Question: {} Short answer:"}[family]
        )
        assert settings.language.dtype == "bf16"
    for name in (*STAGE1, *STAGE2):
        settings = preset("stage1" if name in STAGE1 else "stage2", name)
        assert settings.vision.dtype == "fp16"
        assert (settings.qformer.queries, settings.optim.betas, settings.data.augment) == (32, (0.9, 0.98), True)


@pytest.mark.parametrize("name", PRESETS["stage2"])
def test_a_stage_2_preset_can_start_from_a_stage_1_preset(name: str) -> None:
    """It loads the Q-Former of stage 1, so their settings of the Q-Former and of the image encoder must agree."""
    second = preset("stage2", name)
    assert any((first.vision, first.qformer) == (second.vision, second.qformer) for first in PRESETS["stage1"].values())
    with_start = change(second, {"start": "runs/stage1", "train.batch": "7"})
    assert (with_start.start, with_start.train.batch, with_start.vision) == ("runs/stage1", 7, second.vision)
