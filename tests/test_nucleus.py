"""Nucleus sampling against transformers' own: the same words are possible, each as often."""

from typing import Any

import pytest
import torch
from transformers import TopPLogitsWarper

from openblip2.model.nucleus import LIKELY, NucleusSampling

DRAWS = 20_000
NOTHING: Any = torch.empty(0)  # has been written before


@pytest.mark.parametrize(
    ("spread", "top_p", "temperature", "size"),
    [(2.0, 0.9, 1.0, 215), (2.0, 0.5, 1.0, 7), (1.0, 0.9, 0.5, 215), (0.2, 0.9, 1.0, 1316), (2.0, 1.0, 1.0, 1531)],
)
def test_words_come_as_often_as_transformers_would_draw_them(
    spread: float, top_p: float, temperature: float, size: int
) -> None:
    torch.manual_seed(0)
    words = 3 * LIKELY
    logits = spread * torch.randn(1, words)
    logits[0, :5] = -torch.inf  # forbidden by another processor
    expected = TopPLogitsWarper(top_p)(NOTHING, logits / temperature).softmax(dim=1)[0]
    assert int((expected > 0).sum()) == size
    only = NucleusSampling(top_p, temperature)(NOTHING, logits.expand(DRAWS, words))
    assert torch.equal((only == 0).sum(dim=1), torch.ones(DRAWS, dtype=torch.long))
    found = torch.bincount(only.argmax(dim=1), minlength=words) / DRAWS
    assert float(found[expected == 0].sum()) == 0
    # In units of its standard deviation no word is far off; a word drawn twice as often as it should be would be.
    spreads = (expected * (1 - expected) / DRAWS).sqrt()
    common = expected > 20 / DRAWS
    assert int(common.sum()) > 5
    assert float(((found - expected)[common] / spreads[common]).abs().max()) < 5


def test_rows_of_both_kinds_side_by_side() -> None:
    torch.manual_seed(1)
    logits = torch.zeros(2, 3 * LIKELY)
    logits[0, 7] = 50.0
    only = torch.stack([NucleusSampling(0.9, 1.0)(NOTHING, logits) for _ in range(50)])
    assert set(only[:, 0].argmax(dim=1).tolist()) == {7}
    assert len(set(only[:, 1].argmax(dim=1).tolist())) > 40
