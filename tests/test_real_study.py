"""The study on real pictures, with tiny models and generated pictures in the format of the prepared ones."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

import tiny_runs
from openblip2.apps.studies import real
from openblip2.config import change
from openblip2.data.records import Record, write_records
from openblip2.errors import UserError
from openblip2.presets import preset
from openblip2.progress import Progress


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("real")
    tiny_runs.home(root)
    records = []
    for source, count in (("stamps", 24), ("emoji", 16)):
        for n in range(count):
            colour, noun = list(tiny_runs.COLOURS)[n % 2], tiny_runs.NOUNS[n % 3]
            path = root / "out" / "data" / "pictures" / source / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shade = [max(0, min(255, c + 3 * n)) for c in tiny_runs.COLOURS[colour]]
            Image.new("RGB", (16, 16), (shade[0], shade[1], shade[2])).save(path)
            group = f"{source}/{n - n % 2}"  # two pictures in each group
            facts = {"source": source, "group": group}
            records.append(Record(f"{source}/{n}", path, (f"A {colour} {noun}.",), facts=facts))
    write_records(records, root / "out" / "data")
    return root


def plan(home: Path, **more: object) -> real.RealPlan:
    words = tiny_runs.options(home)[1::2]
    values = {k: v for k, v in (word.split("=", 1) for word in words)}
    values |= {"vision.whiten": "false", "warm_start": "false", "data.augment": "false", "train.steps": "2"}
    few = {"train.steps": 2, "train.batch": 4, "train.validate_every": 0, "data.held_out": 0.25}
    return real.RealPlan(
        k=3,
        folds=(0, 2),
        changes=dict.fromkeys(real.CHANGES, few),
        stage1=change(preset("stage1", "laptop"), values),
        stage2=change(preset("stage2", "laptop"), values),
        **more,  # pyright: ignore[reportArgumentType]
    )


def test_folds_are_trained_scored_and_put_into_a_table(home: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    out = home / "out"
    figures = real.bench_real(out, plan(home), Progress(quiet=True))
    text = (out / "real.md").read_text()
    assert "| joint less alone, tr@1 |" in text
    assert figures == json.loads((out / "real.json").read_text())
    assert figures["scores"]["joint: tr@1"]["n"] == figures["stamps"] == 16
    assert {"captions: CIDEr-D", "alone: ir@1, known captions"} <= figures["scores"].keys()
    assert "joint less alone, ir@1" in figures["differences"]
    assert figures["pictures"] == {"stamps": 24, "emoji": 16}
    # Neither the pictures of a fold's test part nor others of their groups are in the training data.
    for number in (0, 2):
        trained = (out / f"fold-{number}" / "joint" / "stage1" / "trained_on.txt").read_text().split()
        assert 10 < len(trained) < 40

    # A second call trains nothing again, and the figures are the same.
    before = {path: path.stat().st_mtime_ns for path in out.glob("fold-*/*/*/model.safetensors")}
    assert len(before) == 6
    assert real.bench_real(out, plan(home), Progress(quiet=True)) == figures
    assert {path: path.stat().st_mtime_ns for path in out.glob("fold-*/*/*/model.safetensors")} == before


def test_what_cannot_be_run_is_one_line(home: Path) -> None:
    with pytest.raises(UserError, match="give numbers from 0 to 4"):
        real.bench_real(home / "out", real.RealPlan(folds=(7,)), Progress(quiet=True))


def test_a_missing_package_is_named_before_anything_is_fetched(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"scoring captions needs pycocoevalcap: pip install 'openblip2\[eval\]'"):
        real.bench_real(home / "nothing", real.RealPlan(), Progress(quiet=True))
    assert not (home / "nothing").exists()
