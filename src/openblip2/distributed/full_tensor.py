"""Whole tensors out of the pieces that FSDP2 cuts them into, and back, so that files do not depend on it."""

from torch import Tensor, nn


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
