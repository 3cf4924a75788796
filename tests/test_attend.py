"""Attention maps: weights, relevance, the position of maps, the pointing game."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner
from typer.testing import Result as Done

import tiny
import tiny_models
import tiny_runs
from openblip2.apps.scenes.draw import draw_scenes
from openblip2.cli import app
from openblip2.data.records import Record
from openblip2.errors import UserError
from openblip2.evaluate import pointing
from openblip2.evaluate.result import Options
from openblip2.inference.attend import Looked, attention, look, overlay, relevance, sheet, text_relevance, watching
from openblip2.inference.load import load
from openblip2.inference.matcher import Matcher
from openblip2.model.likelihood import likelihoods, word_scores
from openblip2.model.qformer import bidirectional_mask
from openblip2.progress import Progress


def invoke_quietly(given: list[str]) -> Done:
    return CliRunner().invoke(app, given)


def test_watched_passes_are_the_same_and_their_weights_sum_to_one() -> None:
    model, features = tiny.stage1(), tiny.features()
    tokens, valid = tiny.texts()
    mask = bidirectional_mask(tiny.Q, valid)
    memory = model.qformer.encode_image(features)
    plain = model.qformer(memory, tokens, mask)
    with watching(model.qformer) as weights:
        seen = model.qformer(memory, tokens, mask)
    torch.testing.assert_close(seen.queries, plain.queries)
    torch.testing.assert_close(seen.text, plain.text)
    assert [tuple(layer.shape) for layer in weights] == [(tiny.B, tiny.HEADS, tiny.Q, tiny.P)] * 2
    for layer in weights:
        torch.testing.assert_close(layer.sum(-1), torch.ones(tiny.B, tiny.HEADS, tiny.Q))
    torch.testing.assert_close(attention(weights).sum(-1), torch.ones(tiny.B, tiny.Q))
    model.qformer(memory)
    assert len(weights) == 2, "a pass behind it is not watched"


def test_watching_ends_with_an_error_too() -> None:
    model = tiny.stage1()
    with pytest.raises(RuntimeError, match="stop"), watching(model.qformer) as weights:
        raise RuntimeError("stop")
    model.qformer.query_output(tiny.features())
    assert weights == []


def test_relevance_in_closed_form() -> None:
    """For a score that is linear in the weights, the gradient is known."""
    slopes = torch.randn(2, 3, 4, 5)
    weights = torch.rand(2, 3, 4, 5).softmax(-1).requires_grad_()
    more = (slopes - (weights * slopes).sum(-1, keepdim=True)).clamp(min=0)
    expected = (weights * more).sum((1, 2)).detach()
    torch.testing.assert_close(relevance((weights * slopes).sum(), [weights]), expected)
    # A constant added to the slopes changes nothing, because the weights of all patches sum to 1.
    torch.testing.assert_close(relevance((weights * (slopes + 7)).sum(), [weights]), expected, atol=1e-5, rtol=1e-4)


def test_relevance_is_of_each_picture_by_itself() -> None:
    model, features = tiny.stage1(), tiny.features()
    tokens, valid = tiny.texts()

    def found(rows: slice) -> torch.Tensor:
        with watching(model.qformer) as weights:
            logits = model.match(model.qformer.encode_image(features[rows]), tokens[rows], valid[rows])
        return relevance((logits[:, 1] - logits[:, 0]).sum(), weights)

    torch.testing.assert_close(found(slice(None))[2:3], found(slice(2, 3)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_words_share_out_the_texts_likelihood(kind: str) -> None:
    language, soft = tiny_models.language(kind), tiny_models.soft_prompts(1)
    text = "a red dog on the grass" if kind == "llama" else " a red dog on the grass"
    words = word_scores(language, soft, "question:", text)
    assert [word for word, _ in words] == text.split()
    whole, _ = likelihoods(language, soft, "question:", [text])
    # Words do not include the score of the end token, and a word's score does not depend on later words.
    total = -float(whole[0]) * (len(words) + len(language.end))
    assert sum(float(score) for _, score in words) > total
    shorter = word_scores(language, soft, "question:", text.rsplit(" ", 1)[0])
    for (_, one), (_, other) in zip(words[:-1], shorter, strict=True):
        torch.testing.assert_close(one, other)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each stage."""
    return tiny_runs.trained(tmp_path_factory.mktemp("attend"))


def test_of_a_stage_1_a_text_and_all_queries(home: Path) -> None:
    model = load(home / "stage1")
    found = look(model, home / "data" / "0.png", "a red dog")
    assert found.queries.shape == (5, 3, 3)
    assert found.text == "a red dog"
    assert [(word, one.shape) for word, one in found.words] == [("a red dog", (3, 3))]
    assert found.average.sum() <= 1 + 1e-5
    assert look(model, home / "data" / "0.png").words == ()
    by_itm = look(model, home / "data" / "0.png", "a red dog", "itm")
    assert not np.allclose(by_itm.words[0][1], found.words[0][1])
    with pytest.raises(UserError, match="an empty text"):
        look(model, home / "data" / "0.png", " ")


def test_of_a_stage_2_each_word_that_it_writes(home: Path) -> None:
    model: Any = load(home / "stage2")
    picture = home / "data" / "0.png"
    found = look(model, picture)
    assert found.text is not None
    assert found.text == model.caption([picture])[0]
    assert " ".join(word for word, _ in found.words) == " ".join(found.text.split())
    told = look(model, picture, "a blue bus")
    assert [word for word, _ in told.words] == ["a", "blue", "bus"]


