"""The studies with tiny models: what they train, what they keep, and whether verdicts follow from the figures."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tiny_runs
from openblip2 import cli
from openblip2.apps.demo.plan import plan_for
from openblip2.apps.scenes.grammar import judge
from openblip2.apps.scenes.vocabulary import WORLDS
from openblip2.apps.studies import ablate, ablation_in_words, can_plot, figure, judge_claim, plot, sentence, trials
from openblip2.apps.studies.design import STUDIES, study_of
from openblip2.apps.studies.scores import stored_features, training_flops
from openblip2.apps.studies.study import (
    ASKED,
    FLOPS,
    GAP,
    LOSS,
    OTHER,
    RANK,
    RIGHT,
    TOKENS,
    TRAINING,
    WRITING,
    Claim,
    Plan,
    Study,
    Trial,
    Way,
    small_world,
)
from openblip2.config import change, from_dict
from openblip2.errors import UserError
from openblip2.inference.load import load
from openblip2.model.encoders.efficientnet import EfficientNetLite, EfficientNetLiteConfig
from openblip2.plan import make_plan
from openblip2.presets import preset
from openblip2.progress import Progress
from openblip2.runs import read_config

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_runs.home(root)
    torch.manual_seed(3)
    stages = [(1, 3, 2, 2, 6)]
    config = EfficientNetLiteConfig(hidden_size=10, stem=4, stages=stages, image_size=tiny_runs.SIDE, patch_size=4)
    EfficientNetLite(config).save_pretrained(root / "cnn")
    return root


@pytest.fixture
def plan(models: Path) -> Plan:
    words = dict(word.split("=", 1) for word in tiny_runs.options(models)[1::2])
    tiny: dict[str, Any] = {stage: change(preset(stage, "laptop"), words) for stage in ("stage1", "stage2")}
    tiny["stage1"] = change(tiny["stage1"], {"stage1.itm_start_step": 1})
    return Plan(
        scenes=20,
        test_scenes=8,
        validated=4,
        reranked=3,
        steps={"stage1": 3, "stage2": 2},
        weaker={"vision.name": str(models / "cnn"), "vision.layer": -1},
        **tiny,
    )


def test_the_small_world_has_the_demos_settings_and_steps() -> None:
    demo = plan_for("small")
    plan = small_world(seeds=(0, 1), steps={"stage2": 1450})
    assert (plan.world, plan.seeds) == ("small", (0, 1))
    assert plan.steps == {"stage1": demo.stage1.train.steps, "stage2": 1450}
    assert (plan.stage1, plan.stage2) == (demo.stage1, demo.stage2)


def test_a_shorter_run_keeps_the_shares_of_its_parts(plan: Plan, tmp_path: Path) -> None:
    small = replace(small_world(steps={"stage1": 80, "stage2": 150}), scenes=20)
    study, small = study_of("stage1", small)
    work = trials.Work(study, small, trials.Runs(tmp_path, QUIET), [], [])
    first, second = (trials._settings(work, study.ways[1], stage) for stage in ("stage1", "stage2"))
    demo = plan_for("small", budget=0.1)
    assert first.stage1.itm_start_step == demo.stage1.stage1.itm_start_step > 0
    assert first.stage1.similar_start_step == demo.stage1.stage1.similar_start_step
    assert second.stage2.lm_start_step == demo.stage2.stage2.lm_start_step > 0


def test_settings_of_stage_2_are_not_given_to_stage_1(plan: Plan, tmp_path: Path) -> None:
    changed = replace(plan, scenes=20, changes={"stage2.lm_start_step": 1, "optim.lr": 2e-3})
    study, changed = study_of("stage1", changed)
    work = trials.Work(study, changed, trials.Runs(tmp_path, QUIET), [], [])
    first, second = (trials._settings(work, study.ways[1], stage) for stage in ("stage1", "stage2"))
    assert (first.stage2.lm_start_step, second.stage2.lm_start_step) == (0, 1)
    assert first.optim.lr == second.optim.lr == 2e-3


def test_a_study_in_the_small_world_draws_its_nouns(plan: Plan, tmp_path: Path) -> None:
    study, plan = study_of("itg", replace(plan, world="small"))
    work = trials.prepare_work(study, plan, tmp_path, QUIET)
    nouns = {thing["noun"] for record in work.train for thing in (record.facts or {})["objects"]}
    assert nouns <= set(WORLDS["small"])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that are trained; runs that are reused do not appear."""
    found: list[str] = []

    def train(settings: Any, records: Any, run: Path, *more: Any, **options: Any) -> None:
        found.append(f"{run.parent.name}/{run.name}")
        real(settings, records, run, *more, **options)

    real = trials.train_stage
    monkeypatch.setattr(trials, "train_stage", train)
    return found


