"""The frozen image encoder (paper, section 3.4): features of its second-to-last layer, all tokens.

It is a vision transformer of `transformers` (`HFVision`) or any module that implements `Vision`.

Shapes: B images, P patch tokens (class and register tokens included), V encoder width, S image side in px.
"""

import inspect
import math
from functools import cached_property, partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openblip2.compat import keep_first_stages, set_attention
from openblip2.errors import UserError
from openblip2.model.precision import own_precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

HANDED_IN = "module:"  # prefix of the names of parts that a caller passed in: they cannot be loaded by name
# Encoders that accept any image size without an option: positions are interpolated (DINOv2) or rotary (DINOv3).
ANY_SIZE = frozenset({"dinov2", "dinov2_with_registers", "dinov3_vit"})
RIDGE = 0.01  # of whitening, times the mean variance: directions with less variance are noise and stay small
# Fields of an encoder's configuration that change its features but cannot be seen in its weights.
_SHAPING = ("model_type", "hidden_act", "layer_norm_eps", "num_attention_heads", "patch_size", "rope_theta")

Triple = tuple[float, float, float]


class Whitening(nn.Module):
    """Makes the axes of frozen features uncorrelated and of equal variance: `(features - mean) @ matrix`, frozen.

    Not in the paper; off unless `vision.whiten` is set. The features of a frozen encoder vary mostly along a few
    directions that all pictures share (here the largest has 60 times the average variance), and objects differ in
    directions of small variance, which new cross-attention weights can hardly use until training has adapted to them.

    Args:
        mean: `[V]`, fp32.
        matrix: `[V, V]`, fp32.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, mean: Tensor, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("matrix", matrix)

    def forward(self, features: Tensor) -> Tensor:
        """`[..., V]` -> `[..., V]` in the same dtype."""
        with torch.autocast(features.device.type, enabled=False):
            return ((features.float() - self.mean) @ self.matrix).to(features.dtype)


def fit_whitening(features: Tensor) -> Whitening:
    """Fits the whitening to features `[..., V]`: symmetric (ZCA), with a ridge of `RIDGE` x the mean variance."""
    rows = features.flatten(0, -2).double()  # rows x V; fp64, because variances span many orders of magnitude
    mean = rows.mean(0)
    variances, axes = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    matrix = (axes * (variances + RIDGE * variances.mean()).rsqrt()) @ axes.T  # rotated back
    return Whitening(mean.float(), matrix.float())


class Vision(Protocol):
    """The interface of a user's own image encoder: an `nn.Module` with two attributes.

    Attributes:
        width: V.
        image_size: S, the side in px of the images that it takes.
    """

    width: int
    image_size: int

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 `[B, 3, S, S]` RGB in [0, 255], not normalised, to features `[B, P, V]`.

        For attention maps and `warm_start` the last tokens must be a square of patches, row by row.
        """
        ...


