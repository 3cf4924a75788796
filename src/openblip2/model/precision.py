"""Precision of the frozen parts: how they are read from files, and what they compute in.

Each runs in the precision of its own weights, also inside autocast.

safetensors are memory-mapped: in the file's own precision a model costs no memory until it is used. transformers casts
while all of the file is mapped, so a model cast to another precision would peak at file and result together. Here
(`load_in`) it is loaded uncast, then cast tensor by tensor, and the pages of each tensor are given back as soon as it
is cast.

Language models in 8 or 4 bits, by bitsandbytes; gradients pass through them to the soft prompt. 8 bits: LLM.int8(),
rows of weights and of activations scaled to int8. 4 bits: NF4 in blocks of 64 weights, products in the dtype of all
else. Embeddings, norms and the output embedding stay as they are.
"""

import ctypes
import mmap
import sys
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from openblip2.compat import kept_in_fp32, quiet_bitsandbytes
from openblip2.errors import require

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BITS = {"int8": 8, "int4": 4}  # by the setting's name
_DONTNEED = 4  # madvise(2): forget these pages; of a file they can be read again


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


def load_in(loader: Any, source: str, dtype: Any, prefix: str = "", **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """`loader.from_pretrained(source, dtype=dtype)` and its loading report.

    Args:
        dtype: of the weights, or "auto".
        prefix: of the names of the model's weights in a larger model's file.
    """
    stored = _stored_dtype(local_folder(source), prefix)
    cast = stored is not None and isinstance(dtype, torch.dtype) and stored != dtype
    model, report = loader.from_pretrained(
        source, dtype=stored if cast else dtype, output_loading_info=True, trust_remote_code=False, **options
    )
    if cast:
        _cast(model, dtype)
    return model, report


def local_folder(name: str) -> Path | None:
    """Where a model is on this machine: the folder of that name, or the hub's cache; None: not here yet."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return Path(name)
    cached = try_to_load_from_cache(name, "config.json") if name.count("/") == 1 else None
    return Path(cached).parent if isinstance(cached, str) else None


def _stored_dtype(folder: Path | None, prefix: str) -> torch.dtype | None:
    """The one dtype of a folder's weights; None if there are several, or no safetensors here."""
    found: set[torch.dtype] = set()
    for file in sorted(folder.glob("*.safetensors")) if folder else ():
        try:
            with safe_open(file, framework="pt") as opened:
                found |= {opened.get_tensor(name).dtype for name in opened.keys() if name.startswith(prefix)}  # noqa: SIM118
        except SafetensorError:  # the loader says so, and better
            return None
    return found.pop() if len(found) == 1 else None


@torch.no_grad()
def _cast(model: Any, dtype: torch.dtype) -> None:
    """To a dtype, tensor by tensor; what transformers keeps in fp32 for safety is kept so."""
    kept = kept_in_fp32(model, half=dtype == torch.float16)
    stored = model.state_dict().keys()  # not the buffers that are computed: they have their own precision
    mapped = _mapped_files()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in stored and tensor.is_floating_point():
            old = tensor.data
            tensor.data = old.to(torch.float32 if kept & set(name.split(".")) else dtype)
            if tensor.data_ptr() != old.data_ptr():  # otherwise nothing was cast, and it is in use
                _give_back(old, mapped)
    model.config.dtype = dtype


def _mapped_files() -> list[tuple[int, int]]:
    """Where safetensors files are mapped, as addresses [start, end); nothing is known outside Linux."""
    if not sys.platform.startswith("linux"):
        return []
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    ranges = [line.split(maxsplit=1)[0].split("-") for line in lines if line.endswith(".safetensors")]
    return sorted((int(start, 16), int(end, 16)) for start, end in ranges)


def _give_back(tensor: Tensor, mapped: list[tuple[int, int]]) -> None:
    """Lets go of the pages that hold nothing but this tensor; its file is mapped as long as the tensor is here."""
    start, page = tensor.data_ptr(), mmap.PAGESIZE
    end = start + tensor.nbytes
    place = bisect_right(mapped, (start, sys.maxsize)) - 1
    if place < 0 or end > mapped[place][1]:
        return  # in ordinary memory
    start, end = -(-start // page) * page, end // page * page  # inwards: edge pages may hold other tensors
    if start < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)
