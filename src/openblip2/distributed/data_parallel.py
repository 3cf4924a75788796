"""Data parallelism for the work of a batch, and sharding for models that do not fit into one GPU.

Every process has all trained parameters (connector, heads, adapters: 0.2 billion), and `DistributedDataParallel`
averages their gradients. `train.parallel=fsdp2` shards the layers of the image encoder and of the language model over
the processes (FSDP2) and gathers a layer while it computes, so that billions of frozen parameters need not fit into
one GPU. If the encoder is trained (`vision.trained`), its gradients and optimizer moments are sharded, too.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from openblip2.config import RunSettings
from openblip2.distributed.collectives import world_size
from openblip2.errors import UserError

Losses = Callable[[int], dict[str, Tensor]]


class DataParallelLosses:
    """Wraps `losses(number)` so that its backward pass gives each process the mean gradient over all processes.

    All processes start with the trained parameters of the first one.

    Args:
        model: All of its parameters that require a gradient are trained.
        losses: Batch number -> losses by name, weighted as `Stage1.losses` does with several processes.
        sparse: Whether some batches have losses that do not use all trained parameters; each step then finds these.
    """

    def __init__(self, model: nn.Module, losses: Losses, sparse: bool = False) -> None:
        self.losses, self.ddp = losses, None
        self.fsdp_modules: list[nn.Module] = []
        if world_size() == 1:
            return
        from torch.distributed.fsdp import FSDPModule

        # Sharded parameters are left to FSDP2, which averages their gradients itself.
        replicated = [one for one in model.parameters() if one.requires_grad and not in_pieces(one)]
        self.ddp = nn.parallel.DistributedDataParallel(
            _Step(replicated, losses), find_unused_parameters=sparse, gradient_as_bucket_view=True
        )
        self.fsdp_modules = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def __call__(self, number: int) -> dict[str, Tensor]:
        return self.losses(number) if self.ddp is None else self.ddp(number)

    @contextmanager
    def batch(self, last: bool) -> Iterator[None]:
        """Wraps one batch and its backward pass; gradients are synchronised only after the last batch of a step."""
        for module in self.fsdp_modules:
            module.set_requires_gradient_sync(last)  # pyright: ignore[reportCallIssue]
        with nullcontext() if self.ddp is None or last else self.ddp.no_sync():
            yield


class _Step(nn.Module):
    """Losses as a module with only the trained parameters, because DDP would broadcast frozen parts, too."""

    def __init__(self, trained: list[nn.Parameter], losses: Losses) -> None:
        super().__init__()
        self.trained, self.losses = nn.ParameterList(trained), losses

    def forward(self, number: int) -> dict[str, Tensor]:
        return self.losses(number)


def shard(model: nn.Module, settings: RunSettings, device: torch.device) -> None:
    """With `train.parallel=fsdp2`, shards the layers of encoder and language model over the processes' devices.

    Args:
        model: May be on the CPU, because the large parts need not fit on one device.
        settings: The settings of the run.
        device: The device of the shards.

    Raises:
        UserError: The encoder has no layers, or the weights are quantised.
    """
    # A single process is allowed, because a run may be resumed with fewer processes than before.
    if settings.train.parallel != "fsdp2" or world_size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if settings.stage == "stage2" and settings.language.dtype in ("int8", "int4"):
        raise UserError(
            f"train.parallel=fsdp2 does not support language.dtype={settings.language.dtype}: leave it at auto, "
            "or use train.parallel=ddp"
        )
    mesh = init_device_mesh(device.type, (world_size(),))
    parts = [part for part in (getattr(model, "vision", None), getattr(model, "language", None)) if part is not None]
    layers = [layer for part in parts for layer in layers_of(part)]
    if not layers:
        raise UserError("train.parallel=fsdp2: this image encoder has no layers to shard: use train.parallel=ddp")
    for layer in layers:
        trained = {parameter for parameter in layer.parameters() if parameter.requires_grad}
        # Adapters in a frozen layer are small, so they are not sharded and DDP averages their gradients.
        mixed = len(trained) < len(list(layer.parameters()))
        # Each layer is its own FSDP root, because embeddings and heads are used outside of the model's `forward`. By
        # default a root keeps its gathered parameters after the forward pass, so resharding is requested.
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained if mixed else None)
    language = getattr(model, "language", None)
    if language is not None:
        language.sharded = True


def layers_of(part: nn.Module) -> list[nn.Module]:
    """The layers of a transformer, which are the members of its outermost `ModuleList`s."""
    layers: list[nn.Module] = []
    for child in part.children():
        layers += list(child) if isinstance(child, nn.ModuleList) else layers_of(child)
    return layers


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> float:
    """Clips all gradients, sharded or not, to a total norm of `most`; returns the norm before clipping."""
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    # torch's functions accept either whole or sharded tensors, not both.
    whole, pieces = ([p for p in with_gradient if in_pieces(p) == cut] for cut in (False, True))
    gradients = [[p.grad for p in kind if p.grad is not None] for kind in (whole, pieces) if kind]
    norms = [full_tensor(nn.utils.get_total_norm(kind, foreach=True)) for kind in gradients]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    nn.utils.clip_grads_with_norm_(whole, most, norm, foreach=True)
    for parameter in pieces:
        assert parameter.grad is not None
        parameter.grad.to_local().mul_((most / (norm + 1e-6)).clamp(max=1.0))  # pyright: ignore
    return float(norm)


def full_tensor(tensor: Tensor) -> Tensor:
    """Detaches a tensor, and gathers it if it is sharded (a `DTensor`). All processes must call it in one order."""
    tensor = tensor.detach()
    return tensor.full_tensor() if in_pieces(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def like(target: Tensor, full: Tensor) -> Tensor:
    """The inverse of `full_tensor`: moves a tensor to the device of `target` and shards it alike; the dtype stays."""
    if not in_pieces(target):
        return full.to(target.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    # Every process has the full tensor and takes its own shard, so nothing is sent.
    full = full.to(target.to_local().device)
    return distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)


def in_pieces(tensor: Tensor) -> bool:
    """Whether a tensor is sharded over the processes."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False  # avoids the import below, which is slow
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
