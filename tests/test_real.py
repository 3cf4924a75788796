"""Real pictures: reads, groups and splits four sources, in folders with exactly the layouts of the packages."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from openblip2.apps.corpora import prepare as real
from openblip2.apps.corpora import readers
from openblip2.apps.corpora.prepare import by_fold, prepare_images
from openblip2.apps.corpora.readers import emoji, furniture, openclipart
from openblip2.data.batches import group_rows
from openblip2.data.images import open_picture
from openblip2.data.records import Record, read_records
from openblip2.errors import UserError

STAMPS = "tuxpaint-stamps-default/usr/share/tuxpaint/stamps"
PICTURES = "openclipart-png/usr/share/openclipart/png"
DRAWINGS = "openclipart-svg/usr/share/openclipart/svg"
WORDS = "wamerican/usr/share/dict/american-english"
EMOJI = "emoji-datasource-google/package"
NAMES = "unicode-emoji-json/package/data-by-emoji.json"
FURNITURE = "sweethome3d-furniture/usr/share/sweethome3d/furniture"

SVG = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.0//EN" "http://example.invalid/svg10.dtd" {entities}>
<svg xmlns="http://www.w3.org/2000/svg"><metadata>
<rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
  xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work rdf:about="">
  <dc:title>{title}</dc:title>
  <dc:subject><rdf:Bag><rdf:li>sign</rdf:li><rdf:li>{tag}</rdf:li></rdf:Bag></dc:subject>
  <dc:creator><cc:Agent><dc:title>Some Artist</dc:title></cc:Agent></dc:creator>
</cc:Work></rdf:RDF></metadata><path d="M 0 0"/></svg>
"""
ENGLISH = (
    "a owl on branch with apple pie black and white in blue hat clipart by flag of Uganda's Uganda bat cat frog icons"
)


