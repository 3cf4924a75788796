"""Reuse of the keys and values that a language model computes for a prompt: when it is possible, and their storage.

Shapes: N rows, H heads, T tokens, d width of a head.
"""

from copy import deepcopy
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from openblip2.compat import cache_classes, cache_name, cache_of, is_stateful

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache
else:
    _classes = cache_classes()
    DynamicCache, EncoderDecoderCache = _classes.DynamicCache, _classes.EncoderDecoderCache
    DynamicLayer, DynamicSlidingWindowLayer = _classes.DynamicLayer, _classes.DynamicSlidingWindowLayer


class Reuse(NamedTuple):
    """Whether the key-value cache of a prompt can be reused.

    Attributes:
        cache: the model's state consists of keys and values only, so the rows of the cache can be repeated and
            continued. A model with recurrent states must read every prompt from the start.
        gaps: padding is allowed after the cached part: positions are given by `position_ids`, not by distance, and
            no sliding attention window counts the padding.
        reason: why `cache` is False; empty if it is True.
    """

    cache: bool
    gaps: bool
    reason: str = ""


def find_reuse(llm: "PreTrainedModel") -> Reuse:
    """Determines what can be reused for this language model from its class and its configuration."""
    name = type(llm).__name__
    if is_stateful(llm):
        return Reuse(False, False, f"{name} keeps recurrent states")
    if cache_name(llm) is None:
        return Reuse(False, False, f"{name}.forward takes no key-value cache")
    if llm.generation_config is None:
        return Reuse(False, False, f"{name} has no generation_config")
    kinds = {type(layer) for layer in _empty(llm).layers}
    if others := sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer}):
        return Reuse(False, False, f"{name} caches more than keys and values ({', '.join(others)})")
    if not kinds:
        return Reuse(False, False, f"the cache of {name} has no layers")
    known = signature(llm.forward).parameters
    return Reuse(True, "position_ids" in known and DynamicSlidingWindowLayer not in kinds)


def can_pad(llm: "PreTrainedModel") -> bool:
    """Whether padding on the left of a prompt is known not to change the output.

    Recurrent states may include the padding, and a model without `position_ids` may count padding as positions.
    """
    return not is_stateful(llm) and "position_ids" in signature(llm.forward).parameters


def read(
    llm: Any, embeds: Tensor, mask: Tensor, stages: list[tuple[int, list[int]]], pad: int, cache: DynamicCache | None
) -> DynamicCache | None:
    """Reads the beginnings of B prompts in stages; returns their keys and values, or None if nothing was read.

    Args:
        embeds: `[B, T, L]`.
        mask: `[B, T]`.
        stages: pairs of an end position and, for each row, the index of the row that is read in its place.
        pad: padding token id, for rows that have ended.
        cache: the text that all prompts begin with, in one row (`read_text`); None = it was not read before.
    """
    done = 0 if cache is None else cache.get_seq_length()
    held = list(range(len(embeds))) if cache is None else [0] * len(embeds)  # the cache row of each prompt
    for end, standing in stages:
        if end <= done:
            continue
        rows = sorted(set(standing))
        cache = _empty(llm) if cache is None else _select(cache, [held[row] for row in rows])
        # The model's own `generate` prepares all other inputs of the forward pass; the token it generates is ignored.
        named: dict[str, Any] = {str(cache_name(llm)): cache}
        output = llm.generate(
            inputs_embeds=embeds[rows, :end],
            attention_mask=mask[rows, :end],
            max_new_tokens=1,  # the minimum that `generate` accepts
            num_beams=1,
            do_sample=False,
            pad_token_id=pad,
            return_dict_in_generate=True,
            **named,
        )
        cache = cache_of(output)
        done, held = end, [rows.index(row) for row in standing]
    return None if cache is None else _select(cache, held)


def read_text(llm: Any, text: list[int]) -> DynamicCache:
    """Keys and values, in one row, of a text that contains no picture."""
    return cache_of(llm(input_ids=torch.tensor([text], device=llm.device), use_cache=True, logits_to_keep=1))


