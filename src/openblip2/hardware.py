"""What depends on the hardware: device, precision, attention kernel, memory allocator."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# glibc's mallopt parameters (malloc.h) and what they are set to, in bytes.
_MALLOPT = {-1: 2**31 - 1, -2: 256 * 2**20, -3: 2**31 - 1}  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD


def device() -> torch.device:
    """Where models run: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(device: torch.device, precision: str) -> torch.dtype:
    """`bf16`, `fp32`, or `auto`: bf16 on GPUs and on CPUs with bf16 instructions, fp32 on all others."""
    if precision == "auto":
        # Without such instructions a CPU computes bf16 in fp32, and converts both ways.
        cpu = torch.cpu.get_capabilities()
        has_bf16 = device.type == "cuda" or bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def attention_kernel(model: nn.Module) -> AbstractContextManager[object]:
    """On CPUs, where gradients are wanted, attention as plain matrix products; a GPU keeps its own choice.

    With a Q-Former's few rows and small heads the backward pass of a CPU's flash kernel takes several times as long.
    Its forward pass takes less time, a quarter for many rows (docs/decisions.md).
    """
    plain = next(model.parameters()).device.type == "cpu" and torch.is_grad_enabled()
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


@contextmanager
def computing(model: nn.Module, precision: str) -> Iterator[None]:
    """Runs a model in less time, with the same numbers up to rounding.

    With its `attention_kernel`, and bf16 matrix products over fp32 weights where `compute_dtype` says so.
    """
    device = next(model.parameters()).device
    bf16 = compute_dtype(device, precision) == torch.bfloat16
    with attention_kernel(model), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        yield


def keep_freed_memory() -> None:
    """Lets glibc keep freed memory for the next step instead of giving it back to Linux each time.

    Large tensors are otherwise mapped afresh in every step, and touching fresh pages costs a quarter of a step on a
    CPU. Elsewhere (other systems, other C libraries, GPUs' own allocators) there is nothing to do.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return
    for parameter, value in _MALLOPT.items():
        mallopt(parameter, value)
