"""The frozen models in figures. They are built on the meta device, where weights take no memory, and run there.

So every architecture of transformers is counted as it is and none by a rule of thumb: parameters, multiply-adds
forward and backward, and what the backward pass keeps. Sizes come from the tables below, or from a directory's
config.json; nothing is downloaded.

Shapes: P patch tokens, V encoder width, S image side in px, Q queries, T text tokens, L LLM width, W vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from openblip2.config import RunSettings
from openblip2.model.vision import Vision
from openblip2.plan.known import encoder_config, language_config, untied
from openblip2.train.parallel import layers_of


@dataclass(frozen=True)
class Encoder:
    """A frozen image encoder, for one picture."""

    parameters: int
    in_layers: int  # parameters of its layers, which FSDP2 lays in pieces
    largest_layer: int  # of them
    tokens: int  # P
    width: int  # V
    multiply_adds: int
    working: int  # numbers held at once while it runs: a layer's widest rows

    @property
    def numbers(self) -> int:
        """P x V: of its features."""
        return self.tokens * self.width


@dataclass(frozen=True)
class Language:
    """A frozen language model, for one caption.

    Attributes:
        in_layers, largest_layer: parameters of its layers, which FSDP2 lays in pieces, and of the largest of them.
        linear: parameters of linear layers in them, which int8 and int4 make smaller.
        read, written: rows of the encoder and of the decoder; of a decoder alone all are written.
        forward, backward: multiply-adds, the output embedding at scored positions included.
        kept: bytes kept for the backward pass. kept_checkpointed: the same with `train.checkpoint_activations`.
    """

    parameters: int
    in_layers: int
    largest_layer: int
    linear: int
    width: int
    vocabulary: int
    read: int
    written: int
    scored: int
    forward: int
    backward: int
    kept: int
    kept_checkpointed: int


def count_encoder(settings: RunSettings) -> Encoder:
    """The settings' image encoder, cut off behind its layer.

    Raises:
        UserError: its sizes are not known here, or `Vision` refuses it.
    """
    named = settings.vision
    config = encoder_config(named.name)
    with torch.device("meta"), torch.no_grad():
        vision = Vision(_build_encoder(config), named.layer, named.image_size)
        vision.trained = True  # else it would look for autocast, which the meta device has not
        pixels = torch.empty(1, 3, named.image_size, named.image_size, dtype=torch.uint8)
        with FlopCounterMode(display=False) as counted:
            features = vision(pixels)
    _, tokens, width = features.shape
    inner = getattr(config, "intermediate_size", None) or 4 * width
    whitening = tokens * width * width if named.whiten else 0
    layers = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(vision)]
    return Encoder(
        sum(p.numel() for p in vision.parameters()),
        sum(layers),
        max(layers),
        tokens,
        width,
        counted.get_total_flops() // 2 + whitening,
        tokens * (2 * width + 2 * inner),  # residual, norm, the FFN before and behind its activation
    )


def count_language(settings: RunSettings, text: int, fused: bool = True) -> Language:
    """The settings' language model behind a soft prompt, with captions of `text` tokens and an end.

    The prompt is taken as one first token and a token for every four letters of the template behind the picture. What
    stands in front of it is read once for a batch, and not counted.

    Args:
        fused: attention as a GPU's kernels compute it, which keep no probabilities; False = as on a CPU.

    Raises:
        UserError: its sizes are not known here.
    """
    named = settings.language
    config = language_config(named.name)
    if named.exact_gelu:
        config.dense_act_fn = "gelu"  # as it is loaded; the approximation keeps more
    dtype = torch.float32 if named.weights == "fp32" else torch.float16 if named.weights == "fp16" else torch.bfloat16
    with torch.device("meta"):
        llm = build_language(config).to(dtype).eval().requires_grad_(False)
    width, queries = llm.get_input_embeddings().weight.shape[1], settings.qformer.queries
    scored = text + 1
    if config.is_encoder_decoder:
        # A batch is as long as its longest: prefixes of half a caption, suffixes of nearly a whole one.
        read, written = queries + text // 2 + 1, text + 1
    else:
        behind = named.template.split("{image}")[-1].replace("{prompt}", "").replace("{bos}", "")
        read, written = 0, queries + 1 + len(behind) // 4 + text + 1
    rows = torch.empty(1, read or written, width, dtype=dtype, device="meta", requires_grad=True)
    given = _arguments(llm, rows, written)
    own = {id(t.untyped_storage()): t for t in (*llm.parameters(), *llm.buffers())}
    own_storages = {t.untyped_storage()._cdata for t in own.values()}
    with torch.device("meta"), _Fused() if fused else nullcontext(), _hidden_of(llm) as hidden:
        with FlopCounterMode(display=False) as forward, _saved() as saved:
            llm(**given)
        with FlopCounterMode(display=False) as backward:
            hidden[0].sum().backward()
    kept = sum(size for storage, size in saved().items() if storage not in own_storages)
    layers = layers_of(llm)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    words = llm.get_output_embeddings().weight.shape[0]
    head = scored * width * words
    per_row = rows.element_size() * width
    between = per_row * (read + written if read else written) * len(layers) // (2 if read else 1)
    return Language(
        parameters=sum(p.numel() for p in llm.parameters()),
        in_layers=sum(sizes),
        largest_layer=max(sizes),
        linear=sum(m.weight.numel() for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)),
        width=width,
        vocabulary=words,
        read=read,
        written=written,
        scored=scored,
        forward=forward.get_total_flops() // 2 + head,
        backward=backward.get_total_flops() // 2 + head,
        kept=kept,
        kept_checkpointed=between + 2 * kept // len(layers),
    )


def build_language(config: Any) -> Any:
    """The model of a configuration, as its checkpoint has it: FlanT5's output embedding is one of its own."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    loader: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    llm = loader.from_config(config)
    if untied(config):
        shape = llm.get_input_embeddings().weight.shape
        llm.set_output_embeddings(nn.Linear(shape[1], shape[0], bias=False))
    return llm


