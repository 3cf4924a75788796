"""The demo, whole: with tiny models in seconds, and (slow) with the real ones it ships with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import tiny_runs
from openblip2.config import change
from openblip2.demo import Plan, run_demo
from openblip2.errors import UserError
from openblip2.presets import preset
from openblip2.progress import Progress

LITTLE = Plan(train_scenes=24, test_scenes=8, train_easy_vqa=6, asked=6, reranked=3)


def test_demo_writes_report_metrics_and_both_runs(tmp_path: Path) -> None:
    tiny_runs.home(tmp_path)
    words = dict(word.split("=", 1) for word in tiny_runs.options(tmp_path)[1::2])
    tiny = {stage: change(preset(stage, "laptop"), words) for stage in ("stage1", "stage2")}
    metrics = run_demo(tmp_path / "out", replace(LITTLE, **tiny), Progress(quiet=True))
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    assert set(metrics["seconds"]) == {"data", "features", "stage1", "stage2", "evaluation", "total"}
    assert metrics["retrieval"]["n"] == 8
    assert metrics["retrieval"]["chance"] == 1 / 8
    for scores in (metrics["retrieval"][kind] for kind in ("itc", "itm", "itm+itc")):
        assert {"tr@1", "tr@5", "ir@1", "ir@5"} <= scores.keys()
        assert all(0 <= scores[key] <= 1 for key in ("tr@1", "tr@5", "ir@1", "ir@5"))
    assert {"n", "exact", "objects", "attributes"} <= metrics["caption"].keys()
    assert metrics["vqa"]["easy-vqa"]["n"] == 6
    assert {"majority", "question_only"} == metrics["vqa"]["easy-vqa"]["baselines"].keys()
    assert metrics["grounding"]["loss_right"] > 0
    assert 0 < metrics["pointing"]["chance"] < metrics["pointing"]["best fixed place"] <= 1
    maps = sorted(file.name for file in (tmp_path / "out" / "maps").iterdir())
    assert maps == [f"{n:05}-{kind}.png" for n in range(8) for kind in ("attention", "relevance")]
    assert "<html" in (tmp_path / "out" / "report.html").read_text()
    for stage in ("stage1", "stage2"):
        assert (tmp_path / "out" / stage / "model.safetensors").is_file()


def test_stamps_that_are_not_installed_are_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import openblip2.demo.plan as module
    from openblip2.data.corpora import stamps_records

    monkeypatch.setattr(module, "stamps_records", lambda seed: stamps_records(tmp_path / "none", seed=seed))
    with pytest.raises(UserError, match="apt-get install tuxpaint-stamps-default"):
        run_demo(tmp_path / "out", replace(LITTLE, corpus="stamps"), Progress(quiet=True))


@pytest.mark.slow
@pytest.mark.wheels
def test_demo_on_the_real_models(tmp_path: Path) -> None:
    few = {"train.steps": 3, "train.batch": 4, "train.validate_every": 0, "data.held_out": 0.25}
    real = {stage: change(preset(stage, "laptop"), few) for stage in ("stage1", "stage2")}
    metrics = run_demo(tmp_path, replace(LITTLE, **real), Progress(quiet=True))
    assert metrics["caption"]["n"] == 8
