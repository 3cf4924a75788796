"""What depends on the hardware: device, precision, attention kernel, memory allocator."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOST_WEIGHTS = 2**27  # limit of attention weights for `plain_attention` without gradients: 0.25 GB in bf16
# glibc's mallopt parameters (malloc.h) and the values that we set, in bytes.
_MALLOPT = {-1: 2**31 - 1, -2: 256 * 2**20, -3: 2**31 - 1}  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD


def device() -> torch.device:
    """The device that models run on: a GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(device: torch.device, precision: str) -> torch.dtype:
    """The dtype for `bf16`, `fp32` or `auto`, which means bf16 where the hardware computes it faster than fp32."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" or fast_bf16_cpu() else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def fast_bf16_cpu() -> bool:
    """Whether this CPU multiplies matrices faster in bf16 than in fp32.

    CPUs with AMX do, and so do AMD's with AVX512-bf16. Intel's CPUs with AVX512-bf16 but without AMX (if a virtual
    machine hides it) take twice as long as in fp32. CPUs without such instructions convert to fp32 and back.
    """
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and _cpu_vendor() != "GenuineIntel"))


def _cpu_vendor() -> str:
    """The CPU's vendor, for example "GenuineIntel" or "AuthenticAMD"; empty if the system does not name it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **options: Any
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, or `plain_attention` where that is faster."""
    found = plain_attention if plain_is_faster(query, key, value) else F.scaled_dot_product_attention
    return found(query, key, value, attn_mask, dropout_p, **options)


def plain_is_faster(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `plain_attention` is faster than PyTorch's kernels and its attention weights fit into memory.

    On a CPU, the backward pass of PyTorch's flash kernel is slow for few rows and small heads, as in the Q-Former. In
    bf16, its forward pass is slow, too: for one new token of a text, it takes 17 times as long. PyTorch's own version
    without the kernel computes bf16 in fp32 (docs/decisions.md, "Speed and memory"). GPUs have their own kernels.
    """
    if query.device.type != "cpu":
        return False
    if query.requires_grad or key.requires_grad or value.requires_grad:
        return True
    bf16 = query.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    return bf16 and query.shape[:3].numel() * key.shape[2] <= MOST_WEIGHTS


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` as two matrix products and a softmax.

    A row that may not attend to any key (padding) attends to all keys here; PyTorch returns zeros or NaN for it.

    Args:
        query: `[B, H, N, d]`.
        key: `[B, G, M, d]`; G = H, or with `enable_gqa` a divisor of H.
        value: `[B, G, M, e]`.
        attn_mask: `[B or 1, H or 1, N, M]`, bool (True = attend) or added to the logits.
        dropout_p: share of the weights that are dropped.
        is_causal: row n attends to the first n + 1 keys.
        scale: factor of the logits; None = 1 / sqrt(d).
        enable_gqa: H / G heads share each key and value.
    """
    batch, heads, rows = query.shape[:3]
    if is_causal:
        attn_mask = torch.ones(1, 1, rows, key.shape[2], dtype=torch.bool, device=query.device).tril()
    if enable_gqa and heads > key.shape[1]:
        # Heads that share a key become rows of one product, so that the keys are not copied for each head.
        share = heads // key.shape[1]
        query = query.reshape(batch, key.shape[1], share * rows, query.shape[3])
        if attn_mask is not None and attn_mask.shape[1] > 1:
            attn_mask = attn_mask.reshape(len(attn_mask), key.shape[1], share * rows, attn_mask.shape[3])
        elif attn_mask is not None:
            attn_mask = attn_mask.repeat(1, 1, share, 1)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if query.dtype == torch.bfloat16:
        query = query * factor
        # Copy keys that are a view of a larger tensor: a bf16 product that copies them itself takes six times as long.
        key = key if key.requires_grad else key.contiguous()
    else:  # scaling both factors by the root causes less rounding error
        query, key = query * factor**0.5, key * factor**0.5
    logits = query @ key.transpose(-1, -2)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, torch.finfo(logits.dtype).min)
    elif attn_mask is not None:
        logits = logits + attn_mask
    weights = F.dropout(logits.softmax(-1), dropout_p)
    return (weights.to(value.dtype) @ value).reshape(batch, heads, rows, value.shape[3])


@contextmanager
def computing(model: nn.Module, precision: str) -> Iterator[None]:
    """Within the block, a model with fp32 weights computes matrix products in bf16 if `compute_dtype` is bf16."""
    device = next(model.parameters()).device
    bf16 = compute_dtype(device, precision) == torch.bfloat16
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        yield


def keep_freed_memory() -> None:
    """Lets glibc keep freed memory for the next step instead of returning it to Linux each time.

    Otherwise, large tensors get new pages in every step, and the first access to new pages takes a quarter of a step on
    a CPU. Other systems, other C libraries and GPUs (which have their own allocators) do not need this.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another system or C library
        return
    for parameter, value in _MALLOPT.items():
        mallopt(parameter, value)


def release_freed_memory() -> None:
    """Returns the memory that `keep_freed_memory` has kept to Linux, once.

    Texts of different lengths leave gaps between tensors: half of 3.5 GB after 600 steps of the demo's stage 1.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