def _build_encoder(config: Any) -> Any:
    from transformers import AutoModel, Blip2VisionModel

    if config.model_type == "blip_2_vision_model":  # the one vision model that AutoModel does not know
        return Blip2VisionModel(config)
    return AutoModel.from_config(config)


def _arguments(llm: Any, rows: Tensor, written: int) -> dict[str, Any]:
    given: dict[str, Any] = {"inputs_embeds": rows, "use_cache": False}
    if llm.config.is_encoder_decoder:
        return given | {"decoder_input_ids": torch.empty(1, written, dtype=torch.long, device="meta")}
    # Rows of a batch are padded, so there is a mask; as a whole one, for nothing can be asked of it here.
    given["attention_mask"] = torch.empty(1, 1, written, written, dtype=torch.bool, device="meta")
    if "position_ids" in inspect.signature(llm.forward).parameters:
        given["position_ids"] = torch.empty(1, written, dtype=torch.long, device="meta")
    return given


@contextmanager
def _hidden_of(llm: Any) -> Iterator[list[Tensor]]:
    """What the output embedding would read; it itself gets no rows, for it is applied to scored positions alone."""
    read: list[Tensor] = []

    def stop(module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        read.append(given[0])
        return (given[0][:, :0],)

    hook = llm.get_output_embeddings().register_forward_pre_hook(stop)
    try:
        yield read
    finally:
        hook.remove()


@contextmanager
def _saved() -> Iterator[Callable[[], dict[int, int]]]:
    """Bytes of every storage that the backward pass will read, by storage."""
    tensors: list[Tensor] = []  # held, so that no storage is another's successor

    def keep(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


class _Fused(TorchFunctionMode):
    """Attention by the kernels that a GPU takes: flash, and with a mask the memory-efficient one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        queries, keys, values = args[:3]
        mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
        if groups := queries.shape[1] // keys.shape[1] - 1:  # several heads share keys and values
            keys, values = (part.repeat_interleave(groups + 1, dim=1) for part in (keys, values))
        if mask is None:
            causal = bool(kwargs.get("is_causal"))
            return torch.ops.aten._scaled_dot_product_flash_attention(queries, keys, values, 0.0, causal)[0]
        bias = torch.empty_like(mask, dtype=queries.dtype) if mask.dtype == torch.bool else mask
        bias = bias.expand(*queries.shape[:3], keys.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(queries, keys, values, bias, True)[0]
