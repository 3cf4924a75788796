"""The command line under torchrun and accelerate launch, and processes that fail. These tests take minutes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import openblip2
import tiny_runs

pytestmark = pytest.mark.slow

SECONDS = 400  # long, because a machine may be busy
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--", "openblip2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "openblip2"]
ALONE = ["-m", "openblip2"]


def environment(**more: str) -> dict[str, str]:
    source = str(Path(openblip2.__file__).parents[1])
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"PYTHONPATH": source, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | more


def python(words: Sequence[object]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment(), check=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.home(tmp_path_factory.mktemp("training"), count=24)


def train(home: Path, launcher: list[str], stage: str, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    exact = ["qformer.dropout=0", "vision.whiten=false", "warm_start=false", "train.batch=5", "train.accumulate=2"]
    changes = [word for change in exact for word in ("--set", change)]
    words = [*launcher, "train", stage, "--data", home / "data", "--out", out, *tiny_runs.options(home), *changes]
    return python([*words, *more])


def assert_same_log(one: Path, other: Path) -> None:
    first, second = (
        [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (one, other)
    )
    assert len(first) == len(second) == 5  # three steps, two validations
    for mine, theirs in zip(first, second, strict=True):
        mine, theirs = mine.get("validation", mine), theirs.get("validation", theirs)
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"seconds", "verdict"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


def names_in(run: Path) -> list[str]:
    """The names of all files, without the random part of the feature file's name."""
    return sorted(re.sub(r"-\w{32}", "", str(path.relative_to(run))) for path in run.rglob("*"))


@pytest.fixture(scope="module")
def stage1(home: Path) -> Path:
    """A run that one process has trained."""
    said = train(home, ALONE, "stage1", home / "one", "--set", "stage1.itm_start_step=0", "--set", "data.augment=true")
    assert said.returncode == 0, said.stderr
    return home / "one"


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_stage1_logs_what_one_process_logs(home: Path, stage1: Path, tmp_path: Path, launcher: list[str]) -> None:
    out = tmp_path / "two"
    said = train(home, launcher, "stage1", out, "--set", "stage1.itm_start_step=0", "--set", "data.augment=true")
    assert said.returncode == 0, said.stderr
    assert_same_log(stage1, out)
    assert said.stdout.splitlines().count(str(out)) == 1
    assert said.stderr.count("qformer ") == 1
    assert names_in(out) == names_in(stage1)


def test_stage2_in_pieces_logs_what_one_process_logs(home: Path, stage1: Path, tmp_path: Path) -> None:
    more = ["--start", str(stage1), "--set", "train.chunk=2"]
    one = train(home, ALONE, "stage2", tmp_path / "one", *more)
    two = train(home, TORCHRUN, "stage2", tmp_path / "two", *more, "--set", "train.parallel=fsdp2")
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    assert_same_log(tmp_path / "one", tmp_path / "two")


def test_what_all_reject_is_said_once(home: Path, tmp_path: Path) -> None:
    said = train(home, TORCHRUN, "stage1", tmp_path / "run", "--set", "train.bach=3")
    assert said.returncode != 0
    assert [line for line in said.stderr.splitlines() if line.startswith("openblip2: ")] == [
        "openblip2: unknown setting 'train.bach': did you mean 'train.batch'?"
    ]
    said = train(home, TORCHRUN, "stage1", tmp_path / "run", "--set", "train.batch=1")
    lines = [line for line in said.stderr.splitlines() if line.startswith("openblip2: ")]
    assert len(lines) == 1
    assert "train.batch=1 is for all 2 processes" in lines[0]


PROGRAM = """
import sys, os, time
from openblip2.distributed import collectives
from openblip2.errors import UserError
from openblip2.distributed.launch import first_process_first, processes
def main():
    how, number = sys.argv[1], int(os.environ["RANK"])
    with processes():
        with first_process_first():
            print("ready", collectives.share(1 + number).counts if number == 9 else "", flush=True)
            if how == "first fails" and number == 0:
                raise UserError("the disk is full")
        if how == "second fails" and number == 1:
            raise UserError("the picture is gone")
        if how == "second is killed" and number == 1:
            os.kill(os.getpid(), 9)
        if how == "stuck" and number == 1:
            raise UserError("the shard is gone")
        if how == "stuck":
            time.sleep(1000)
        print("met", collectives.share(1 + number).counts, flush=True)
try:
    main()
except UserError as error:
    print(f"openblip2: {error}", file=sys.stderr)
    sys.exit(2)
"""


def together(how: str) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of two processes that are started without a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    group = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, how],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(RANK=str(number), LOCAL_RANK=str(number), **meeting),
        )
        for number in range(2)
    ]
    try:
        said = [process.communicate(timeout=SECONDS) for process in group]
    finally:
        for process in group:
            process.kill()
    return [(process.returncode, *words) for process, words in zip(group, said, strict=True)]


def test_processes_meet_and_part() -> None:
    assert together("all is well") == [(0, "ready \nmet (1, 2)\n", "")] * 2


@pytest.mark.parametrize(
    ("how", "which", "line"),
    [
        ("first fails", 0, "openblip2: the disk is full"),
        ("second fails", 1, "openblip2: the picture is gone"),
        ("stuck", 1, "openblip2: the shard is gone"),
    ],
)
def test_an_error_in_one_ends_all_with_one_line(how: str, which: int, line: str) -> None:
    began = time.monotonic()
    ends = together(how)
    assert time.monotonic() - began < 200
    assert [code for code, _, _ in ends] == [2, 2]
    assert [errors for _, _, errors in ends] == [f"{line}\n" if number == which else "" for number in range(2)]


def test_a_process_that_is_killed_ends_the_other() -> None:
    first, second = together("second is killed")
    assert second[0] == -signal.SIGKILL
    assert first[0] == 2
    assert first[2].startswith("openblip2: process 0 lost the connection to another one")
    assert first[2].count("\n") == 1


def test_the_variables_must_fit() -> None:
    command = [sys.executable, "-c", PROGRAM, "all is well"]
    given = environment(RANK="0", WORLD_SIZE="2")
    said = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=given, check=False)
    assert said.returncode == 2
    assert said.stderr.startswith("openblip2: RANK=0 is set, but the processes cannot connect")
    assert "torchrun" in said.stderr
