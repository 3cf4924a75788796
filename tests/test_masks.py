"""Compares the three masks with their drawings."""

import pytest
import torch
from torch import Tensor

from openblip2.model import qformer
from openblip2.model.qformer import bidirectional_mask, causal_mask, unimodal_mask

# Q = 2, T = 4, the last token is padding. From left to right: uni-modal, bi-directional, multimodal causal.
DRAWING = """
    1 1 . . . .          1 1 1 1 1 .            1 1 . . . .
    1 1 . . . .          1 1 1 1 1 .            1 1 . . . .
    . . 1 1 1 .          1 1 1 1 1 .            1 1 1 . . .
    . . 1 1 1 .          1 1 1 1 1 .            1 1 1 1 . .
    . . 1 1 1 .          1 1 1 1 1 .            1 1 1 1 1 .
"""
KINDS = {"unimodal": unimodal_mask, "bidirectional": bidirectional_mask, "causal": causal_mask}


def parse(text: str) -> dict[str, Tensor]:
    """Parses three drawings side by side; rows of padding are not drawn."""
    rows = [line.split() for line in text.splitlines() if line.strip() and not set(line) - set("1. ")]
    drawn = torch.tensor([[cell == "1" for cell in row] for row in rows])
    assert drawn.shape == (5, 18)
    return dict(zip(KINDS, drawn.split(6, dim=1), strict=True))


def several() -> Tensor:
    """Three texts of T = 4: full length, one token shorter, and only one token long."""
    return torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_as_drawn(kind: str) -> None:
    mask = KINDS[kind](2, several())
    assert mask.shape == (3, 1, 6, 6)
    assert mask.dtype == torch.bool
    assert torch.equal(mask[1, 0, :5], parse(DRAWING)[kind])


def test_the_documented_drawing_is_this_one() -> None:
    written = parse(qformer.__doc__ or "")
    for kind, drawn in parse(DRAWING).items():
        assert torch.equal(written[kind], drawn)


def looks(kind: str, row: int, column: int, queries: int, valid: list[bool]) -> bool:
    """Whether a row attends to a column, by the rule in words."""
    row_is_text, column_is_text = row >= queries, column >= queries
    if column_is_text and not valid[column - queries]:
        return False
    if kind == "unimodal":
        return row_is_text == column_is_text
    if kind == "bidirectional":
        return True
    return not column_is_text or (row_is_text and column <= row)


@pytest.mark.parametrize("kind", KINDS)
def test_every_cell_of_a_batch(kind: str) -> None:
    mask = KINDS[kind](3, several())
    for n, valid in enumerate(several().tolist()):
        cells = [[looks(kind, row, column, 3, valid) for column in range(7)] for row in range(7)]
        assert mask[n, 0].tolist() == cells


def test_query_rows_are_the_same_in_itc_and_itg() -> None:
    assert torch.equal(causal_mask(2, several())[:, :, :2], unimodal_mask(2, several())[:, :, :2])
    assert not causal_mask(2, several())[:, :, :2, 2:].any()


def test_without_queries_unimodal_is_its_text_rows() -> None:
    rows = unimodal_mask(2, several())[:, :, 2:]
    assert not rows[..., :2].any()
    assert torch.equal(unimodal_mask(0, several()).expand(-1, -1, 4, -1), rows[..., 2:])


@pytest.mark.parametrize("kind", KINDS)
def test_the_given_tensor_is_left_alone(kind: str) -> None:
    valid = several()
    KINDS[kind](2, valid)
    assert torch.equal(valid, several())
