"""`torch.compile` for the blocks of a Q-Former: attention and feed-forward, each with its residual sum and norm.

Blocks and not the whole model: they are few kinds with the same code, so compiling takes seconds to a minute and not
many, and which pass they serve does not matter to them.
"""

import torch
from torch import nn

from openblip2.compat import allow_recompiles
from openblip2.errors import UserError, one_line
from openblip2.model.blocks import Attention, FeedForward
from openblip2.model.qformer import QFormer

KINDS = 64  # compiled forms of a block: with and without mask, gradient, text, dropout; torch stops at 8


def compile_blocks(qformer: QFormer) -> None:
    """Compiles the blocks in place, when they are first used; names of parameters stay.

    Raises:
        UserError: this machine has no compiler.
    """
    place = qformer.queries.device
    try:
        torch.compile(nn.functional.gelu)(torch.ones(64, device=place))
    except Exception as error:  # what is missing decides what is raised: it is named
        raise UserError(
            f"train.compile=true: torch.compile does not work here ({one_line(error)}): a CPU needs a C++ compiler, a "
            "GPU triton"
        ) from error
    allow_recompiles(KINDS)
    for block in qformer.modules():
        if isinstance(block, Attention | FeedForward):
            block.compile(dynamic=True)
