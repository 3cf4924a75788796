"""Which way a training step computes its losses."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from openblip2.distributed.collectives import world_size
from openblip2.model.fast import gradient_cache, joined_batch
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2


def step_losses(model: Stage1 | Stage2, chunk: int) -> Callable[..., dict[str, Tensor]]:
    """`model.losses`, or in several processes or in chunks what gives the same result; called with its arguments.

    Args:
        chunk: `train.chunk`, pairs at a time in each process; 0 = all.
    """
    first = isinstance(model, Stage1)
    if chunk:  # first: in several processes it uses the joined batch itself
        return partial(gradient_cache.stage1_losses if first else gradient_cache.stage2_losses, model, chunk)
    if world_size() > 1:
        return partial(joined_batch.joined_stage1_losses if first else joined_batch.joined_stage2_losses, model)
    return model.losses
