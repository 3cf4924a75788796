"""The tiny configuration of the tests. All its sizes differ, so that swapped axes cause an error.

Nothing here imports transformers, so that the processes of `test_distributed`, which import it, start fast.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from openblip2.model.qformer import QFormer
from openblip2.model.stage1 import Stage1

P, V, Q, T, D = 7, 11, 5, 6, 30
HEADS, FFN, LAYERS, E, WORDS = 3, 28, 4, 9, 41  # the width of a head is 10
B, POSITIONS = 8, 13
CLS, SEP, DEC = 1, 2, WORDS - 1  # 0 is padding

M = TypeVar("M", bound=nn.Module)


def redraw(model: M, seed: int = 0, std: float = 0.2) -> M:
    """Redraws every parameter, because a new model has zero biases and scales of 1, which would hide errors.

    With a larger `std`, attention mixes so much that the rows become nearly equal after many layers.
    """
    random = torch.Generator().manual_seed(seed)
    scales = {id(m.weight) for m in model.modules() if "Norm" in type(m).__name__}  # LayerNorm, T5LayerNorm ...
    with torch.no_grad():
        for parameter in model.parameters():
            noise = std * torch.randn(parameter.shape, generator=random)
            parameter.copy_(noise + (id(parameter) in scales))
    return model.eval()


def qformer(
    vocabulary: int = WORDS, layers: int = LAYERS, cross_every: int = 2, dropout: float = 0.1, seed: int = 0
) -> QFormer:
    """A redrawn Q-Former in eval mode."""
    return redraw(QFormer(D, layers, HEADS, FFN, Q, V, vocabulary, POSITIONS, cross_every, dropout), seed)


def stage1(
    detach_gathered: bool = False,
    dropout: float = 0.1,
    seed: int = 0,
    decorrelation: float = 0.0,
    smooth_maximum: float = 0.0,
) -> Stage1:
    """A redrawn stage 1 in eval mode, without an image encoder."""
    options: dict[str, Any] = {"detach_gathered": detach_gathered, "decorrelation": decorrelation}
    model = redraw(Stage1(qformer(dropout=dropout), None, E, smooth_maximum=smooth_maximum, **options), seed)
    nn.init.constant_(model.temperature, 0.2)
    return model


def features(count: int = B, seed: int = 1) -> Tensor:
    """Patch features `[B, P, V]`; the patches of an image share a component."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, V, generator=random) + torch.randn(count, P, V, generator=random)


def texts(count: int = B, seed: int = 2, shortest: int = 3) -> tuple[Tensor, Tensor]:
    """Tokens `[B, T]` and `valid [B, T]`; lengths cycle from T down to `shortest`, so the first row is full."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(SEP + 1, DEC, (count, T), generator=random)
    lengths = T - torch.arange(count) % (T + 1 - shortest)
    valid = torch.arange(T) < lengths[:, None]
    tokens[:, 0] = CLS
    tokens[torch.arange(count), lengths - 1] = SEP
    return tokens.where(valid, 0), valid


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every trained parameter; zeros where the loss does not depend on it."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(
        loss, list(named.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(named, found, strict=True))


def assert_same_gradients(mine: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Compares relative to the largest entry of each gradient, because entries are sums that nearly cancel."""
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        scale = max(1.0, float(theirs[name].abs().max()))
        torch.testing.assert_close(
            gradient / scale,
            theirs[name] / scale,
            rtol=0,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )
