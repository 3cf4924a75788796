"""Tux Paint's stamps: images of things, animals and signs, each with an English sentence (Debian package)."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from openblip2.apps.corpora.groups import alike, drawn, joined, thumbnail
from openblip2.data.images import open_picture
from openblip2.data.records import Record
from openblip2.data.sources import Source
from openblip2.errors import UserError

NAME = "stamps"
STAMPS = Path("/usr/share/tuxpaint/stamps")
_RIGHT = "install them: apt-get install tuxpaint-stamps-default"


class Stamps(NamedTuple):
    """The two splits, and one line "where: what is wrong; what would be right" for each stamp that was skipped."""

    train: list[Record]
    test: list[Record]
    skipped: list[str]


def read_split(split: Literal["train", "test"]) -> Source:
    """What `--data stamps` names.

    Raises:
        UserError: as `stamps_records`.
    """
    found = stamps_records()
    return Source(found.train if split == "train" else found.test, found.skipped, NAME)


def stamps_records(root: Path = STAMPS, test_share: float = 0.15, seed: int = 0) -> Stamps:
    """The installed stamps in two splits.

    A stamp is `NAME.png` with `NAME.txt`, whose first line is the sentence. The images stay where they are; most have
    a transparent background. A sixth of the package is SVG only and is left out, because Pillow cannot read it. The
    licence is GPL-2, so the stamps are never part of this project.

    The split is by group and drawn from `seed`. A group consists of the images that are nearly equal (also mirrored),
    that have the same sentence, or that are numbered in one series (`lion.png`, `lion-2.png`). Stamps that cannot be
    read are skipped and named.

    Args:
        root: the folder of the stamps.
        test_share: the share of the images in the test split, approximately.
        seed: of the split.

    Raises:
        UserError: `root` is missing or has no stamp.
    """
    stamps, skipped = read_stamps(root)
    records: list[Record] = []
    thumbnails: list[np.ndarray] = []
    for record in stamps:
        try:
            thumbnails.append(thumbnail(open_picture(record.image)))
            records.append(record)
        except UserError as problem:
            skipped.append(str(problem))
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
    """All stamps below `root`, with images not yet opened, and one line for each stamp that was skipped.

    Raises:
        UserError: `root` is missing or has no stamp.
    """
    if not root.is_dir():
        raise UserError(f"{root}: Tux Paint's stamps are missing; {_RIGHT}")
    records: list[Record] = []
    skipped: list[str] = []
    for path in sorted(root.rglob("*.png")):
        text = path.with_suffix(".txt")
        if not text.exists():
            continue  # NAME_mirror.png: the mirrored form of a stamp, if that is not simply its mirror image
        try:
            records.append(Record(path.relative_to(root).as_posix(), path, (_sentence(text),)))
        except UserError as problem:
            skipped.append(str(problem))
    if not records:
        raise UserError(f"{root}: no stamp (NAME.png with NAME.txt) in it; {_RIGHT}")
    return records, skipped


def _keys(stamp: Record) -> list[Hashable]:
    """What the stamps of a group have in common: the sentence, and the name without its number."""
    series = re.sub(r"[\d_-]+", "", stamp.image.stem)
    return [stamp.captions[0].lower(), (stamp.image.parent, series) if series else stamp.image]


def _sentence(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); UTF-8 text") from error
    if not lines or not lines[0].strip():
        raise UserError(f"{path}: its first line is empty; an English sentence")
    return lines[0].strip()
