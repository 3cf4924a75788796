"""Image encoders compared with transformers' hidden states, with a tiny random encoder of each supported family."""

import copy
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from openblip2.errors import UserError
from openblip2.model.load import load_vision
from openblip2.model.vision import CLIP_MEAN, CLIP_STD, HFVision

SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
SIZES |= {"image_size": 12, "patch_size": 4}  # 3 x 3 patches
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "clip": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**SIZES, intermediate_size=40)),
    "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIZES, intermediate_size=40)),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**SIZES, intermediate_size=40)),
    "blip2": lambda: hf.Blip2VisionModel(hf.Blip2VisionConfig(**SIZES, intermediate_size=40)),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**SIZES, mlp_ratio=2)),
    "dinov3": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**SIZES, mlp_bias=True, num_register_tokens=4)),
    "aimv2": lambda: hf.Aimv2VisionModel(hf.Aimv2VisionConfig(**SIZES, intermediate_size=40)),
}
# Where each family keeps its position embeddings, and how many of them (CLS) are not on the grid.
POSITIONS = {
    "clip": ("embeddings.position_embedding.weight", 1),
    "siglip": ("embeddings.position_embedding.weight", 0),
    "vit": ("embeddings.position_embeddings", 1),
    "blip2": ("embeddings.position_embedding", 1),
    "dinov2": ("embeddings.position_embeddings", 1),
}
# The paper's grid, 16 x 16 patches of 14 px, in 2 thin layers.
PAPER_GRID: dict[str, Any] = {**SIZES, "num_hidden_layers": 2, "image_size": 224, "patch_size": 14}
PAPER_SIZED: dict[str, Callable[[], PreTrainedModel]] = {
    "clip": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**PAPER_GRID, intermediate_size=40)),
    "blip2": lambda: hf.Blip2VisionModel(hf.Blip2VisionConfig(**PAPER_GRID, intermediate_size=40)),
}


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def redraw(model: PreTrainedModel, random: torch.Generator) -> PreTrainedModel:
    """Draws all parameters at random: new encoders have zero biases, unit scales and, in some families, no noise."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3)
    return model.eval()


def pictures(side: int, random: torch.Generator, count: int = 2) -> Tensor:
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=random)


def hidden_states(model: PreTrainedModel, pixels: Tensor) -> tuple[Tensor, ...]:
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        return model((pixels / 255.0 - mean) / std, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("family", FAMILIES)
def test_output_is_the_hidden_state_and_later_layers_are_gone(family: str, random: torch.Generator) -> None:
    full = redraw(FAMILIES[family](), random)
    pixels = pictures(12, random)
    states = hidden_states(full, pixels)
    assert len(states) == 5
    per_layer = parameters_of_a_layer(full)
    for layer, index in ((-1, 4), (-2, 3), (-4, 1), (1, 1), (4, 4)):
        vision = HFVision(copy.deepcopy(full), layer, 12, MEAN, STD)
        torch.testing.assert_close(vision(pixels), states[index], rtol=1e-5, atol=1e-5)
        assert vision.layers == index
        assert count(vision) == count(full) - (4 - index) * per_layer
    differences = [(a - b).abs().mean() for a, b in pairwise(states)]
    assert min(differences) > 1e-2, "the layers are too alike for this test to tell them apart"
    assert states[1].shape[-1] == HFVision(full, -2, 12).width == 24


def parameters_of_a_layer(model: PreTrainedModel) -> int:
    return count(next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 4)[0])


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("family", "norm"),
    [("siglip", "post_layernorm"), ("vit", "layernorm"), ("dinov2", "layernorm"), ("clip", "")],
)
def test_last_layer_is_raw(family: str, norm: str, random: torch.Generator) -> None:
    """Our last layer is before the final norm; applying it gives the last hidden state (CLIP's has no norm)."""
    full = redraw(FAMILIES[family](), random)
    pixels = pictures(12, random)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        expected = full((pixels / 255.0 - mean) / std).last_hidden_state
        ours = HFVision(full, -1, 12, MEAN, STD)(pixels)
        ours = full.get_submodule(norm)(ours) if norm else ours
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", POSITIONS)
def test_another_image_size_interpolates_positions(family: str, random: torch.Generator) -> None:
    """The oracle is an encoder for 20 px whose position table was resized from 3 x 3 to 5 x 5 in advance."""
    small = redraw(FAMILIES[family](), random)
    pixels = pictures(20, random)
    config = copy.deepcopy(small.config)
    config.image_size = 20  # pyright: ignore[reportAttributeAccessIssue]
    large = type(small)(config).eval()
    name, extra = POSITIONS[family]
    state = small.state_dict()
    table = state[name].reshape(-1, 24)
    grid = F.interpolate(table[extra:].T.reshape(1, 24, 3, 3), size=(5, 5), mode="bicubic", align_corners=False)
    resized = torch.cat([table[:extra], grid.reshape(24, 25).T])
    large.load_state_dict({**state, name: resized.reshape(large.state_dict()[name].shape)})
    expected = hidden_states(large, pixels)[3]
    assert expected.shape == (2, 25 + extra, 24)
    torch.testing.assert_close(HFVision(small, -2, 20, MEAN, STD)(pixels), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["blip2", "clip"])
@pytest.mark.parametrize(("side", "tokens"), [(224, 257), (364, 677), (490, 1226)])
def test_a_tower_of_224_px_serves_364_and_490_px(family: str, side: int, tokens: int, random: torch.Generator) -> None:
    """The paper uses 224 px for pre-training, 364 px for captioning and retrieval, and 490 px for VQA."""
    encoder = redraw(PAPER_SIZED[family](), random)
    name, _ = POSITIONS[family]
    table = encoder.state_dict()[name].reshape(257, 24)
    patches = table[1:].T.reshape(1, 24, 16, 16)
    naive = F.interpolate(patches, size=(side // 14, side // 14), mode="bicubic", align_corners=False)

    # With zero weights for the pixels, the input of the layers is the positions, with the class token added in front.
    for parameter in encoder.get_submodule("embeddings.patch_embedding").parameters():
        parameter.data.zero_()
    seen: list[Any] = []
    encoder.get_submodule("embeddings").register_forward_hook(lambda module, given, output: seen.append(output))
    vision = HFVision(encoder, -2, side, MEAN, STD)
    assert vision(pictures(side, random, 1)).shape == (1, tokens, 24)
    (positions,) = seen[0]
    torch.testing.assert_close(positions[1:], naive.reshape(24, -1).T, rtol=1e-6, atol=1e-6)
    class_token = encoder.get_parameter("embeddings.class_embedding").reshape(24)
    torch.testing.assert_close(positions[0], table[0] + class_token, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["blip2", "clip"])
def test_at_its_own_size_no_bit_is_interpolated(family: str, random: torch.Generator) -> None:
    encoder = redraw(PAPER_SIZED[family](), random)
    pixels = pictures(224, random)
    expected = hidden_states(encoder, pixels)[1]
    assert torch.equal(HFVision(encoder, -2, 224, MEAN, STD)(pixels), expected)


def test_dinov3_takes_another_size_and_keeps_registers(random: torch.Generator) -> None:
    full = redraw(FAMILIES["dinov3"](), random)
    pixels = pictures(20, random)
    expected = hidden_states(full, pixels)[3]
    vision = HFVision(full, -2, 20, MEAN, STD)
    assert vision(pixels).shape == (2, 1 + 4 + 25, 24)
    torch.testing.assert_close(vision(pixels), expected, rtol=1e-5, atol=1e-5)


def test_an_image_does_not_depend_on_its_batch(random: torch.Generator) -> None:
    vision = HFVision(redraw(FAMILIES["dinov2"](), random), -2, 12)
    pixels = pictures(12, random, count=3)
    torch.testing.assert_close(vision(pixels)[1:2], vision(pixels[1:2]), rtol=1e-5, atol=1e-5)


def test_frozen_without_gradient_and_always_in_eval_mode(random: torch.Generator) -> None:
    encoder = hf.ViTModel(hf.ViTConfig(**SIZES, intermediate_size=40, hidden_dropout_prob=0.5))
    vision = HFVision(redraw(encoder, random).train(), -2, 12)
    parent = nn.Sequential(vision, nn.Linear(24, 5)).train()
    assert parent.training
    assert not any(module.training for module in vision.modules())
    assert not any(parameter.requires_grad for parameter in vision.parameters())
    pixels = pictures(12, random)
    seen = vision(pixels)
    torch.testing.assert_close(seen, vision(pixels), rtol=0, atol=0)
    assert not seen.requires_grad
    parent(pixels).sum().backward()  # the output is no inference tensor, so autograd can save it for later layers
    assert parent[1].weight.grad is not None


def test_half_precision_rounds_the_weights_and_not_the_normalisation(random: torch.Generator) -> None:
    full = redraw(FAMILIES["clip"](), random)
    pixels = pictures(20, random)
    exact = HFVision(copy.deepcopy(full), -2, 20, MEAN, STD)(pixels)
    vision = nn.Sequential(HFVision(full, -2, 20, MEAN, STD)).to(torch.bfloat16)[0]
    rough = vision(pixels)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() / exact.norm() < 0.03
    assert vision.mean == MEAN


def test_pixels_of_the_wrong_kind_are_refused(random: torch.Generator) -> None:
    vision = HFVision(FAMILIES["vit"](), -2, 12)
    with pytest.raises(ValueError, match=r"must be uint8 \[B, 3, 12, 12\], not torch.float32 \[2, 3, 12, 12\]"):
        vision(pictures(12, random).float())
    with pytest.raises(ValueError, match=r"not torch.uint8 \[2, 3, 16, 16\]"):
        vision(pictures(16, random))


@pytest.mark.parametrize("layer", [0, 5, -5])
def test_a_layer_out_of_range_is_refused(layer: int) -> None:
    with pytest.raises(UserError, match=rf"^vision layer {layer} does not exist: this 'vit_?\w*' has 4 layers"):
        HFVision(FAMILIES["vit"](), layer, 12)


def test_image_sizes_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"14 px is not a multiple .* patch of 4 px: use 12 or 16"):
        HFVision(FAMILIES["vit"](), -2, 14)
    with pytest.raises(UserError, match=r"accepts only 12 px, not 20"):
        HFVision(FAMILIES["aimv2"](), -2, 20)


def save(model: PreTrainedModel, folder: Path, preprocessing: dict[str, Any] | None = None) -> str:
    model.save_pretrained(folder)
    if preprocessing is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return str(folder)


TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def clip() -> PreTrainedModel:
    vision = {**SIZES, "intermediate_size": 40}
    text = {**TEXT, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    return hf.CLIPModel(hf.CLIPConfig(vision_config=vision, text_config=text))


def siglip() -> PreTrainedModel:
    text = {**TEXT, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    return hf.SiglipModel(hf.SiglipConfig(vision_config={**SIZES, "intermediate_size": 40}, text_config=text))


def blip2() -> PreTrainedModel:
    opt = {"model_type": "opt", "vocab_size": 50, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 20}
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 20}
    return hf.Blip2Model(
        hf.Blip2Config(
            vision_config={**SIZES, "intermediate_size": 40},
            qformer_config={**TEXT, "encoder_hidden_size": 24, "vocab_size": 50},
            text_config={**opt, **sizes},
        )
    )


@pytest.mark.parametrize("build", [clip, siglip, blip2])
def test_vision_part_of_a_larger_model(
    build: Callable[[], PreTrainedModel], tmp_path: Path, random: torch.Generator
) -> None:
    model = redraw(build(), random)
    pixels = pictures(12, random)
    part = model.get_submodule("vision_model")
    assert isinstance(part, PreTrainedModel)
    expected = hidden_states(part, pixels)[3]
    vision = load_vision(save(model, tmp_path, {"image_mean": MEAN, "image_std": STD}))
    torch.testing.assert_close(vision(pixels), expected, rtol=1e-5, atol=1e-5)
    assert count(vision) < count(part) < count(model)


def test_a_classifier_without_the_pooler_loads(tmp_path: Path, random: torch.Generator) -> None:
    model = redraw(hf.ViTForImageClassification(hf.ViTConfig(**SIZES, intermediate_size=40)), random)
    pixels = pictures(12, random)
    expected = hidden_states(model, pixels)[2]
    vision = load_vision(save(model, tmp_path, {"image_mean": MEAN, "image_std": STD, "size": 12}), layer=2)
    torch.testing.assert_close(vision(pixels), expected, rtol=1e-5, atol=1e-5)


def test_preprocessing_is_read(tmp_path: Path) -> None:
    encoder = FAMILIES["dinov2"]()
    crop = {"do_center_crop": True, "crop_size": {"height": 20, "width": 20}, "size": {"shortest_edge": 30}}
    published = load_vision(save(encoder, tmp_path / "a", {"image_mean": MEAN, "image_std": STD, **crop}))
    assert (published.mean, published.std, published.image_size) == (MEAN, STD, 20)
    nothing = load_vision(save(encoder, tmp_path / "b"))
    assert (nothing.mean, nothing.std, nothing.image_size) == (CLIP_MEAN, CLIP_STD, 12)
    chosen = load_vision(str(tmp_path / "a"), layer=1, image_size=16, dtype=torch.bfloat16)
    assert (chosen.layers, chosen.image_size, chosen.encoder.dtype) == (1, 16, torch.bfloat16)
    raw = load_vision(save(encoder, tmp_path / "c", {"do_normalize": False, "size": {"height": 16, "width": 16}}))
    assert (raw.mean, raw.std, raw.image_size) == ((0, 0, 0), (1, 1, 1), 16)
    with pytest.raises(UserError, match=r"no usable image_mean"):
        load_vision(save(encoder, tmp_path / "d", {"size": 12}))


def test_what_is_no_image_encoder_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    broken = Path(save(FAMILIES["vit"](), tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"not weights")
    text = save(hf.BertModel(hf.BertConfig(**TEXT, vocab_size=50)), tmp_path / "text")
    for name, reason in (
        (str(tmp_path / "empty"), "is not a model: give a directory with config.json"),
        (str(tmp_path / "nowhere"), "cannot be found"),
        ("no/such-model", "cannot be found"),
        ("wheel:nothing", "unknown wheel 'wheel:nothing'"),
        (str(broken), "cannot be loaded"),
        (text, "is a 'bert': it must be a vision transformer"),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            load_vision(name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_weights_that_are_not_there_are_never_drawn_at_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(save(FAMILIES["clip"](), tmp_path))
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "layers.1.mlp.fc1.weight" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights of a 'clip_vision_model' are missing, .*mlp.fc1.weight"):
        load_vision(str(folder))
