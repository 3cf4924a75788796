"""A run that ended early, for any reason, resumes with the same result. The slow kill test is in test_kill.py."""

import errno
import json
import math
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

from lives import SLOW_IMPORTS, Lives, die_at
from openblip2.config import TrainSettings
from openblip2.errors import Stopped, UserError
from openblip2.progress import Progress
from openblip2.train import resume
from openblip2.train.bookkeeping import Log
from openblip2.train.loop import fit
from openblip2.train.resume import find_checkpoint
from test_training import OPTIM, Line, log_of, quiet, settings

Losses = Callable[[int], dict[str, Tensor]]
EVERY = 6  # by default, runs are killed at every 6th file operation; the others are slow tests


class Heard(Progress):
    """Records the messages."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def go(
    folder: Path,
    losses: Callable[[Line], Losses] = lambda model: model.losses,
    train: TrainSettings | None = None,
    validate: Callable[[], dict[str, Any]] = lambda: {"n": 1},
    progress: Progress | None = None,
    samples: Callable[[], list[dict[str, Any]]] = list,
) -> Line:
    """Trains from the last checkpoint, or from the beginning if there is none, as a job script does each time."""
    torch.manual_seed(0)
    model, progress = Line(), progress or quiet()
    folder.mkdir(exist_ok=True)
    last = find_checkpoint(folder, progress.say)
    fit(model, losses(model), folder, OPTIM, train or settings(), validate, progress, last, samples)
    return model


def at(number: int, happens: Callable[[], object]) -> Callable[[Line], Losses]:
    """Losses that call `happens` when they compute batch `number`."""

    def of(model: Line) -> Losses:
        def losses(now: int) -> dict[str, Tensor]:
            if now == number:
                happens()
            return model.losses(now)

        return losses

    return of


def gone(*_: object) -> None:
    raise RuntimeError("the machine is gone")


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "resume").iterdir())


def assert_same_run(one: Path, other: Path) -> None:
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert log_of(one) == log_of(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    go(folder)
    return folder


def test_a_resumed_run_is_bit_equal(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="gone"):
        go(tmp_path, at(4, gone))
    go(tmp_path)
    assert_same_run(whole, tmp_path)


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_request_to_stop_finishes_the_step_and_saves(whole: Path, tmp_path: Path, kind: int, code: int) -> None:
    before = signal.getsignal(kind)
    with pytest.raises(Stopped) as stopped:
        go(tmp_path, at(2, lambda: signal.raise_signal(kind)))
    assert stopped.value.code == code
    assert steps(tmp_path) == ["step-00000002", "step-00000003"]
    assert signal.getsignal(kind) is before
    go(tmp_path)
    assert_same_run(whole, tmp_path)


def test_a_request_breaks_a_validation_off_and_it_is_made_up_for(whole: Path, tmp_path: Path) -> None:
    def asked() -> dict[str, Any]:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("validation goes on")

    with pytest.raises(Stopped):
        go(tmp_path, validate=asked)
    assert steps(tmp_path) == ["step-00000002", "step-00000003"]
    assert not any("validation" in row for row in log_of(tmp_path))
    go(tmp_path)
    assert_same_run(whole, tmp_path)


def test_the_last_checkpoints_are_kept_and_say_what_is_in_them(tmp_path: Path) -> None:
    train = TrainSettings(steps=5, batch=2, accumulate=3, precision="fp32", checkpoint_every=1, keep_checkpoints=3)
    go(tmp_path, train=train)
    assert steps(tmp_path) == ["step-00000003", "step-00000004", "step-00000005"]
    last = tmp_path / "resume" / "step-00000005"
    progress = json.loads((last / "progress.json").read_text())
    assert progress == {"step": 5, "batches": 15, "bad_steps": 0, "bad_in_a_row": 0, "data": ""}
    manifest = json.loads((last / "manifest.json").read_text())
    assert manifest["step"] == 5
    assert sorted(manifest["files"]) == sorted(path.name for path in last.iterdir() if path.name != "manifest.json")
    assert (last / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert {name.split(":")[1] for name in load_file(last / "optimizer.safetensors")} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    """Flips one bit in the last tensor."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "short": ("optimizer.safetensors", shorten),
    "a bit": ("model.safetensors", flip),
    "missing": ("progress.json", Path.unlink),
    "no manifest": ("manifest.json", Path.unlink),
    "half a manifest": ("manifest.json", shorten),
    "empty manifest": ("manifest.json", lambda path: path.write_text("{}")),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(whole: Path, tmp_path: Path, case: str) -> None:
    with pytest.raises(RuntimeError):
        go(tmp_path, at(5, gone))
    name, damage = DAMAGE[case]
    newest = tmp_path / "resume" / "step-00000004"
    damage(newest / name)
    heard = Heard()
    with pytest.raises(RuntimeError):
        go(tmp_path, at(3, gone), progress=heard)  # before it reaches step 4 again
    assert len([line for line in heard.lines if "damaged" in line]) == 1
    assert str(newest) in heard.lines[0]
    assert name in heard.lines[0]
    assert "step-00000002 is used instead" in heard.lines[0]
    assert steps(tmp_path) == ["step-00000002", "step-00000004.damaged"]
    go(tmp_path)
    assert_same_run(whole, tmp_path)
    assert steps(tmp_path) == ["step-00000004", "step-00000006"]


