"""Effective rank: closed forms, a naive loop, and where it is reported."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import tiny
import tiny_blip2
import tiny_models
import tiny_runs
from openblip2 import Captioner, Matcher, UserError, load
from openblip2.cli import app
from openblip2.data.features import Features
from openblip2.data.images import to_pixels
from openblip2.data.records import Question, Record
from openblip2.evaluate.health import COLLAPSED, rank_finding
from openblip2.evaluate.validation import effective_rank, grounding, measure_answers, measure_stage1
from openblip2.model.stage2 import Stage2

N, Q, D = 6, 5, 9


def drawn(seed: int = 0, queries: int = Q, width: int = D) -> Tensor:
    return torch.randn(N, queries, width, generator=torch.Generator().manual_seed(seed))


def naive(queries: Tensor) -> float:
    rows = queries.double().numpy()
    ranks = []
    for picture in rows - rows.mean(axis=0):
        squares = np.linalg.svd(picture, compute_uv=False) ** 2
        shares = [square / squares.sum() for square in squares if square > 0]
        ranks.append(math.exp(-sum(share * math.log(share) for share in shares)))
    return float(np.mean(ranks))


def test_equal_queries_have_rank_1() -> None:
    assert effective_rank(drawn(queries=1).expand(N, Q, D)) == pytest.approx(1)


def test_orthogonal_queries_of_equal_size_have_rank_q() -> None:
    basis = torch.linalg.qr(drawn(width=Q)[0].T).Q  # [Q, Q]
    sizes = torch.tensor([1.0, -2.0, 5.0, 0.5, 3.0, -1.0])
    assert effective_rank(sizes[:, None, None] * basis) == pytest.approx(Q)


def test_two_directions_of_unequal_size() -> None:
    queries = torch.zeros(2, Q, D)
    queries[0, 1, 4], queries[0, 3, 2] = 6.0, 2.0  # 9/10 and 1/10 of the squared norm; also without the mean
    expected = math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    assert effective_rank(queries) == pytest.approx(expected)


@pytest.mark.parametrize(("queries", "width"), [(Q, D), (D, Q)])
def test_equals_the_naive_loop(queries: int, width: int) -> None:
    rows = drawn(queries=queries, width=width)
    found = effective_rank(rows)
    assert found == pytest.approx(naive(rows))
    assert 1 < found < min(queries, width)


def test_what_is_alike_for_all_pictures_does_not_count() -> None:
    alike = 100 * drawn(1)[:1]
    assert effective_rank(drawn(queries=1) + alike) == pytest.approx(1, abs=1e-4)
    assert effective_rank(drawn() + alike) == pytest.approx(effective_rank(drawn()), rel=1e-4)


def test_pictures_that_do_not_differ_have_rank_1() -> None:
    alike = drawn()[:1].expand(N, Q, D)
    rounded = torch.where(drawn(1) > 0, alike.nextafter(torch.tensor(torch.inf)), alike)  # as by another sum order
    assert not torch.equal(rounded, alike)
    for queries in (torch.zeros(N, Q, D), alike, rounded):
        assert effective_rank(queries) == 1.0


def test_one_picture_is_refused_and_what_is_not_finite_is_nan() -> None:
    with pytest.raises(ValueError, match="at least 2 pictures"):
        effective_rank(drawn()[:1])
    broken = drawn()
    broken[2, 1, 0] = torch.inf
    assert math.isnan(effective_rank(broken))


def held_out() -> Features:
    words = [["a dog", "a cat", "a bus"][n % 3] for n in range(tiny.B)]
    asked = [(Question("dog", "cat", "open"),), (Question("bus", "dog", "open"),)]
    records = [Record(str(n), Path(f"{n}.png"), (word,), questions=asked[n % 2]) for n, word in enumerate(words)]
    return Features(records, tiny.features())


class Tokens:
    """Replaces a tokenizer: the tokens of texts and questions are the rows of `tiny.texts`."""

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        return tiny.texts(len(texts))


def outputs(qformer: torch.nn.Module, features: Tensor) -> Tensor:
    return qformer.query_output(features)  # pyright: ignore


def test_validation_of_stage_1_reports_it() -> None:
    model = tiny.stage1()
    with torch.no_grad():
        found = measure_stage1(model, Tokens(), held_out())  # pyright: ignore
        expected = naive(outputs(model.qformer, tiny.features()))
    assert found["effective_rank"] == pytest.approx(expected, rel=1e-4)
    assert 1.01 < expected < tiny.Q


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_validation_of_stage_2_reports_it_and_its_losses_are_the_models(kind: str) -> None:
    model = tiny.redraw(Stage2(tiny.qformer(vocabulary=0), tiny_models.language(kind)))
    features, captions = tiny.features(), [record.captions[0] for record in held_out().records]
    with torch.no_grad():
        found = grounding(model, held_out(), seed=3, prompt="a")
        losses = []
        for seen in (features, features.roll(1, 0)):
            torch.manual_seed(3)
            losses.append(float(model.losses(["a"] * tiny.B, captions, features=seen)["lm"]))
        expected = naive(outputs(model.qformer, features))
    assert [found["loss_right"], found["loss_shuffled"]] == pytest.approx(losses, rel=1e-5)
    assert found["effective_rank"] == pytest.approx(expected, rel=1e-4)


def test_validation_of_vqa_reports_it_and_its_losses_are_the_models() -> None:
    model = tiny.redraw(Stage2(tiny.qformer(), tiny_models.language("llama")))
    features, read = tiny.features(), tiny.texts()
    asked = [record.questions[0] for record in held_out().records]
    texts, answers = [one.text for one in asked], [one.answer for one in asked]
    with torch.no_grad():
        found = measure_answers(model, Tokens(), held_out(), "{}", seed=0)  # pyright: ignore
        losses = [
            float(model.losses(texts, answers, features=seen, question=read)["lm"])
            for seen in (features, features.roll(1, 0))
        ]
        expected = naive(model.query_output(features=features, question=read))
    assert [found["loss_right"], found["loss_shuffled"]] == pytest.approx(losses, rel=1e-5)
    assert found["effective_rank"] == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.trained(tmp_path_factory.mktemp("home"))


def pictures(home: Path) -> list[str]:
    return [str(home / "data" / f"{n}.png") for n in range(4)]


def test_runs_log_it(home: Path) -> None:
    for stage in ("stage1", "stage2"):
        rows = [json.loads(line) for line in (home / stage / "log.jsonl").read_text().splitlines()]
        ranks = [row["validation"]["effective_rank"] for row in rows if "validation" in row]
        assert len(ranks) == 2
        assert all(1 <= rank <= 4 for rank in ranks)  # of 4 pictures and 5 queries


def test_of_a_loaded_model_on_pictures(home: Path) -> None:
    images = pictures(home)
    for stage, kind in (("stage1", Matcher), ("stage2", Captioner)):
        model = load(home / stage)
        assert isinstance(model, kind)
        vision = model.model.vision
        assert vision is not None
        with torch.no_grad():
            expected = naive(outputs(model.model.qformer, vision(to_pixels(images, vision.image_size))))
        assert model.effective_rank(images) == pytest.approx(expected, rel=1e-3)
        with pytest.raises(UserError, match="at least two"):
            model.effective_rank(images[:1])


def doctor(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["doctor", *map(str, words)])


def test_the_doctor_measures_runs_and_published_weights(home: Path, tmp_path: Path) -> None:
    tiny_blip2.generator("opt", tmp_path / "generator")
    tiny_blip2.retriever(tmp_path / "retriever")
    for source in (home / "stage1", home / "stage2", tmp_path / "generator", tmp_path / "retriever"):
        rank = load(source).effective_rank(pictures(home))
        done = doctor(source, *pictures(home))
        assert done.exit_code == 0, done.output
        assert f"effective rank: {rank:.2f} of 5" in done.stdout
        row = json.loads(doctor(source, *pictures(home), "--json").stdout)
        assert row["effective_rank"] == pytest.approx(rank)
        assert (row["queries"], row["pictures"], row["about"]) == (5, 4, "effective rank")


def test_a_qformer_that_reads_questions_is_measured_with_one(home: Path, tmp_path: Path) -> None:
    images, asked, run = pictures(home), "what colour is it", tmp_path / "run"
    rows = [f"{n}.png,{asked}?,{['red', 'blue'][n % 2]}\n" for n in range(16)]
    (home / "data" / "asked.csv").write_text("image,question,answer\n" + "".join(rows))
    words = ["--preset", "laptop", "--data", home / "data" / "asked.csv", "--start", home / "stage2", "--out", run]
    for setting in ("train.steps=2", "train.batch=4", "optim.warmup=0", "data.held_out=0.25"):
        words += ["--set", setting]
    done = CliRunner().invoke(app, ["train", "vqa", *map(str, words)])
    assert done.exit_code == 0, done.output
    model = load(run)
    assert isinstance(model, Captioner)
    assert model.tokens is not None
    with pytest.raises(UserError, match="give one with each picture"):
        model.effective_rank(images)
    vision = model.model.vision
    assert vision is not None
    with torch.no_grad():
        features = vision(to_pixels(images, vision.image_size))
        expected = naive(model.model.query_output(features=features, question=model.tokens([asked] * len(images))))
    assert model.effective_rank(images, [asked] * len(images)) == pytest.approx(expected, rel=1e-3)
    assert f"effective rank: {expected:.2f} of 5" in doctor(run, *images, "--question", f"{asked.upper()}?").stdout


def test_what_the_doctor_cannot_measure_is_one_line(home: Path, tmp_path: Path) -> None:
    images = pictures(home)
    for words, said in (
        ((home / "stage1", images[0]), "give at least two"),
        ((home / "stage1", *images, "--out", tmp_path / "page.html"), "leave out --out or the pictures"),
        ((home / "stage1", "--question", "a dog"), "give them after the run"),
        ((home / "stage1", *images, "--question", "a dog"), "does not read questions"),
        ((home / "stage2", *images, "--question", "a dog"), "cannot read questions"),
    ):
        refused = doctor(*words)
        assert isinstance(refused.exception, UserError), refused.output
        assert said in str(refused.exception)
        assert "\n" not in str(refused.exception)


@pytest.mark.parametrize(
    ("rank", "queries", "early", "level"),
    [
        (1.0, 16, False, "bad"),
        (1.0, 16, True, "note"),
        (1.6, 16, False, "note"),
        (3.9, 16, False, "note"),
        (4.0, 16, False, "good"),
        (1.9, 4, False, "note"),
        (2.0, 4, False, "good"),
        (1.0, 3, False, "good"),
    ],
)
def test_levels(rank: float, queries: int, early: bool, level: str) -> None:
    found = rank_finding(rank, queries, early)
    assert found.level == level
    assert bool(found.advice) == (level != "good")


def test_below_the_threshold_one_direction_has_86_percent() -> None:
    """Checks the comment at `COLLAPSED` for two directions; with more directions, the first one has a larger share."""
    entropy = -sum(share * math.log(share) for share in (0.86, 0.14))
    assert math.exp(entropy) == pytest.approx(COLLAPSED, abs=0.01)