def blots(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    """A different picture for each seed: random blots on a transparent background."""
    random = np.random.default_rng(seed)
    picture = Image.new("RGBA", (80, 60), (0, 0, 0, 0))
    draw = ImageDraw.Draw(picture)
    for _ in range(6):
        x, y = (int(v) for v in random.integers(0, 55, 2))
        ink = tuple(int(v) for v in random.integers(0, 200, 3))
        draw.ellipse((x, y, x + int(random.integers(8, 30)), y + int(random.integers(8, 30))), fill=(*ink, 255))
    return picture.resize(size)


def save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def stamp(folder: Path, name: str, picture: Image.Image, sentence: str) -> Path:
    path = folder / STAMPS / f"{name}.png"
    save(picture, path)
    path.with_suffix(".txt").write_text(f"{sentence}\nde.utf8=Etwas anderes.\n", encoding="utf-8")
    return path


def drawing(folder: Path, name: str, title: str, seed: int = 0, tag: str = "thing", entities: str = "") -> Path:
    save(blots(seed), folder / PICTURES / f"{name}.png")
    path = folder / DRAWINGS / f"{name}.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SVG.format(title=title, tag=tag, entities=entities), encoding="utf-8")
    words = folder / WORDS
    words.parent.mkdir(parents=True, exist_ok=True)
    words.write_text("\n".join(ENGLISH.split()), encoding="utf-8")
    return path


def emojis(folder: Path, rows: list[dict], names: dict) -> None:
    for i, row in enumerate(rows):
        if isinstance(row.get("image"), str):
            save(blots(500 + i, (64, 64)), folder / EMOJI / "img/google/64" / row["image"])
    (folder / EMOJI).mkdir(parents=True, exist_ok=True)
    (folder / EMOJI / "emoji.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / NAMES).parent.mkdir(parents=True, exist_ok=True)
    (folder / NAMES).write_text(json.dumps(names), encoding="utf-8")


def face(code: str, category: str = "Smileys & Emotion") -> dict:
    return {"unified": code.upper(), "image": f"{code}.png", "category": category, "skin_variations": {"1F3FB": {}}}


def chairs(folder: Path, lines: str, icons: dict[str, int]) -> Path:
    catalogue = folder / FURNITURE / "Maker"
    for icon, seed in icons.items():
        save(blots(seed, (128, 96)), catalogue / "maker" / icon)
    catalogue.mkdir(parents=True, exist_ok=True)
    (catalogue / "PluginFurnitureCatalog.properties").write_text(lines, encoding="latin-1")
    return catalogue


def captions(found: tuple[list[Record], list[str]]) -> dict[str, str]:
    return {record.id: record.captions[0] for record in found[0]}


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- openclipart


def test_a_drawings_caption_is_its_title_cleaned(tmp_path: Path) -> None:
    titles = {
        "animals/owl_on_branch_somebody_01": "Owl on Branch",
        "food/pie_apple_bw": "Apple_Pie (B and W)",
        "people/hat1": "Clipart by Some Body - blue hat - clothing 03",
        "people/hat2": "BlueHat#12",
        "animals/frog": "Frog&amp;#39;",  # an HTML entity, escaped again in XML
    }
    for name, title in titles.items():
        drawing(tmp_path, name, title)
    assert captions(openclipart(tmp_path)) == {
        "animals/owl_on_branch_somebody_01": "Owl on Branch",
        "food/pie_apple_bw": "Apple Pie in black and white",
        "people/hat1": "blue hat",
        "people/hat2": "Blue Hat",
        "animals/frog": "Frog'",
    }


def test_a_collections_title_gives_way_to_the_files_name(tmp_path: Path) -> None:
    for name in ("animals/bat", "animals/black_cat_02", "food/apple", "food/uva", "computer/icons/frog"):
        drawing(tmp_path, name, "Cat Clipart")
    drawing(tmp_path, "computer/icons/hat", "A hat")
    drawing(tmp_path, "special/hat", "A hat")  # templates and patterns
    drawing(tmp_path, "animals/gufo", "Un gufo")
    records, skipped = openclipart(tmp_path)
    assert captions((records, [])) == {
        "animals/bat": "bat",
        "animals/black_cat_02": "black cat",
        "food/apple": "apple",
        "computer/icons/hat": "A hat",
    }
    assert skipped == [f"{tmp_path / DRAWINGS}: 4 drawings have no English caption of their own; left out"]


def test_a_title_that_agrees_with_the_file_is_believed_however_many_share_it(tmp_path: Path) -> None:
    for i in range(5):
        drawing(tmp_path, f"animals/owl_somebody_{i:02}", f"Owl {i}")
    assert set(captions(openclipart(tmp_path)).values()) == {"Owl"}


def test_flags_are_called_flags(tmp_path: Path) -> None:
    drawing(tmp_path, "flags/uganda", "Uganda", tag="flag")
    drawing(tmp_path, "flags/blue", "Blue flag", tag="flags")
    assert list(captions(openclipart(tmp_path)).values()) == ["Blue flag", "flag of Uganda"]


BOMB = "[" + "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10 if i else "bang"}">' for i in range(12)) + "]"


@pytest.mark.parametrize(
    ("entities", "title"),
    [(BOMB, "&e11;"), ('[<!ENTITY e SYSTEM "file:///etc/passwd">]', "&e;"), ('[<!ENTITY e "owl">]', "&e;")],
)
def test_entities_are_refused(entities: str, title: str, tmp_path: Path) -> None:
    drawing(tmp_path, "animals/owl", "Owl")
    path = drawing(tmp_path, "animals/cat", title, entities=entities)
    records, skipped = openclipart(tmp_path)
    assert [record.id for record in records] == ["animals/owl"]
    assert skipped[0] == f"{path}: defines entities, which are not expanded; it is skipped"


def test_what_is_broken_in_openclipart_is_skipped_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawing(tmp_path, "animals/owl", "Owl")
    broken = [drawing(tmp_path, f"animals/{name}", "Owl") for name in ("a", "b", "c", "d")]
    broken[0].write_text("<svg><metadata>", encoding="utf-8")
    broken[1].write_bytes(b"\x00\xff")
    broken[2].write_text(SVG.format(title="Owl", tag="", entities="") + " " * 9000, encoding="utf-8")
    (tmp_path / PICTURES / "animals/d.png").unlink()
    (tmp_path / DRAWINGS / "animals/link.svg").symlink_to("owl.svg")  # another name of a file that is read
    monkeypatch.setattr(readers, "_MAX_BYTES", 8000)
    records, skipped = openclipart(tmp_path)
    assert [record.id for record in records] == ["animals/owl"]
    assert [str(broken[i].with_suffix("")) in line for i, line in enumerate(skipped[:3])] == [True] * 3
    assert str(tmp_path / PICTURES / "animals/d.png") in skipped[3]
    assert not any("\n" in line for line in skipped)


@pytest.mark.parametrize("gone", [PICTURES, DRAWINGS, WORDS])
def test_openclipart_needs_all_its_packages(gone: str, tmp_path: Path) -> None:
    drawing(tmp_path, "animals/owl", "Owl")
    (tmp_path / gone).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"openclipart|English words") as error:
        openclipart(tmp_path)
    assert str(tmp_path / gone) in one_line(error)


# --- emoji


def test_emoji_have_their_unicode_names(tmp_path: Path) -> None:
    rows = [face("1f600"), face("2764-fe0f"), face("1f1e6-1f1fc", "Flags"), face("1f3fb", "Component")]
    names = {"😀": {"name": "grinning face"}, "❤": {"name": "red heart"}, "🇦🇼": {"name": "flag Aruba"}, "🏻": {}}
    emojis(tmp_path, rows, names)
    found = emoji(tmp_path)
    assert captions(found) == {"1f600": "grinning face", "2764-fe0f": "red heart", "1f1e6-1f1fc": "flag of Aruba"}
    assert found.skipped == []
    assert open_picture(found.records[0].image).size == (64, 64)


def test_what_is_broken_in_emoji_is_skipped_and_named(tmp_path: Path) -> None:
    outside = {"unified": "1F602", "image": "../../../emoji.json", "category": ""}
    rows = [face("1f600"), face("1f601"), outside, {"unified": "zz", "image": "", "category": ""}, {}, face("1f603")]
    emojis(tmp_path, rows[:2] + rows[5:], {})
    names = {char: {"name": char} for char in "😀😁😂"}
    (tmp_path / NAMES).write_text(json.dumps(names), encoding="utf-8")
    (tmp_path / EMOJI / "emoji.json").write_text(json.dumps([*rows, 7]), encoding="utf-8")
    (tmp_path / EMOJI / "img/google/64/1f601.png").unlink()
    records, skipped = emoji(tmp_path)
    assert [record.id for record in records] == ["1f600"]
    assert len(skipped) == 6
    assert not any("\n" in line for line in skipped)


@pytest.mark.parametrize("harm", ["gone", "not JSON", "another kind", "deep"])
@pytest.mark.parametrize("file", [f"{EMOJI}/emoji.json", NAMES])
def test_broken_tables_of_emoji_are_named(file: str, harm: str, tmp_path: Path) -> None:
    emojis(tmp_path, [face("1f600")], {"😀": {"name": "grinning face"}})
    path = tmp_path / file
    if harm == "gone":
        path.unlink()
    else:
        path.write_text({"not JSON": "[[", "another kind": "7", "deep": "[" * 100_000}[harm], encoding="utf-8")
    with pytest.raises(UserError, match="the unpacked package") as error:
        emoji(tmp_path)
    assert str(path) in one_line(error)


# --- furniture


def test_furniture_is_read_from_its_catalogue(tmp_path: Path) -> None:
    lines = """# PluginFurnitureCatalog.properties
name=Maker
id#1=Maker#chair
name#1=Caf\\u00e9 chair\\: high
icon#1=/maker/chair.png
name#2=Bed
icon#2=/maker/gone.png
icon#3=/maker/table.png
name#4=Secret
icon#4=/../outside.png
! name#5=Comment
icon # 6
"""
    chairs(tmp_path, lines, {"chair.png": 1, "table.png": 2})
    save(blots(3), tmp_path / FURNITURE / "outside.png")
    (tmp_path / "tuxpaint").mkdir()
    records, skipped = furniture(tmp_path / "tuxpaint" / "..")
    assert captions((records, [])) == {"Maker/chair": "Café chair: high"}
    assert len(skipped) == 3
    assert "gone.png" in skipped[0]
    assert "entry 3 has no name" in skipped[1]
    assert "outside.png" in skipped[2]


def test_without_furniture_one_line_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sweethome3d-furniture") as error:
        furniture(tmp_path)
    one_line(error)


# --- prepared pictures: one folder, groups across the sources, folds


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All four sources. Seeds 0 and 1 are in more than one source, seed 1 mirrored; the others are in one."""
    for i, name in enumerate(("owl", "bat", "cat")):
        stamp(tmp_path, f"animals/{name}", blots(i, (160, 120)), f"A {name}.")
    stamp(tmp_path, "animals/frog", blots(7), "A frog.")
    stamp(tmp_path, "animals/frog-2", blots(8), "Another frog.")
    drawing(tmp_path, "animals/owl", "Owl", 0)
    drawing(tmp_path, "animals/bat", "Bat", 11)
    save(ImageOps.mirror(blots(1)), tmp_path / PICTURES / "animals/bat.png")
    drawing(tmp_path, "food/apple", "Apple", 12)
    names = {"😀": {"name": "owl"}, "🏃‍♂️": {"name": "man running"}, "🏃": {"name": "person running"}}
    emojis(tmp_path, [face("1f600"), face("1f3c3-200d-2642-fe0f"), face("1f3c3")], names)
    chairs(tmp_path, "name#1=Owl\nicon#1=/maker/statue.png\nname#2=Bed\nicon#2=/maker/bed.png\n", {"statue.png": 0})
    save(Image.new("RGB", (600, 300), "blue"), tmp_path / FURNITURE / "Maker/maker/bed.png")
    return tmp_path


def test_prepared_pictures_are_one_data_folder(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    records, skipped = prepare_images(folder, out)
    assert skipped == [f"openclipart: {folder / DRAWINGS}: 0 drawings have no English caption of their own; left out"]
    again, unread = read_records(out)
    assert (again, unread) == (records, [])
    shutil.rmtree(folder / "openclipart-png")  # the data folder does not need the sources
    sizes = {record.id: open_picture(record.image).size for record in again}
    assert len(sizes) == 13
    assert sizes["stamps/animals/owl"] == (160, 120)  # nothing is enlarged
    assert sizes["furniture/Maker/bed"] == (real.SIDE, real.SIDE // 2)
    with Image.open(out / "pictures/emoji/1f600.png") as picture:
        assert picture.mode == "RGB"
        assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert {record.facts["source"] for record in records if record.facts} == set(real.SOURCES)


def test_copies_are_one_group_across_sources(folder: Path, tmp_path: Path) -> None:
    records, _ = prepare_images(folder, tmp_path / "out")
    members: dict[str, set[str]] = {}
    for record in records:
        assert record.facts is not None
        members.setdefault(record.facts["group"], set()).add(record.id)
    assert {frozenset(group) for group in members.values() if len(group) > 1} == {
        frozenset({"stamps/animals/owl", "openclipart/animals/owl", "furniture/Maker/statue"}),
        frozenset({"stamps/animals/bat", "openclipart/animals/bat"}),  # mirrored
        frozenset({"stamps/animals/frog", "stamps/animals/frog-2"}),  # a series
        frozenset({"emoji/1f3c3", "emoji/1f3c3-200d-2642-fe0f"}),  # man and person
    }  # not with emoji/1f600, which only has the same caption as the owl
    assert all(name in group for name, group in members.items())


def test_pictures_that_cannot_be_used_are_skipped_and_named(folder: Path, tmp_path: Path) -> None:
    stamps = [stamp(folder, f"harmed/{name}", blots(90 + i), "A harmed one.") for i, name in enumerate("abcde")]
    Image.new("1", (20_000, 20_000)).save(stamps[0])  # 50 kilobytes that decode to 1.2 gigabytes
    assert stamps[0].stat().st_size < 100_000
    stamps[1].write_bytes(stamps[1].read_bytes()[:60])
    Image.new("RGBA", (64, 64), (255, 255, 255, 255)).save(stamps[2])
    dot = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    dot.paste("black", (20, 20, 26, 26))
    dot.save(stamps[3])
    stamps[4].with_suffix(".txt").write_bytes(b"\xff")
    records, skipped = prepare_images(folder, tmp_path / "out")
    assert len(records) == 13
    told = [line for line in skipped if line.startswith("stamps: ")]
    assert len(told) == 5
    for path in stamps:
        assert sum(str(path.with_suffix("")) in line for line in told) == 1


def test_a_source_that_is_not_there_is_skipped_unless_none_is(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "unicode-emoji-json")
    records, skipped = prepare_images(folder, tmp_path / "out")
    assert len(records) == 10
    assert [line for line in skipped if line.startswith("emoji: ") and "data-by-emoji.json" in line]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for match, given, out in (
        ("no pictures", tmp_path / "empty", tmp_path / "none"),
        ("cannot be written", folder, tmp_path / "file"),
    ):
        with pytest.raises(UserError, match=match) as error:
            prepare_images(given, out)
        one_line(error)


def test_no_group_is_in_two_folds(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    owner = [f"{'ab'[int(number < 90)]}/{number}" for number in random.integers(300, size=500)]
    records = [Record(str(i), tmp_path, ("a cat",), facts={"group": owner[i]}) for i in range(500)]
    parts = by_fold(records, k=5, seed=0)
    assert sorted(record.id for part in parts for record in part) == sorted(record.id for record in records)
    for source in "ab":
        sizes = [sum(owner[int(record.id)][0] == source for record in part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) > 20
    told = [{(record.facts or {})["group"] for record in part} for part in parts]
    assert sum(len(names) for names in told) == len(set().union(*told))
    assert by_fold(records, k=5, seed=0) == parts
    assert by_fold(records, k=5, seed=1) != parts
    assert all(part == sorted(part, key=lambda record: int(record.id)) for part in parts)


def test_folds_need_groups(tmp_path: Path) -> None:
    records = [Record(str(i), tmp_path, ("a cat",), facts={"group": str(i)}) for i in range(4)]
    for wrong in ([Record("x", tmp_path, ("a cat",))], [Record("x", tmp_path, ("a cat",), facts={"group": 7})]):
        with pytest.raises(UserError, match="x: its facts have no group"):
            by_fold([*records, *wrong], k=2)
    for k in (1, 5):
        with pytest.raises(UserError, match=f"{k} folds for 4 groups"):
            by_fold(records, k=k)


def test_pairs_are_those_of_all_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [blots(i % 5) if i % 2 else ImageOps.mirror(blots(i % 5)) for i in range(11)]
    pictures += [Image.new("RGB", (60, 40), ink) for ink in ("red", "blue")]
    thumbnails = np.stack([real.thumbnail(open_picture(picture)) for picture in pictures])
    monkeypatch.setattr(real, "_ROWS", 3)
    naive = []
    for i in range(len(thumbnails)):
        for j in range(i + 1, len(thumbnails)):
            one, other = (thumbnails[n].reshape(2, 16, 16) for n in (i, j))
            for turned in (other, other[:, :, ::-1]):
                whole, inside = (float(np.vdot(one[k], turned[k])) for k in (0, 1))
                if whole >= 0.95 and (inside >= 0.75 or not (one[1].any() or other[1].any())):
                    naive.append((i, j))
                    break
    assert len(naive) >= 8
    assert real.alike(thumbnails) == naive


def flag(*stripes: str, shape: str = "rectangle", size: tuple[int, int] = (90, 60)) -> Image.Image:
    """Vertical stripes in a rectangle or an ellipse, on white."""
    colours = Image.new("RGB", size)
    for i, stripe in enumerate(stripes):
        colours.paste(stripe, (i * size[0] // len(stripes), 0, size[0], size[1]))
    mask = Image.new("1", size)
    getattr(ImageDraw.Draw(mask), shape)((0, 0, size[0] - 1, size[1] - 1), fill=1)
    return Image.composite(colours, Image.new("RGB", size, "white"), mask)


@pytest.mark.parametrize(
    ("one", "other", "copies"),
    [
        (flag("navy", "silver", "red"), flag("red", "silver", "navy"), True),  # mirrored
        (flag("navy", "silver", "red"), flag("navy", "silver", "red", size=(450, 300)), True),
        (flag("red"), flag("blue"), True),  # one shade, only recoloured
        (flag("navy", "silver", "red"), flag("silver", "navy", "silver"), False),  # same outline, different inside
        (flag("navy", "silver"), flag("navy"), False),
        (flag("red"), flag("red", shape="ellipse"), False),
    ],
)
def test_copies_agree_in_their_outline_and_inside(one: Image.Image, other: Image.Image, copies: bool) -> None:
    assert bool(real.alike(np.stack([real.thumbnail(one), real.thumbnail(other)]))) == copies


def test_groups_join_through_others() -> None:
    assert group_rows([["a", 0], ["b"], ["c", 0], ["b", "x"], ["d"], ["x"]]) == [0, 1, 0, 1, 4, 1]
