"""Corpora that ordinary packages carry: easy-VQA (PyPI) and Tux Paint's stamps (Debian)."""

import importlib.util
import json
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from openblip2.data.images import open_picture
from openblip2.data.real.groups import alike, drawn, joined, thumbnail
from openblip2.data.records import Question, Record
from openblip2.data.scenes.grammar import Facts, Thing, sentences
from openblip2.errors import UserError

STAMPS = Path("/usr/share/tuxpaint/stamps")
_RIGHT = "install them: apt-get install tuxpaint-stamps-default"

# The exact inks of easy-VQA.
_INKS = {
    (0, 0, 0): "black",
    (0, 0, 255): "blue",
    (165, 42, 42): "brown",
    (128, 128, 128): "gray",
    (0, 255, 0): "green",
    (255, 0, 0): "red",
    (0, 128, 128): "teal",
    (255, 255, 0): "yellow",
}


class Stamps(NamedTuple):
    """The two parts, and one line "where: what; what would be right" for each stamp that was skipped."""

    train: list[Record]
    test: list[Record]
    skipped: list[str]


def easy_vqa_records(split: Literal["train", "test"]) -> list[Record]:
    """easy-VQA 1.0 (MIT): pictures of 64 x 64 px of one shape in one colour each, and the official questions.

    4,000 pictures with 38,575 questions for training, 1,000 with 9,673 to test. The pictures stay in the
    installed package. It has no captions: they are made of shape and colour, in the grammar of the scenes,
    as are the facts (size and place unknown). A tenth of the pictures have no question that tells both, so
    they are read from the pixels; all official answers agree with them. A question's kind is "yes/no" or,
    where a shape or a colour is asked for, "open".

    Source: https://github.com/vzhou842/easy-VQA

    Raises:
        UserError: the package is missing or not what it was.
    """
    right = "install it: pip install easy-vqa==1.0"
    found = importlib.util.find_spec("easy_vqa")
    if found is None or not found.submodule_search_locations:
        raise UserError(f"easy-VQA: the package easy_vqa is missing; {right}")
    folder = Path(found.submodule_search_locations[0]) / "data" / split
    asked: dict[int, list[Question]] = {}
    try:
        for text, answer, image in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
            kind = "yes/no" if answer in ("yes", "no") else "open"
            asked.setdefault(image, []).append(Question(text, answer, kind))
        return [_easy_vqa_record(folder, split, image, asked[image]) for image in sorted(asked)]
    except UserError as problem:
        raise UserError(f"{problem}; {right}") from problem
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: is not easy-VQA's data ({error}); {right}") from error


def stamps_records(root: Path = STAMPS, test_share: float = 0.15, seed: int = 0) -> Stamps:
    """Tux Paint's stamps: pictures of things, animals and signs, each with an English sentence.

    A stamp is `NAME.png` with `NAME.txt`, whose first line is the sentence. The pictures stay where they are,
    most on a transparent ground. A sixth of the package comes as SVG only and is left out: Pillow reads none.
    Licence: GPL-2 (Debian package tuxpaint-stamps-default), so they are never part of this project.

    The split is by group, drawn from `seed`, with about `test_share` of the pictures to test. A group are the
    pictures that are nearly equal (also mirrored), that have the same sentence, or that are numbered in one
    series (`lion.png`, `lion-2.png`). A stamp that cannot be read is skipped and named.

    Raises:
        UserError: `root` is missing or has no stamp.
    """
    stamps, skipped = read_stamps(root)
    records: list[Record] = []
    thumbnails: list[np.ndarray] = []
    for record in stamps:
        try:
            thumbnails.append(thumbnail(open_picture(record.image)))
        except UserError as problem:
            skipped.append(str(problem))
            continue
        records.append(record)
    if not records:
        raise UserError(f"{root}: no stamp in it can be read; {_RIGHT}")
    groups = joined([_keys(record) for record in records], alike(np.stack(thumbnails)))
    test = drawn([[records[i].id for i in group] for group in groups], test_share, seed)
    return Stamps(
        train=[record for record in records if record.id not in test],
        test=[record for record in records if record.id in test],
        skipped=sorted(skipped),
    )


def read_stamps(root: Path) -> tuple[list[Record], list[str]]:
    """All stamps below `root`, their pictures not yet opened, and one line for each that was skipped.

    Raises:
        UserError: `root` is missing or has no stamp.
    """
    if not root.is_dir():
        raise UserError(f"{root}: Tux Paint's stamps are missing; {_RIGHT}")
    records: list[Record] = []
    skipped: list[str] = []
    for path in sorted(root.rglob("*.png")):
        if not path.with_suffix(".txt").exists():
            continue  # NAME_mirror.png: how a stamp looks mirrored, where that is not its mirror image
        try:
            sentence = _sentence(path.with_suffix(".txt"))
        except UserError as problem:
            skipped.append(str(problem))
            continue
        records.append(Record(path.relative_to(root).as_posix(), path, (sentence,)))
    if not records:
        raise UserError(f"{root}: no stamp (NAME.png with NAME.txt) in it; {_RIGHT}")
    return records, skipped


def _keys(stamp: Record) -> list[Hashable]:
    """What a stamp's group has in common: the sentence, and the name without its number."""
    series = re.sub(r"[\d_-]+", "", stamp.image.stem)
    return [stamp.captions[0].lower(), (stamp.image.parent, series) if series else stamp.image]


def _easy_vqa_record(folder: Path, split: str, image: int, asked: Sequence[Question]) -> Record:
    path = folder / "images" / f"{image}.png"
    shape, colour = _shape_and_colour(path)
    thing: Thing = {"noun": shape, "colour": colour, "size": None, "place": None, "number": 1}
    facts: Facts = {"kind": "one", "objects": [thing], "relation": None}
    return Record(f"easy-vqa-{split}-{image}", path, tuple(sentences(facts)), tuple(asked), dict(facts))


def _shape_and_colour(path: Path) -> tuple[str, str]:
    """What one picture of easy-VQA shows: its ink, and how much of the box around it the ink fills."""
    picture = open_picture(path)
    colours = {colour for _, colour in picture.getcolors(picture.width * picture.height) or []}
    inks = [ink for ink in _INKS if ink in colours]
    if len(inks) != 1:
        raise UserError(f"{path}: has {len(inks)} of easy-VQA's colours; exactly one")
    inked = (np.asarray(picture) == inks[0]).all(axis=-1)
    widths = inked.sum(axis=1)[inked.any(axis=1)]
    width = inked.any(axis=0).sum()
    filled = widths.sum() / (len(widths) * width)
    # Whole and large they fill 1, 1/2 and pi/4 of it. The smallest triangle, of 8 px, fills 0.68, as do some
    # circles that the picture's edge cuts, but these do not stand on a line as long as the box.
    triangle = filled < 0.75 and widths[-1] == width
    return "rectangle" if filled > 0.95 else "triangle" if triangle else "circle", _INKS[inks[0]]


def _sentence(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); UTF-8 text") from error
    if not lines or not lines[0].strip():
        raise UserError(f"{path}: its first line is empty; an English sentence")
    return lines[0].strip()
