"""LoRA with peft: low-rank adapters in the linear layers of a part whose own weights are frozen.

Not in the paper; optional. Each adapted layer computes `W x + (alpha / rank) B A x` with alpha = 2 x rank and no
dropout; B starts at zero, so a new adapter changes nothing. Adapters are fp32 for any precision of the layer.

With `qformer.lora_rank` the queries, the image norm and everything outside the Q-Former (projection or heads) are
trained in full, because they are small and adapt to new pictures or to a new language model. With `language.lora_rank`
all linear layers of the language model except its output embedding get adapters.
"""

import warnings
from typing import Any

import torch
from torch import nn

from openblip2.compat import LORA_BASE, LORA_FIRST, LORA_PARTS, forget_adapters, lora_layers, quiet_bitsandbytes
from openblip2.errors import UserError, require
from openblip2.model.qformer import QFormer

# Name pattern of the linear layers of attention in a Q-Former: as usual for LoRA, FFNs get no adapters.
QFORMER_LAYERS = r"layers\.\d+\.(attention|cross)\.(query|key|value|out)"


def require_lora() -> None:
    """Raises a `UserError` if peft is not installed."""
    require("qformer.lora_rank or language.lora_rank", "lora", "peft")


def add_lora(module: nn.Module, rank: int, layers: str = "all-linear") -> None:
    """Freezes a module and puts trainable adapters into its linear layers, in place.

    Args:
        rank: rank of the adapters.
        layers: pattern of layer names; "all-linear" = all of a transformers model except the output embedding.
    """
    require_lora()
    quiet_bitsandbytes()  # peft imports bitsandbytes if it is installed
    from peft import LoraConfig, inject_adapter_in_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # for GPT-2; peft then corrects it
        config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=layers)
        inject_adapter_in_model(config, module)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # in half precision small updates would be rounded away


def adapt_qformer(qformer: QFormer, rank: int) -> None:
    """Adds LoRA to self- and cross-attention; queries and image norm are still trained in full."""
    add_lora(qformer, rank, QFORMER_LAYERS)
    qformer.queries.requires_grad_(True)  # `add_lora` froze them
    qformer.image_norm.requires_grad_(True)


def has_lora(module: nn.Module) -> bool:
    """Whether a module contains adapters."""
    return any(LORA_FIRST in name for name, _ in module.named_parameters())


def plain_state(module: nn.Module) -> dict[str, Any]:
    """A module's own weights, under the names that they have without adapters; adapter weights are left out."""
    return {
        name.replace(LORA_BASE, "."): tensor for name, tensor in module.state_dict().items() if LORA_PARTS not in name
    }


@torch.no_grad()
def merge_lora(module: nn.Module) -> nn.Module:
    """Folds all adapters in a module into the weights and puts the plain layers back, in place; returns the module.

    This is exact up to the rounding of the weights' dtype. All parameters stay trained or frozen as they were.

    Raises:
        UserError: the layers hold 8- or 4-bit weights, which cannot take the sum without being rounded again.
    """
    if not has_lora(module):
        return module
    plain: list[tuple[str, Any, Any]] = [(name, layer, layer.get_base_layer()) for name, layer in lora_layers(module)]
    for name, _, base in plain:
        if not base.weight.is_floating_point():
            raise UserError(
                f"LoRA cannot be merged into {name}: its weights are quantised; load the run with language.dtype=bf16"
            )
    for name, layer, base in plain:
        layer.merge()
        module.set_submodule(name, base)
    forget_adapters(module)
    return module