class LastRead:
    """Caches the keys and values of the text that a frozen model read last, because the next batch begins with it."""

    def __init__(self) -> None:
        self.key: tuple[object, ...] = ()
        self.cache: DynamicCache | None = None

    def __call__(self, llm: Any, text: list[int]) -> DynamicCache:
        """Same as `read_text`; returns a copy that the caller may change."""
        # The versions count how often weights were written to, for example by `load_state_dict`. With autocast, norms
        # are computed in fp32.
        written = sum(weight._version for weight in llm.parameters())
        autocast = torch.is_autocast_enabled(llm.device.type)
        key = (*text, llm.device, llm.dtype, written, autocast)
        if self.cache is None or self.key != key:
            # Validation runs in inference mode, and tensors created in it cannot be used in training.
            with torch.inference_mode(False), torch.no_grad():
                self.cache = read_text(llm, text)
            self.key = key
        return deepcopy(self.cache)  # a forward pass appends to its cache


def with_room(llm: "PreTrainedModel", cache: DynamicCache | None, beams: int, room: int) -> DynamicCache:
    """Prepares a cache for `beams` continuations of each of its rows, with room for `room` more tokens.

    The given cache is changed in place; None = nothing has been read yet.
    """
    cache = _empty(llm) if cache is None else cache
    for n, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[n] = Growing(room, layer, beams)
        elif isinstance(layer, DynamicSlidingWindowLayer):
            layer.batch_repeat_interleave(beams)
    return cache


def encoder_decoder_cache(llm: "PreTrainedModel", room: int) -> EncoderDecoderCache:
    """An empty cache of an encoder-decoder for texts of up to `room` tokens."""
    cross = _empty(llm)
    for n, layer in enumerate(cross.layers):
        if type(layer) is DynamicLayer:
            cross.layers[n] = Shared()
    return EncoderDecoderCache(with_room(llm, None, 1, room), cross)


class Growing(DynamicLayer):
    """Keys and values `[N, H, T, d]` in a preallocated buffer; reordering beams moves only the generated tokens.

    The layer of transformers copies all keys and values for every new token, and again when beams are reordered. Beams
    of one row have the same prompt, so here the keys and values of the prompt are never moved.

    Args:
        room: number of tokens to reserve space for.
        read: the layer with the keys and values computed so far, or an empty layer.
        beams: number of copies of each row of `read`.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, room: int, read: DynamicLayer, beams: int) -> None:
        super().__init__()
        self.room, self.prompt = room, read.get_seq_length()
        self.stores: tuple[Tensor, ...] = ()
        if self.prompt:
            assert read.keys is not None
            assert read.values is not None
            self._reserve(read.keys, read.values, beams)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values `[N, H, new, d]`; returns views of all keys and values."""
        if not self.stores:
            self._reserve(key_states, value_states, 1)
            return self.keys, self.values
        start = self.keys.shape[2]
        stop = start + key_states.shape[2]
        if stop > self.stores[0].shape[2]:
            self._reserve(self.keys, self.values, 1)
        for store, new in zip(self.stores, (key_states, value_states), strict=True):
            store[:, :, start:stop] = new  # in place: nothing is copied
        self.keys, self.values = (store[:, :, :stop] for store in self.stores)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the beams by `beam_idx`; a beam only moves among the beams of the same prompt."""
        for store in self.stores:
            written = store[:, :, self.prompt : self.keys.shape[2]]
            written.copy_(written.index_select(0, beam_idx.to(store.device)))

    def _reserve(self, keys: Tensor, values: Tensor, beams: int) -> None:
        self.lazy_initialization(keys, values)
        rows, heads, length = keys.shape[:3]
        stores = []
        for part in (keys, values):
            store = part.new_empty(rows, beams, heads, length + self.room, part.shape[3])  # [N, beams, H, T, d]
            store[:, :, :, :length] = part[:, None]
            stores.append(store.flatten(0, 1))
        self.stores = tuple(stores)
        self.keys, self.values = (store[:, :, :length] for store in self.stores)


class Shared(DynamicLayer):
    """Keys and values of the encoder output: the same for all beams of a row, so they are never reordered."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Does nothing."""


def _select(cache: DynamicCache, rows: list[int]) -> DynamicCache:
    """Selects rows of the cache, in place; a row may be repeated."""
    held: Any = cache.layers[0]
    if rows != list(range(len(held.keys))):
        cache.batch_select_indices(torch.tensor(rows, device=held.keys.device))
    return cache


def _empty(llm: "PreTrainedModel") -> DynamicCache:
    return DynamicCache(config=llm.config.get_text_config(decoder=True))
