"""Several processes compute the same losses and gradients as one process with the joined batch.

This holds for any division of the batch. Here it is uneven, and one of four processes has no rows. Dropout is 0,
because each process draws its own masks, which differ from those of one process with the joined batch.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

import tiny
from openblip2.distributed import collectives
from openblip2.distributed.collectives import Share, gather, rank, transpose, world_size
from openblip2.errors import UserError
from openblip2.model.fast.gradient_cache import step_losses
from openblip2.model.fast.joined_batch import share_texts
from openblip2.model.objectives import HardNegatives, same_image
from processes import mean, mean_gradients, run
from tiny import E

COUNTS = {2: (5, 3), 4: (3, 0, 4, 1)}
IDS = torch.tensor([5, 3, 5, 8, 2, 3, 11, 5])  # 5 and 3 have captions in several processes
# Negatives have other ids and are mostly in another process; 1 and 6 occur several times; each kind lacks one.
NEGATIVES = HardNegatives(torch.tensor([1, 6, 4, -1, 3, 6, 1, 6]), torch.tensor([6, 2, 6, 1, 0, -1, 1, 3]))

# Arguments of `gradients` for which the result must not depend on the number of processes.
CASES: dict[str, dict[str, Any]] = {
    "given": {},
    "found": {"found": True},
    "detached": {"detach_gathered": True},
    "chunks": {"chunk": 2},
    "found in chunks": {"chunk": 2, "found": True},
    "detached chunks": {"detach_gathered": True, "chunk": 2},
    "without itg": {"objectives": ("itc", "itm")},
    "itc alone": {"objectives": ("itc",)},
    "trained encoder": {"encoder_trains": True},
    "decorrelation": {"decorrelation": 0.5},
    "decorrelation chunks": {"decorrelation": 0.5, "chunk": 2},
    "no ids": {"named": False, "found": True},
}


class Found(NamedTuple):
    losses: dict[str, Tensor]
    gradients: dict[str, Tensor]
    at_features: Tensor


def gradients(
    own: slice,
    found: bool = False,
    detach_gathered: bool = False,
    chunk: int = 0,
    encoder_trains: bool = False,
    named: bool = True,
    decorrelation: float = 0.0,
    objectives: tuple[str, ...] = ("itc", "itm", "itg"),
) -> Found:
    """Losses and gradients of some rows of the joined batch, as means over processes."""
    smooth_maximum = 0.1 if decorrelation else 0.0  # both are not in the paper, so they are tested together
    model = tiny.stage1(detach_gathered, 0.0, decorrelation=decorrelation, smooth_maximum=smooth_maximum).train()
    tokens, valid = (part[own] for part in tiny.texts())
    longest = max(3, int(valid.sum(dim=1).max())) if len(valid) else 4  # each process pads to its own longest text
    features = tiny.features()[own].requires_grad_(encoder_trains)
    torch.manual_seed(rank())  # must have no effect
    losses = step_losses(model, chunk)(
        tokens[:, :longest],
        valid[:, :longest],
        IDS[own] if named else None,
        features=features,
        negatives=None if found else HardNegatives(*(rows[own] for rows in NEGATIVES)),
        objectives=objectives,
        generator=torch.Generator().manual_seed(3),
    )
    torch.stack(list(losses.values())).sum().backward()
    at_features = torch.zeros_like(features) if features.grad is None else features.grad
    if world_size() == 1:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found_here = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}
        return Found({name: loss.detach() for name, loss in losses.items()}, found_here, at_features)
    return Found({n: mean(loss) for n, loss in losses.items()}, mean_gradients(model), at_features / world_size())


def work(process: int, counts: tuple[int, ...]) -> dict[str, Any]:
    """Everything that is tested in one process."""
    own = Share(counts, process).own
    assert (world_size(), rank()) == (len(counts), process)
    check_share(process, counts)
    check_gather(process, counts)
    check_transpose(process, counts)
    with collectives.alone():
        assert (world_size(), rank(), collectives.is_first()) == (1, 0, process == 0)
        assert gather(IDS) is IDS
    assert world_size() == len(counts)
    return {case: tuple(gradients(own, **options)) for case, options in CASES.items()}


def check_share(process: int, counts: tuple[int, ...]) -> None:
    shared = collectives.share(counts[process], process, torch.tensor(7 - process))
    assert shared.counts == counts
    assert shared.total == 8
    ranks = range(len(counts))
    assert (shared.sums, shared.most) == ((sum(ranks), sum(7 - n for n in ranks)), (ranks[-1], 7))
    assert torch.equal(same_image(IDS[shared.own], gather(IDS[shared.own], shared)), IDS[shared.own][:, None] == IDS)
    assert collectives.mean_over_processes([process, 2.0]) == [ranks[-1] / 2, 2.0]
    with pytest.raises(UserError, match="no process can open"):
        collectives.share(0)


def check_gather(process: int, counts: tuple[int, ...]) -> None:
    shared = Share(counts, process)
    everything = torch.arange(16.0).view(8, 2)
    mine = everything[shared.own].clone().requires_grad_()
    gathered = gather(mine, shared)
    assert torch.equal(gathered, everything)
    # Each process has a different gradient for a row, and the row's owner gets the sum.
    (gathered * everything * (process + 1)).sum().backward()
    assert mine.grad is not None
    assert torch.equal(mine.grad, everything[shared.own] * sum(range(1, len(counts) + 1)))


def check_transpose(process: int, counts: tuple[int, ...]) -> None:
    shared = Share(counts, process)
    matrix, weights = torch.arange(64.0).view(8, 8), torch.arange(64.0).view(8, 8) ** 2
    mine = matrix[shared.own].clone().requires_grad_()
    turned = transpose(mine, shared)
    assert torch.equal(turned, matrix.T[shared.own])
    (turned * weights[shared.own]).sum().backward()
    assert mine.grad is not None
    assert torch.equal(mine.grad, weights.T[shared.own])


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids="{} processes".format)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(request.param, work, tmp_path_factory.mktemp("gloo"), COUNTS[request.param])


@pytest.mark.parametrize("case", CASES)
def test_processes_are_one_with_the_joined_batch(results: list[dict[str, Any]], case: str) -> None:
    expected = gradients(slice(0, 8), **{**CASES[case], "chunk": 0})
    for result in results:
        losses, found, _ = result[case]
        assert list(losses) == list(expected.losses)
        for name, loss in expected.losses.items():
            torch.testing.assert_close(losses[name], loss, rtol=1e-5, atol=1e-5)
        tiny.assert_same_gradients(found, expected.gradients)
    at_features = torch.cat([result[case][2] for result in results])
    torch.testing.assert_close(at_features, expected.at_features, rtol=1e-5, atol=1e-5)
    assert expected.gradients["text_proj.weight"].abs().max() > 1e-3
    assert (expected.at_features.abs().max() > 1e-3) == (case == "trained encoder")


def test_both_directions_differ(results: list[dict[str, Any]]) -> None:
    """The setting changes gradients but not losses, also in several processes."""
    full, half = results[0]["given"], results[0]["detached"]
    torch.testing.assert_close(full[0]["itc"], half[0]["itc"])
    assert (full[1]["vision_proj.weight"] - half[1]["vision_proj.weight"]).abs().max() > 1e-3


def test_negatives_found_are_not_those_given(results: list[dict[str, Any]]) -> None:
    assert results[0]["found"][0]["itm"] != results[0]["given"][0]["itm"]


def test_one_process_needs_no_group(tmp_path: Path) -> None:
    rows = torch.randn(3, E, requires_grad=True)
    assert not dist.is_initialized()
    assert gather(rows) is rows
    assert (world_size(), rank(), collectives.is_first()) == (1, 0, True)
    assert share_texts(torch.ones(3, 5, dtype=torch.bool))[0] == Share((3,), 0)