def test_no_whole_checkpoint_is_an_error_and_none_at_all_is_not(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, print) is None
    with pytest.raises(RuntimeError):
        go(tmp_path, at(5, gone))
    for folder in (tmp_path / "resume").iterdir():
        flip(folder / "model.safetensors")
    for _ in range(2):  # the second attempt fails too
        with pytest.raises(UserError, match=r"step-00000004 is damaged \(model\.safetensors has changed since it was"):
            go(tmp_path)
    model = Line()
    fit(model, model.losses, tmp_path, OPTIM, settings(steps=1), dict, quiet())  # starts from the beginning
    assert not (tmp_path / "resume").exists()


def test_checkpoints_of_another_version_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        go(tmp_path, at(3, gone))
    (tmp_path / "resume" / "progress.json").write_text('{"step": 2}')
    with pytest.raises(UserError, match="of an older openblip2"):
        go(tmp_path)
    (tmp_path / "resume" / "progress.json").unlink()
    manifest = tmp_path / "resume" / "step-00000002" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 9'))
    with pytest.raises(UserError, match=r"format 9, but this openblip2 reads 2"):
        go(tmp_path)


def test_half_a_line_in_the_log_is_dropped_and_counted(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        go(tmp_path, at(5, gone))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    heard = Heard()
    go(tmp_path, progress=heard)
    assert "1 line was removed (not valid JSON)" in heard.lines[0]
    assert_same_run(whole, tmp_path)


def test_the_log_is_whole_while_its_end_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = '{"step": 1}\n{"step": 2}\n'
    (tmp_path / "log.jsonl").write_text(before)
    monkeypatch.setattr("os.replace", gone)
    with pytest.raises(RuntimeError):
        Log(tmp_path / "log.jsonl", keep_steps=1)
    monkeypatch.undo()
    assert (tmp_path / "log.jsonl").read_text() == before
    Log(tmp_path / "log.jsonl", keep_steps=1)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'


def test_a_full_disk_is_one_line_and_costs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"checkpoint of step 4 cannot be written \(.*No space left"):
        go(tmp_path, at(3, lambda: monkeypatch.setattr(resume, "write_tensors", full)))
    monkeypatch.undo()
    assert find_checkpoint(tmp_path, print) == tmp_path / "resume" / "step-00000002"
    assert steps(tmp_path) == ["step-00000002"]


def broken(*numbers: int, value: float = math.nan) -> Callable[[Line], Losses]:
    def of(model: Line) -> Losses:
        return lambda n: {k: v * (value if n in numbers else 1) for k, v in model.losses(n).items()}

    return of