def settings_in(run: Path) -> Any:
    return from_dict(read_config(run)["settings"])


def test_stage1_is_left_out_or_started_as_the_paper_does(plan: Plan, tmp_path: Path, trained: list[str]) -> None:
    result = ablate("stage1", tmp_path, plan, QUIET)
    assert sorted(trained) == sorted(
        f"seed-0/{name}"
        for name in (
            "stage1-with-stage-1",
            "stage1-with-stage-1-closed-form-starts-of-both",
            "stage2-without-stage-1",
            "stage2-with-stage-1",
            "stage2-with-stage-1-closed-form-start-of-stage-2",
            "stage2-with-stage-1-closed-form-starts-of-both",
        )
    )
    runs = tmp_path / "seed-0"
    assert settings_in(runs / "stage2-without-stage-1").start is None
    assert settings_in(runs / "stage2-with-stage-1").start == str(runs / "stage1-with-stage-1")
    second = settings_in(runs / "stage2-with-stage-1-closed-form-start-of-stage-2")
    assert (second.warm_start, second.start) == (True, str(runs / "stage1-with-stage-1")), "the same stage 1"
    for way, closed in (("with-stage-1", False), ("with-stage-1-closed-form-starts-of-both", True)):
        assert settings_in(runs / f"stage1-{way}").warm_start is closed
        assert settings_in(runs / f"stage2-{way}").warm_start is closed
    assert json.loads((tmp_path / "ablation.json").read_text()) == json.loads(json.dumps(result))
    way = result["ways"]["with stage 1"]
    assert {LOSS, OTHER, GAP, RIGHT, "recall@1, both ways, re-ranked by ITM"} <= set(way["figures"])
    assert set(result["ways"]["without stage 1"]["figures"]) == {LOSS, OTHER, GAP, RIGHT, ASKED, RANK}, (
        "it has no stage 1"
    )
    assert [point[0] for point in way["curves"]["loss_right"][0]] == [1, 2]
    assert way["changes"] == {"stage1": {"warm_start": False}, "stage2": {"warm_start": False}}
    assert result["ways"]["without stage 1"]["changes"]["stage1"] is None
    assert result["steps"] == {"stage1": [3, 4], "stage2": [2, 4]}
    text = (tmp_path / "ablation.md").read_text()
    for claim in result["claims"]:
        assert f"**{sentence(claim['verdict'])}.** Claim ({claim['source']}): {claim['says']}" in text
    assert "One seed" in text
    assert (tmp_path / "ablation.svg").is_file() == can_plot()


def test_the_caption_losses_are_those_of_the_model(plan: Plan, tmp_path: Path) -> None:
    """Computes the training loss one picture at a time; the "other picture" is the previous one."""
    from openblip2.inference.captioner import ANSWER, CAPTION, Captioner, greedy

    ablate("stage1", tmp_path, plan, QUIET)
    study, plan = study_of("stage1", plan)
    work = trials.prepare_work(study, plan, tmp_path, QUIET)
    run = tmp_path / "seed-0" / "stage2-with-stage-1-closed-form-starts-of-both"
    captioner = load(run)
    assert isinstance(captioner, Captioner)
    values = json.loads((run / "scores.json").read_text())["values"]
    features = stored_features(captioner, work.test, work.features(captioner.settings))
    for n, record in enumerate(work.test):
        for name, seen in ((LOSS, n), (OTHER, n - 1)):
            with torch.no_grad():
                row = features.values[[seen]]
                loss = captioner.model.losses([""], [record.captions[0]], features=row)["lm"]
            assert values[name][n] == pytest.approx(float(loss), rel=1e-4)
        assert values[GAP][n] == pytest.approx(values[OTHER][n] - values[LOSS][n])
    assert len({round(value, 4) for value in values[LOSS]}) > 1
    written = captioner.caption([record.image for record in work.test], decoding=greedy(CAPTION))
    judged = [judge(str(text), record.facts or {}) for text, record in zip(written, work.test, strict=True)]
    assert values[RIGHT] == [float(one.objects and one.attributes) for one in judged]
    assert sum(values[RANK]) / 8 == pytest.approx(captioner.effective_rank([r.image for r in work.test]), rel=1e-3)
    answers = captioner.answer([r.image for r in work.test], [r.questions[0].text for r in work.test], greedy(ANSWER))
    expected = [str(answer) == record.questions[0].answer for answer, record in zip(answers, work.test, strict=True)]
    assert values[ASKED] == list(map(float, expected))


