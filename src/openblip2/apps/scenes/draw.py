"""Drawn scenes: coloured icons and shapes on a light background, with known content.

The content of a scene, its `Facts`, is chosen first; image, captions and questions follow from it. Training and test
scenes have the same nouns and colours, but share no combination of noun and colour. In training, every second scene is
the one before it with one detail changed.
"""

import copy
import functools
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

from openblip2.apps.scenes.grammar import Facts, Thing, captions, questions
from openblip2.apps.scenes.vocabulary import COLOURS, NOUNS, NUMBERS, PLACES, SHAPES, SIZES, WORLDS, World
from openblip2.data.records import Record, write_records
from openblip2.data.rows import RECORDS
from openblip2.errors import UserError

Split = Literal["train", "test"]

# Percentages of scenes with one object, with a group of one noun, and with a pair of different nouns.
SHARES = (25.0, 20.0, 55.0)
# Fraction of changed scenes in which a noun is changed. Without these, ITM sees hardly any negative pair that differs
# only in a noun, and it learns to ignore nouns if there are many of them.
OTHER_NOUN = 1 / 3
# How many of the ten colours of each noun are used only in the test.
HELD_OUT_COLOURS = 2

# All lengths below are fractions of the image side. The side of an object is the length of its longer side.
_SIDES = {"small": (0.24, 0.30), "big": (0.48, 0.56)}
_PAIR_SIDE = (0.37, 0.42)
_MARGIN = 0.04
_JITTER = 0.02
# Number of objects -> arrangements: the side of each object, and their centres.
_Centres = tuple[tuple[float, float], ...]
_GROUPS: dict[int, tuple[tuple[float, _Centres], ...]] = {
    2: (
        (0.38, ((0.27, 0.5), (0.73, 0.5))),
        (0.38, ((0.5, 0.27), (0.5, 0.73))),
        (0.38, ((0.27, 0.27), (0.73, 0.73))),
        (0.38, ((0.73, 0.27), (0.27, 0.73))),
    ),
    3: (
        (0.27, ((0.18, 0.5), (0.5, 0.5), (0.82, 0.5))),
        (0.27, ((0.5, 0.18), (0.5, 0.5), (0.5, 0.82))),
        (0.36, ((0.5, 0.27), (0.27, 0.73), (0.73, 0.73))),
        (0.36, ((0.27, 0.27), (0.73, 0.27), (0.5, 0.73))),
    ),
    4: (
        (0.36, ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73))),
        (0.27, ((0.5, 0.18), (0.18, 0.5), (0.82, 0.5), (0.5, 0.82))),
    ),
}
_GLYPH = 256  # px; each icon is drawn once in this size and then scaled
_FONT = "materialdesignicons6-webfont"


def draw_scenes(
    folder: Path,
    count: int,
    split: Split,
    seed: int,
    size: int = 224,
    world: World = "full",
) -> list[Record]:
    """Draws scenes into a folder: `images/NNNNN.png` and `records.jsonl`.

    Scene i depends only on (seed, split, i), `size` and `world`, not on `count`. The facts of each record are
    `grammar.Facts`.

    Args:
        folder: where to write.
        count: number of scenes.
        split: which combinations of nouns and colours are used.
        seed: seed of all random choices.
        size: image side in px.
        world: which nouns are drawn: a dozen ("small") or all ("full").

    Raises:
        UserError: the icon font is missing, `folder` cannot be written, or an argument is out of its range.
    """
    if world not in WORLDS:
        raise UserError(f"unknown world {world!r}: it must be {' or '.join(WORLDS)}")
    if count < 1 or size < 32:
        raise UserError(f"scenes: {count} of {size} px: give at least 1 scene and at least 32 px")
    images = Path(folder) / "images"
    try:
        images.mkdir(parents=True, exist_ok=True)
        # An interrupted call must not leave an earlier list with new images.
        (Path(folder) / RECORDS).unlink(missing_ok=True)
        records = [_record(images, i, split, seed, size, WORLDS[world]) for i in range(count)]
        write_records(records, Path(folder))
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be written ({error.strerror}): use a new folder") from error
    return records


@functools.cache
def colours_of(noun: str, split: Split) -> tuple[str, ...]:
    """The colours of `noun` in `split`: two for the test, the other eight for training."""
    ranked = sorted(COLOURS, key=lambda colour: hashlib.sha256(f"{noun}/{colour}".encode()).digest())
    return tuple(ranked[:HELD_OUT_COLOURS] if split == "test" else ranked[HELD_OUT_COLOURS:])


