"""What the processes of a run share: the work of a batch, and what does not fit into one GPU.

Every process has all that trains (connector, heads, adapters: 0.2 billion parameters), and `DistributedDataParallel`
takes the mean of its gradients. `train.parallel=fsdp2` cuts the layers of the image encoder and of the language model
into pieces, one for each process (FSDP2), and gathers a layer while it computes: frozen billions need not fit into one
GPU. An encoder that trains (`vision.trained`) then has its gradients and moments in pieces, too.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from openblip2.config import RunSettings
from openblip2.distributed.collectives import world_size
from openblip2.errors import UserError

Losses = Callable[[int], dict[str, Tensor]]


class DataParallelLosses:
    """`losses(number)`, whose backward pass leaves the mean gradient of all processes in each of them.

    All processes begin with the first one's trained parameters.

    Args:
        model: All of it that requires a gradient is trained.
        losses: Batch number -> losses by name, as `Stage1.losses` gives them in several processes.
        sparse: Whether there are batches whose losses do not depend on all that trains; each step then looks which.
    """

    def __init__(self, model: nn.Module, losses: Losses, sparse: bool = False) -> None:
        self.losses, self.ddp = losses, None
        self.fsdp_modules: list[nn.Module] = []
        if world_size() == 1:
            return
        from torch.distributed.fsdp import FSDPModule

        # Parameters in pieces are left to FSDP2, which averages their gradients itself.
        replicated = [one for one in model.parameters() if one.requires_grad and not in_pieces(one)]
        self.ddp = nn.parallel.DistributedDataParallel(
            _Step(replicated, losses), find_unused_parameters=sparse, gradient_as_bucket_view=True
        )
        self.fsdp_modules = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def __call__(self, number: int) -> dict[str, Tensor]:
        return self.losses(number) if self.ddp is None else self.ddp(number)

    @contextmanager
    def batch(self, last: bool) -> Iterator[None]:
        """Around one batch and its backward pass: gradients are sent with the last batch of a step only."""
        with ExitStack() as stack:
            if self.ddp is not None and not last:
                stack.enter_context(self.ddp.no_sync())
            for module in self.fsdp_modules:
                module.set_requires_gradient_sync(last)  # pyright: ignore[reportCallIssue]
            yield


class _Step(nn.Module):
    """Losses as a module of what trains alone: DDP would broadcast the frozen parts and their buffers, too."""

    def __init__(self, trained: list[nn.Parameter], losses: Losses) -> None:
        super().__init__()
        self.trained, self.losses = nn.ParameterList(trained), losses

    def forward(self, number: int) -> dict[str, Tensor]:
        return self.losses(number)


def shard(model: nn.Module, settings: RunSettings, device: torch.device) -> None:
    """With `train.parallel=fsdp2`, cuts the layers of encoder and language model into pieces on the processes' devices.

    Args:
        model: May be on the CPU: the large parts need not fit on one device.
        settings: Of the run.
        device: Where the pieces go.

    Raises:
        UserError: The encoder has no layers, or the weights are quantised.
    """
    # One process is no error: a run may go on with fewer processes than it began with.
    if settings.train.parallel != "fsdp2" or world_size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if settings.stage == "stage2" and settings.language.dtype in ("int8", "int4"):
        raise UserError(
            f"train.parallel=fsdp2 takes no weights of language.dtype={settings.language.dtype}: leave it at auto, "
            "or train.parallel at ddp"
        )
    mesh = init_device_mesh(device.type, (world_size(),))
    parts = [part for part in (getattr(model, "vision", None), getattr(model, "language", None)) if part is not None]
    layers = [layer for part in parts for layer in layers_of(part)]
    if not layers:
        raise UserError("train.parallel=fsdp2: this image encoder has no layers to lay in pieces: leave it at ddp")
    for layer in layers:
        trained = {parameter for parameter in layer.parameters() if parameter.requires_grad}
        # Adapters in a frozen layer are few, and stay whole: DDP takes care of them.
        mixed = len(trained) < len(list(layer.parameters()))
        # Each layer is a root of its own, because embeddings and heads are used outside of the model's `forward`. By
        # default a root keeps its gathered parameters after the forward pass.
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained if mixed else None)
    language = getattr(model, "language", None)
    if language is not None:
        language.sharded = True


def layers_of(part: nn.Module) -> list[nn.Module]:
    """The layers of a transformer: the members of its outermost lists."""
    layers: list[nn.Module] = []
    for child in part.children():
        layers += list(child) if isinstance(child, nn.ModuleList) else layers_of(child)
    return layers


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> float:
    """The norm of all gradients, in pieces or whole; where it is larger than `most` they are scaled to that."""
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    # torch's functions take whole tensors or tensors in pieces, not both.
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
    """A tensor, detached; one in pieces over the processes (a `DTensor`) is gathered.

    All processes must call it, in the same order.
    """
    tensor = tensor.detach()
    return tensor.full_tensor() if in_pieces(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def fill(target: Tensor, full: Tensor) -> None:
    """Copies a tensor that every process has into one that may be in pieces: the opposite of `full_tensor`."""
    assert full.shape == target.shape, f"a tensor of shape {list(full.shape)} does not fill {list(target.shape)}"
    target.detach().copy_(like(target, full))


def like(target: Tensor, full: Tensor) -> Tensor:
    """A tensor that every process has, on the device of `target` and cut in the same way; its dtype stays."""
    if not in_pieces(target):
        return full.to(target.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    # Every process has all of it: each takes its piece, and nothing is sent.
    full = full.to(target.to_local().device)
    return distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)


def in_pieces(tensor: Tensor) -> bool:
    """Whether a tensor is in pieces over the processes."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False  # without the import below, which is slow
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