class FrozenVision(nn.Module):
    """An image encoder as both stages use it: frozen, always in eval mode, in its own precision.

    Args:
        encoder: the encoder; it is frozen in place.
        width: V.
        image_size: S.

    Attributes:
        whitening: applied to the features, if set.
        trained: whether the encoder is trained, in fine-tuning.
        kind: its architecture.
        source: the setting `vision.name`; for a user's own encoder it cannot be loaded.
        shaping: what changes the features but cannot be seen in the weights, as far as it is known.
        layers: how many layers run, or -1 if unknown.
        mean, std: used to normalise pixels, or () if unknown.
    """

    layers = -1
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __init__(self, encoder: nn.Module, width: int, image_size: int) -> None:
        super().__init__()
        self.width, self.image_size = width, image_size
        self.encoder: Any = encoder.requires_grad_(False)
        self.whitening: Whitening | None = None
        self.trained = False
        self.kind = type(encoder).__name__
        self.source, self.shaping = f"{HANDED_IN}{self.kind}", {"module": repr(encoder)}
        self.eval()

    def train(self, mode: bool = True) -> "FrozenVision":
        """Stays in eval mode: dropout is off, whether the encoder is frozen or trained."""
        return super().train(False)

    @cached_property
    def patches(self) -> int:
        """P."""
        with torch.no_grad():
            return self(self.gray_picture()).shape[1]

    @property
    def grid(self) -> int:
        """Patches along a side; the patches are the last `grid * grid` tokens, row by row."""
        return math.isqrt(self.patches)

    def gray_picture(self) -> Tensor:
        """Pixels of one gray picture, on the encoder's device."""
        some = next(chain(self.encoder.parameters(), self.encoder.buffers()), torch.empty(0))
        return torch.full((1, 3, self.image_size, self.image_size), 128, dtype=torch.uint8, device=some.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the encoder's weights."""
        return next((p.dtype for p in self.encoder.parameters()), torch.float32)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels, uint8 `[B, 3, S, S]` RGB in [0, 255] on the encoder's device, to features `[B, P, V]`.

        It computes in the dtype of its weights, also the features: autocast to another dtype is disabled inside, unless
        the encoder is trained.
        """
        side = self.image_size
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, side, side):
            raise ValueError(f"pixels must be uint8 [B, 3, {side}, {side}], not {pixels.dtype} {list(pixels.shape)}")
        if self.trained:  # uses the precision of training
            features = self._encode(pixels)
        else:
            with own_precision(pixels.device, self.dtype):
                features = self._encode(pixels)
        return features if self.whitening is None else self.whitening(features)

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels)


def frozen_vision(encoder: Vision) -> FrozenVision:
    """Makes a `FrozenVision` of an encoder that a caller passes in, unless it is one; it must implement `Vision`."""
    if isinstance(encoder, FrozenVision):
        return encoder
    kind = type(encoder).__name__
    sizes: list[Any] = [getattr(encoder, name, None) for name in ("width", "image_size")]
    if not isinstance(encoder, nn.Module) or not all(type(size) is int for size in sizes):
        raise UserError(f"image encoder {kind}: it must be an nn.Module with two whole numbers, width and image_size")
    vision = FrozenVision(encoder, *sizes)
    with torch.no_grad():
        shape = vision(vision.gray_picture()).shape
    if len(shape) != 3 or (shape[0], shape[2]) != (1, vision.width):
        raise UserError(f"image encoder {kind}: for one picture it returns {list(shape)}, not [1, P, {vision.width}]")
    return vision


class HFVision(FrozenVision):
    """A frozen image encoder of `transformers`, cut off after one of its layers; it normalises pixels in float32.

    The output is that of the chosen layer, `hidden_states[layer]` of `transformers`: no final norm, no pooling, no
    projection. The layers after it are removed from `encoder` in place, so that they cost neither memory nor time.

    Args:
        encoder: a vision transformer of `transformers`, in the dtype in which it will run.
        layer: the layer to take as a hidden-state index: -1 is the last, -2 the second to last (the paper's), 1 the
            first.
        image_size: S, a multiple of the patch side. If it is not the encoder's own, its position embeddings are
            interpolated (bicubic).
        mean, std: mean and standard deviation of red, green and blue in the encoder's training, in [0, 1].

    Raises:
        UserError: the encoder is not a plain stack of layers, has no such layer, or does not accept that image size.
    """

    def __init__(
        self,
        encoder: "PreTrainedModel",
        layer: int = -2,
        image_size: int = 224,
        mean: Triple = CLIP_MEAN,
        std: Triple = CLIP_STD,
    ) -> None:
        config: Any = encoder.config
        super().__init__(encoder, config.hidden_size, image_size)
        set_attention(encoder)
        self.mean, self.std = mean, std
        self.kind, self.source = config.model_type, str(config.name_or_path) or self.source
        self.shaping = {name: value for name, value in config.to_dict().items() if name in _SHAPING}
        self._options = _options_for_size(encoder, image_size)
        stack = _stack(encoder)
        depth, self.layers = len(stack), layer if layer > 0 else len(stack) + 1 + layer
        if not 1 <= self.layers <= depth or layer == 0:
            raise UserError(
                f"vision layer {layer} does not exist: this {self.kind!r} has {depth} layers, -1 (last) to {-depth}, "
                f"or 1 to {depth}"
            )
        del stack[self.layers :]
        config.num_hidden_layers = self.layers
        keep_first_stages(config, self.layers)

    def unfreeze(self) -> None:
        """Makes all parameters that affect its features trainable; it then computes in the precision of training."""
        self.trained = True
        parameters = dict(self.encoder.requires_grad_(True).named_parameters())
        # These parameters (no pooler, last norm or mask token) are found by a backward pass for one gray picture.
        with torch.enable_grad():
            features = self(self.gray_picture())
        found = torch.autograd.grad(features.float().sum(), list(parameters.values()), allow_unused=True)
        for parameter, gradient in zip(parameters.values(), found, strict=True):
            parameter.requires_grad_(gradient is not None)

    def depths(self) -> dict[str, int]:
        """The depth of each parameter, by name: 1 to `layers` in the layers, 0 before them."""
        layers = {id(p): n for n, layer in enumerate(_stack(self.encoder), 1) for p in layer.parameters()}
        return {name: layers.get(id(parameter), 0) for name, parameter in self.named_parameters()}

    def checkpoint_activations(self) -> None:
        """Enables activation checkpointing: the backward pass recomputes each layer instead of storing activations."""
        for layer in _stack(self.encoder):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def _encode(self, pixels: Tensor) -> Tensor:
        # Not buffers: `.to(torch.bfloat16)` on a parent would round them.
        mean, std = (torch.tensor(c, device=pixels.device).view(3, 1, 1) for c in (self.mean, self.std))
        pixels = ((pixels.float() / 255 - mean) / std).to(self.encoder.dtype)
        seen: list[Any] = []
        # A hook instead of `output_hidden_states`, which would keep the output of every layer until the end.
        hook = _stack(self.encoder)[-1].register_forward_hook(lambda layer, given, output: seen.append(output))
        try:
            self.encoder(pixels, **self._options)
        finally:
            hook.remove()
        return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def side_of(size: Any) -> int:
    """Side in px of 224, (224, 224), {"height": 224, "width": 224} or {"shortest_edge": 224}."""
    if isinstance(size, int):
        return size
    return int(min(size.values() if isinstance(size, dict) else size))


def _stack(encoder: "PreTrainedModel") -> nn.ModuleList:
    config: Any = encoder.config
    lists = [module for module in encoder.modules() if isinstance(module, nn.ModuleList)]
    stacks = [module for module in lists if len(module) == config.num_hidden_layers]
    if len(stacks) != 1:
        raise UserError(
            f"image encoder {config.model_type!r} is not one plain stack of {config.num_hidden_layers} layers"
        )
    return stacks[0]


def _options_for_size(encoder: "PreTrainedModel", image_size: int) -> dict[str, bool]:
    """Checks an image size, and returns the encoder's options for it."""
    config: Any = encoder.config
    patch, native = side_of(config.patch_size), side_of(config.image_size)
    if image_size < patch or image_size % patch:
        below = max(image_size // patch, 1) * patch
        raise UserError(
            f"image size {image_size} px is not a multiple of the encoder's patch of {patch} px: "
            f"use {below} or {below + patch}"
        )
    if "interpolate_pos_encoding" in inspect.signature(encoder.forward).parameters:
        return {"interpolate_pos_encoding": True}  # at the native size it changes nothing
    if image_size != native and config.model_type not in ANY_SIZE:
        raise UserError(f"image encoder {config.model_type!r} accepts only {native} px, not {image_size}")
    return {}
