"""What experiment trackers receive from the log."""

import sys
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from openblip2.errors import UserError
from openblip2.train.bookkeeping import Log, numbers, open_tracker

ROWS: list[dict[str, Any]] = [
    {"step": 1, "loss": 3.5, "itc": 1.5, "lr": 1e-4, "seconds": 0.2},
    {"step": 2, "bad": ["itc is nan"], "bad_steps": 1},
    {"step": 2, "validation": {"n": 8, "tr@1": 0.5, "verdict": "the model looks"}},
]


def test_what_is_a_number_is_told_by_name() -> None:
    assert numbers(ROWS[0]) == {
        "training/loss": 3.5,
        "training/itc": 1.5,
        "training/lr": 1e-4,
        "training/seconds": 0.2,
    }
    assert numbers(ROWS[1]) == {"training/bad_steps": 1}
    assert numbers(ROWS[2]) == {"held out/n": 8, "held out/tr@1": 0.5}


def test_tensorboard_has_the_rows(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = Log(tmp_path / "log.jsonl", track=open_tracker("tensorboard", tmp_path, {}))
    for row in ROWS:
        log.write(row)
    found = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    (loss,) = found.Scalars("training/loss")
    assert (loss.step, loss.value) == (1, 3.5)
    assert [event.value for event in found.Scalars("held out/tr@1")] == [0.5]


def test_a_tracker_never_asks_on_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a key, wandb asks on the terminal if standard input is one; otherwise it raises an error."""

    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    def begin(**given: Any) -> None:
        if sys.stdin.isatty():
            input("Enter your choice: ")
        raise ValueError("api_key not configured (no-tty)")

    module = ModuleType("wandb")
    module.init = begin  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    terminal = Terminal("2\n")
    monkeypatch.setattr(sys, "stdin", terminal)
    with pytest.raises(UserError, match=r"train\.track=wandb: .*no-tty.*wandb login.*WANDB_MODE=offline"):
        open_tracker("wandb", tmp_path / "run", {})
    assert sys.stdin is terminal
    assert terminal.read() == "2\n", "nothing was asked"


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_the_others_are_begun_once_and_told_each_row(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []
    module = ModuleType(kind)
    module.init = lambda **given: calls.append(("init", given))  # type: ignore[attr-defined]
    module.log = lambda row, step: calls.append((f"log {step}", row))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, kind, module)
    log = Log(tmp_path / "log.jsonl", track=open_tracker(kind, tmp_path / "run", {"steps": 2}))
    for row in ROWS:
        log.write(row)
    assert [name for name, _ in calls] == ["init", "log 1", "log 2", "log 2"]
    assert calls[0][1]["name"] == "run"
    assert calls[0][1]["config"] == {"steps": 2}
    assert calls[3][1] == {"held out/n": 8, "held out/tr@1": 0.5}


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "trackio"])
def test_one_that_is_missing_is_named(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if kind == "tensorboard" else kind, None)
    with pytest.raises(UserError, match=f"train.track={kind}: pip install {kind}"):
        open_tracker(kind, tmp_path, {})


def test_only_the_first_process_tells(tmp_path: Path) -> None:
    told: list[Any] = []
    Log(tmp_path / "log.jsonl", writes=False, track=told.append).write(ROWS[0])
    assert told == []