def draw_facts(
    random: Random, split: Split, shares: Sequence[float] = SHARES, nouns: Sequence[str] = WORLDS["full"]
) -> Facts:
    """The random content of one scene of `split`."""
    kind = random.choices(("one", "group", "pair"), weights=shares)[0]
    objects: list[Thing] = [
        {"noun": noun, "colour": random.choice(colours_of(noun, split)), "size": None, "place": None, "number": 1}
        for noun in random.sample(nouns, 2 if kind == "pair" else 1)
    ]
    if kind == "pair":
        return {"kind": "pair", "objects": objects, "relation": random.choice(("to the left of", "above"))}
    if kind == "group":
        objects[0]["number"] = random.randint(2, len(NUMBERS))
        return {"kind": "group", "objects": objects, "relation": None}
    objects[0].update(size=random.choice(SIZES), place=random.choice(PLACES))
    return {"kind": "one", "objects": objects, "relation": None}


def change_detail(facts: Facts, random: Random, split: Split, nouns: Sequence[str] = WORLDS["full"]) -> Facts:
    """Returns facts of the same kind that differ in one detail, which is a noun in a third of the cases.
    Otherwise: the order, colours or relation of two things; the number of a group; the size or place of one thing.
    """
    changed = copy.deepcopy(facts)
    first, *others = changed["objects"]
    if random.random() < OTHER_NOUN and _replace_noun(random.choice(changed["objects"]), changed, random, split, nouns):
        return changed
    if others:
        second, draw = others[0], random.random()
        if draw < 0.15:
            changed["relation"] = "above" if facts["relation"] == "to the left of" else "to the left of"
        elif draw < 0.4 and _may_exchange(first, second, split):
            first["colour"], second["colour"] = second["colour"], first["colour"]
        else:
            changed["objects"] = [second, first]
    elif facts["kind"] == "group":
        first["number"] = random.choice([n for n in range(2, len(NUMBERS) + 1) if n != first["number"]])
    elif random.random() < 0.3:
        first["size"] = random.choice([size for size in SIZES if size != first["size"]])
    else:
        first["place"] = random.choice([place for place in PLACES if place != first["place"]])
    return changed


def _replace_noun(thing: Thing, facts: Facts, random: Random, split: Split, nouns: Sequence[str]) -> bool:
    """Gives `thing` a noun that is not in `facts` and has the same colour in `split`; False if there is none."""
    present = {each["noun"] for each in facts["objects"]}
    others = [noun for noun in nouns if noun not in present and thing["colour"] in colours_of(noun, split)]
    if others:
        thing["noun"] = random.choice(others)
    return bool(others)


def _may_exchange(first: Thing, second: Thing, split: Split) -> bool:
    """Whether two things can have each other's colours in `split`, and would then differ."""
    exchanged = (first["noun"], second["colour"]), (second["noun"], first["colour"])
    return first["colour"] != second["colour"] and all(colour in colours_of(noun, split) for noun, colour in exchanged)


def draw_picture(facts: Facts, random: Random, size: int) -> Image.Image:
    """An image of `size` x `size` px that shows `facts` (of `draw_facts`). Everything else about it is random.

    The boxes of the objects are added to the facts.
    """
    paper = random.choice(((255, 255, 255), tuple(random.randint(230, 255) for _ in "rgb")))
    picture = Image.new("RGB", (size, size), paper)
    for thing, boxes in zip(facts["objects"], _boxes(facts, random), strict=True):
        ink, ratio = _ink(thing["colour"], random), random.uniform(0.4, 1.0)
        upright = random.random() < 0.5
        thing["boxes"] = []
        for x, y, side in boxes:
            # Sides are multiples of 2 px, so that scaled icons are found in the cache.
            mask = _mask(thing["noun"], max(2, 2 * round(side * size / 2)))
            if thing["noun"] == "rectangle":  # wide, high or square; the same for a whole group
                long, short = mask.width, max(2, round(mask.width * ratio))
                mask = mask.resize((short, long) if upright else (long, short))
            left, top = round(x * size - mask.width / 2), round(y * size - mask.height / 2)
            picture.paste(ink, (left, top), mask)
            corners = (left, top, left + mask.width, top + mask.height)
            thing["boxes"].append([round(min(max(edge / size, 0), 1), 4) for edge in corners])
    return picture


