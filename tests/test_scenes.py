"""Drawn scenes: they show their facts, the splits share no combination, and a seed always gives the same scenes."""

import collections
import hashlib
import importlib.util
import itertools
import json
import re
import sys
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image, ImageDraw

from openblip2.apps.scenes import draw as scenes
from openblip2.apps.scenes.draw import colours_of, draw_facts, draw_picture, draw_scenes
from openblip2.apps.scenes.grammar import Facts, Thing, judge, questions
from openblip2.apps.scenes.vocabulary import COLOURS, NOUNS, PLACES, SIZES, WORLDS, plural
from openblip2.data.records import read_records
from openblip2.errors import UserError

SPLITS: tuple[Literal["train"], Literal["test"]] = ("train", "test")


def some_facts(count: int, split: Literal["train", "test"] = "train") -> list[Facts]:
    return [draw_facts(Random(f"{split} {i}"), split) for i in range(count)]


def thing(noun: str, colour: str, size: str | None = None, place: str | None = None, number: int = 1) -> Thing:
    return {"noun": noun, "colour": colour, "size": size, "place": place, "number": number}


# --- split


def test_no_combination_is_in_both_splits_and_each_noun_and_colour_is() -> None:
    shown = {split: {(noun, colour) for noun in NOUNS for colour in colours_of(noun, split)} for split in SPLITS}
    assert not shown["train"] & shown["test"]
    assert len(shown["train"] | shown["test"]) == len(NOUNS) * len(COLOURS)
    assert 0.15 < len(shown["test"]) / (len(NOUNS) * len(COLOURS)) < 0.25
    for pairs in shown.values():
        assert {noun for noun, _ in pairs} == set(NOUNS)
        assert {colour for _, colour in pairs} == set(COLOURS)


def test_the_split_is_the_same_in_every_process() -> None:
    # Python's own hash() would change the split from run to run, and a new colour must not change it unnoticed.
    assert colours_of("cat", "test") == ("green", "teal")
    assert colours_of("rectangle", "test") == ("red", "black")


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_keep_to_their_split(split: Literal["train", "test"]) -> None:
    for seed, facts in enumerate(some_facts(300, split)):
        assert all(each["colour"] in colours_of(each["noun"], split) for each in facts["objects"])
        for question in questions(facts, Random(seed), lambda noun: colours_of(noun, split)):
            named = re.fullmatch(r"(?:is|are) the (.+) (\S+)\?", question.text)
            if named and named[2] in COLOURS:  # otherwise all pairs of the other split would have the answer "no"
                noun = next(noun for noun in NOUNS if named[1] in (noun, plural(noun)))
                assert named[2] in colours_of(noun, split)


def test_kinds_come_in_their_shares() -> None:
    kinds = collections.Counter(facts["kind"] for facts in some_facts(4000))
    assert kinds["one"] / 4000 == pytest.approx(0.25, abs=0.03)
    assert kinds["group"] / 4000 == pytest.approx(0.20, abs=0.03)
    assert kinds["pair"] / 4000 == pytest.approx(0.55, abs=0.03)
    assert {draw_facts(Random(i), "train", (0, 1, 0))["kind"] for i in range(20)} == {"group"}


def test_the_small_world_shows_and_asks_about_its_own_nouns(tmp_path: Path) -> None:
    nouns = set(WORLDS["small"])
    assert len(nouns) == 12
    assert nouns < set(NOUNS)
    for split in SPLITS:
        records = draw_scenes(tmp_path / split, 150, split, seed=0, size=32, world="small")
        things = [each for record in records for each in (record.facts or {})["objects"]]
        assert {each["noun"] for each in things} == nouns
        assert all(each["colour"] in colours_of(each["noun"], split) for each in things)
        asked = [re.fullmatch(r"is there an? (.+)\?", q.text) for record in records for q in record.questions]
        assert {match[1] for match in asked if match} == nouns


