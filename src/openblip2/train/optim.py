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
    """Groups the parameters by learning-rate factor and weight decay; each one is in exactly one group.

    Args:
        trained: The trained parameters, by name.
        weight_decay: Not applied to biases, LayerNorms, the temperature, queries, class tokens and positions.
        rates: The factor of the learning rate by parameter name, stored as a group's `rate`; 1 for all others.
    """
    assert len({id(p) for p in trained.values()}) == len(trained), "a parameter is named twice"
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        # A fused step accepts either whole or sharded parameters (FSDP2) in one group, not both.
        kind = ((rates or {}).get(name, 1.0), _decays(parameter), not in_pieces(parameter))
        groups.setdefault(kind, []).append(parameter)
    return [
        {"params": members, "weight_decay": weight_decay if decays else 0.0, "rate": rate}
        for (rate, decays, _), members in sorted(groups.items(), key=lambda group: group[0], reverse=True)
    ]


def _decays(parameter: nn.Parameter) -> bool:
    # Decided by the number of axes and not by the name, because each library uses different names. Matrices have two
    # axes and an encoder's patch convolution has four. Biases and norms have one axis, the temperature has none, and
    # queries, class token and positions have three.
    return parameter.ndim in (2, 4)


def layer_rates(model: nn.Module, decay: float) -> dict[str, float]:
    """The factor of the learning rate for each parameter of a trained image encoder, by name.

    The last of L layers has `decay`, the one before it `decay`^2, embeddings and positions `decay`^(L + 1).
    The authors' code stores this value but never reads it. Source: BEiT (arXiv 2106.08254), whose code they used.
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
    """The rate of step 0, 1, ...: linear warmup from 0 to `lr` over `warmup` steps, then cosine decay to `min_lr`."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / (settings.warmup + 1)  # + 1, because a first step with rate 0 would be wasted
    progress = (step - settings.warmup) / max(1, steps - settings.warmup)
    low = min(settings.min_lr, settings.lr)  # an `lr` below `min_lr` must not increase
    return low + (settings.lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
