"""Connectors from other papers, for comparison with the Q-Former. Each is one class, and none has a stage 1.

Their last linear layer, which maps to the width of the language model, is the projection of stage 2.

Shapes: B images, P patch tokens, V encoder width, Q visual tokens, D their width, S side of the square of patches.
"""

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from openblip2.errors import UserError
from openblip2.model.blocks import INIT_STD
from openblip2.model.connector import Connector, Question

Count = Annotated[int, Field(ge=1, strict=True)]


def patch_side(patches: int) -> int:
    """S: the last S x S patch tokens are the picture, row by row; tokens before them are `[CLS]` and registers.

    Raises:
        UserError: there are no patches.
    """
    if (side := math.isqrt(patches)) < 1:
        raise UserError("the image encoder gives no patch tokens, which this connector needs: choose another encoder")
    return side


class PatchMLP(Connector):
    """Every patch becomes a visual token (LLaVA-1.5: Linear, GELU, Linear; the last one is stage 2's projection).

    Args:
        patches: P.
        image_width: V.
        width: D.
    """

    name: ClassVar[str] = "mlp"

    def __init__(self, patches: int, image_width: int, width: Count = 768) -> None:
        side = patch_side(patches)
        super().__init__(side * side, width, image_width)
        self.norm = nn.LayerNorm(image_width)
        self.hidden = nn.Linear(image_width, width)

    def visual_tokens(self, patches: Tensor, question: Question | None = None) -> Tensor:
        """Maps each of the last Q patches separately: `[B, Q, V]` -> `[B, Q, D]`."""
        return F.gelu(self.hidden(self.norm(patches[:, -self.tokens :].float())))  # without [CLS] and registers


class PooledMLP(PatchMLP):
    """`PatchMLP` on patches that are first averaged over the cells of a grid (DeCo, Yao et al. 2024).

    Args:
        patches: P.
        image_width: V.
        grid: side of the grid, at most S; Q is its square.
        width: D.
    """

    name: ClassVar[str] = "pooled_mlp"

    def __init__(self, patches: int, image_width: int, grid: Count = 4, width: Count = 768) -> None:
        side = require_grid(patches, grid)
        super().__init__(patches, image_width, width)
        self.side, self.grid, self.tokens = side, grid, grid * grid
        self.sizes["tokens"] = self.tokens  # PatchMLP stored the number of patches

    def visual_tokens(self, patches: Tensor, question: Question | None = None) -> Tensor:
        """As in `PatchMLP`, but for cells instead of patches."""
        cells = F.adaptive_avg_pool2d(as_square(patches.float(), self.side), self.grid)  # [B, V, grid, grid]
        return super().visual_tokens(as_rows(cells))


class Resampler(Connector):
    """Learned queries that read the patches, without separate self-attention (Flamingo's perceiver resampler).

    Each layer has one attention, in which the queries attend to both the patches and the queries, and a feed-forward
    network; LayerNorm comes before each of them.

    Args:
        patches: P.
        image_width: V.
        queries: Q.
        width: D, a multiple of `heads`.
        layers: number of layers.
        heads: number of attention heads.
    """

    name: ClassVar[str] = "resampler"

    def __init__(
        self,
        patches: int,
        image_width: int,
        queries: Count = 32,
        width: Count = 768,
        layers: Count = 6,
        heads: Count = 12,
    ) -> None:
        super().__init__(queries, width, image_width)
        if width % heads:
            raise UserError(f"connector.options: width={width} is not a multiple of heads={heads}: change one of them")
        self.image_norm = nn.LayerNorm(image_width)
        self.image = nn.Linear(image_width, width)
        self.positions = nn.Parameter(torch.randn(1, patches, width) * INIT_STD)  # attention ignores the order
        self.queries = nn.Parameter(torch.randn(1, queries, width) * INIT_STD)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(width),
                    "patch_norm": nn.LayerNorm(width),
                    "attention": nn.MultiheadAttention(width, heads, batch_first=True),
                    "ffn": nn.Sequential(
                        nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
                    ),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def visual_tokens(self, patches: Tensor, question: Question | None = None) -> Tensor:
        """Features `[B, P, V]` to `[B, Q, D]`."""
        image = self.image(self.image_norm(patches.float())) + self.positions
        rows = self.queries.expand(len(patches), -1, -1)  # [B, Q, D]
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            normed = layer["norm"](rows)
            source = torch.cat([layer["patch_norm"](image), normed], dim=1)  # includes the queries (Flamingo)
            rows = rows + layer["attention"](normed, source, source, need_weights=False)[0]
            rows = rows + layer["ffn"](rows)
        return self.norm(rows)  # needed because the residual sums grow with depth


