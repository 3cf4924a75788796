"""`torch.compile` for the blocks of a connector: attention and feed-forward, each with its residual sum and norm.

Blocks and not the whole model: they are few kinds with the same code, so compiling takes seconds to a minute and not
many, and which pass they serve does not matter to them.
"""

import torch
from torch import nn

from openblip2.compat import allow_recompiles
from openblip2.errors import UserError, one_line
from openblip2.model.blocks import Attention, FeedForward

KINDS = 64  # compiled forms of a block: with and without mask, gradient, text, dropout; torch stops at 8


def compile_blocks(connector: nn.Module) -> None:
    """Compiles the blocks in place, when they are first used; names of parameters stay.

    Raises:
        UserError: this machine has no compiler.
    """
    blocks = [block for block in connector.modules() if isinstance(block, Attention | FeedForward)]
    try:
        for block in blocks[:1]:
            torch.compile(nn.functional.gelu)(torch.ones(64, device=next(block.parameters()).device))
    except Exception as error:  # what is missing decides what is raised: it is named
        raise UserError(
            f"train.compile=true: torch.compile does not work here ({one_line(error)}): a CPU needs a C++ compiler, a "
            "GPU triton"
        ) from error
    allow_recompiles(KINDS)
    for block in blocks:
        block.compile(dynamic=True)