def test_training_flops_are_those_of_each_kind_of_step(plan: Plan, tmp_path: Path) -> None:
    ablate("itg", tmp_path, plan, QUIET)
    study, plan = study_of("itg", plan)
    work = trials.prepare_work(study, plan, tmp_path, QUIET)
    run: Any = load(tmp_path / "seed-0" / "stage1-itc-itm-itg")
    stored = stored_features(run, work.test, work.features(run.settings))

    def flops(steps: int, itm_start: int) -> float:
        run.settings = change(run.settings, {"train.steps": steps, "stage1.itm_start_step": itm_start})
        return training_flops(run, stored)

    without, step = flops(1, 1), flops(1, 0)
    assert 0 < 2 * without < step, "ITM takes more than half of a step"
    assert flops(10, 4) == 4 * without + 6 * step
    captions = [record.captions[0] for record in stored.records[: run.settings.train.batch]]
    planned = make_plan(run.settings, "A100-40G", 1, cached=True, text=run.tokens(captions)[0].shape[1])
    assert step == pytest.approx(planned["step"]["flops"], rel=0.1), "another attention kernel, but the same products"


SLUGS = {
    "Q-Former after stage 1": "q-former-after-stage-1",
    "Q-Former without stage 1": "q-former-without-stage-1",
    "perceiver resampler": "perceiver-resampler",
    "MLP on all patches": "mlp-on-all-patches",
    "MLP on pooled patches": "mlp-on-pooled-patches",
    "C-Abstractor": "c-abstractor",
}


def test_an_objective_is_left_out(plan: Plan, tmp_path: Path) -> None:
    result = ablate("itg", tmp_path, plan, QUIET)
    rows = {}
    for way in ("itc-itm", "itc-itm-itg"):
        run = tmp_path / "seed-0" / f"stage1-{way}"
        rows[way] = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {key for row in rows["itc-itm"] for key in row} & {"itc", "itm", "itg"} == {"itc", "itm"}
    assert {key for row in rows["itc-itm-itg"] for key in row} >= {"itc", "itm", "itg"}
    for way in result["ways"].values():
        assert set(way["curves"]) == {"recall"}
        for words in ("image to text", "text to image"):
            for score in ("ITC alone", "re-ranked by ITM", "re-ranked by ITM + ITC"):
                one, five = (way["figures"][f"recall@{k}, {words}, {score}"]["score"] for k in (1, 5))
                assert 0 <= one <= five <= 1
    assert list(result["ways"]["ITC + ITM"]["changes"]["stage1"]) == ["stage1.objectives"]


def test_queries_and_encoders(plan: Plan, tmp_path: Path) -> None:
    numbers = ablate("queries", tmp_path / "queries", replace(plan, values=(6, 2)), QUIET)
    assert list(numbers["ways"]) == ["2 queries", "6 queries"]
    for stage in ("stage1", "stage2"):
        assert settings_in(tmp_path / "queries" / "seed-0" / f"{stage}-6-queries").qformer.queries == 6
    assert {claim["figure"] for claim in numbers["claims"]} == {LOSS, RIGHT, "recall@1, both ways, ITC alone"}
    encoders = ablate("encoder", tmp_path / "encoder", plan, QUIET)
    changes = encoders["ways"]["EfficientNet-Lite0"]["changes"]
    assert set(changes["stage1"]) == set(changes["stage2"]) == {"vision.name", "vision.layer"}
    assert len(list((tmp_path / "encoder" / "features").iterdir())) == 2


