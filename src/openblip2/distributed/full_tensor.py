"""Whole tensors out of pieces and back: what FSDP2 cuts over processes is saved and loaded as if it never had been."""

from torch import Tensor, nn


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may lie in pieces over the processes (a `DTensor`), detached; another as it is.

    All processes must ask, in the same order: the pieces travel.
    """
    tensor = tensor.detach()
    return tensor.full_tensor() if in_pieces(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def fill(target: Tensor, whole: Tensor) -> None:
    """Copies a whole tensor, there in every process, into one that may lie in pieces: `full_tensor` backwards."""
    assert whole.shape == target.shape, f"a tensor of shape {list(whole.shape)} does not fill {list(target.shape)}"
    target.detach().copy_(like(target, whole))


def like(target: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor, there in every process, where and in the pieces that `target` lies in; its dtype stays."""
    if not in_pieces(target):
        return whole.to(target.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    # Every process has the whole: each takes its piece, and nothing is sent.
    whole = whole.to(target.to_local().device)
    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)


def in_pieces(tensor: Tensor) -> bool:
    """Whether a tensor lies in pieces over the processes."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False  # and the module of the others, which is slow to import, is not needed
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
