"""The trained parameters of a model: their optimizer and learning rate (paper, section 3.4 and appendix), their file.

The whitening of the model's features is stored here, too.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from openblip2.config import OptimSettings, RunSettings
from openblip2.distributed.collectives import is_first
from openblip2.distributed.data_parallel import full_tensor, in_pieces, like
from openblip2.errors import UserError
from openblip2.model.connector import Connector
from openblip2.model.vision import Whitening, fit_whitening
from openblip2.runs import read_tensors, write_tensors


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name; a tied parameter appears once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def saved_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a run saves, by name: the trained ones, and all of the connector."""
    # Other frozen parts can be loaded again by their names in config.json. The connector is always saved, even if
    # adapters (LoRA) freeze it, because no other file has its weights.
    connectors = tuple(f"{name}." for name, part in model.named_children() if isinstance(part, Connector))
    return {n: p for n, p in model.named_parameters() if p.requires_grad or n.startswith(connectors)}


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


def save_trained(model: nn.Module, path: Path) -> None:
    """Writes the saved parameters to one safetensors file. All processes must call it; the first one writes."""
    weights = {}
    for name, parameter in saved_parameters(model).items():
        # One by one: a sharded parameter (FSDP2) is gathered in all processes, and only the first one keeps all.
        full = full_tensor(parameter).cpu().contiguous()
        if is_first():
            weights[name] = full  # the other processes only take part in gathering it
    if is_first():
        write_tensors(weights, path)


def fill_trained(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copies tensors into the saved parameters; a `UserError` lists names and shapes in `source` that do not match."""
    # A missing or unexpected name means that config.json does not describe the model that was trained.
    wanted = saved_parameters(model)
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        raise UserError(
            f"{source} does not fit this model: {_some('missing', missing)}{_some('unexpected', extra)}"
            "the run's config.json must describe the model that was trained"
        )
    for name, parameter in wanted.items():
        if tensors[name].shape != parameter.shape:
            raise UserError(
                f"{source} does not fit this model: {name} has shape {list(tensors[name].shape)}, "
                f"the model needs {list(parameter.shape)}"
            )
        parameter.detach().copy_(like(parameter, tensors[name]))


def save_whitening(whitening: Whitening, run: Path) -> None:
    """Writes `RUN/whitening.safetensors`."""
    write_tensors({"mean": whitening.mean.cpu(), "matrix": whitening.matrix.cpu()}, run / "whitening.safetensors")


def read_whitening(run: Path) -> Whitening:
    """The whitening of the features that a run was trained on; a `UserError` says if it is missing or damaged."""
    tensors = read_tensors(run / "whitening.safetensors")
    if tensors.keys() != {"mean", "matrix"}:
        raise UserError(f"{run / 'whitening.safetensors'}: contains {sorted(tensors)}, not mean and matrix")
    return Whitening(tensors["mean"], tensors["matrix"])


def whitening_of_run(settings: RunSettings, run: Path, features: Callable[[], Tensor] | None = None) -> Whitening:
    """The whitening that the start run was trained with, or, without a start, one fitted to features `[N, P, V]`."""
    # Fitted in one process only, because rounding could give another result in the others.
    if not is_first():
        return read_whitening(run)
    if settings.start:
        whitening = read_whitening(Path(settings.start))
    else:
        assert features is not None, "only fine-tuning trains the encoder, and it starts from a run"
        whitening = fit_whitening(features())
    save_whitening(whitening, run)
    return whitening


def _some(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{what}: {', '.join(names[:4])}{more}; " if names else ""