class CAbstractor(Connector):
    """Convolutions around average pooling, which preserve the spatial neighbourhood (Honeybee's C-Abstractor).

    Args:
        patches: P.
        image_width: V.
        grid: side of the grid that the patches are pooled to, at most S; Q is its square.
        width: D.
        depth: number of blocks before the pooling, and also after it.
    """

    name: ClassVar[str] = "c_abstractor"

    def __init__(self, patches: int, image_width: int, grid: Count = 4, width: Count = 768, depth: Count = 3) -> None:
        side = require_grid(patches, grid)
        super().__init__(grid * grid, width, image_width)
        self.side, self.grid = side, grid
        self.norm = nn.LayerNorm(image_width)
        self.positions = nn.Parameter(torch.randn(1, self.side**2, image_width) * INIT_STD)
        self.enter = nn.Conv2d(image_width, width, 1)  # to D, patch by patch
        self.before = nn.Sequential(*(ConvBlock(width) for _ in range(depth)))
        self.after = nn.Sequential(*(ConvBlock(width) for _ in range(depth)))
        self.readout = nn.Linear(width, width)

    def visual_tokens(self, patches: Tensor, question: Question | None = None) -> Tensor:
        """Features `[B, P, V]` to `[B, Q, D]`."""
        rows = self.norm(patches[:, -(self.side**2) :].float()) + self.positions
        square = self.before(self.enter(as_square(rows, self.side)))  # [B, D, S, S]
        cells = self.after(F.adaptive_avg_pool2d(square, self.grid))
        return F.gelu(self.readout(as_rows(cells)))


class ConvBlock(nn.Module):
    """A residual bottleneck of RegNet-Y: 1 x 1, 3 x 3 in groups, squeeze-and-excitation, 1 x 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        groups = math.gcd(width, 24)  # grouped as in RegNet; the number of groups must divide the width
        self.reduce = nn.Sequential(nn.Conv2d(width, width, 1), nn.GroupNorm(1, width), nn.SiLU())
        self.mix = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=groups), nn.GroupNorm(1, width), nn.SiLU()
        )
        inner = max(1, width // 4)
        self.gate = nn.Sequential(nn.Conv2d(width, inner, 1), nn.SiLU(), nn.Conv2d(inner, width, 1), nn.Sigmoid())
        self.widen = nn.Sequential(nn.Conv2d(width, width, 1), nn.GroupNorm(1, width))

    def forward(self, square: Tensor) -> Tensor:
        inner = self.mix(self.reduce(square))
        inner = inner * self.gate(inner.mean((2, 3), keepdim=True))  # scales channels by their means over the picture
        return F.silu(square + self.widen(inner))  # the activation follows the residual sum, as in RegNet


def require_grid(patches: int, grid: int) -> int:
    """Returns `patch_side`, after a check that the grid is not finer than the patches.

    Raises:
        UserError: the grid is finer than the patches.
    """
    side = patch_side(patches)
    if grid > side:
        raise UserError(
            f"connector.options: grid={grid} gives {grid**2} visual tokens from {side**2} patches: give at most {side}"
        )
    return side


def as_square(rows: Tensor, side: int) -> Tensor:
    """The last `side * side` of patches `[B, P, V]` as `[B, V, S, S]`."""
    return rows[:, -(side**2) :].transpose(1, 2).unflatten(2, (side, side))


def as_rows(square: Tensor) -> Tensor:
    """`[B, D, S, S]` to `[B, S * S, D]`, row by row."""
    return square.flatten(2).transpose(1, 2)


OTHERS = (Resampler, PatchMLP, PooledMLP, CAbstractor)
