"""The data sent for hard negatives: only the features that are needed, each once to each process."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from openblip2.distributed.collectives import Share, fetch_rows, plan_route
from openblip2.model.fast.joined_batch import bring
from openblip2.model.objectives import HardNegatives, hard_negatives
from processes import run

P, V, WIDTH, CROSSING, BYTES = 257, 1408, 768, 6, 2  # ViT-g at 224 px; Q-Former; cross-attending layers; fp16
WORLD, EACH = 16, 16


def wanted_at_random(counts: tuple[int, ...], seed: int, spread: float) -> list[list[int]]:
    """Hard negative images of the joined batch, by process. With a larger spread, more rows need the same few."""
    count = sum(counts)
    torch.manual_seed(seed)
    likely = spread * torch.randn(count)
    scores = torch.randn(count, count) + likely
    drawn = hard_negatives(scores, scores, torch.eye(count, dtype=torch.bool)).images
    return [part.tolist() for part in drawn.split(counts)]


@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0])
def test_at_most_an_eighth_of_gathering(spread: float) -> None:
    """16 processes with 16 pairs each, ViT-g: the bytes that each process receives, and that all send together."""
    counts = (EACH,) * WORLD
    gathered = (WORLD - 1) * EACH * P * V * BYTES
    assert gathered == 173_690_880
    for seed in range(5):
        wanted = wanted_at_random(counts, seed, spread)
        routes = [plan_route(wanted, Share(counts, place)) for place in range(WORLD)]
        received = [sum(route.receives) * P * V * BYTES for route in routes]
        assert max(received) <= EACH * P * V * BYTES == 11_579_392
        assert max(received) <= gathered / 8
        assert sum(sum(route.sends) for route in routes) == sum(sum(route.receives) for route in routes)
    keys_and_values = CROSSING * 2 * WIDTH
    assert keys_and_values / V > 6.5  # the cost if keys and values were sent, and the same again for gradients


def test_a_route() -> None:
    """Three processes with rows 0-2, 3, and 4-6 of the joined batch."""
    counts, wanted = (3, 1, 3), [[4, -1, 4], [0], [5, 3, 0]]
    first, second, third = (plan_route(wanted, Share(counts, place)) for place in range(3))
    assert first.places == (3, -1, 3)  # a row that is wanted twice is fetched once
    assert (first.sent, first.sends, first.receives) == ((0, 0), (0, 1, 1), (0, 0, 1))
    assert (second.sent, second.sends, second.receives) == ((0,), (0, 0, 1), (1, 0, 0))
    assert third.places == (1, 4, 3)  # own row 5 at 1; rows 3 and 0, fetched in the order 0, 3, after three own rows
    assert (third.sent, third.sends, third.receives) == ((0,), (1, 0, 0), (1, 1, 0))
    assert not first.idle
    assert plan_route([[1, -1, 0], [3], [4, 4, 4]], Share(counts, 1)).idle


def work(process: int, counts: tuple[int, ...]) -> dict[str, Any]:
    """Fetches rows, counts the bytes that are passed to gloo, and runs the backward pass."""
    shared, sent = Share(counts, process), []
    wanted = wanted_at_random(counts, 2, 1.0)
    route = plan_route(wanted, shared)
    rows = torch.arange(float(shared.total * 6)).view(-1, 2, 3)[shared.own].clone().requires_grad_()
    real = dist.all_to_all_single

    def counted(output: Tensor, given: Tensor, *sizes: list[int]) -> object:
        mine = sizes[1][process] * given[:1].nbytes
        sent.append(given.nbytes - mine)
        return real(output, given, *sizes)  # pyright: ignore[reportArgumentType]

    with patch.object(dist, "all_to_all_single", counted):
        found = fetch_rows(rows, route)
        at_hand = torch.cat([rows, found])[list(route.places)]
        forth = list(sent)
        (at_hand * (process + 1)).sum().backward()
        frozen = rows.detach().half()
        mine = torch.tensor(wanted[process], dtype=torch.int64)  # without dtype, an empty list gives float
        rivals = HardNegatives(mine, mine)
        tokens = torch.full((len(rows), 4 + process), process)
        texts = Share(counts, process, (), (4 + len(counts) - 1,))
        brought = bring(rivals, frozen, tokens, tokens >= 0, texts)
    return {
        "at hand": at_hand.detach(),
        "gradient": rows.grad,
        "sent": [*forth, sum(route.sends) * rows[:1].nbytes],
        "wanted": wanted[process],
        "fp16": brought.fetched.dtype == torch.float16 and torch.equal(brought.fetched.float(), found.detach()),
        "texts": [int(brought.tokens[n, 0]) for n in brought.negatives.texts],
        "lengths": [int(brought.valid[n].sum()) for n in brought.negatives.texts],
    }


def test_what_is_fetched(tmp_path: Path) -> None:
    counts = (3, 1, 0, 4)
    results = run(4, work, tmp_path, counts)
    everything = torch.arange(48.0).view(-1, 2, 3)
    weights = torch.zeros(8)
    owner = [place for place, count in enumerate(counts) for _ in range(count)]
    for process, result in enumerate(results):
        assert torch.equal(result["at hand"], everything[result["wanted"]])
        assert result["fp16"]
        handed, planned = result["sent"]
        assert handed == planned
        assert result["texts"] == [owner[row] for row in result["wanted"]]
        assert result["lengths"] == [4 + owner[row] for row in result["wanted"]]
        for row in result["wanted"]:
            weights[row] += process + 1
    # A row's gradient is the sum of the gradients from all processes that fetched it.
    gradient = torch.cat([result["gradient"] for result in results])
    assert torch.equal(gradient, weights[:, None, None].expand(-1, 2, 3))
