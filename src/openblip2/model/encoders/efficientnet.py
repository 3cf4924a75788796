"""EfficientNet-Lite0: a convolutional image encoder that can be used in place of a vision transformer.

Tan and Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", in its Lite variant: ReLU6,
no squeeze-and-excitation. Batch norms are folded into the convolutions before them, which is equivalent in eval mode.

`HFVision` treats all of it as one layer, because its stages differ in width: `vision.layer` is -1. Each position of the
last feature map is a token, row by row; there is no class token.

Shapes: B images, S image side in px, P = (S / 32)^2 positions, V encoder width (1280).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

# Number of blocks, kernel side, stride of the first block, expansion factor, output width.
LITE0 = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192))
LITE0 += ((1, 3, 1, 6, 320),)


class EfficientNetLiteConfig(PreTrainedConfig):
    """Sizes of the encoder. `hidden_size`: V. `stem`: width after the first convolution. `stages`: as `LITE0`.

    `patch_size`: side in px that becomes one position: 2 times the product of the stages' strides.
    """

    model_type = "efficientnet_lite"

    def __init__(
        self,
        hidden_size: int = 1280,
        stem: int = 32,
        stages: Sequence[Sequence[int]] = LITE0,
        image_size: int = 224,
        patch_size: int = 32,
        num_hidden_layers: int = 1,
        **kwargs: Any,
    ) -> None:
        self.hidden_size, self.stem, self.stages = hidden_size, stem, [list(stage) for stage in stages]
        self.image_size, self.patch_size, self.num_hidden_layers = image_size, patch_size, num_hidden_layers
        super().__init__(**kwargs)


class EfficientNetLite(PreTrainedModel):
    """Pixels `[B, 3, S, S]`, normalised, to features `[B, P, V]`; S is a multiple of `config.patch_size`."""

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        assert config.patch_size == 2 * math.prod(stride for _, _, stride, _, _ in config.stages)
        parts: list[nn.Module] = [convolution(3, config.stem, kernel=3, stride=2)]
        width = config.stem
        for blocks, kernel, stride, expand, width_out in config.stages:
            for n in range(blocks):
                parts.append(Block(width, width_out, kernel, stride if n == 0 else 1, expand))
                width = width_out
        parts += [convolution(width, config.hidden_size), Tokens()]
        self.layers = nn.ModuleList([nn.Sequential(*parts)])  # `HFVision` looks for one list of layers
        self.post_init()

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = True) -> Tensor:
        # The parameter tells `HFVision` that any image size is accepted: there are no positions to interpolate.
        # Channels last in memory: on a CPU 1.4 times as fast in bf16 and 1.8 times in fp32.
        return self.layers[0](pixel_values.contiguous(memory_format=torch.channels_last))


class Block(nn.Module):
    """Expansion, depthwise convolution, projection; the input is added if it has the same shape as the output."""

    def __init__(self, width: int, width_out: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        inside = width * expand
        wider = [convolution(width, inside)] if expand > 1 else []
        apart = convolution(inside, inside, kernel, stride, groups=inside)
        self.steps = nn.Sequential(*wider, apart, convolution(inside, width_out, active=False))
        self.adds = stride == 1 and width == width_out  # as in MobileNetV2

    def forward(self, x: Tensor) -> Tensor:
        return x + self.steps(x) if self.adds else self.steps(x)


class Tokens(nn.Module):
    """A feature map `[B, V, H, W]` as tokens `[B, H * W, V]`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2).contiguous()


def convolution(
    width: int, width_out: int, kernel: int = 1, stride: int = 1, groups: int = 1, active: bool = True
) -> nn.Sequential:
    """A convolution with a bias and, if `active`, ReLU6.

    Padding is as in TensorFlow's "SAME": for stride 2 and an even side, one more row and column after than before.
    """
    front, back = (kernel - stride) // 2, (kernel - stride + 1) // 2
    even = front == back
    padding = [] if even else [nn.ZeroPad2d((front, back, front, back))]
    layer = nn.Conv2d(width, width_out, kernel, stride, front if even else 0, groups=groups)
    return nn.Sequential(*padding, layer, *([nn.ReLU6()] if active else []))


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLite, exist_ok=True)