class Overflow(torch.autograd.Function):
    """A finite loss with a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * math.inf


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_a_bad_step_changes_nothing_and_is_counted(tmp_path: Path, kind: str) -> None:
    def of(model: Line) -> Losses:
        if kind != "gradient":
            return broken(7, value=float(kind))(model)
        return lambda n: {k: Overflow.apply(v) if n == 7 else v for k, v in model.losses(n).items()}  # pyright: ignore

    train = TrainSettings(
        steps=6, batch=2, accumulate=2, precision="fp32", validate_every=0, checkpoint_every=1, keep_checkpoints=9
    )
    heard = Heard()
    go(tmp_path, of, train, progress=heard)  # batch 7 is the second of step 4
    before, after, then = (tmp_path / "resume" / f"step-0000000{n}" for n in (3, 4, 5))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (before / name).read_bytes() == (after / name).read_bytes()
        assert (after / name).read_bytes() != (then / name).read_bytes()
    row = log_of(tmp_path)[3]
    assert (row["step"], row["bad_steps"]) == (4, 1)
    assert [text.split(" = ")[0] for text in row["bad"]][-1] == "grad_norm"
    assert json.loads((after / "progress.json").read_text())["bad_in_a_row"] == 1
    assert json.loads((then / "progress.json").read_text()) == {
        "step": 5, "batches": 10, "bad_steps": 1, "bad_in_a_row": 0, "data": "",
    }  # fmt: skip
    assert [line for line in heard.lines if line.startswith("step 4 is left out (1 so far): ")]
    assert [row["step"] for row in log_of(tmp_path) if "loss" in row] == [1, 2, 3, 5, 6]


def test_bad_steps_in_a_row_end_the_run_and_name_the_samples(tmp_path: Path) -> None:
    seen = [{"batch": 4, "process": 0, "sample": "x", "caption": "a cat"}]
    train = settings(steps=9, most_bad_steps=3)
    message = r"^step 5: near = nan, far = nan, grad_norm = nan; such steps are left out, but this is number 3 in a row"
    for _ in range(2):  # the second time starts from the checkpoint of step 4 and continues its count
        with pytest.raises(UserError, match=message):
            go(tmp_path, broken(0, 2, 3, 4), train, samples=lambda: seen)
        found = json.loads((tmp_path / "bad_batch.json").read_text())
        assert (found["step"], found["bad_in_a_row"], found["samples"]) == (5, 3, seen)
        assert log_of(tmp_path)[-1]["bad_steps"] == 4
        assert steps(tmp_path) == ["step-00000002", "step-00000004"]


def test_a_run_with_bad_steps_resumes_to_the_same(tmp_path: Path) -> None:
    go(tmp_path / "whole", broken(1, 3, 4))
    for number in range(1, 6):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(RuntimeError):
            go(folder, lambda model, n=number: chained(at(n, gone)(model), broken(1, 3, 4)(model)))
        go(folder, broken(1, 3, 4))
        assert_same_run(tmp_path / "whole", folder)


def chained(first: Losses, second: Losses) -> Losses:
    def losses(number: int) -> dict[str, Tensor]:
        first(number)
        torch.manual_seed(number)  # as `fit` does with seed 0
        return second(number)

    return losses


# The server calls the following functions in separate processes.


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    with Lives("test_resume", *SLOW_IMPORTS) as server:
        yield server


def life(folder: str, operation: int) -> None:
    """Resumes training, and is killed at an operation on the run's files; -1 = never."""
    torch.set_num_threads(1)
    if operation >= 0:
        die_at(operation, folder)
    go(Path(folder))


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, EVERY))])
def test_killed_at_each_operation_on_files_it_ends_in_the_same_run(
    whole: Path, tmp_path: Path, lives: Lives, first: int
) -> None:
    operation, codes, folder = first - EVERY, [-9], tmp_path
    while codes == [-9]:
        operation += EVERY
        folder = tmp_path / str(operation)
        folder.mkdir()
        codes, _ = lives.live(life, folder, operation)
        if operation % 4 == 0:  # killed a second time, at any operation
            assert lives.live(life, folder, operation * 7 % 23)[0] in ([-9], [0])
        assert lives.live(life, folder, -1)[0] == [0]
        assert_same_run(whole, folder)
        assert steps(folder) == ["step-00000004", "step-00000006"]
        assert not list(folder.rglob("*.new"))
    assert codes == [0]  # the run ended before this operation
    assert operation > 60


