"""Precision of the frozen parts: each runs in that of its own weights, also inside autocast.

Language models in 8 or 4 bits, by bitsandbytes; gradients pass through them to the soft prompt. 8 bits: LLM.int8(),
rows of weights and of activations scaled to int8. 4 bits: NF4 in blocks of 64 weights, products in the dtype of all
else. Embeddings, norms and the output embedding stay as they are.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from openblip2.compat import quiet_bitsandbytes
from openblip2.errors import require

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BITS = {"int8": 8, "int4": 4}  # by the setting's name


def own_precision(place: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Switches autocast off where it would compute in another dtype than the weights' own, `dtype`.

    Where the two are the same nothing is switched: autocast keeps norms and softmax in fp32 there.
    """
    if place.type != "meta" and torch.is_autocast_enabled(place.type) and torch.get_autocast_dtype(place.type) != dtype:
        return torch.autocast(place.type, enabled=False)
    return nullcontext()


def require_quantisation() -> None:
    """Checks that what reads and runs quantised weights is installed.

    Raises:
        UserError: it is not.
    """
    require("language.dtype=int8 or int4", "quant", "bitsandbytes", "accelerate")


def quantised_options(bits: int, dtype: torch.dtype, place: torch.device | None) -> dict[str, Any]:
    """Arguments of `from_pretrained`: `bits` 8 or 4, `dtype` of all else, `place` to run on (None: a GPU if any).

    Raises:
        UserError: bitsandbytes is not installed.
    """
    require_quantisation()
    from transformers import BitsAndBytesConfig

    quiet_bitsandbytes()
    if bits == 8:
        how = BitsAndBytesConfig(load_in_8bit=True)
    else:
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    # Quantised where it is to run: 8-bit weights lose their scales when they are moved later.
    return {"quantization_config": how} | ({} if place is None else {"device_map": {"": str(place)}})
