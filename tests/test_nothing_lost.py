"""Finished work is never replaced, and nothing is left out, without a word."""

import json
from pathlib import Path

import pytest

from openblip2.errors import UserError
from openblip2.train.checkpoint import require_absent
from openblip2.train.resume import require_new
from test_cli import Home, Said, call, home

__all__ = ["home"]


def one_line(said: Said, *parts: object) -> None:
    assert said.code == 2, said.err
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    for part in parts:
        assert str(part) in said.err


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- finished work


def test_training_into_a_finished_run_is_refused_unless_overwrite(home: Home) -> None:
    run = home.broken("finished", lambda folder: None, "stage1")
    before = files(run)
    one_line(call(*home.train("stage1", "finished", "--set", "train.seed=1")), run, "finished run", "--overwrite")
    assert files(run) == before
    one_line(call(*home.train("stage1", "finished", "--resume", "--overwrite")), "--resume", "--overwrite")
    said = call(*home.train("stage1", "finished", "--set", "train.seed=1", "--overwrite"))
    assert said.code == 0, said.err
    assert (run / "model.safetensors").read_bytes() != before[run / "model.safetensors"]


def test_another_programs_model_is_never_replaced(tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text('{"architectures": ["OPTForCausalLM"]}')
        with pytest.raises(UserError, match="not of a run: give another --out"):
            require_new(folder, overwrite=True)
    require_new(tmp_path / "new", overwrite=False)


def test_a_run_cannot_be_replaced_by_one_that_starts_from_it(home: Home) -> None:
    run = home.broken("start", lambda folder: None, "stage1")
    before = files(run)
    one_line(call(*home.train("stage2", "start", "--start", run, "--overwrite")), run, "starts from", "another --out")
    assert files(run) == before


def test_a_finished_evaluation_is_refused_unless_overwrite(home: Home, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    words = ("evaluate", "retrieval", home.stage1, "--data", home.data, "--out", out, "--rerank", 0)
    out.write_text("mine")
    one_line(call(*words), out, "--overwrite")
    assert out.read_text() == "mine"
    said = call(*words, "--overwrite")
    assert said.code == 0, said.err
    assert json.loads(out.read_text())["samples"] == "scores.samples.jsonl"


def test_a_finished_demo_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    one_line(call("demo", "--out", tmp_path), tmp_path / "metrics.json", "--overwrite")
    require_absent(tmp_path / "metrics.json", overwrite=True)


# --- data that changed


def test_resume_with_other_data_is_refused(home: Home) -> None:
    run = home.broken("other-data", lambda folder: (folder / "model.safetensors").unlink(), "stage1")
    rows = home.data / "records.jsonl"
    before = rows.read_text()
    try:
        rows.write_text(before.replace("a red dog", "a red bus", 1))
        said = call(*home.train("stage1", "other-data", "--resume"))
        one_line(said, run, "the data have changed", "16 pictures", "a new --out")
        rows.write_text("".join(before.splitlines(keepends=True)[1:]))
        one_line(call(*home.train("stage1", "other-data", "--resume")), "15 pictures")
        held = call(*home.train("stage1", "other-data", "--resume", "--held-out", home.data))
        one_line(held, "31 pictures")
    finally:
        rows.write_text(before)
    said = call(*home.train("stage1", "other-data", "--resume"))
    assert said.code == 0, said.err
    assert (run / "model.safetensors").read_bytes() == (home.stage1 / "model.safetensors").read_bytes()
