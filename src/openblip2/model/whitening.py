"""Whitening of frozen features: an affine map that makes their axes uncorrelated and of equal variance.

Not in the paper; off unless `vision.whiten` is set. The features of a frozen encoder vary mostly along a few directions
that all pictures share (here the largest has 60 times the average variance), and the differences between objects are in
directions of small variance. New cross-attention weights can hardly use these until training has adapted to them;
after whitening, they can use all directions from the first step.

Shapes: N rows (patch tokens of any pictures), P patch tokens, V encoder width.
"""

import torch
from torch import Tensor, nn

RIDGE = 0.01  # times the mean variance: directions with less variance are noise and stay small


class Whitening(nn.Module):
    """`(features - mean) @ matrix`, frozen; `mean [V]`, `matrix [V, V]`, both fp32."""

    mean: Tensor
    matrix: Tensor

    def __init__(self, mean: Tensor, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("matrix", matrix)

    def forward(self, features: Tensor) -> Tensor:
        """`[..., V]` -> `[..., V]` in the same dtype."""
        with torch.autocast(features.device.type, enabled=False):
            return ((features.float() - self.mean) @ self.matrix).to(features.dtype)


def fit_whitening(features: Tensor) -> Whitening:
    """Fits the whitening to features `[..., V]`: symmetric (ZCA), with a ridge of `RIDGE` x the mean variance."""
    rows = features.flatten(0, -2).double()  # [N, V]; fp64, because variances span many orders of magnitude
    mean = rows.mean(0)
    variances, axes = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    matrix = (axes * (variances + RIDGE * variances.mean()).rsqrt()) @ axes.T  # rotated back
    return Whitening(mean.float(), matrix.float())
