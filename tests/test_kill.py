"""Killed at random, again and again, a run ends as one that was left in peace.

OPENBLIP2_KILLS=200 asks for as many; otherwise there are few. Where they fell is printed: pytest -m slow -s.
"""

import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_runs
from lives import AT, PHASE, SLOW_IMPORTS, Lives
from openblip2.data.batches import PairBatch, Sampler
from openblip2.data.records import read_records
from openblip2.train import loop
from openblip2.train.bad_steps import Remembered
from openblip2.train.recipes import train_stage
from test_training import log_of, quiet, recipe

KILLS = int(os.environ.get("OPENBLIP2_KILLS", "12"))
STEPS, BATCH, PICTURES, HELD = 24, 2, 20, 4  # three epochs of eight batches: a window of the sampler each
# When: at any time, and while the smallest targets are there. In seconds of computing since what is named.
AIMS = [("start", 0.9)] * 10 + [("checkpoint", 0.02)] * 8 + [("validation", 0.02), ("end", 0.01)]
IMPORTS = (
    "transformers.models.vit.modeling_vit",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "PIL.PngImagePlugin",
)


def life(folder: str, home: str, stage: str) -> None:
    """What a job script does each time it is started: the same command, with --resume."""
    torch.set_num_threads(1)
    show_phases()
    taken = Path(folder) / "taken.jsonl"
    call = Remembered.__call__

    def noted(self: Remembered, number: int) -> PairBatch:
        batch = call(self, number)
        with taken.open("a") as file:
            file.write(json.dumps([number, batch.names, batch.captions]) + "\n")
        return batch

    Remembered.__call__ = noted
    changes = {
        "data__augment": "true",
        "data__held_out": HELD / PICTURES,
        "train__batch": BATCH,
        "train__steps": STEPS,
        "train__validate_every": 5,
        "language__prompts": '["", "a photo of"]',
    }
    records, skipped = read_records(Path(home) / "data")
    run = Path(folder) / "run"
    train_stage(recipe(Path(home), stage, **changes), records, run, quiet(), resume=True, skipped=skipped)


def show_phases() -> None:
    """Says to the server what the process is at."""

    def at(phase: str, function: Callable[..., Any], then: str = "training") -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            PHASE[0] = AT.index(phase)
            found = function(*arguments)
            PHASE[0] = AT.index(then)
            return found

        return called

    loop._accumulate = at("training", loop._accumulate)
    loop.write_checkpoint = at("checkpoint", loop.write_checkpoint)
    loop.measure = at("validation", loop.measure)
    loop.save_trained = at("end", loop.save_trained, "end")


def batches_taken(folder: Path) -> tuple[dict[int, Any], int]:
    """What was in each batch, which must be the same whenever it was taken; and how often one was taken again."""
    found: dict[int, Any] = {}
    again = 0
    for line in (folder / "taken.jsonl").read_text().splitlines():
        number, *content = json.loads(line)
        again += number in found
        assert found.setdefault(number, content) == content, number
    return found, again


@pytest.mark.slow
def test_random_kills_lose_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for build in (tiny_runs.vision, tiny_runs.bert, tiny_runs.language):
        build(home / build.__name__)
    tiny_runs.pictures(home / "data", count=PICTURES)
    assert Sampler.WINDOW * BATCH == PICTURES - HELD
    drawn = random.Random(6)
    fell: Counter[str] = Counter()
    again, runs = 0, 0
    whole: dict[str, Path] = {}
    with Lives("test_kill", *SLOW_IMPORTS, *IMPORTS) as server:
        for stage in ("stage1", "stage2"):
            whole[stage] = tmp_path / f"{stage}-whole"
            whole[stage].mkdir()
            assert server.live(life, whole[stage], home, stage)[0] == [0]
        while fell.total() < KILLS:
            stage = ("stage1", "stage2")[runs % 2]
            folder = tmp_path / f"{stage}-{runs}"
            folder.mkdir()
            codes = [-9]
            while codes == [-9]:
                since, most = drawn.choice(AIMS)
                seconds = drawn.uniform(0, most) if fell.total() < KILLS else None
                codes, phase = server.live(life, folder, home, stage, seconds=seconds, since=since)
                assert codes in ([-9], [0]), f"after {fell.total()} kills: {folder}"
                if codes == [-9]:
                    fell[phase] += 1
            runs += 1
            again += check_run(folder, whole[stage])
    print(f"\n{fell.total()} kills in {runs} runs, at: {dict(fell)}; {again} batches were taken again")
    if KILLS >= 50:  # of fewer, chance may leave one out
        assert min(fell[name] for name in AT) > 0


def check_run(folder: Path, whole: Path) -> int:
    """The same weights, log and batches as of the undisturbed run; every picture once an epoch."""
    mine, theirs = folder / "run", whole / "run"
    assert (mine / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes(), folder
    rows = log_of(mine)
    assert rows == log_of(theirs), folder
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1)), folder
    found, again = batches_taken(folder)
    assert found == batches_taken(whole)[0], folder
    in_order = [name for number in range(STEPS) for name in found[number][0]]
    for epoch in range(STEPS // Sampler.WINDOW):
        pictures = in_order[epoch * (PICTURES - HELD) : (epoch + 1) * (PICTURES - HELD)]
        assert len(set(pictures)) == PICTURES - HELD, (folder, epoch)
    left = {path.name for path in (mine / "resume").iterdir()}
    assert left == {f"step-{STEPS - 2:08}", f"step-{STEPS:08}"}, folder
    assert not list(mine.rglob("*.new")), folder
    return again
