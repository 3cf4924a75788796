"""The module between the frozen image encoder and the language model in stage 2: its interface, and some of its kinds.

The paper's connector is the Q-Former (`model/qformer.py`). Those below are from other papers, for comparison: they have
no stage 1, and their last linear layer, to the width of the language model, is the projection of stage 2. For another
one, write a subclass of `Connector` and add it to `CONNECTORS` of `model/build.py`, in this package or in your program.

Shapes: B images, P patch tokens, V encoder width, Q visual tokens, D their width, T question tokens, S side of the
square of patches.
"""

import math
from abc import ABC, abstractmethod
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from openblip2.errors import UserError
from openblip2.model.blocks import INIT_STD

Count = Annotated[int, Field(ge=1, strict=True)]
Question = tuple[Tensor, Tensor]  # the Q-Former's token ids [B, T] int64, and [B, T] bool, False on padding


class Connector(nn.Module, ABC):
    """Converts the features of an image into visual tokens, which stage 2 then projects to the language model.

    The builder calls a subclass as `Kind(patches, image_width, **options)`: P, V, and the setting `connector.options`.
    The other constructor parameters are therefore its settings, and are checked against their annotations. A setting
    that does not fit P or V is a `UserError`. The Q-Former has its own settings (`qformer`), and the sizes of a BERT.

    Attributes:
        name: value of the setting `connector.name`, and first part of its tensors' names in model.safetensors.
        has_stage1: whether stage 2 can start from a stage-1 run.
        tokens: Q.
        width: D.
        sizes: stored in `config.json`, so that a run is only loaded into a connector of the same sizes.
        reads_questions: whether `visual_tokens` requires a question; if False, it accepts none.
        checkpoint_activations: True saves memory: the backward pass recomputes the layers.
    """

    name: ClassVar[str]
    has_stage1: ClassVar[bool] = False

    def __init__(self, tokens: int, width: int, image_width: int) -> None:
        super().__init__()
        self.tokens, self.width, self.image_width = tokens, width, image_width
        self.sizes = {"tokens": tokens, "width": width, "image_width": image_width}
        self.reads_questions = self.checkpoint_activations = False

    @abstractmethod
    def visual_tokens(self, patches: Tensor, question: Question | None = None) -> Tensor:
        """Features `[B, P, V]` to visual tokens `[B, Q, D]`. The features may be in half precision, the weights not."""


def patch_side(patches: int, grid: int = 1) -> int:
    """S: the last S x S patch tokens are the picture, row by row; tokens before them are `[CLS]` and registers.

    Raises:
        UserError: there are no patches, or a grid of `grid * grid` cells would be finer than the patches.
    """
    if (side := math.isqrt(patches)) < 1:
        raise UserError("the image encoder gives no patch tokens, which this connector needs: choose another encoder")
    if grid > side:
        raise UserError(
            f"connector.options: grid={grid} gives {grid**2} visual tokens from {side**2} patches: give at most {side}"
        )
    return side


class PatchMLP(Connector):
    """Every patch becomes a visual token (LLaVA-1.5: Linear, GELU, Linear; the last one is stage 2's projection)."""

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
        grid: side of the grid, at most S; Q is its square.
    """

    name: ClassVar[str] = "pooled_mlp"

    def __init__(self, patches: int, image_width: int, grid: Count = 4, width: Count = 768) -> None:
        side = patch_side(patches, grid)
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
        grid: side of the grid that the patches are pooled to, at most S; Q is its square.
        depth: number of blocks before the pooling, and also after it.
    """

    name: ClassVar[str] = "c_abstractor"

    def __init__(self, patches: int, image_width: int, grid: Count = 4, width: Count = 768, depth: Count = 3) -> None:
        side = patch_side(patches, grid)
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


def as_square(rows: Tensor, side: int) -> Tensor:
    """The last `side * side` of patches `[B, P, V]` as `[B, V, S, S]`."""
    return rows[:, -(side**2) :].transpose(1, 2).unflatten(2, (side, side))


def as_rows(square: Tensor) -> Tensor:
    """`[B, D, S, S]` to `[B, S * S, D]`, row by row."""
    return square.flatten(2).transpose(1, 2)


OTHERS = (Resampler, PatchMLP, PooledMLP, CAbstractor)