def _record(images: Path, index: int, split: Split, seed: int, size: int, nouns: Sequence[str]) -> Record:
    random = Random(f"{seed}/{split}/{index}")  # seeded with text: the same on every machine and Python
    if split == "train" and index % 2:
        # Without these scenes, a model rarely has to distinguish "a red cat above a blue bus" from "a blue bus above a
        # red cat", because 3,000 scenes of 12 nouns contain only a tenth of all such texts.
        before = draw_facts(Random(f"{seed}/{split}/{index - 1}"), split, nouns=nouns)
        facts = change_detail(before, random, split, nouns)
    else:
        facts = draw_facts(random, split, nouns=nouns)
    path = images / f"{index:05d}.png"
    draw_picture(facts, random, size).save(path, compress_level=1)
    return Record(
        id=f"{split}-{seed}-{index:05d}",
        image=path,
        captions=captions(facts, random),
        questions=questions(facts, random, lambda noun: colours_of(noun, split), nouns),
        facts=dict(facts),
    )


def _boxes(facts: Facts, random: Random) -> list[list[tuple[float, float, float]]]:
    """For each object, centre x, centre y and side of each copy."""
    first = facts["objects"][0]

    def near(x: float, y: float, side: float) -> tuple[float, float, float]:
        return x + random.uniform(-_JITTER, _JITTER), y + random.uniform(-_JITTER, _JITTER), side

    if facts["kind"] == "pair":
        sides = random.uniform(*_PAIR_SIDE), random.uniform(*_PAIR_SIDE)
        across = random.uniform(0.44, 0.56), random.uniform(0.44, 0.56)
        if facts["relation"] == "above":
            return [[near(across[0], 0.26, sides[0])], [near(across[1], 0.74, sides[1])]]
        return [[near(0.26, across[0], sides[0])], [near(0.74, across[1], sides[1])]]
    if facts["kind"] == "group":
        side, centres = random.choice(_GROUPS[first["number"]])
        return [[near(x, y, side) for x, y in centres]]
    side = random.uniform(*_SIDES[str(first["size"])])
    row, column = divmod(PLACES.index(str(first["place"])), 3)
    at = (side / 2 + _MARGIN, 0.5, 1 - side / 2 - _MARGIN)
    return [[near(at[column], at[row], side)]]


def _ink(colour: str, random: Random) -> tuple[int, int, int]:
    """A shade of `colour`: slightly lighter or darker, with a smaller change of hue."""
    light = random.randint(-9, 9)
    red, green, blue = (min(255, max(0, c + light + random.randint(-4, 4))) for c in COLOURS[colour])
    return red, green, blue


@functools.lru_cache(maxsize=8192)
def _mask(noun: str, side: int) -> Image.Image:
    """`noun` in white on black (mode "L"), with `side` px on its longer side."""
    glyph = _glyph(noun)
    scale = side / max(glyph.size)
    width, height = (max(1, round(length * scale)) for length in glyph.size)
    return glyph.resize((width, height), Image.Resampling.LANCZOS)


@functools.cache
def _glyph(noun: str) -> Image.Image:
    """`noun` in white on black (mode "L"), large, without margins."""
    canvas = Image.new("L", (2 * _GLYPH, 2 * _GLYPH))
    draw = ImageDraw.Draw(canvas)
    box = (0, 0, 2 * _GLYPH - 1, 2 * _GLYPH - 1)
    if noun not in SHAPES:
        font, codes = _icon_font()
        draw.text((_GLYPH, _GLYPH), codes[NOUNS[noun]], font=font, fill=255, anchor="mm")
    elif noun == "circle":
        draw.ellipse(box, fill=255)
    elif noun == "triangle":
        draw.regular_polygon((_GLYPH, _GLYPH, _GLYPH - 1), 3, fill=255)
    else:
        draw.rectangle(box, fill=255)
    return canvas.crop(canvas.getbbox())


@functools.cache
def _icon_font() -> tuple[ImageFont.FreeTypeFont, dict[str, str]]:
    """The Material Design icon font of the package qtawesome, and icon name -> character.

    The package is not imported, because that needs Qt.
    """
    right = "install it: pip install qtawesome==1.4.2"
    found = importlib.util.find_spec("qtawesome")
    if found is None or not found.submodule_search_locations:
        raise UserError(f"scenes: the icons need the package qtawesome; {right}")
    fonts = Path(found.submodule_search_locations[0]) / "fonts"
    outlines = sorted(fonts.glob(f"{_FONT}-[0-9]*.ttf"))
    names = sorted(fonts.glob(f"{_FONT}-charmap-*.json"))
    if not outlines or not names:
        raise UserError(f"{fonts}: contains no {_FONT}; {right}")
    codes = {name: chr(int(code, 16)) for name, code in json.loads(names[-1].read_text(encoding="utf-8")).items()}
    missing = sorted(icon for noun, icon in NOUNS.items() if noun not in SHAPES and icon not in codes)
    if missing:
        raise UserError(f"{names[-1]}: contains no icon {missing[0]!r}; {right}")
    return ImageFont.truetype(outlines[-1], _GLYPH), codes
