"""easy-VQA is compared with all its official answers; stamps that are made here are read, grouped and split."""

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from openblip2.apps.corpora.installed import STAMPS, easy_vqa_records, stamps_records
from openblip2.apps.corpora.prepare import joined
from openblip2.apps.scenes.grammar import Judgement, judge
from openblip2.data.images import open_picture
from openblip2.data.records import Record
from openblip2.errors import UserError

# --- easy-VQA

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


# --- stamps


def disc(path: Path, colour: str, ground: str | None = None) -> None:
    picture = Image.new("RGBA", (64, 64), ground or (0, 0, 0, 0))
    ImageDraw.Draw(picture).ellipse((12, 12, 52, 52), fill=colour)
    picture.save(path)


def blots(seed: int) -> Image.Image:
    """A unique picture: random blots on a transparent background."""
    random = np.random.default_rng(seed)
    picture = Image.new("RGBA", (80, 60), (0, 0, 0, 0))
    draw = ImageDraw.Draw(picture)
    for _ in range(6):
        x, y = (int(v) for v in random.integers(0, 55, 2))
        ink = tuple(int(v) for v in random.integers(0, 200, 3))
        draw.ellipse((x, y, x + int(random.integers(8, 30)), y + int(random.integers(8, 30))), fill=(*ink, 255))
    return picture


def stamp(root: Path, name: str, picture: Image.Image, sentence: str) -> None:
    path = root / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    path.with_suffix(".txt").write_text(f"{sentence}\nde.utf8=Etwas anderes.\n", encoding="utf-8")


NAMES = [f"animals/{a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    """100 stamps that have nothing in common."""
    for i, name in enumerate(NAMES):
        stamp(tmp_path, name, blots(i), f"A {name[8:]}.")
    return tmp_path


def by_id(records: list[Record]) -> set[str]:
    return {record.id.removesuffix(".png") for record in records}


def test_stamps_are_read_and_split(stamps: Path) -> None:
    train, test, skipped = stamps_records(stamps)
    assert skipped == []
    assert by_id(train) | by_id(test) == set(NAMES)
    assert not by_id(train) & by_id(test)
    assert len(test) == 15
    (record,) = [record for record in [*train, *test] if record.id == "animals/ak.png"]
    assert record.image == stamps / "animals" / "ak.png"
    assert record.captions == ("A ak.",)


def test_the_split_is_drawn_from_the_seed(stamps: Path) -> None:
    first, again, other = (by_id(stamps_records(stamps, seed=seed).test) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len(stamps_records(stamps, test_share=0.4).test) == 40
    # One more stamp moves few of the others, because the split does not depend on the number of stamps.
    stamp(stamps, "animals/zz", blots(999), "A zz.")
    assert len(by_id(stamps_records(stamps).test) ^ first) <= 2


def noisy(picture: Image.Image) -> Image.Image:
    pixels = np.asarray(picture).astype(int)
    pixels[..., :3] += np.random.default_rng(0).integers(-6, 7, pixels[..., :3].shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def shifted(picture: Image.Image) -> Image.Image:
    return ImageOps.expand(picture, (30, 5, 0, 20), fill=(255, 255, 255, 0)).resize((200, 154))


COPIES = {
    "the same": lambda picture: picture,
    "mirrored": ImageOps.mirror,
    "noisy": noisy,
    "on white": lambda picture: Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture),
    "moved and scaled": shifted,
}


@pytest.mark.parametrize("copy", COPIES)
def test_copies_of_a_picture_stay_on_one_side(copy: str, stamps: Path) -> None:
    for i in range(12):
        stamp(stamps, f"copies/{NAMES[i][8:]}", COPIES[copy](blots(i)), f"Something called {i}.")
    on_one_side(stamps, [(NAMES[i], f"copies/{NAMES[i][8:]}") for i in range(12)])


def on_one_side(stamps: Path, pairs: list[tuple[str, str]]) -> None:
    """Only groups keep 12 pairs together over 6 seeds: the probability by chance is below 1e-9."""
    for seed in range(6):
        train, test, _ = stamps_records(stamps, test_share=0.5, seed=seed)
        assert all((a in by_id(train)) == (b in by_id(train)) for a, b in pairs)
        assert 0.4 < len(test) / len([*train, *test]) <= 0.5


def test_the_same_sentence_stays_on_one_side(stamps: Path) -> None:
    for i in range(12):
        stamp(stamps, f"more/{NAMES[i][8:]}", blots(200 + i), f"a {NAMES[i][8:].upper()}.")
    on_one_side(stamps, [(NAMES[i], f"more/{NAMES[i][8:]}") for i in range(12)])


def test_a_numbered_series_stays_on_one_side(stamps: Path) -> None:
    for i in range(12):
        stamp(stamps, f"{NAMES[i]}-{i + 2}", blots(300 + i), f"Another one, number {i}.")
    on_one_side(stamps, [(NAMES[i], f"{NAMES[i]}-{i + 2}") for i in range(12)])


def test_what_cannot_be_read_is_skipped_and_named(stamps: Path) -> None:
    harmed = [stamps / f"{name}.png" for name in NAMES[:4]]
    harmed[0].write_bytes(b"")
    harmed[1].write_bytes(harmed[1].read_bytes()[:60])
    harmed[2].with_suffix(".txt").write_text("\nde.utf8=Etwas.\n")
    harmed[3].with_suffix(".txt").write_bytes(b"A caf\xe9.\n")
    shutil.copy(stamps / f"{NAMES[4]}.png", stamps / f"{NAMES[4]}_mirror.png")  # belongs to a stamp, is not one itself
    train, test, skipped = stamps_records(stamps)
    assert by_id(train) | by_id(test) == set(NAMES[4:])
    assert len(skipped) == 4
    for path, line in zip(harmed, skipped, strict=True):
        assert str(path.with_suffix("")) in line
        assert "\n" not in line


def test_a_huge_picture_is_not_decoded(stamps: Path) -> None:
    path = stamps / f"{NAMES[0]}.png"
    Image.new("1", (20_000, 20_000)).save(path)  # 50 kilobytes that decode to 1.2 gigabytes
    assert path.stat().st_size < 100_000
    (line,) = stamps_records(stamps).skipped
    assert line.startswith(str(path))


@pytest.mark.parametrize("there", [False, True])
def test_without_stamps_one_line_says_how_to_get_them(there: bool, tmp_path: Path) -> None:
    root = tmp_path / "stamps"
    if there:
        root.mkdir()
    with pytest.raises(UserError, match=r"apt-get install tuxpaint-stamps-default") as caught:
        stamps_records(root)
    assert str(root) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not STAMPS.is_dir(), reason="needs the Debian package tuxpaint-stamps-default")
def test_the_real_stamps() -> None:
    train, test, skipped = stamps_records()
    assert skipped == []
    assert len(train) + len(test) > 700
    assert len(test) / (len(train) + len(test)) == pytest.approx(0.15, abs=0.01)
    told = [{record.captions[0] for record in part} for part in (train, test)]
    assert not told[0] & told[1]
    assert "A frog." in told[0] | told[1]


def test_groups_join_through_others() -> None:
    groups = joined([["a"], ["b"], ["c"], ["b", "x"], ["d"], ["x"]], [(0, 2)])
    assert sorted(groups) == [[0, 2], [1, 3, 5], [4]]