def test_connectors_have_equal_steps_and_tokens(plan: Plan, tmp_path: Path, trained: list[str]) -> None:
    result = ablate("connector", tmp_path, replace(plan, values=(2,)), QUIET)
    assert len(trained) == 1 + len(result["ways"]), "one run of stage 1, for the first way alone"
    runs = {name: tmp_path / "seed-0" / f"stage2-{slug}" for name, slug in SLUGS.items()}
    assert list(runs) == list(result["ways"])
    steps = {settings_in(run).train.steps for run in runs.values()}
    assert len(steps) == 1
    sizes = {name: json.loads((run / "config.json").read_text())["sizes"] for name, run in runs.items()}
    assert {sizes[name]["tokens"] for name in ("perceiver resampler", "MLP on pooled patches", "C-Abstractor")} == {4}
    assert {claim["worse"] for claim in result["claims"]} == set(list(runs)[1:])
    costs = {name: way["costs"] for name, way in result["ways"].items()}
    for found in costs.values():
        assert list(found) == [FLOPS, TRAINING, TOKENS, WRITING]
        assert min(found.values()) > 0
    assert costs["Q-Former after stage 1"][FLOPS] > costs["Q-Former without stage 1"][FLOPS], "stage 1 is part of it"
    assert f"| {TOKENS} | 4 | 4 | 4 | 9 | 4 | 4 |" in (tmp_path / "ablation.md").read_text()