class Rows(nn.Module):
    """A model for which training in several processes equals training in one process on the joined batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)

    def forward(self, rows: Tensor) -> Tensor:
        return self.last(self.norm(self.first(rows)).tanh()).square().mean()


def train_rows(process: int, folder: str, how: str, steps: int, world: int, bad: int = -1) -> None:
    """Trains on batches of 4 rows, split among processes; in batch number `bad`, a row of the last process is NaN."""
    torch.set_num_threads(1)
    run = Path(folder)
    torch.manual_seed(3)
    model = Rows()
    if world > 1:
        meeting = f"file://{run}/meeting-{steps}-{world}"
        dist.init_process_group("gloo", meeting, timedelta(minutes=5), world_size=world, rank=process)
    if how == "fsdp":  # two layers are sharded, the norm is not
        fully_shard(model.first)
        fully_shard(model.last)
    taken: list[int] = []

    def losses(number: int) -> dict[str, Tensor]:
        rows = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
        if number == bad:
            rows[-1] = math.nan
        taken.append(number)
        return {"square": model(rows.chunk(world)[process])}

    train = TrainSettings(steps=12, batch=4, precision="fp32", validate_every=0, checkpoint_every=3, most_bad_steps=2)

    def validate() -> dict[str, Any]:
        return {"n": 1}

    def stops(number: int) -> dict[str, Tensor]:
        if number == steps - 1 and process == 0:  # one process gets the signal, all stop
            signal.raise_signal(signal.SIGTERM)
        return losses(number)

    code = 0
    try:
        last = find_checkpoint(run, print)
        fit(model, stops, run, OPTIM, train, validate, quiet(), last, lambda: [{"process": process}])
    except Stopped as stopped:
        code = stopped.code
        assert taken[-1] == steps - 1
    except UserError:
        code = 2
    finally:
        if world > 1:
            dist.destroy_process_group()
    raise SystemExit(code)


def train_alone(folder: str, how: str, steps: int, world: int, bad: int = -1) -> None:
    train_rows(0, folder, how, steps, world, bad)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("worlds", [(2, 1), (1, 2), (2, 2)], ids=str)
def test_a_run_resumes_on_another_number_of_processes(
    tmp_path: Path, lives: Lives, how: str, worlds: tuple[int, int]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    one = ("ddp", 99, 1, 4)
    assert lives.live(train_alone, whole, *one)[0] == [0]
    for world, steps, code in zip(worlds, (8, 99), (143, 0), strict=True):
        arguments = (parts, how if world > 1 else "ddp", steps, world, 4)
        if world == 1:
            assert lives.live(train_alone, *arguments)[0] == [code]
        else:
            assert lives.live(train_rows, *arguments, processes=world)[0] == [code] * world
    assert (parts / "resume" / "step-00000012").is_dir()
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    moments, theirs = (load_file(f / "resume" / "step-00000012" / "optimizer.safetensors") for f in (whole, parts))
    assert moments.keys() == theirs.keys()
    for name, tensor in moments.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-7)
    rows = [row for row in log_of(parts) if "step" in row and "validation" not in row]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if "bad" in row] == [5]  # batch 4 is bad in one process, skipped in both


def endlessly_bad(process: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", timedelta(minutes=5), world_size=2, rank=process)
    model = Rows()

    def losses(number: int) -> dict[str, Tensor]:
        return {"square": model(torch.full((2, 5), math.nan if process else 1.0))}

    names = [{"process": process, "sample": "é" * (process + 1)}]
    try:
        fit(model, losses, Path(folder), OPTIM, settings(most_bad_steps=2), dict, quiet(), None, lambda: names)
    except UserError as error:  # every process names the bad value that one of them found
        raise SystemExit(2 if "square = nan" in str(error) else 3) from error


def test_samples_of_all_processes_are_named(tmp_path: Path, lives: Lives) -> None:
    assert lives.live(endlessly_bad, tmp_path, processes=2)[0] == [2, 2]
    found = json.loads((tmp_path / "bad_batch.json").read_text())
    assert found["samples"] == [{"process": 0, "sample": "é"}, {"process": 1, "sample": "éé"}]
