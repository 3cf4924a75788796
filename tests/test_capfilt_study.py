"""The study of CapFilt with tiny models: the captions on which each variant is trained."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny_runs
from openblip2.apps.studies import ablate, design, trials
from openblip2.apps.studies.study import Plan
from openblip2.capfilt.shard import How
from openblip2.config import change
from openblip2.data.records import Record
from openblip2.errors import UserError
from openblip2.presets import preset
from openblip2.progress import Progress

QUIET = Progress(quiet=True)


@pytest.fixture
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    root = tmp_path_factory.mktemp("models")
    tiny_runs.home(root)
    words = dict(word.split("=", 1) for word in tiny_runs.options(root)[1::2]) | {"data.max_tokens": "18"}
    tiny: dict[str, Any] = {stage: change(preset(stage, "laptop"), words) for stage in ("stage1", "stage2")}
    return Plan(seeds=(0, 1), scenes=24, test_scenes=8, validated=4, steps={"stage1": 3, "stage2": 2}, **tiny)


def test_the_web_has_wrong_captions_and_no_other_difference() -> None:
    records = [Record(str(n), Path(f"{n}.png"), (f"caption {n}", f"also {n}")) for n in range(41)]
    right, swapped = design.right_half(records), design.web_half(records)
    assert [record.id for record in right] == [record.id for record in swapped] == [str(n) for n in range(20, 41)]
    assert [record.captions for record in right] == [(f"caption {n}",) for n in range(20, 41)]
    wrong = [n for n in range(21) if swapped[n] != right[n]]
    assert len(wrong) == round(21 * design.NOISE), "those that are swapped all are another's"
    assert sorted(record.captions for record in swapped) == sorted(record.captions for record in right)
    assert swapped == design.web_half(records)


def test_each_way_is_trained_on_its_captions(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        design.FILTERS, "itm", How(captions=1, filter="itm", threshold=0.0)
    )  # untrained ITM may drop all
    given: dict[str, list[Record]] = {}
    real = trials.train_stage

    def train(settings: Any, records: Any, run: Path, *more: Any, **options: Any) -> None:
        given[f"{run.parent.name}/{run.name}"] = list(records)
        real(settings, records, run, *more, **options)

    monkeypatch.setattr(trials, "train_stage", train)
    result = ablate("capfilt", tmp_path, plan, QUIET)
    runs = ("the-web-s-captions", "capfilt", "capfilt-blip-s-form", "the-right-captions")
    assert given.keys() == {f"seed-0/{name}" for name in ("stage1-captioner", "stage2-captioner")} | {
        f"seed-{seed}/stage1-{name}" for name in runs for seed in (0, 1)
    }, "captioner and ranker are trained once, for all seeds"
    assert given["seed-1/stage1-capfilt"] == given["seed-0/stage1-capfilt"]
    swapped, found, itm, right = (given[f"seed-0/stage1-{name}"] for name in runs)
    assert [len(record.captions) for record in swapped] == [len(record.captions) for record in right] == [1] * 12
    assert sum(one != other for one, other in zip(swapped, right, strict=True)) in range(3, 7)
    for records, name in ((found, "capfilt"), (itm, "itm")):
        kept = json.loads((tmp_path / f"web-{name}.json").read_text())
        assert {record.id: list(record.captions) for record in records} == kept["captions"]
        assert kept["counts"]["captions"] == sum(len(record.captions) for record in records)
        assert 1 <= max(len(record.captions) for record in records) <= 2
    assert kept["counts"]["captions by the captioner"] <= 12
    trained_on = {record.id for record in given["seed-0/stage2-captioner"]}
    assert not trained_on & {record.id for record in found}
    assert [claim["better"] for claim in result["claims"]] == ["CapFilt", "CapFilt, BLIP's form"]
    assert all(claim["worse"] == "the web's captions" for claim in result["claims"])
    text = (tmp_path / "ablation.md").read_text()
    assert text.startswith("# What is CapFilt worth?")

    # A second call repeats nothing. With another number of captioner steps, all that depends on it is repeated.
    given.clear()
    again = ablate("capfilt", tmp_path, plan, QUIET)
    assert not given
    assert again["ways"] == result["ways"]
    ablate("capfilt", tmp_path, replace(plan, steps={"stage1": 3, "stage2": 3}, overwrite=True), QUIET)
    assert "seed-0/stage2-captioner" in given
    assert "seed-0/stage1-captioner" not in given
    assert "seed-0/stage1-the-right-captions" not in given


def test_nothing_left_is_one_line(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(design.FILTERS, "itm", How(captions=1, filter="itm", threshold=1.0))
    with pytest.raises(UserError, match="CapFilt kept no picture"):
        ablate("capfilt", tmp_path, plan, QUIET)
