"""The whole demo: with tiny models in seconds, and (slow) with the real models that it uses."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny_runs
from openblip2.apps.demo import run_demo
from openblip2.apps.demo.plan import DemoPlan, announcement, plan_for
from openblip2.apps.scenes.vocabulary import WORLDS
from openblip2.cli import app
from openblip2.config import change
from openblip2.data.records import read_records
from openblip2.errors import UserError
from openblip2.presets import preset
from openblip2.progress import Progress

LITTLE = DemoPlan(train_scenes=24, test_scenes=8, train_easy_vqa=6, asked=6, reranked=3)
FEWER: dict[str, Any] = {"train_scenes": 24, "test_scenes": 8, "asked": 6, "reranked": 3, "pointed": 4, "looked": 2}


def tiny(root: Path) -> dict[str, Any]:
    """The settings of both stages, with tiny models that are created in `root`."""
    tiny_runs.home(root)
    words = dict(word.split("=", 1) for word in tiny_runs.options(root)[1::2])
    return {stage: change(preset(stage, "laptop"), words) for stage in ("stage1", "stage2")}


def test_demo_writes_report_metrics_and_both_runs(tmp_path: Path) -> None:
    metrics = run_demo(tmp_path / "out", replace(LITTLE, **tiny(tmp_path)), Progress(quiet=True))
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
        health = metrics["health"][stage]
        assert health["queries"] == 5
        assert all(line.startswith("BAD") for line in health["bad"])


def test_a_missing_plotting_library_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the report needs matplotlib: pip install 'openblip2\[demo\]'"):
        run_demo(tmp_path / "out", DemoPlan(), Progress(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def little_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which `openblip2 demo` trains tiny models on few pictures, for any world and seed."""
    import openblip2.apps.demo.plan as module

    models = tiny(tmp_path)
    monkeypatch.setattr(module, "plan_for", lambda *given: replace(plan_for(*given), **FEWER, **models))
    return tmp_path / "out"


def test_demo_shows_the_first_five_test_pictures_and_the_report(little_demo: Path) -> None:
    said = CliRunner().invoke(app, ["demo", "--out", str(little_demo)])
    assert said.exit_code == 0, said.output
    first = read_records(little_demo / "data" / "test")[0][:5]
    examples = json.loads((little_demo / "metrics.json").read_text())["examples"]
    assert [example["image"] for example in examples] == [str(record.image) for record in first]
    assert [example["reference"] for example in examples] == [record.captions[0] for record in first]
    shown = [f"{e['image']}\n  caption:   {e['caption']}\n  reference: {e['reference']}" for e in examples]
    told = f"report: {little_demo / 'report.html'}\nmetrics: {little_demo / 'metrics.json'}\n"
    assert said.stdout.split("\n\n")[1:] == [*shown, told]
    assert said.stderr.startswith("Teaches a frozen language model")
    drawn = {thing["noun"] for r in read_records(little_demo / "data" / "train")[0] for thing in r.facts["objects"]}  # pyright: ignore[reportOptionalSubscript]
    assert drawn <= set(WORLDS["small"])


def test_demo_as_json_is_one_object_a_line(little_demo: Path) -> None:
    said = CliRunner().invoke(app, ["demo", "--out", str(little_demo), "--json"])
    assert said.exit_code == 0, said.output
    *examples, files = [json.loads(line) for line in said.stdout.splitlines()]
    assert examples == json.loads((little_demo / "metrics.json").read_text())["examples"]
    assert len(examples) == 5
    assert files == {"report": str(little_demo / "report.html"), "metrics": str(little_demo / "metrics.json")}


def test_worlds_and_budgets_are_plans() -> None:
    full, longer = plan_for("full", 3), plan_for("full", budget=2.5)
    assert (full.world, full.seed) == ("full", 3)
    assert full.stage1.vision == full.stage2.vision
    for usual, more in ((full.stage1, longer.stage1), (full.stage2, longer.stage2)):
        assert more.train.steps == 2.5 * usual.train.steps
    assert longer.stage1.stage1 == full.stage1.stage1
    assert longer.stage2.stage2.lm_start_step == 2.5 * full.stage2.stage2.lm_start_step
    small, shorter = plan_for(), plan_for(budget=0.1)
    assert small.world == "small"
    assert small.stage1.vision == small.stage2.vision  # stage 2 starts from stage 1 and reads the same features
    assert shorter.stage1.train.steps == round(0.1 * small.stage1.train.steps)
    assert shorter.stage1.stage1.itm_start_step < shorter.stage1.train.steps
    assert shorter.stage1.stage1.similar_start_step == round(0.1 * (small.stage1.stage1.similar_start_step or 0))


def test_the_announcement_has_the_plan_in_it() -> None:
    told = announcement(plan_for(), Path("runs/x"))
    for part in ("12 things", "cat, dog, fish", "at 168 px", "runs/x/report.html", "wheel:dinov2-small"):
        assert part in told
    assert "222 things" in announcement(plan_for("full"), Path("x"))


@pytest.mark.slow
@pytest.mark.wheels
def test_demo_on_the_real_models(tmp_path: Path) -> None:
    few = {"train.steps": 3, "train.batch": 4, "train.validate_every": 0, "data.held_out": 0.25}
    real = {stage: change(preset(stage, "laptop"), few) for stage in ("stage1", "stage2")}
    metrics = run_demo(tmp_path, replace(LITTLE, **real), Progress(quiet=True))
    assert metrics["caption"]["n"] == 8
