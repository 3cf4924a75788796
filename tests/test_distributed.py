"""Two processes are one process with the joined batch: the world size changes neither losses nor gradients.

Every process takes the mean over its own rows, and backward sums through `gather` what the losses of all
processes ask of a row. Summed over processes, the parameters' gradients are then those of the *sum* of all
losses; the mean that DistributedDataParallel takes makes them those of the mean loss, which is the loss of
the joined batch. So nothing has to be rescaled.
"""

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn

import tiny
from openblip2.distributed import gather, rank, world_size
from openblip2.model.gradient_cache import stage1_losses
from openblip2.model.objectives import Contrast, Rivals, same_image
from openblip2.model.stage1 import Stage1
from tiny import E

WORLD, EACH, SECONDS = 2, 4, 60
IDS = torch.tensor([5, 3, 5, 8, 2, 3, 11, 5])  # 5 and 3 have captions in both processes
# Negatives of other ids in the same process; one is missing in each, for ITM is the mean over pairs.
TEXTS, IMAGES = torch.tensor([1, 0, 3, -1, 5, 6, 4, 4]), torch.tensor([3, 2, 1, 0, 7, -1, 5, 6])


# What must not depend on the number of processes, and arguments of `stage1_gradients` for it.
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "one-sided": {"one_sided": True},
    "chunks": {"chunk": 3},
    "one-sided chunks": {"one_sided": True, "chunk": 3},
    "sigmoid": {"contrast": "sigmoid"},
    "sigmoid chunks": {"contrast": "sigmoid", "chunk": 3},
}


def stage1_gradients(
    process: int | None, one_sided: bool = False, contrast: Any = "softmax", chunk: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of one process' rows, or of all rows (None)."""
    model = tiny.stage1(one_sided, contrast=contrast)
    rows = slice(None) if process is None else slice(process * EACH, (process + 1) * EACH)
    first = 0 if process is None else process * EACH
    # Equal lengths: ITG is the mean over tokens, and as many of them must be in each process.
    tokens, valid = tiny.texts(shortest=tiny.T)
    negatives = Rivals(*(torch.where(n < 0, n, n - first)[rows] for n in (TEXTS, IMAGES)))
    patches = tiny.features()[rows]
    losses = stage1_losses(model, chunk, tokens[rows], valid[rows], IDS[rows], features=patches, negatives=negatives)
    torch.stack(list(losses.values())).sum().backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def mean(tensor: Tensor) -> Tensor:
    """Over processes, as DistributedDataParallel does with gradients."""
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / WORLD


def in_a_process(process: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", timedelta(seconds=SECONDS), world_size=WORLD, rank=process)
    try:
        check_gather(process)
        check_positives(process)
        check_drawn_negatives(process)
        for case, options in CASES.items():
            losses, found = stage1_gradients(process, **options)
            torch.save(
                ({k: mean(v) for k, v in losses.items()}, {k: mean(v) for k, v in found.items()}),
                f"{meeting}.{case}.{process}",
            )
    finally:
        dist.destroy_process_group()


def check_gather(process: int) -> None:
    assert (world_size(), rank()) == (WORLD, process)
    mine = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]) + 10 * process
    mine.requires_grad_()
    everything = gather(mine)
    assert everything[:, 0].tolist() == [1, 3, 5, 11, 13, 15]
    # Each process wants something else of a row; the row's owner gets the sum.
    (everything * torch.arange(12.0).view(6, 2) * (process + 1)).sum().backward()
    assert mine.grad is not None
    assert torch.equal(mine.grad, 3 * torch.arange(12.0).view(6, 2)[3 * process : 3 * process + 3])


def check_positives(process: int) -> None:
    own = IDS[process * EACH : (process + 1) * EACH]
    assert torch.equal(same_image(own), own[:, None] == IDS)


def check_drawn_negatives(process: int) -> None:
    """They are drawn from the process' own rows, by its own columns of the similarities."""
    model: Stage1 = tiny.stage1()
    own = IDS[process * EACH : (process + 1) * EACH]
    scores = torch.arange(EACH * WORLD * EACH).float().view(EACH, WORLD * EACH)
    wanted = scores[:, process * EACH : (process + 1) * EACH].masked_fill(own[:, None] == own, -1).argmax(dim=1)
    for drawn in model.rivals(Contrast(torch.tensor(0.0), 50 * scores, 50 * scores), same_image(own)):
        assert torch.equal(drawn, wanted)


@pytest.fixture(scope="module")
def meeting(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Runs both processes; whatever fails in one of them fails here."""
    place = str(tmp_path_factory.mktemp("gloo") / "meeting")
    processes = spawn(in_a_process, (place,), WORLD, join=False)
    assert processes is not None
    try:
        while not processes.join(timeout=SECONDS):
            pass
    finally:
        for process in processes.processes:
            if process is not None:
                process.kill()
    return place


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_with_the_joined_batch(meeting: str, case: str) -> None:
    losses, expected = stage1_gradients(None, **{**CASES[case], "chunk": 0})
    results = [torch.load(f"{meeting}.{case}.{process}", weights_only=True) for process in range(WORLD)]
    for mean_losses, found in results:
        for name, loss in losses.items():
            torch.testing.assert_close(mean_losses[name], loss.detach(), rtol=1e-5, atol=1e-5)
        tiny.assert_same_gradients(found, expected)
    assert expected["text_head.weight"].abs().max() > 1e-3


def test_both_directions_differ(meeting: str) -> None:
    """The setting is no other name for the same thing, in two processes either."""
    full, half = (torch.load(f"{meeting}.{case}.0", weights_only=True) for case in ("full", "one-sided"))
    torch.testing.assert_close(full[0]["itc"], half[0]["itc"])
    assert (full[1]["image_head.weight"] - half[1]["image_head.weight"]).abs().max() > 1e-3


def test_one_process_needs_no_group() -> None:
    rows = torch.randn(3, E, requires_grad=True)
    assert not dist.is_initialized()
    assert gather(rows) is rows
    assert (world_size(), rank()) == (1, 0)
