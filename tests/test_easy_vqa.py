"""easy-VQA is compared with all its official answers."""

import importlib.util
import re
from pathlib import Path
from typing import Literal

import pytest
from PIL import Image, ImageDraw

from openblip2.apps.corpora.easy_vqa import easy_vqa_records
from openblip2.apps.scenes.grammar import Judgement, judge
from openblip2.data.images import open_picture
from openblip2.data.records import Record
from openblip2.errors import UserError

COUNTS = {"train": (4000, 38_575, 28_407), "test": (1000, 9_673, 7_136)}  # from the package's own README
LABELS = [
    "circle",
    "triangle",
    "rectangle",
    "red",
    "green",
    "blue",
    "black",
    "gray",
    "teal",
    "brown",
    "yellow",
]


@pytest.fixture(scope="module", params=["train", "test"])
def split(request: pytest.FixtureRequest) -> tuple[str, list[Record]]:
    return request.param, easy_vqa_records(request.param)


def test_easy_vqa_is_whole(split: tuple[str, list[Record]]) -> None:
    name, records = split
    pictures, asked, yes_no = COUNTS[name]
    questions = [question for record in records for question in record.questions]
    assert (len(records), len(questions)) == (pictures, asked)
    assert sum(question.kind == "yes/no" for question in questions) == yes_no
    assert {question.kind for question in questions} == {"yes/no", "open"}
    assert {question.answer for question in questions} == {*LABELS, "yes", "no"}
    assert len({record.id for record in records}) == pictures
    assert len({record.image for record in records}) == pictures
    assert open_picture(records[0].image).size == (64, 64)


def test_easy_vqas_facts_agree_with_every_official_answer(split: tuple[str, list[Record]]) -> None:
    # The facts are read from the pixels, and the answers come from the authors of the images: 48,248 cross-checks.
    for record in split[1]:
        assert record.facts is not None
        (thing,) = record.facts["objects"]
        shown = {thing["noun"], thing["colour"]}
        for question in record.questions:
            named = set(re.findall(r"\w+", question.text)) & set(LABELS)
            if question.kind == "open":
                assert question.answer in shown, (record.id, question)
                assert named <= shown, (record.id, question)
            else:
                denied = re.search(r"\b(not|no)\b", question.text) is not None
                assert (question.answer == "yes") == ((named <= shown) != denied), (record.id, question)


def test_easy_vqas_captions_are_the_scenes_sentences(split: tuple[str, list[Record]]) -> None:
    for record in split[1]:
        assert record.facts is not None
        (thing,) = record.facts["objects"]
        noun, colour = thing["noun"], thing["colour"]
        assert record.captions == (
            f"a {colour} {noun}",
            f"there is a {colour} {noun}",
            f"the {noun} is {colour}",
        )
        assert judge(record.captions[2], record.facts) == Judgement(objects=True, attributes=True, relation=None)


@pytest.mark.parametrize("split", ["train", "test"])
def test_without_easy_vqa_one_line_says_how_to_get_it(
    split: Literal["train", "test"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"easy_vqa is missing.*pip install easy-vqa==1\.0") as caught:
        easy_vqa_records(split)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("harm", ["no questions", "not JSON", "no picture", "another picture"])
def test_a_broken_easy_vqa_is_named(harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "easy_vqa" / "data" / "test"
    (data / "images").mkdir(parents=True)
    (tmp_path / "easy_vqa" / "__init__.py").touch()
    (data / "questions.json").write_text('[["what color is the shape?", "red", 0]]')
    disc(data / "images" / "0.png", "red", ground="white")
    monkeypatch.syspath_prepend(tmp_path)
    assert [record.captions[0] for record in easy_vqa_records("test")] == ["a red circle"]
    if harm == "no questions":
        (data / "questions.json").unlink()
    elif harm == "not JSON":
        (data / "questions.json").write_text("[[")
    elif harm == "no picture":
        (data / "images" / "0.png").unlink()
    else:
        disc(data / "images" / "0.png", "pink", ground="white")
    with pytest.raises(UserError, match=r"pip install easy-vqa") as caught:
        easy_vqa_records("test")
    assert str(data) in str(caught.value)
    assert "\n" not in str(caught.value)


def disc(path: Path, colour: str, ground: str | None = None) -> None:
    picture = Image.new("RGBA", (64, 64), ground or (0, 0, 0, 0))
    ImageDraw.Draw(picture).ellipse((12, 12, 52, 52), fill=colour)
    picture.save(path)
