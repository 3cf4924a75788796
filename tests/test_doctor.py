"""`openblip2 doctor`: reference losses in closed form, and its findings in logs with deliberate faults."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

import tiny
from openblip2.apps.report import write_findings
from openblip2.cli import app
from openblip2.config import RunSettings, change
from openblip2.evaluate.health import ITM_CHANCE, Finding, findings, smoothed_floor
from openblip2.evaluate.validation import easy_hits, queries_used
from openblip2.runs import write_config


@pytest.mark.parametrize(("choices", "smoothing"), [(32, 0.1), (1024, 0.1), (30523, 0.1), (7, 0.5), (5, 0.0), (1, 0.1)])
def test_floors_are_what_a_perfect_model_has(choices: int, smoothing: float) -> None:
    """Compared with the loss of logits that are the logarithms of the targets."""
    target = torch.full((choices,), smoothing / choices, dtype=torch.float64)
    target[0] += 1 - smoothing
    logits = target.clamp(min=1e-300).log()[None]
    least = F.cross_entropy(logits, torch.zeros(1, dtype=torch.long), label_smoothing=smoothing)
    assert smoothed_floor(smoothing, choices) == pytest.approx(float(least), abs=1e-9)


def test_the_loss_of_itm_without_knowledge() -> None:
    """One pair in three is a match, and the model always predicts a probability of 1/3."""
    pairs = torch.tensor([1, 0, 0])
    logits = torch.tensor([[2.0, 1.0]]).log().expand(3, 2)
    assert pytest.approx(float(F.cross_entropy(logits, pairs)), abs=1e-6) == ITM_CHANCE


def settings(stage: str = "stage1", **changes: Any) -> RunSettings:
    plain = {
        "stage": stage,
        "train.steps": 100,
        "train.batch": 32,
        "optim.warmup": 5,
        "optim.lr": 3e-4,
        "optim.min_lr": 1e-5,
    }
    return change(RunSettings(), plain | {name.replace("__", "."): value for name, value in changes.items()})


def log(steps: int = 100, **losses: float) -> list[dict[str, Any]]:
    return [{"step": n + 1, "loss": 1.0, **losses, "grad_norm": 2.0 + n % 3} for n in range(steps)]


def look(step: int = 100, **values: float) -> dict[str, Any]:
    return {"step": step, "validation": {"n": 64, **values}}


def told(rows: list[dict[str, Any]], of: RunSettings | None = None) -> dict[str, Finding]:
    return {one.about: one for one in findings(of or settings(), rows)}


def test_a_healthy_run_has_nothing_bad() -> None:
    rows = [*log(itc=0.9, itm=0.3, itg=2.5), look(itc=1.0, itm=0.35, itg=2.6, itm_accuracy=0.9, queries_used=12.0)]
    rows[-1]["validation"] |= {"tr@1": 0.9, "ir@1": 0.8, "effective_rank": 8.5}
    found = told(rows)
    assert {one.level for one in found.values()} == {"good"}
    assert "recall@1 is 85 % among 64 held-out pairs" in found["ITC"].seen


@pytest.mark.parametrize(
    ("losses", "about"),
    [({"itc": math.log(32)}, "ITC"), ({"itc": 1.0, "itm": 0.62}, "ITM"), ({"itc": 1.0, "itg": math.log(30523)}, "ITG")],
)
def test_a_loss_at_chance_is_bad_but_not_at_once(losses: dict[str, float], about: str) -> None:
    assert told(log(100, **losses))[about].level == "bad"
    assert told(log(100, **losses))[about].advice
    assert told(log(5, **losses))[about].level == "note"


def test_a_loss_far_above_chance_is_not_called_chance() -> None:
    found = told(log(100, itc=6.478), settings(train__batch=4))["ITC"]
    assert found.level == "bad"
    assert "6.478, worse than guessing (1.39)" in found.seen
    assert "lower optim.lr" in found.advice


def test_itm_at_chance_is_said_in_plain_english_with_advice() -> None:
    rows = [*log(itc=1.0, itm=0.634), look(itm_accuracy=0.67, itm_easy_accuracy=0.5)]
    assert told(rows)["ITM"].in_words() == (
        "BAD   ITM: 0.634, no better than guessing (0.64): the model has not learned this; accuracy on held-out pairs "
        "is 67 % with hard negatives (guessing: 67 %) and 50 % with random negatives (guessing: 50 %). Try: more "
        "train.steps, because ITM starts to learn after ITC; until it does, rank by ITC alone (--rerank 0)"
    )


def test_what_else_can_be_ill() -> None:
    assert told([*log(itc=0.5), look(itc=3.0)])["itc, training and held-out"].level == "note"
    rows = [*log(itc=1.0), *(look(n, itc=value) for n, value in ((25, 1.0), (50, 1.2), (75, 1.3), (100, 1.5)))]
    assert "at step 25" in told(rows)["held-out itc"].seen
    alone = [*log(itc=1.0), look(queries_used=1.5)]
    assert told(alone)["queries"].level == "note"
    assert "stage1.smooth_maximum=0.03" in told(alone)["queries"].advice
    assert "a larger stage1.smooth_maximum" in told(alone, settings(stage1__smooth_maximum=0.03))["queries"].advice
    spiky = log(itc=1.0)
    spiky[50]["grad_norm"] = 500.0
    assert told(spiky)["gradient norm"].advice == "optim.clip=1"
    assert told(spiky, settings(optim__clip=1.0))["gradient norm"].level == "good"
    bad = [*log(50, itc=1.0), {"step": 51, "bad": ["itc is nan"], "bad_steps": 1}]
    assert "the first at step 51 (itc is nan)" in told(bad)["steps left out"].seen
    assert "never reached" in told(log(itc=1.0), settings(optim__warmup=100))["rate"].seen
    assert told(log(itc=1.0), settings(train__batch=4))["batch"].level == "note"


def test_a_stage_2_that_does_not_look_is_told() -> None:
    two = settings("stage2")
    blind = told([*log(lm=2.0), look(loss_right=2.0, loss_shuffled=2.01)], two)
    assert blind["grounding"].level == "bad"
    seeing = told([*log(lm=2.0), look(loss_right=2.0, loss_shuffled=3.0)], two)
    assert {one.level for one in seeing.values()} == {"good"}


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_queries_that_are_copies_are_told(stage: str) -> None:
    name = "itc" if stage == "stage1" else "lm"
    late, early = ([{**row, name: 1.0} for row in log(steps)] for steps in (100, 5))
    found = told([*late, look(50, effective_rank=9.0), look(effective_rank=1.04)], settings(stage))
    assert found["effective rank"].level == "bad"
    assert "1.04 of 32: the 32 queries of a picture are almost the same vector" in found["effective rank"].seen
    assert told([*early, look(5, effective_rank=1.04)], settings(stage))["effective rank"].level == "note"
    assert "not finite" in told([*late, look(effective_rank=math.nan)], settings(stage))["effective rank"].seen


def test_queries_used_is_e_to_the_entropy() -> None:
    model = tiny.stage1()
    features, (tokens, valid) = tiny.features(), tiny.texts()
    with torch.no_grad():
        images = model.image_vectors(model.qformer.query_output(features))
        texts = model.text_vectors(tokens, valid)
        used = queries_used(images, texts)
    nearest = [int((images[n] @ texts[n]).argmax()) for n in range(tiny.B)]
    shares = [nearest.count(query) / tiny.B for query in set(nearest)]
    assert used == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)))
    assert 1 <= used <= tiny.Q


def test_easy_negatives_are_the_next_pictures_texts() -> None:
    model = tiny.stage1()
    features, (tokens, valid) = tiny.features(), tiny.texts()
    ids = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6])  # the first two are one picture, so not negatives of each other
    with torch.no_grad():
        hits = easy_hits(model, features, tokens, valid, ids)
        expected = 0
        for n in range(tiny.B):
            other = (n + 1) % tiny.B
            if ids[n] == ids[other]:
                continue
            for m, is_match in ((n, True), (other, False)):
                memory = model.qformer.encode_image(features[n : n + 1])
                logits = model.match(memory, tokens[m : m + 1], valid[m : m + 1])[0]
                expected += int((logits[1] > logits[0]) == is_match)
    assert (int(hits.sum()), len(hits)) == (expected, 14)


def test_a_page_runs_nothing_that_a_log_or_a_name_says(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    found = [Finding(evil, "bad", evil, evil)]
    write_findings(tmp_path / "page.html", evil, settings(), log(itc=1.0), found)
    page = (tmp_path / "page.html").read_text()
    assert "<img src=x" not in page
    assert page.count("&lt;img src=x") == 5  # title, heading, finding, observation, advice


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    sizes = {"width": 30, "layers": 2, "heads": 3, "ffn": 28, "vocabulary": 41, "positions": 20}
    write_config(run, settings(), sizes)
    refused = CliRunner().invoke(app, ["doctor", str(run)])
    assert "a run that has begun" in str(refused.exception)
    rows = [*log(itc=math.log(32), itm=0.3, itg=1.5), look(itc=3.4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "log.jsonl").write_text(text + '{"step": 101, "lo')  # as if the run were still running
    done = CliRunner().invoke(app, ["doctor", str(run), "--out", str(tmp_path / "out" / "page.html")])
    assert done.exit_code == 0, done.output
    assert "BAD   ITC: 3.466, no better than guessing (3.47)" in done.output
    page = (tmp_path / "out" / "page.html").read_text()
    assert "1 of " in page
    assert page.count('src="data:image/svg+xml') == 4
    assert "http" not in page
    machine = CliRunner().invoke(app, ["doctor", str(run), "--json"])
    assert {json.loads(line)["level"] for line in machine.stdout.splitlines()} == {"good", "bad"}
    (run / "log.jsonl").write_text("not json\n" + text)
    assert "line 1 is not a row" in str(CliRunner().invoke(app, ["doctor", str(run)]).exception)
    (run / "log.jsonl").write_text(text)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    without = CliRunner().invoke(app, ["doctor", str(run), "--out", str(tmp_path / "page.html")])
    assert str(without.exception) == "--out needs matplotlib: pip install 'openblip2[plots]'"
    assert without.stdout == ""
    assert CliRunner().invoke(app, ["doctor", str(run)]).exit_code == 0
