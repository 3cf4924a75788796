"""Effective rank: whether the queries of an image hold different information or are copies of one vector."""

import math

import torch
from torch import Tensor


def effective_rank(queries: Tensor) -> float:
    """The effective number of directions that the queries of an image span, 1 to `min(Q, D)`; the mean over images.

    For each image: the exponential of the entropy of its normalised squared singular values, after each query's mean
    over the images is subtracted. It is computed in float64 on the CPU. An image whose outputs equal that mean, up to
    the rounding of float32, has rank 1.

    Args:
        queries: `[N, Q, D]`, the query outputs of N images.

    Returns:
        The effective rank; NaN if an output is not finite.

    Raises:
        ValueError: there are fewer than 2 images, so there is no mean to differ from.
    """
    if len(queries) < 2:
        raise ValueError(f"effective rank needs at least 2 pictures, got {len(queries)}")
    if not queries.isfinite().all():  # the eigenvalue solver would raise an error, and stop a training run
        return math.nan
    rows = queries.detach().cpu().double()
    centred = rows - rows.mean(dim=0)
    squares = torch.linalg.eigvalsh(centred @ centred.mT).clamp(min=0)  # [N, Q], of the singular values
    total = squares.sum(dim=1, keepdim=True)
    rounding = torch.finfo(torch.float32).eps ** 2 * rows.square().sum(dim=(1, 2))[:, None]
    shares = torch.where(total > rounding, squares / total, 0.0)
    return float(torch.special.entr(shares).sum(dim=1).exp().mean())
