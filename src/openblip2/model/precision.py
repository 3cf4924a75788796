"""Precision of the frozen parts: each runs in that of its own weights, also inside autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def own_precision(place: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Switches autocast off where it would compute in another dtype than the weights' own, `dtype`.

    Where the two are the same nothing is switched: autocast keeps norms and softmax in fp32 there.
    """
    if torch.is_autocast_enabled(place.type) and torch.get_autocast_dtype(place.type) != dtype:
        return torch.autocast(place.type, enabled=False)
    return nullcontext()
