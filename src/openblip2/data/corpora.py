"""Corpora that ordinary packages carry: easy-VQA (PyPI) and Tux Paint's stamps (Debian)."""

import hashlib
import importlib.util
import json
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from openblip2.data.grammar import Facts, Thing, sentences
from openblip2.data.images import open_picture
from openblip2.data.records import Question, Record
from openblip2.errors import UserError

STAMPS = Path("/usr/share/tuxpaint/stamps")

# Two stamps are one picture if their content, as gray thumbnails of this side, correlates this much or more.
# Chosen by looking at the pairs: above it are recoloured, mirrored and retouched copies, below it coins and
# apples, which are merely round.
_THUMBNAIL = 16
_ALIKE = 0.95
_PAPER = 8  # gray levels from white that still count as paper

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
    right = "install them: apt-get install tuxpaint-stamps-default"
    if not root.is_dir():
        raise UserError(f"{root}: Tux Paint's stamps are missing; {right}")
    records: list[Record] = []
    keys: list[list[Hashable]] = []
    thumbnails: list[np.ndarray] = []
    skipped: list[str] = []
    for path in sorted(root.rglob("*.png")):
        if not path.with_suffix(".txt").exists():
            continue  # NAME_mirror.png: how a stamp looks mirrored, where that is not its mirror image
        try:
            record = Record(path.relative_to(root).as_posix(), path, (_sentence(path.with_suffix(".txt")),))
            thumbnails.append(_thumbnail(open_picture(path)))
        except UserError as problem:
            skipped.append(str(problem))
            continue
        records.append(record)
        series = path.parent, re.sub(r"[\d_-]+", "", path.stem)
        keys.append([record.captions[0].lower(), series if series[1] else path])
    if not records:
        raise UserError(f"{root}: no stamp (NAME.png with NAME.txt) in it; {right}")
    groups = _groups(keys, _alike(np.stack(thumbnails)))
    test = _drawn([[records[i].id for i in group] for group in groups], test_share, seed)
    return Stamps(
        train=[record for record in records if record.id not in test],
        test=[record for record in records if record.id in test],
        skipped=skipped,
    )


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


def _thumbnail(picture: Image.Image) -> np.ndarray:
    """`[256]` gray values of what is not paper, padded to a square; of mean 0 and length 1."""
    gray = ImageOps.invert(picture.convert("L"))
    content = gray.crop(gray.point([255 * (level > _PAPER) for level in range(256)]).getbbox())
    side = max(content.size)
    square = ImageOps.pad(content, (side, side), color=0)
    values = np.asarray(square.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX), dtype=np.float64)
    values = values.ravel() - values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-9)


def _alike(thumbnails: np.ndarray) -> list[tuple[int, int]]:
    """The pairs i < j of thumbnails `[N, 256]` that are nearly equal, one of them perhaps mirrored."""
    mirrored = thumbnails.reshape(-1, _THUMBNAIL, _THUMBNAIL)[:, :, ::-1].reshape(len(thumbnails), -1)
    correlation = np.maximum(thumbnails @ thumbnails.T, thumbnails @ mirrored.T)
    return [(int(i), int(j)) for i, j in np.argwhere(np.triu(correlation >= _ALIKE, k=1))]


def _groups(keys: Sequence[Sequence[Hashable]], pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """0..N-1 in groups: together is what shares a key or is a pair, directly or through others."""
    group = list(range(len(keys)))
    first: dict[Hashable, int] = {}
    shared = [(first.setdefault(key, i), i) for i, own in enumerate(keys) for key in own]
    for i, j in [*shared, *pairs]:
        old, new = group[j], group[i]
        group = [new if each == old else each for each in group]
    return [[i for i, each in enumerate(group) if each == name] for name in sorted(set(group))]


def _drawn(groups: Sequence[Sequence[str]], share: float, seed: int) -> set[str]:
    """The ids of groups drawn at random up to `share` of all ids; a group too large is passed over."""
    room = round(share * sum(len(group) for group in groups))
    drawn: set[str] = set()
    # By a hash of the first id: the same on every machine, and little changes where stamps are added.
    for group in sorted(groups, key=lambda ids: hashlib.sha256(f"{seed}/{ids[0]}".encode()).digest()):
        if len(drawn) + len(group) <= room:
            drawn.update(group)
    return drawn
