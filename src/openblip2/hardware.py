"""What depends on the hardware: device, precision, attention kernel, memory allocator."""

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# glibc's mallopt parameters (malloc.h) and what they are set to, in bytes.
_MALLOPT = {-1: 2**31 - 1, -2: 256 * 2**20, -3: 2**31 - 1}  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD


def device() -> torch.device:
    """Where models run: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(device: torch.device, precision: str) -> torch.dtype:
    """`bf16`, `fp32`, or `auto`: bf16 where the hardware computes it in less time than fp32, fp32 elsewhere."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" or fast_bf16_cpu() else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def fast_bf16_cpu() -> bool:
    """Whether this CPU multiplies matrices in less time in bf16 than in fp32.

    CPUs with AMX do, and AMD's with AVX512-bf16. Intel's with AVX512-bf16 but without AMX (where a virtual machine
    hides it) take twice as long as for fp32, and CPUs without such instructions convert to fp32 and back.
    """
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and _cpu_vendor() != "GenuineIntel"))


def _cpu_vendor() -> str:
    """As the CPU names its maker, where the system says so: "GenuineIntel", "AuthenticAMD"."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def attention_kernel(model: nn.Module) -> AbstractContextManager[object]:
    """On CPUs, where gradients are wanted, attention as plain matrix products; a GPU keeps its own choice.

    With few rows and small heads, as queries have, the backward pass of a CPU's flash kernel takes several times as
    long. Its forward pass takes less time, a quarter for many rows (docs/decisions.md).
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
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another system or C library
        return
    for parameter, value in _MALLOPT.items():
        mallopt(parameter, value)


def release_freed_memory() -> None:
    """Gives the memory that `keep_freed_memory` kept back to Linux, once.

    Texts of many lengths leave gaps between tensors. After 600 steps of the demo's stage 1 they were half of 3.5 GB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
