"""The optimizer and its learning rate (paper, section 3.4 and appendix)."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from openblip2.config import OptimSettings
from openblip2.distributed.data_parallel import in_pieces


def parameter_groups(
    trained: dict[str, nn.Parameter], weight_decay: float, rates: Mapping[str, float] | None = None
) -> list[dict]:
    """Groups that hold each trained parameter exactly once: with and without weight decay, and one for each rate.

    Args:
        trained: The parameters by name.
        weight_decay: Of all but biases, LayerNorms, the temperature, the queries, class tokens and positions.
        rates: By name, what the learning rate is multiplied with, a group's `rate`; 1 for all others.
    """
    assert len({id(p) for p in trained.values()}) == len(trained), "a parameter is named twice"
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        # A fused step takes either whole parameters or parameters in pieces (FSDP2), not both.
        kind = ((rates or {}).get(name, 1.0), _decays(parameter), not in_pieces(parameter))
        groups.setdefault(kind, []).append(parameter)
    return [
        {"params": members, "weight_decay": weight_decay if decays else 0.0, "rate": rate}
        for (rate, decays, _), members in sorted(groups.items(), key=lambda group: group[0], reverse=True)
    ]


def _decays(parameter: nn.Parameter) -> bool:
    # By the number of axes and not by the names, which each library spells in its own way. Matrices have two, an
    # encoder's convolution over patches has four; biases and norms have one, the temperature none; queries, class token
    # and positions have three.
    return parameter.ndim in (2, 4)


def layer_rates(model: nn.Module, decay: float) -> dict[str, float]:
    """What the learning rate of each parameter of a trained image encoder is multiplied with, by name.

    The last of L layers has `decay`, the one before it `decay`^2, embeddings and positions `decay`^(L + 1).
    In the authors' code this is stored and never read. Source: BEiT (arXiv 2106.08254), whose code they took.
    """
    vision = getattr(model, "vision", None)
    if vision is None or not vision.trained or decay == 1.0:
        return {}
    return {f"vision.{name}": decay ** (vision.layers + 1 - depth) for name, depth in vision.depths().items()}


def adamw(
    trained: dict[str, nn.Parameter], settings: OptimSettings, rates: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, in one fused pass over the parameters."""
    groups = parameter_groups(trained, settings.weight_decay, rates)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)  # paper 3.4


def learning_rate(step: int, steps: int, settings: OptimSettings) -> float:
    """The rate of step 0, 1, ...: linear from 0 to `lr` over `warmup` steps, then a cosine down to `min_lr`."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / (settings.warmup + 1)  # + 1: a first step with rate 0 would be wasted
    progress = (step - settings.warmup) / max(1, steps - settings.warmup)
    low = min(settings.min_lr, settings.lr)  # a small `lr` must not grow
    return low + (settings.lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