def test_a_picture_with_one_patch_that_differs_points_there(home: Path) -> None:
    """All other patches are equal, so they have equal relevance to any score."""
    model = load(home / "stage1")
    assert isinstance(model, Matcher)
    features = torch.zeros(1, 10, 24)
    features[0, 1 + 5] = torch.randn(24, generator=torch.Generator().manual_seed(0))  # after the class token
    found = sum(text_relevance(model, features, ["a red dog"], by)[0] for by in ("itc", "itm"))
    flat = np.asarray(found).reshape(-1)
    others = np.delete(flat, 5)
    assert others.max() - others.min() < 1e-6
    assert abs(flat[5] - others[0]) > 1e-6


@pytest.mark.parametrize("size", [(300, 100), (90, 200), (64, 64), (1, 500)])
def test_maps_lie_where_their_patches_are(size: tuple[int, int]) -> None:
    """For any aspect ratio, because the encoder sees the whole picture, resized to a square."""
    found = np.zeros((4, 4), np.float32)
    found[0, 3] = 1.0
    drawn = overlay(Image.new("RGB", size, "white"), found, side=200)
    assert drawn.width / drawn.height == pytest.approx(size[0] / size[1], rel=0.1) or min(size) == 1
    changed = np.abs(np.asarray(drawn).astype(int) - np.asarray(drawn)[-1, 0].astype(int)).sum(-1)
    y, x = np.unravel_index(changed.argmax(), changed.shape)
    assert x >= drawn.width // 2
    assert y <= drawn.height // 2


def test_nothing_found_is_drawn_as_nothing() -> None:
    drawn = np.asarray(overlay(Image.new("RGB", (20, 20), "white"), np.zeros((3, 3), np.float32)))
    assert (drawn == drawn[0, 0]).all()
    assert sheet(Image.new("RGB", (20, 10)), [("a", np.ones((2, 2), np.float32))] * 9, side=20).width == 8 * 28


@pytest.mark.parametrize(("stage", "text"), [("stage1", "a red dog"), ("stage2", None)])
def test_the_command_writes_pictures(home: Path, tmp_path: Path, stage: str, text: str | None) -> None:
    picture = str(home / "data" / "1.png")
    given = ["attend", str(home / stage), picture, "--out", str(tmp_path / "maps")]
    done = invoke_quietly(given + (["--text", text] if text else []))
    assert done.exit_code == 0, done.output
    # Such a small stage 2 may generate an empty text, and then there is no map of its words.
    said = text or look(load(home / stage), picture).text
    for name in ("attention.png", "queries.png", *(["text.png"] if said else [])):
        assert Image.open(tmp_path / "maps" / name).size[0] > 1
        assert name in done.output


def test_the_command_refuses_what_it_cannot_do(home: Path, tmp_path: Path) -> None:
    given = ["attend", str(home / "stage1"), str(home / "data" / "1.png"), "--out", str(tmp_path), "--by", "itg"]
    assert "must be one of itc, itm" in str(invoke_quietly(given).exception)


def scenes(folder: Path) -> list[Record]:
    return draw_scenes(folder, 6, "test", 0)


def test_the_pointing_game(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps that are brightest in a box always score a hit; a random guess scores as often as the boxes are large."""
    model = load(home / "stage1")
    assert isinstance(model, Matcher)
    records = scenes(tmp_path)
    boxes = [thing["boxes"] for record in records for thing in (record.facts or {})["objects"]]
    middles = [(n + 0.5) / 3 for n in range(3)]

    def seeing(matcher: Matcher, features: torch.Tensor, texts: list[str], by: str) -> np.ndarray[Any, Any]:
        return np.stack(
            [
                [[float(any(a <= x < c and b <= y < d for a, b, c, d in one)) for x in middles] for y in middles]
                for one in boxes
            ]
        )

    monkeypatch.setattr(pointing, "text_relevance", seeing)
    result = pointing.score_pointing(model, records, Options(by="itc"), Progress())
    hits = seeing(model, torch.empty(0), [], "itc")
    assert result.scores["pointing"].score == pytest.approx(np.mean(hits.max((1, 2))))
    assert result.scores["chance"].score == pytest.approx(hits.mean())
    assert result.scores["best fixed place"].score == pytest.approx(hits.mean(0).max())
    assert len(result.samples) == len(boxes)
    with pytest.raises(UserError, match="none of these pictures has boxes"):
        pointing.score_pointing(model, [Record("a", records[0].image, ("a",))], Options(), Progress())


def test_boxes_hold_their_objects(tmp_path: Path) -> None:
    """Everything that is drawn is inside a box, and every box has drawn pixels at each of its edges."""
    for record in scenes(tmp_path):
        pixels = np.asarray(Image.open(record.image).convert("RGB")).astype(int)
        inked = np.abs(pixels - pixels[0, 0]).sum(-1) > 60
        covered = np.zeros_like(inked)
        for thing in (record.facts or {})["objects"]:
            for box in thing["boxes"]:
                left, top, right, bottom = (round(edge * len(pixels)) for edge in box)
                covered[top:bottom, left:right] = True
                inside = inked[top:bottom, left:right]
                assert all(edge.any() for edge in (inside[:2], inside[-2:], inside[:, :2], inside[:, -2:]))
        assert not (inked & ~covered).any()


def test_evaluate_pointing(home: Path, tmp_path: Path) -> None:
    scenes(tmp_path / "scenes")
    given = ["evaluate", "pointing", str(home / "stage1"), "--data", str(tmp_path / "scenes")]
    done = invoke_quietly([*given, "--out", str(tmp_path / "found.json")])
    assert done.exit_code == 0, done.output
    assert "best fixed place" in done.output
    assert "is for pointing" in str(
        invoke_quietly(
            ["evaluate", "retrieval", *given[2:], "--by", "itm", "--out", str(tmp_path / "b.json")]
        ).exception
    )
    assert Looked(np.ones((2, 3, 3)) / 9, None, ()).average.shape == (3, 3)
