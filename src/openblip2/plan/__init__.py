"""Plans a run by one real training step on fake tensors, for which torch's meta kernels compute only the shapes."""

import math
import weakref
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from openblip2 import hardware
from openblip2.config import RunSettings
from openblip2.distributed.data_parallel import layers_of
from openblip2.errors import UserError
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2
from openblip2.plan.models import build_model

GIB = 2**30
CONTEXT = 0.8 * GIB  # assumed: CUDA's context and the buffers of its libraries
FRAGMENTS = 0.05  # assumed: share of the rest that the allocator cannot use
# Dense bf16 TFLOPS with fp32 sums, and GiB of memory: NVIDIA's data sheets, figures "with sparsity" halved.
GPUS = {
    "A100-40G": (312.0, 40),
    "A100-80G": (312.0, 80),
    "H100": (989.5, 80),
    "H200": (989.5, 131),
    "L40S": (362.05, 48),
    "4090": (165.2, 24),
}


def make_plan(
    settings: RunSettings,
    gpu: str,
    count: int,
    efficiency: float = 0.15,
    cached: bool | None = None,
    text: int | None = None,
) -> dict[str, Any]:
    """Plan a stage of pre-training.

    Args:
        settings: The settings of the run; `train.batch` is the number of pairs over all GPUs.
        gpu: One of `GPUS`.
        count: The number of GPUs.
        efficiency: The share of the GPU's peak that the run reaches; published BLIP-2 runs: 0.12 to 0.18.
        cached: Whether features come from a cache; None = as in the settings.
        text: The number of tokens that captions are padded to; None = `data.max_tokens`.

    Returns:
        Bytes, seconds, numbers of parameters and floating-point operations (a multiply-add is two), ready for JSON.

    Raises:
        UserError: The run cannot be planned.
    """
    train, text = settings.train, settings.data.max_tokens if text is None else text
    cached = (bool(settings.data.features) or not settings.data.augment) if cached is None else cached
    if train.batch < count:
        raise UserError(f"train.batch={train.batch}: give at least one pair for each of the {count} GPUs")
    if settings.vision.trained or settings.qformer.question_in_qformer:
        raise UserError(
            "vision.trained and qformer.question_in_qformer belong to fine-tuning; a plan is for pre-training"
        )
    if not settings.stage1.objectives:
        raise UserError("stage1.objectives=[]: there is nothing to train; name at least one of itc, itm, itg")
    model = build_model(settings, torch.float32 if train.precision == "fp32" else torch.bfloat16)
    longest = model.connector.sizes.get("positions", text)
    if not 4 <= text <= longest:
        raise UserError(f"--text-tokens {text}: give 4 to {longest}, the most that the Q-Former accepts")
    frozen: dict[str, Any] = {"image encoder": model.vision}
    if isinstance(model, Stage2):
        frozen["language model"] = model.language
    share = math.ceil(train.batch / count)  # pairs of one GPU
    pairs = min(train.chunk or share, share)  # pairs that go through the models at once
    shards = count if train.parallel == "fsdp2" else 1
    parameters: dict[str, int] = {}
    memory: dict[str, float] = {}
    for name, part in frozen.items():
        bits = {"int8": 8, "int4": 4}.get(settings.language.dtype, 16) if part is not model.vision else 16
        parameters[name] = sum(p.numel() for p in part.parameters() if not p.requires_grad)
        memory[f"{name}, frozen"] = _weight_bytes(part, shards, bits)
    parameters["trained"] = trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops, activations, feature_bytes = _run_step(model, settings, pairs, text, cached, chunked=pairs < share)
    memory |= {"trained weights": 4.0 * trained, "gradients": 4.0 * trained, "AdamW's moments": 8.0 * trained}
    memory["activations and temporary tensors"] = activations
    if pairs < share:
        memory["chunks: other features, sums of gradients"] = (share - pairs) * feature_bytes + 4.0 * trained
    memory["CUDA and its libraries (assumed)"] = CONTEXT
    memory["fragments (assumed)"] = FRAGMENTS * sum(memory.values())
    sent = {"gradients": 8.0 * trained * (1 - 1 / count)}  # ring all-reduce in fp32
    if isinstance(model, Stage1) and "itm" in settings.stage1.objectives:
        sent["features of ITM's negatives"] = train.accumulate * share * (1 - 1 / count) * feature_bytes
    tflops, gib = GPUS[gpu]
    step_flops = train.batch * train.accumulate * sum(map(sum, flops.values())) / pairs
    seconds = step_flops / (count * tflops * 1e12 * efficiency)
    return {
        "gpus": {"kind": gpu, "count": count, "peak_flops": tflops * 1e12, "memory": gib * GIB},
        "parameters": parameters,
        "flops_of_a_pair": {part: {"forward": f / pairs, "backward": b / pairs} for part, (f, b) in flops.items()},
        "step": {"pairs": train.batch * train.accumulate, "flops": step_flops, "seconds": seconds, "sent": sent},
        "run": {"steps": train.steps, "days": train.steps * seconds / 86400, "efficiency": efficiency},
        "memory": {"items": memory, "total": sum(memory.values()), "fits": sum(memory.values()) <= gib * GIB},
        "features": {"bytes_of_an_image": feature_bytes, "cached": cached},
    }


