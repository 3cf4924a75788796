"""Names of other libraries that are not part of their documented interface, or that changed between versions.

The rest of the package uses documented names only (`tests/test_compat.py` checks it), so when a new release of
transformers, peft or bitsandbytes breaks something, this is the file to change. Every entry says in which version a
name appeared or changed. Checked with transformers 5.17 to 5.24; `make test-versions` runs the tests against them. At
the end are two functions that silence these libraries.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from inspect import signature
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__version__ = "0.1.0"  # of this package; here because modules that record it must not import `openblip2` itself

log = logging.getLogger("openblip2")

# transformers 5.24 renamed `past_key_values` to `cache`: the argument of `forward` and `generate` and the field of
# their outputs. The old argument still works there, with a FutureWarning, until 5.40.
CACHE_NAMES = ("cache", "past_key_values")

# peft (0.18 to 0.21): an adapted layer has the original layer as `base_layer`; names of adapters contain these parts.
LORA_BASE = ".base_layer."
LORA_PARTS = ".lora_"
LORA_FIRST = ".lora_A."


def cache_name(llm: "PreTrainedModel") -> str | None:
    """The argument of `llm.forward` and `llm.generate` that takes a key-value cache; None if `forward` takes none."""
    known = signature(llm.forward).parameters
    return next((name for name in CACHE_NAMES if name in known), None)


def cache_of(output: Mapping[str, Any]) -> Any:
    """The key-value cache in the output of a language model's `forward` or `generate`."""
    return next(output[name] for name in CACHE_NAMES if name in output)


def is_stateful(llm: "PreTrainedModel") -> bool:
    """Whether a language model has recurrent states, as Mamba or RecurrentGemma (private in transformers 5.x)."""
    return llm._is_stateful


def cache_classes() -> Any:
    """The module of transformers that defines the key-value cache and its layers.

    We use `DynamicCache`, `EncoderDecoderCache`, `DynamicLayer` and `DynamicSlidingWindowLayer`; in a cache, `layers`,
    `batch_repeat_interleave` and `batch_select_indices`; in a layer, `keys`, `values`, `update`, `reorder_cache` and
    `lazy_initialization`. The layers appeared in transformers 4.56 and are not documented.
    """
    from transformers import cache_utils

    return cache_utils


def set_attention(model: "PreTrainedModel") -> None:
    """On a CPU, makes a model with PyTorch's attention use `hardware.plain_attention` where it is faster.

    `AttentionInterface` is documented; `_attn_implementation` and the arguments of an attention function are not. A
    model that does not support the interface keeps its own attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations import sdpa_attention
    from transformers.masking_utils import sdpa_mask

    from openblip2 import hardware

    def forward(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **given: Any) -> tuple[Any, None]:
        if not hardware.plain_is_faster(query, key, value):
            return sdpa_attention.sdpa_attention_forward(module, query, key, value, attention_mask, **given)
        causal = given.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        causal = bool(causal) and attention_mask is None and query.shape[2] > 1  # same condition as in transformers
        if (bias := given.get("position_bias")) is not None:  # T5 passes it since 5.24
            attention_mask = sdpa_attention.create_position_bias_mask(bias, attention_mask, causal, query, key)
            causal = False
        shared = query.shape[1] > key.shape[1]
        dropout, scale = given.get("dropout", 0.0), given.get("scaling")
        found = hardware.plain_attention(query, key, value, attention_mask, dropout, causal, scale, shared)
        return found.transpose(1, 2).contiguous(), None

    usual = model.config._attn_implementation == "sdpa"
    if usual and hardware.device().type == "cpu" and model._can_set_attn_implementation():
        AttentionInterface.register("openblip2", forward)
        AttentionMaskInterface.register("openblip2", sdpa_mask)
        model.set_attn_implementation("openblip2")


def checkpointable_layers(model: "PreTrainedModel") -> list[Any]:
    """The layers that support activation checkpointing in transformers (their base class exists since 4.53)."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]


def keep_first_stages(config: Any, layers: int) -> None:
    """Keeps the names of the first `layers` layers only, in the configuration of an encoder that is also a backbone."""
    from transformers.backbone_utils import BackboneConfigMixin  # since 5.0; `utils.backbone_utils` before

    if issubclass(type(config), BackboneConfigMixin):
        config.stage_names = config.stage_names[: layers + 1]
        config.set_output_features_output_indices(out_features=None, out_indices=None)


def kept_in_fp32(model: "PreTrainedModel", half: bool) -> set[str]:
    """Names of the modules that transformers keeps in fp32 when it loads a model in fp16 (`half`) or else in bf16."""
    kept = set(model._keep_in_fp32_modules_strict or ())
    return kept | set(model._keep_in_fp32_modules or ()) if half else kept


def unlimited_length() -> int:
    """The smallest value of `tokenizer.model_max_length` that means that the tokenizer has no limit."""
    from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

    return VERY_LARGE_INTEGER


def lora_layers(module: "nn.Module") -> list[tuple[str, Any]]:
    """The names and modules of all layers in a module that have a LoRA adapter."""
    from peft.tuners.lora import LoraLayer

    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, LoraLayer)]


def forget_adapters(module: "nn.Module") -> None:
    """Removes the attribute in which peft stores the configurations of a module's adapters."""
    for part in module.modules():
        vars(part).pop("peft_config", None)


def keep_4bit_gradients(llm: "PreTrainedModel") -> None:
    """Keeps 4-bit layers in the format that supports a backward pass.

    On CPUs with bf16 instructions a layer of bitsandbytes (since 0.49) repacks its weights for inference in the first
    pass without gradients. After that, no gradient passes through the layer, and there is no warning.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for layer in llm.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def allow_recompiles(count: int) -> None:
    """Lets torch.compile keep `count` compiled versions of a function (the name `recompile_limit`: since torch 2.6)."""
    import torch

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, count)


def warn_of_versions() -> None:
    """Logs one warning if library versions are outside this package's ranges; does nothing if it is not installed."""
    from packaging.requirements import Requirement

    try:
        requirements = metadata.requires("openblip2") or []
    except metadata.PackageNotFoundError:  # used from a source folder: no ranges are known
        return
    found: dict[str, str] = {}
    for requirement in map(Requirement, requirements):
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:  # it belongs to an extra that is not installed
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            found[requirement.name] = f"{requirement.name} {installed} is not supported: {requirement.specifier}"
    if found:
        log.warning("openblip2: %s; install a version in the range, or expect failures", "; ".join(found.values()))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides transformers' load report, warnings and weight progress bars in the block, but not download bars.

    The report would list the unused weights of a larger model. The caller must check for missing weights.
    """
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if bars:
        transformers_logging.disable_progress_bar()  # also disables those of downloads
        enable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def quiet_bitsandbytes() -> None:
    """Makes bitsandbytes log only errors from now on.

    It would warn about a missing optional kernel, and in each layer and pass about the cast of activations to int8.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