def test_every_second_scene_of_training_is_the_one_before_with_one_detail_changed(tmp_path: Path) -> None:
    records = draw_scenes(tmp_path, 400, "train", seed=0, size=32, world="small")
    seen = collections.Counter()
    for record, changed in zip(records[::2], records[1::2], strict=True):
        before, after = record.facts or {}, changed.facts or {}
        added = {o["noun"] for o in after["objects"]} - {o["noun"] for o in before["objects"]}
        assert len({o["noun"] for o in after["objects"]}) == len(before["objects"])
        assert len(added) <= 1
        assert sorted(o["colour"] for o in before["objects"]) == sorted(o["colour"] for o in after["objects"])
        assert all(o["colour"] in colours_of(o["noun"], "train") for o in after["objects"])
        assert record.captions[0] != changed.captions[0]
        judged = judge(changed.captions[0], before)
        # If the changed scene has another noun, it differs in nothing else.
        of = ("kind", "relation") if added else ("kind",)
        assert [before[name] for name in of] == [after[name] for name in of]
        if added:
            same = [
                {name: value for name, value in o.items() if name not in ("noun", "boxes")}
                for o in (*before["objects"], *after["objects"])
            ]
            assert same[: len(same) // 2] == same[len(same) // 2 :]
        seen[before["kind"], bool(added), judged.objects, judged.attributes, judged.relation] += 1
        assert not (judged.objects and judged.attributes) or judged.relation is False
    assert {key[:2] for key in seen} == set(itertools.product(("one", "group", "pair"), (False, True)))
    assert 0.25 < sum(n for key, n in seen.items() if key[1]) / 200 < 0.42
    assert any(key[0] == "pair" and not key[1] and not key[3] for key in seen)  # the two colours are swapped


def test_the_full_world_is_what_it_was(tmp_path: Path) -> None:
    """A seed gives the same texts as before worlds existed; every second scene, a changed copy, is not compared."""
    records = draw_scenes(tmp_path, 40, "train", seed=7, size=32)
    told = [[r.captions, [(q.text, q.answer) for q in r.questions]] for r in records]
    assert hashlib.sha256(json.dumps(told[::2]).encode()).hexdigest()[:16] == "d9da5c5e093582d8"
    assert records == draw_scenes(tmp_path, 40, "train", seed=7, size=32, world="full")


# --- pictures


def test_every_noun_has_a_picture_of_its_own() -> None:
    masks = {noun: np.asarray(scenes._mask(noun, 64)) for noun in NOUNS}
    assert all(
        max(mask.shape) == 64 and mask.max() > 200 and mask.min() < 50
        for noun, mask in masks.items()
        if noun != "rectangle"
    )
    assert len({(mask.shape, mask.tobytes()) for mask in masks.values()}) == len(NOUNS)


def test_colours_are_told_apart_whatever_the_shade() -> None:
    random = Random(0)
    for colour in COLOURS:
        for _ in range(50):
            assert nearest(scenes._ink(colour, random)) == colour


def nearest(ink: tuple[int, ...]) -> str:
    return min(COLOURS, key=lambda colour: sum((a - b) ** 2 for a, b in zip(COLOURS[colour], ink, strict=True)))


def ink_positions(picture: Image.Image) -> dict[str, np.ndarray]:
    """Returns colour name -> x, y `[N, 2]` of its pixels, as fractions of the side. The corner pixel is background."""
    pixels = np.asarray(picture).astype(int)
    inked = np.abs(pixels - pixels[0, 0]).sum(-1) > 200
    # Pixels at the outline are left out, because they mix ink and background.
    inside = inked[1:-1, 1:-1] & inked[:-2, 1:-1] & inked[2:, 1:-1] & inked[1:-1, :-2] & inked[1:-1, 2:]
    yx = np.argwhere(inside) + 1
    inks = pixels[yx[:, 0], yx[:, 1]]
    names = list(COLOURS)
    named = ((inks[:, None] - np.array(list(COLOURS.values()))) ** 2).sum(-1).argmin(-1)
    return {names[i]: (yx[named == i][:, ::-1] + 0.5) / picture.width for i in np.unique(named)}


@pytest.mark.parametrize("relation", ["to the left of", "above"])
def test_a_pair_stands_as_its_relation_says(relation: str) -> None:
    for seed in range(10):
        facts: Facts = {
            "kind": "pair",
            "objects": [thing("tree", "green"), thing("car", "teal")],
            "relation": relation,
        }
        ink = ink_positions(draw_picture(facts, Random(seed), 112))
        assert set(ink) == {"green", "teal"}
        along = 0 if relation == "to the left of" else 1
        assert ink["green"][:, along].max() < ink["teal"][:, along].min()
        for points in ink.values():
            assert 0.30 < np.ptp(points, axis=0).max() < 0.45


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", SIZES)
def test_one_object_stands_at_its_place_in_its_size(place: str, size: str) -> None:
    # The expected position is read from the words of the place, not from its index in PLACES.
    x = -1 if "left" in place else 1 if "right" in place else 0
    y = -1 if "top" in place else 1 if "bottom" in place else 0
    for seed in range(3):
        objects = [thing("lock", "purple", size, place)]
        facts: Facts = {"kind": "one", "objects": objects, "relation": None}
        ink = ink_positions(draw_picture(facts, Random(seed), 112))
        assert set(ink) == {"purple"}
        centre = (ink["purple"].min(0) + ink["purple"].max(0)) / 2
        assert [int(v) for v in np.sign(centre - 0.5) * (abs(centre - 0.5) > 0.1)] == [x, y]
        extent = np.ptp(ink["purple"], axis=0).max()
        assert extent < 0.32 if size == "small" else 0.44 < extent < 0.6


@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_group_has_its_number_apart(number: int) -> None:
    for noun in ("circle", "rectangle", "star"):
        for seed in range(6):
            facts: Facts = {
                "kind": "group",
                "objects": [thing(noun, "black", number=number)],
                "relation": None,
            }
            assert islands(draw_picture(facts, Random(seed), 112)) == number


def islands(picture: Image.Image) -> int:
    """Returns the number of connected dark regions in `picture`."""
    dark = picture.convert("L").point([255 * (level < 100) for level in range(256)])
    count = 0
    while dark.getbbox():
        y, x = np.argwhere(np.asarray(dark) == 255)[0]
        ImageDraw.floodfill(dark, (int(x), int(y)), 0)
        count += 1
    return count


def test_any_scene_is_inside_the_picture_in_its_colours() -> None:
    for seed, facts in enumerate(some_facts(40, "test")):
        picture = draw_picture(facts, Random(seed), 224)
        assert picture.mode == "RGB"
        assert picture.size == (224, 224)
        edge = np.asarray(picture)
        paper = edge[0, 0]
        for line in (edge[0], edge[-1], edge[:, 0], edge[:, -1]):
            assert (line == paper).all()
        ink = ink_positions(picture)
        # Some pixels at the edge of thin lines mix ink and background, but they are never the majority.
        right = {each["colour"] for each in facts["objects"]}
        assert right <= set(ink)
        assert sum(len(ink[colour]) for colour in right) > 0.7 * sum(map(len, ink.values()))


# --- files


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_scenes_come_back_as_they_were_drawn_and_are_the_same_again(tmp_path: Path) -> None:
    drawn = draw_scenes(tmp_path / "a", 12, "train", seed=3, size=64)
    again = draw_scenes(tmp_path / "b", 12, "train", seed=3, size=64)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert [record.captions for record in drawn] == [record.captions for record in again]

    back, skipped = read_records(tmp_path / "a")
    assert skipped == []
    assert back == drawn
    for record in back:
        with Image.open(record.image) as picture:
            assert (picture.size, picture.format, picture.mode) == ((64, 64), "PNG", "RGB")
        facts: dict[str, Any] = json.loads(json.dumps(record.facts))
        assert judge(record.captions[0], facts).attributes


def test_fewer_scenes_are_the_first_of_more_and_others_differ(tmp_path: Path) -> None:
    many = draw_scenes(tmp_path / "many", 8, "train", seed=0, size=48)
    few = draw_scenes(tmp_path / "few", 3, "train", seed=0, size=48)
    assert [record.captions for record in few] == [record.captions for record in many[:3]]
    assert content(tmp_path / "few").keys() - {"records.jsonl"} == {f"images/{i:05d}.png" for i in range(3)}
    for split, seed in (("test", 0), ("train", 1)):
        other = draw_scenes(tmp_path / f"{split}{seed}", 8, split, seed, size=48)  # pyright: ignore[reportArgumentType]
        assert [record.captions for record in other] != [record.captions for record in many]
        assert not {record.id for record in other} & {record.id for record in many}


def test_qt_is_never_imported(tmp_path: Path) -> None:
    draw_scenes(tmp_path, 2, "train", seed=0, size=48)
    assert "qtawesome" not in sys.modules


# --- unusable input


def test_without_the_font_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cached in (scenes._icon_font, scenes._glyph, scenes._mask):
        cached.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"qtawesome.*pip install qtawesome") as caught:
        draw_scenes(tmp_path, 20, "train", seed=0, size=48)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"count": 0}, "at least 1 scene"),
        ({"size": 8}, "at least 32 px"),
        ({"world": "tiny"}, "'tiny': it must be small or full"),
    ],
)
def test_numbers_that_make_no_sense(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        draw_scenes(tmp_path, **{"count": 1, "split": "train", "seed": 0, **settings})


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"taken.*cannot be written"):
        draw_scenes(tmp_path / "taken", 1, "train", seed=0)
