"""A run that is killed at random times, again and again, ends as an undisturbed run does.

OPENBLIP2_KILLS=200 sets the number of kills (default: 12). `pytest -m slow -s` prints the phases that were killed.
"""

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import openblip2
import tiny_runs
from lives import AT, PHASE, SLOW_IMPORTS, Lives
from openblip2.data.batches import PairBatch
from openblip2.data.records import read_records
from openblip2.train import loop
from openblip2.train.bookkeeping import RecordingBatches
from openblip2.train.recipes import train_stage
from test_training import log_of, quiet, recipe

SOURCE = str(Path(openblip2.__file__).parents[1])
KILLS = int(os.environ.get("OPENBLIP2_KILLS", "12"))
STEPS, BATCH, PICTURES, HELD = 24, 2, 20, 4
EPOCH = (PICTURES - HELD) // BATCH  # batches; the run has three epochs
# When to kill: at any time, and in the shortest phases; at most so many seconds of CPU time after the named phase.
AIMS = [("start", 0.9)] * 10 + [("checkpoint", 0.02)] * 8 + [("validation", 0.02), ("end", 0.01)]
IMPORTS = (
    "transformers.models.vit.modeling_vit",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "PIL.PngImagePlugin",
)


def life(folder: str, home: str, stage: str) -> None:
    """Does what a job script does at each start: runs the same command with --resume."""
    torch.set_num_threads(1)
    show_phases()
    taken = Path(folder) / "taken.jsonl"
    call = RecordingBatches.__call__

    def noted(self: RecordingBatches, number: int) -> PairBatch:
        batch = call(self, number)
        with taken.open("a") as file:
            file.write(json.dumps([number, batch.names, batch.captions]) + "\n")
        return batch

    RecordingBatches.__call__ = noted
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
    """Tells the server which phase the process is in."""

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
    """Contents of each batch, which must be the same each time it is taken, and how often batches were taken again."""
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
    tiny_runs.home(home, count=PICTURES)
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
    if KILLS >= 50:  # with fewer kills, chance may miss a phase
        assert min(fell[name] for name in AT) > 0


def check_run(folder: Path, whole: Path) -> int:
    """Compares weights, log and batches with the undisturbed run; each epoch must have every picture once."""
    mine, theirs = folder / "run", whole / "run"
    assert (mine / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes(), folder
    rows = log_of(mine)
    assert rows == log_of(theirs), folder
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1)), folder
    found, again = batches_taken(folder)
    assert found == batches_taken(whole)[0], folder
    in_order = [name for number in range(STEPS) for name in found[number][0]]
    for epoch in range(STEPS // EPOCH):
        pictures = in_order[epoch * (PICTURES - HELD) : (epoch + 1) * (PICTURES - HELD)]
        assert len(set(pictures)) == PICTURES - HELD, (folder, epoch)
    left = {path.name for path in (mine / "resume").iterdir()}
    assert left == {f"step-{STEPS - 2:08}", f"step-{STEPS:08}"}, folder
    assert not list(mine.rglob("*.new")), folder
    return again


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both_and_one_goes_on(tmp_path: Path) -> None:
    tiny_runs.home(tmp_path, count=PICTURES)
    run, steps = tmp_path / "run", 400
    words = ["train", "stage1", "--data", tmp_path / "data", "--out", run, "--resume", *tiny_runs.options(tmp_path)]
    words += ["--set", f"train.steps={steps}", "--set", "train.checkpoint_every=0", "--set", "train.validate_every=0"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    both = [start(words, meeting | {"RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(2)]
    log = run / "log.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) > 3):
        assert [process.poll() for process in both] == [None, None]
        time.sleep(0.05)
    both[1].terminate()  # rank 1, which writes nothing
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [143, 143], said
    assert "add --resume to continue" in said[0]
    assert said[1] == ""
    done = log_of(run)[-1]["step"]
    assert [path.name for path in (run / "resume").iterdir()] == [f"step-{done:08}"]
    alone = start(words, {})
    assert alone.wait(timeout=300) == 0, alone.communicate()[1]
    assert [row["step"] for row in log_of(run) if "loss" in row] == list(range(1, steps + 1))


def start(words: Sequence[object], more: dict[str, str]) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": SOURCE, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | more
    command = [sys.executable, "-m", "openblip2", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
