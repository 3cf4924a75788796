"""Accelerators and how many of them: peak, memory, bandwidth and links, as their makers state them."""

import difflib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from openblip2.errors import UserError

TERA, GIGA, GIB = 10**12, 10**9, 2**30
GPU_EFFICIENCY = {"stage1": 0.15, "stage2": 0.15}  # published BLIP-2 runs reach 12 to 18 %
# Of the fastest matrix product: what `openblip2 bench` measured on two cores at the laptop's sizes (docs/results.md:
# 15.1 pairs/s and 70 %); at ViT-g's 65 and 80 %.
CPU_EFFICIENCY = {"stage1": 0.37, "stage2": 0.7}


@dataclass(frozen=True)
class Accelerator:
    """One kind of accelerator.

    Attributes:
        flops: dense bf16 (fp16 where it has no bf16) products with fp32 sums, in floating-point operations a second.
        memory: bytes. bandwidth: of that memory, bytes a second.
        link: to the other accelerators of its machine, bytes a second in one direction.
        bf16: whether it has bf16 products. fused: whether attention keeps no probabilities.
        efficiency: the share of the peak that is planned with where none is given, by stage.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    bf16: bool = True
    fused: bool = True
    efficiency: Mapping[str, float] = field(default_factory=lambda: GPU_EFFICIENCY)


def _gpu(name: str, tflops: float, gib: int, gb_s: float, link_gb_s: float, bf16: bool = True) -> Accelerator:
    return Accelerator(name, tflops * TERA, gib * GIB, gb_s * GIGA, link_gb_s * GIGA, bf16)


# Makers count links in both directions: half of that. PCIe: 4.0 x16 32 GB/s each way, 3.0 x16 16 GB/s.
GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA A100 Tensor Core GPU data sheet (2021): 312 TFLOPS, 1,555 and 2,039 GB/s, NVLink 600 GB/s.
        _gpu("A100-40G", 312, 40, 1555, 300),
        _gpu("A100-80G", 312, 80, 2039, 300),
        # NVIDIA H100 data sheet (SXM): 1,979 TFLOPS with sparsity, half of it dense; 3.35 TB/s, NVLink 900 GB/s.
        _gpu("H100", 989.5, 80, 3350, 450),
        # NVIDIA H200 data sheet (SXM): as the H100, with 141 GB (131 GiB) at 4.8 TB/s.
        _gpu("H200", 989.5, 131, 4800, 450),
        # NVIDIA V100 data sheet (SXM2): 125 TFLOPS fp16, no bf16; 900 GB/s, NVLink 300 GB/s.
        _gpu("V100-16G", 125, 16, 900, 150, bf16=False),
        _gpu("V100-32G", 125, 32, 900, 150, bf16=False),
        # NVIDIA L40S data sheet: 362.05 TFLOPS dense, 48 GB at 864 GB/s, PCIe 4.0.
        _gpu("L40S", 362.05, 48, 864, 32),
        # NVIDIA Ada GPU architecture whitepaper, appendix A: 165.2 TFLOPS with fp32 sums, 1,008 GB/s, PCIe 4.0.
        _gpu("4090", 165.2, 24, 1008, 32),
        # NVIDIA T4 data sheet: 65 TFLOPS fp16, no bf16; 16 GB at 320 GB/s, PCIe 3.0.
        _gpu("T4", 65, 16, 320, 16, bf16=False),
    )
}
CPU = "cpu"


@dataclass(frozen=True)
class Cluster:
    """So many accelerators of one kind in machines of so many, and what connects the machines.

    `network`: of one machine, bytes a second in one direction.
    """

    kind: Accelerator
    count: int
    per_machine: int
    network: float

    @property
    def machines(self) -> int:
        return math.ceil(self.count / self.per_machine)

    @property
    def slowest_link(self) -> float:
        """Bytes a second of a ring through all accelerators, which goes through every machine once."""
        return self.kind.link if self.machines == 1 else min(self.kind.link, self.network)


def read_cluster(text: str, per_machine: int = 8, network_gbit: float = 100.0) -> Cluster:
    """`16xA100-40G`, `H100`, or `cpu`, which is this machine, its peak measured now.

    Raises:
        UserError: no such accelerator, or no such number of them.
    """
    found = re.fullmatch(r"(?:(\d+)\s*[x*])?\s*(.+)", text.strip(), re.IGNORECASE)
    names = {name.lower(): gpu for name, gpu in GPUS.items()}
    count, name = (int(found[1] or 1), found[2].lower()) if found else (0, text)
    if name == CPU:
        if count != 1:
            raise UserError(f"--gpus {text!r}: cpu is this machine, give it without a number")
        return Cluster(this_cpu(), 1, 1, math.inf)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {names[near[0]].name!r}?" if near else f"known are {', '.join(GPUS)} and cpu"
        raise UserError(f"--gpus {text!r}: {hint} Write it as 16xA100-40G")
    if not 1 <= count <= 100_000:
        raise UserError(f"--gpus {text!r}: give 1 to 100,000 of them, for example 16xA100-40G")
    return Cluster(names[name], count, per_machine, network_gbit * GIGA / 8)


def this_cpu() -> Accelerator:
    """The processor here: the fastest matrix product it now does, in the precision that training would take."""
    import torch

    from openblip2.bench.measure import matmul_peak
    from openblip2.train.hardware import compute_dtype

    place = torch.device("cpu")
    dtype = compute_dtype(place, "auto")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    peak, half = matmul_peak(dtype, place), dtype == torch.bfloat16
    return Accelerator(CPU, peak, memory, math.inf, math.inf, half, fused=False, efficiency=CPU_EFFICIENCY)
