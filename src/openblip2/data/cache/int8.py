"""Features in 8 bits: symmetric, a scale for each token, channels brought to like width first.

On DINOv2-small, layer 8 of 12, this is 0.5 % off (of the features' norm), and 2 % once they are whitened; with the
scale of each token alone 1.5 % and 6.8 %. bf16 is 0.17 % and 0.7 % off, fp16 0.02 % and 0.09 %.

Shapes: n rows, P patch tokens, V encoder width.
"""

import torch
from torch import Tensor

from openblip2.errors import UserError


def channel_tables(features: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and width of each channel `[V]`, by a shard's first batch.

    A few channels of a vision transformer are many times wider than the rest; with one scale a token they would leave
    the others little of the 255 steps.
    """
    rows = features.float().flatten(0, 1)
    if not len(rows):
        return rows.new_zeros(features.shape[-1]), rows.new_ones(features.shape[-1])
    width = rows.std(0, correction=0)
    least = 0.1 * width.mean()  # a channel that happens to rest in this batch may move in the next
    return rows.mean(0), width.clamp(min=float(least) or 1.0)


def quantise(features: Tensor, centre: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """`(x - centre) / width` in 255 steps of a size of its own for each token: int8 `[n, P, V]`, fp32 `[n, P, 1]`."""
    if not bool(features.isfinite().all()):
        raise UserError("the encoder gave features that are not finite; vision.weights=bf16 or fp32 has the range")
    even = (features.float() - centre).div_(width)
    scales = even.abs().amax(-1, keepdim=True) / 127
    return even.div_(scales.clamp(min=torch.finfo(torch.float32).tiny)).round_().to(torch.int8), scales


def dequantise(values: Tensor, scales: Tensor, centre: Tensor, width: Tensor) -> Tensor:
    """fp32 of int8; an error of at most half a step, `scales / 2 x width`."""
    return torch.addcmul(centre, values.float() * scales, width)