def _run_step(
    model: Stage1 | Stage2, settings: RunSettings, pairs: int, text: int, cached: bool, chunked: bool
) -> tuple[dict[str, tuple[int, int]], int, int]:
    """FLOPs of `pairs` pairs, peak bytes besides weights and gradients, and bytes of an image's features in fp16."""
    vision, half = model.vision, settings.train.precision != "fp32"
    assert vision is not None
    if settings.train.checkpoint_activations:
        model.connector.checkpoint_activations = True
        if isinstance(model, Stage2):
            model.language.checkpoint_activations()
    # A patch and not a mode, because a mode would be inactive when the backward pass recomputes a layer.
    gpu = patch.object(hardware, "plain_is_faster", lambda *_: False)
    attention = patch.object(F, "scaled_dot_product_attention", _attention)
    with FakeTensorMode(allow_non_fake_inputs=True), _AllTrue(), gpu, attention:
        model.to_empty(device="cpu")  # fake CPU tensors, because there is no autocast for "meta"
        with Meter(model) as meter, torch.autocast("cpu", torch.bfloat16, enabled=half):
            features = vision(torch.empty(pairs, 3, vision.image_size, vision.image_size, dtype=torch.uint8))
            flops = {"image encoder": (meter.lap(), 0)}
            if cached:
                flops, meter.peak = {}, meter.now
            if isinstance(model, Stage1):
                flops["Q-Former and heads"] = _stage1(model, settings, features, text, chunked, meter)
            else:
                flops |= _stage2(model, features, text, meter)
    return flops, meter.peak, 2 * features[0].numel()


def _stage1(
    model: Stage1, settings: RunSettings, features: Tensor, text: int, chunked: bool, meter: "Meter"
) -> tuple[int, int]:
    pairs, objectives = len(features), settings.stage1.objectives
    tokens, valid = torch.zeros(pairs, text, dtype=torch.long), torch.ones(pairs, text, dtype=torch.bool)
    given: Any = {"features": features, "negatives": (torch.arange(pairs).roll(1), torch.arange(pairs).roll(1))}
    if chunked:  # ITC's vectors of all chunks are computed before any chunk has a graph
        with torch.no_grad():
            model.losses(tokens, valid, **given, objectives=("itc",))
    losses = [*model.losses(tokens, valid, **given, objectives=objectives).values()]
    # ITM's negatives from other GPUs or chunks arrive as features, so their keys and values are computed here.
    fetched = round(pairs * (1 - pairs / settings.train.batch)) if "itm" in objectives else 0
    if fetched:
        losses += [side.sum() for layer in model.connector.encode_image(features[:fetched]).layers for side in layer]
    forward = meter.lap()
    torch.stack(losses).sum().backward()
    return forward, meter.lap()


def _stage2(model: Stage2, features: Tensor, text: int, meter: "Meter") -> dict[str, tuple[int, int]]:
    pairs = len(features)
    captions = [" ".join(["abc"] * text)] * pairs  # `text` tokens of `LengthTokenizer`
    # A batch of an encoder-decoder is padded to its longest prefix and to its longest suffix.
    draws = [0.0 if n % 2 else 0.999 for n in range(pairs)]
    soft = model.soft_prompt(features=features)
    prompt, first = soft.detach().requires_grad_(), meter.lap()
    loss, _ = model.language.scored(prompt, [""] * pairs, captions, draws)
    forward = meter.lap()
    loss.backward()
    backward = meter.lap()
    soft.backward(prompt.grad)
    return {"Q-Former and projection": (first, meter.lap()), "language model": (forward, backward)}


def _weight_bytes(part: nn.Module, shards: int, bits: int) -> float:
    """Bytes on one GPU: layers are divided over `shards` GPUs, and weights of their linear layers have `bits` bits."""

    def size(modules: list[nn.Module]) -> float:
        return float(sum(p.numel() * p.element_size() for module in modules for p in module.parameters()))

    layers = layers_of(part)
    linear = size([module for layer in layers for module in layer.modules() if isinstance(module, nn.Linear)])
    # With shards, two layers are gathered at a time: the one that computes, and the next one, fetched meanwhile.
    whole = 2 * max(size([layer]) for layer in layers) if shards > 1 else 0
    return size([part]) - size(layers) + (size(layers) - (1 - bits / 16) * linear) / shards + whole


class Meter(TorchDispatchMode):
    """Counts FLOPs, and the current and peak bytes of all tensors other than the weights of `model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def lap(self) -> int:
        """The FLOPs since the last lap."""
        flops, self.flops = self.flops, 0
        return flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func.overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.now -= size


class _AllTrue(TorchFunctionMode):
    """Treats masks, which have no values on fake tensors, as True everywhere: all captions have the same length."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            return args[0].flatten(0, args[1].ndim - 1)
        return 1 if func is Tensor.__int__ else func(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, **_: Any
) -> Tensor:
    """Attention with a GPU kernel, which does not store the attention probabilities."""
    if (heads := query.shape[1] // key.shape[1]) > 1:  # query heads that share keys and values
        key, value = (side.repeat_interleave(heads, dim=1) for side in (key, value))
    if attn_mask is not None:
        bias = torch.empty_like(attn_mask, dtype=query.dtype) if attn_mask.dtype == torch.bool else attn_mask
        attn_mask = bias.expand(*query.shape[:3], key.shape[2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p)[0]
