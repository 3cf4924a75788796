"""Attention as plain matrix products: equal to torch's own, alone and inside language models of transformers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch.nn import functional as F

import tiny
import tiny_models
from openblip2 import compat, hardware

MASKS: dict[str, Callable[[], torch.Tensor | None]] = {
    "none": lambda: None,
    "padding": lambda: torch.arange(6)[None, None, None] < torch.tensor([4, 6])[:, None, None, None],
    "of each head": lambda: torch.rand(2, 4, 3, 6) < 0.7,
    "added": lambda: torch.randn(2, 1, 3, 6),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_it_is_torchs_with_the_same_gradients(mask: str, groups: int) -> None:
    torch.manual_seed(1)
    given = MASKS[mask]()
    given = None if given is None else given.expand(2, -1, 3, 6)
    if given is not None and given.dtype == torch.bool:
        given = given | (torch.arange(6) == 0)  # a row that attends to nothing has no defined result
    found = []
    for attend in (hardware.plain_attention, F.scaled_dot_product_attention):
        torch.manual_seed(2)
        q, k, v = (torch.randn(2, h, n, 5).requires_grad_() for h, n in ((4, 3), (groups, 6), (groups, 6)))
        result = attend(q, k, v, given, scale=0.3, enable_gqa=groups < 4)
        found.append((result, *torch.autograd.grad(result.square().sum(), (q, k, v))))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_causal_rows_see_what_is_before_them() -> None:
    q, k, v = (torch.randn(2, 4, 6, 5) for _ in range(3))
    mine = hardware.plain_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(mine, F.scaled_dot_product_attention(q, k, v, is_causal=True), rtol=1e-5, atol=1e-5)


def test_a_row_of_padding_is_finite() -> None:
    nothing = torch.zeros(1, 1, 3, 6, dtype=torch.bool)
    for kind in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(1, 2, n, 5, dtype=kind) for n in (3, 6, 6))
        assert torch.isfinite(hardware.plain_attention(q, k, v, nothing)).all()


def test_no_rows_are_no_error() -> None:
    """One of several processes may have no rows."""
    q, k, v = (torch.randn(0, heads, 3, 5).requires_grad_() for heads in (4, 2, 2))
    found = hardware.plain_attention(q, k, v, torch.ones(0, 1, 3, 3, dtype=torch.bool), enable_gqa=True)
    assert found.shape == (0, 4, 3, 5)
    found.sum().backward()


def test_weights_are_dropped() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.ones(1, 1, n, 1) for n in (50, 400, 400))  # an output is the sum of its row's weights
    dropped = hardware.plain_attention(q, k, v, dropout_p=0.5)
    assert 0.95 < float(dropped.mean()) < 1.05
    assert 0.03 < float(dropped.std()) < 0.07
    torch.testing.assert_close(hardware.plain_attention(q, k, v), torch.ones_like(dropped))


def test_where_it_is_taken() -> None:
    """It is used with gradients and in bf16. If all weights of an image do not fit, torch's kernel is used."""
    small = [torch.randn(1, 2, 3, 4) for _ in range(3)]
    assert not hardware.plain_is_faster(*small)
    assert hardware.plain_is_faster(small[0].clone().requires_grad_(), *small[1:])
    half = [part.bfloat16() for part in small]
    assert hardware.plain_is_faster(*half)
    with torch.autocast("cpu", torch.bfloat16):
        assert hardware.plain_is_faster(*small)
    long = torch.zeros(1, 1, 1, 4, dtype=torch.bfloat16).expand(1, 8, 8192, 4)
    assert not hardware.plain_is_faster(long, long, long)


SIZES: dict[str, Any] = {"vocab_size": len(tiny_models.tokenizer()), "hidden_size": 16, "num_hidden_layers": 2}


def mistral() -> hf.PreTrainedModel:
    """A model in which two heads share a key, with a window of 4 tokens."""
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4}
    return tiny.redraw(hf.MistralForCausalLM(hf.MistralConfig(**SIZES, **heads, intermediate_size=12)))


def falcon() -> hf.PreTrainedModel:
    """A model that does not use transformers' `AttentionInterface`."""
    return tiny.redraw(hf.FalconForCausalLM(hf.FalconConfig(**SIZES, num_attention_heads=4)))


KINDS = {**tiny_models.MODELS, "mistral": mistral, "falcon": falcon}


@pytest.mark.parametrize("kind", KINDS)
def test_a_language_model_writes_and_scores_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With padding on either side, with and without gradients."""
    torch.manual_seed(4)
    llm: Any = KINDS[kind]().eval()
    ids = torch.randint(5, len(tiny_models.tokenizer()), (3, 7))
    found, calls = [], []
    own = hardware.plain_attention

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(args)
        return own(*args, **options)

    monkeypatch.setattr(hardware, "plain_attention", counted)
    monkeypatch.setattr(hardware, "plain_is_faster", lambda *_: True)
    for _ in range(2):
        for padded in (slice(0, 3), slice(4, 7)):
            mask = torch.ones_like(ids)
            mask[1, padded] = 0
            labels = {"decoder_input_ids": ids} if llm.config.is_encoder_decoder else {}
            logits = llm(input_ids=ids, attention_mask=mask, **labels).logits
            with torch.no_grad():
                text = llm.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, num_beams=2, do_sample=False)
            found.append((logits[mask.bool()], text))
        if not calls:
            compat.set_attention(llm)
    if kind != "t5":  # T5 uses the interface only since 5.24
        assert bool(calls) == (kind != "falcon")
    for mine, theirs in zip(found[2:], found[:2], strict=True):
        torch.testing.assert_close(mine[0], theirs[0], rtol=1e-4, atol=1e-5)
        assert mine[1].tolist() == theirs[1].tolist()
