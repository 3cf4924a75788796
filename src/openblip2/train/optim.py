"""The optimizer and its learning rate (paper, section 3.4 and appendix)."""

import math

import torch
from torch import nn

from openblip2.config import OptimSettings


def parameter_groups(trained: dict[str, nn.Parameter], weight_decay: float) -> list[dict]:
    """Two groups that hold each trained parameter exactly once: with and without weight decay.

    Not decayed: biases, LayerNorms, the temperature and the queries, by what they are and not by their names'
    spelling: everything of fewer than two axes, and the queries, the only parameter of three axes.
    """
    decayed = [p for p in trained.values() if p.ndim == 2]
    others = [p for p in trained.values() if p.ndim != 2]
    assert len({id(p) for p in decayed + others}) == len(trained), "a parameter is named twice"
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def adamw(trained: dict[str, nn.Parameter], settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, in one fused pass over the parameters."""
    groups = parameter_groups(trained, settings.weight_decay)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


def learning_rate(step: int, steps: int, settings: OptimSettings) -> float:
    """The rate of step 0, 1, ...: linear from 0 to `lr` over `warmup` steps, then a cosine down to `min_lr`."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / (settings.warmup + 1)
    progress = (step - settings.warmup) / max(1, steps - settings.warmup)
    low = min(settings.min_lr, settings.lr)
    return low + (settings.lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