def test_a_new_study_is_one_function(
    plan: Plan, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some ways limit the pictures of both stages, and some only differ in how they use the same run."""
    seen: list[str] = []

    def by_pictures(plan: Plan) -> Study:
        ways = [Way(f"{n} pictures", {}, {}, {"stage1": n, "stage2": n}) for n in plan.values]
        used = [
            Way(f"again, {word}", {}, {}, ways[0].pictures, adapt=lambda _, w=word: seen.append(w)) for word in "ab"
        ]
        claim = Claim("more is better", "ours", LOSS, ways[1].name, ways[0].name)
        return Study("by-pictures", "how many?", (*ways, *used), (claim,), ("stage2",), {"stage1": 3, "stage2": 2})

    monkeypatch.setitem(STUDIES, "by-pictures", (by_pictures, (8, 12)))
    result = ablate("by-pictures", tmp_path, replace(plan, scenes=None), QUIET)
    assert result["pictures"]["train"] == 12
    assert trained == [f"seed-0/{stage}-{n}-pictures" for n in (8, 12) for stage in ("stage1", "stage2")]
    assert seen == ["a", "b"]
    run = tmp_path / "seed-0" / "stage2-8-pictures"
    assert {path.name for path in run.glob("scores*")} == {"scores.json", "scores-again-a.json", "scores-again-b.json"}
    for n in (8, 12):
        for stage in ("stage1", "stage2"):
            listed = (tmp_path / "seed-0" / f"{stage}-{n}-pictures" / "trained_on.txt").read_text().splitlines()
            assert len(listed) == n
    text = (tmp_path / "ablation.md").read_text()
    assert "- 8 pictures: stage 1 on 8 pictures; stage 2 on 8 pictures; stage 1: no change" in text


def test_the_learning_curve_and_the_first_visual_tokens(plan: Plan, tmp_path: Path, trained: list[str]) -> None:
    curve = ablate("pictures", tmp_path / "pictures", replace(plan, values=(8, 12), scenes=None), QUIET)
    assert list(curve["ways"]) == ["8 pictures", "12 pictures"]
    assert trained == [f"seed-0/{stage}-{n}-pictures" for n in (8, 12) for stage in ("stage1", "stage2")]
    trained.clear()
    result = ablate("elastic", tmp_path / "elastic", replace(plan, values=(1, 2)), QUIET)
    assert len(trained) == 3  # one stage 1, and stage 2 with and without elastic tokens
    losses = [way["figures"][LOSS]["score"] for way in result["ways"].values()]
    assert len(set(losses)) == 4
    with pytest.raises(UserError, match=r"--values 99: give at most \d+ visual tokens"):
        ablate("elastic", tmp_path / "no", replace(plan, values=(1, 99)), QUIET)


def test_what_is_finished_is_not_trained_again_unless_it_is_of_something_else(
    plan: Plan, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(plan, values=(2, 3))
    first = ablate("queries", tmp_path, few, QUIET)
    assert len(trained) == 4
    trained.clear()
    again = ablate("queries", tmp_path, few, QUIET)
    assert trained == []
    assert again["ways"] == first["ways"]
    other = replace(few, steps={"stage1": 4, "stage2": 2})
    with pytest.raises(UserError, match=r"stage1-2-queries.trained.json was made with other settings: .*--overwrite"):
        ablate("queries", tmp_path, other, QUIET)
    assert trained == []
    # After a new stage 1 in the same folder, stage 2 is trained again, although its settings are the same.
    ablate("queries", tmp_path, replace(other, overwrite=True), QUIET)
    assert len(trained) == 4
    trained.clear()

    # If retraining a run is interrupted, the old files in its folder must not be used as its result.
    counting = trials.train_stage

    def stop(settings: Any, records: Any, run: Path, *more: Any, **options: Any) -> None:
        if run.name == "stage2-2-queries":
            raise KeyboardInterrupt
        counting(settings, records, run, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trials, "train_stage", stop)
        with pytest.raises(KeyboardInterrupt):
            ablate("queries", tmp_path, replace(few, overwrite=True), QUIET)
    assert trained == ["seed-0/stage1-2-queries"]
    trained.clear()
    third = ablate("queries", tmp_path, replace(few, overwrite=True), QUIET)
    assert sorted(trained) == ["seed-0/stage1-3-queries", "seed-0/stage2-2-queries", "seed-0/stage2-3-queries"]
    for name, way in third["ways"].items():
        assert way["figures"] == first["ways"][name]["figures"], "the same steps give the same figures"


def test_seeds(plan: Plan, tmp_path: Path) -> None:
    result = ablate("itg", tmp_path, replace(plan, seeds=(3, 5)), QUIET)
    assert [settings_in(tmp_path / f"seed-{n}" / "stage1-itc-itm").train.seed for n in (3, 5)] == [3, 5]
    found = result["ways"]["ITC + ITM"]["figures"]["recall@1, image to text, ITC alone"]
    assert len(found["seeds"]) == 2
    assert found["score"] == pytest.approx(sum(found["seeds"]) / 2)
    assert len(result["ways"]["ITC + ITM"]["curves"]["recall"]) == 2
    text = (tmp_path / "ablation.md").read_text()
    assert "seeds 3, 5" in text
    assert "One seed" not in text


def test_what_does_not_fit_is_refused(plan: Plan, tmp_path: Path) -> None:
    for name, changed, message in (
        ("stage3", {}, f"unknown study 'stage3': studies are {', '.join(STUDIES)}"),
        ("itg", {"values": (1, 2)}, "leave it out for itg"),
        ("queries", {"values": (4,)}, "give at least two numbers of queries"),
        ("pictures", {"values": (8, 21)}, "there are only 20 training scenes"),
        ("queries", {"changes": {"qformer.queries": 3}}, "--set qformer.queries: the study queries sets this itself"),
        ("itg", {"changes": {"train.steps": 3}}, "for steps, use --stage1-steps"),
        ("itg", {"changes": {"train.stops": 3}}, "unknown setting 'train.stops'"),
    ):
        with pytest.raises(UserError, match=message):
            ablate(name, tmp_path, replace(plan, **changed), QUIET)


def test_settings_without_effect_are_named(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    progress = Progress(quiet=True)
    monkeypatch.setattr(progress, "say", said.append)
    monkeypatch.setattr("openblip2.apps.studies.trials._scenes", lambda *_: 1 / 0)
    for name, changed in (("itg", "data.open_shards"), ("stage1", "data.caption_share"), ("itg", "optim.clip")):
        with pytest.raises(ZeroDivisionError):
            ablate(name, tmp_path, replace(plan, changes={changed: 1}), progress)
    assert [line.partition(" (")[0] for line in said] == [
        "settings without effect in ablate itg: data.open_shards",
        "settings without effect in ablate stage1: data.caption_share",
    ]


def made(**values: list[float]) -> Trial:
    names = {"loss": LOSS, "gap": GAP}
    curves = {"loss_right": [(2, 3.0), (4, 2.0)]}
    return Trial({names[name]: found for name, found in values.items()}, curves, {})


LOW, HIGH = [1.0, 1.1, 0.9, 1.0, 1.2, 0.8], [2.0, 2.2, 1.9, 2.1, 2.0, 1.8]


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        ([made(loss=LOW)], [made(loss=HIGH)], "holds"),
        ([made(loss=HIGH)], [made(loss=LOW)], "does not hold"),
        ([made(loss=LOW)], [made(loss=LOW[::-1])], "undecided: the interval of the difference contains 0"),
        ([made(loss=LOW), made(loss=LOW)], [made(loss=HIGH), made(loss=[v - 0.3 for v in LOW])], "seeds disagree"),
        ([made(gap=HIGH)], [made(gap=LOW)], "holds"),
        ([made(gap=LOW)], [made(gap=HIGH)], "does not hold"),
    ],
)
def test_verdicts_follow_from_the_figures(better: list[Trial], worse: list[Trial], verdict: str) -> None:
    claim = Claim("a is better", "ours", next(iter(better[0].values)), "a", "b")
    found = judge_claim(claim, better, worse)
    assert verdict in found["verdict"]
    means = [sum(sum(t.values[claim.figure]) / 6 for t in side) / len(side) for side in (better, worse)]
    assert found["difference"] == pytest.approx(means[0] - means[1])
    assert found["low"] <= found["difference"] <= found["high"]
    assert figure(better, claim.figure)["score"] == pytest.approx(means[0])


def result_of(figures: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    ways = {
        name: {
            "pictures": {},
            "changes": {"stage1": None, "stage2": {"warm_start": name == "b"}},
            "figures": {LOSS: {"score": value, "low": value - 0.1, "high": value + 0.1, "n": 6, "seeds": [value]}},
            "curves": {"loss_right": [[(2, 3.0), (4, value)]], "loss_shuffled": [[(2, 3.1), (4, 3.2)]]},
            "costs": {WRITING: value / 8},
        }
        for name, value in figures["loss"].items()
    }
    claim = judge_claim(Claim("b is better", "ours", LOSS, "b", "a"), [made(loss=LOW)], [made(loss=HIGH)])
    return {
        "study": "stage1",
        "question": "what is it worth?",
        "pictures": {"train": 1500, "test": 6, "validated": 4},
        "seeds": [0],
        "steps": {"stage2": [4, 24]},
        "models": {"image encoder": ["eye"]},
        "ways": ways,
        "claims": [claim],
        "notes": ["a note"],
        "seconds": {"training and scoring": 122.0, "this call": 130.0},
    }


def test_the_document_holds_every_figure() -> None:
    text = ablation_in_words(result_of({"loss": {"a": 2.0, "b": 1.0}}))
    assert text.startswith("# What is it worth?\n")
    assert "| caption loss, right picture, nats per token | 2.00 [1.90, 2.10] | 1.00 [0.90, 1.10] |" in text
    assert "b minus a: -1.00 nats per token [" in text
    assert "- b: stage 1: not trained; stage 2: `warm_start=True`" in text
    assert "took 2.0 min" in text
    assert f"| {WRITING} | 0.25 | 0.125 |" in text


def test_the_plot_draws_every_way(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(result_of({"loss": {"a": 2.0, "b": 1.0}}), tmp_path / "ablation.svg")
    assert (tmp_path / "ablation.svg").read_text().count('<g id="axes_') == 2
    plot(result_of({"loss": {"a": 2.0, "b": 1.0}}), tmp_path / "ablation.png")
    # A study of one number compares nothing: `ablate pictures --values 1000`.
    plot(result_of({"loss": {"a": 2.0, "b": 1.0}}) | {"claims": []}, tmp_path / "one.svg")
    assert (tmp_path / "one.svg").is_file()
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from openblip2.apps import studies

    asked: list[Any] = []

    def run(name: str, out: Path, plan: Plan, progress: Progress) -> None:
        asked.append((name, plan))
        (out / "ablation.md").write_text("# Words\n")

    monkeypatch.setattr(studies, "ablate", run)
    words = ["ablate", "queries", "--out", str(tmp_path), "--seeds", "0, 2", "--values", "4,8", "--scenes", "30"]
    words += ["--stage2-steps", "5", "--set", "train.batch=8"]
    found = CliRunner().invoke(cli.app, words)
    assert found.exit_code == 0, found.output
    assert "# Words" in found.stdout
    name, plan = asked[0]
    assert name == "queries"
    assert (plan.seeds, plan.values, plan.scenes) == ((0, 2), (4, 8), 30)
    assert (plan.steps, plan.changes) == ({"stage2": 5}, {"train.batch": "8"})
    with pytest.raises(UserError, match="--seeds 'x': give whole numbers"):
        CliRunner().invoke(cli.app, ["ablate", "itg", "--out", str(tmp_path), "--seeds", "x"], catch_exceptions=False)
