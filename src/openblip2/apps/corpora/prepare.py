"""Converts images of packages to one data folder, in groups of near-duplicates, and in folds that keep groups whole.

Shapes: N images; a thumbnail has 2 x 16 x 16 values.
"""

import re
import warnings
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from openblip2.apps.corpora.readers import SOURCES, Found
from openblip2.data.batches import group_rows
from openblip2.data.images import open_picture
from openblip2.data.records import Record, write_records
from openblip2.errors import UserError

SIDE = 384  # px: the maximum for prepared images, so that crops for an encoder at 224 px are not enlarged
_GROUND = 247  # gray levels above this are background
_LEAST = 0.1  # minimum length of the content, as a share of the longer side
# Two images are copies if the correlation of their gray thumbnails is at least _ALIKE, and that of their insides at
# least _INSIDE or both insides have one shade. Without the second condition, all flags would be copies of each other,
# and so would a coin and an apple. Limits chosen by eye: pairs above are recoloured, mirrored and retouched copies.
_THUMBNAIL = 16
_ALIKE = 0.95
_INSIDE = 0.75
_PAPER = 8  # gray levels from white that still count as background
_SHADE = 10  # standard deviation in gray levels that still counts as one shade
_ROWS = 512  # thumbnails that are compared with all others at once; limits the memory


def prepare_images(folder: Path, out: Path) -> Found:
    """Converts the packages in `folder` to the data folder `out`: images and `records.jsonl`.

    Each image is written on white, with at most `SIDE` px, as `out/pictures/ID.png`; ids begin with the source. `facts`
    are {"source": its name, "group": the id of the first image of its group}. A group consists of the images of any
    source that are nearly equal (also mirrored), that are numbered in one series of a folder, or that show one emoji as
    man, woman and person. Images are skipped and named if they cannot be read, are too large (`images.MAX_PIXELS`) or
    are nearly empty, and so are sources that are missing.

    The images keep their licences (see `fetch`): use them on this machine and do not pass them on.

    Raises:
        UserError: all sources are missing, or `out` cannot be written.
    """
    found: list[tuple[str, Record]] = []
    skipped: list[str] = []
    for source, read in SOURCES.items():
        try:
            records, problems = read(folder)
        except UserError as problem:
            records, problems = [], [str(problem)]
        found += [(source, record) for record in records]
        skipped += [f"{source}: {problem}" for problem in problems]
    try:
        records = _written(found, out / "pictures", skipped)
        if not records:
            raise UserError(f"{folder}: contains no pictures that can be used; {'; '.join(skipped[:4])}")
        write_records(records, out)
    except OSError as error:
        raise UserError(f"{error.filename or out} cannot be written ({error.strerror}): give another folder") from error
    return Found(records, skipped)


def _written(found: Sequence[tuple[str, Record]], folder: Path, skipped: list[str]) -> list[Record]:
    """Writes the reduced images and finds their groups. Images that cannot be used are added to `skipped`."""
    records: list[Record] = []
    thumbnails: list[np.ndarray] = []
    for source, record in found:
        name = f"{source}/{record.id.removesuffix('.png')}"
        path = folder / f"{name}.png"
        try:
            picture = _small(record.image)
        except UserError as problem:
            skipped.append(f"{source}: {problem}")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        thumbnails.append(thumbnail(picture))
        records.append(replace(record, id=name, image=path, facts={"source": source}))
    keys: list[list[Hashable]] = [[_series(record)] for record in records]
    for pair in alike(np.stack(thumbnails)) if thumbnails else []:
        for i in pair:
            keys[i].append(("pair", *pair))
    firsts = [records[i].id for i in group_rows(keys)]
    return [replace(one, facts={**(one.facts or {}), "group": name}) for one, name in zip(records, firsts, strict=True)]


def by_fold(records: Sequence[Record], k: int = 5, seed: int = 0) -> list[list[Record]]:
    """Divides the records of `prepare_images` into `k` random folds. Each group is in only one fold.

    To test on fold i, train on all others. The groups of a source are assigned at random, large ones first, each to the
    smallest fold so far: if no group is very large, the sizes differ by one at most. The order within a fold is that of
    `records`.

    Raises:
        UserError: a record has no group, or there are fewer groups than folds.
    """
    groups: list[str] = []
    for record in records:
        group = (record.facts or {}).get("group")
        if not isinstance(group, str):
            raise UserError(f"{record.id}: its facts have no group; give records that `prepare_images` wrote")
        groups.append(group)
    if not 2 <= k <= len(set(groups)):
        raise UserError(
            f"{k} folds for {len(set(groups))} groups; give at least 2 folds, and at most as many as there are groups"
        )
    fold: dict[str, int] = {}
    for source in sorted({group.partition("/")[0] for group in groups}):
        sizes = Counter(group for group in groups if group.partition("/")[0] == source)
        filled = [0] * k
        # The order by hash is random, but the same on every machine, and it changes little if images are added.
        for name in sorted(sizes, key=lambda name: (-sizes[name], sha256(f"{seed}/{name}".encode()).digest())):
            fold[name] = filled.index(min(filled))
            filled[fold[name]] += sizes[name]
    return [[record for record, group in zip(records, groups, strict=True) if fold[group] == i] for i in range(k)]


def _small(path: Path) -> Image.Image:
    with warnings.catch_warnings():  # Pillow only warns about some images above our limit
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        picture = open_picture(path)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    ink = picture.convert("L").point([255 * (level <= _GROUND) for level in range(256)])
    left, top, right, bottom = ink.getbbox() or (0, 0, 0, 0)
    if max(right - left, bottom - top) < _LEAST * max(picture.size):
        raise UserError(f"{path}: is nearly empty; it is skipped")
    return picture


def _series(record: Record) -> Hashable:
    """The key that images of a series share: the name without its number; for an emoji, without man or woman."""
    folder, _, stem = record.id.rpartition("/")
    if folder == "emoji":
        rest = re.sub(r"\b(man|men|woman|women|person|people)\b", "", record.captions[0]).split()
        return (folder, *rest) if rest else record.id
    stem = re.sub(r"[\d_-]+", "", stem)
    return (folder, stem) if stem else record.id


def thumbnail(picture: Image.Image) -> np.ndarray:
    """`[512]`: gray values of the image without margins, padded to a square, and then the values inside its outline.

    Each half has mean 0 and length 1. The second half is 0 if the inside has one shade.
    """
    gray = ImageOps.invert(picture.convert("L"))
    ink = gray.point([255 * (level > _PAPER) for level in range(256)])
    values, inked = (_square(each.crop(ink.getbbox())) for each in (gray, ink))
    inside = inked > 200
    spread = values[inside].std() if inside.any() else 0.0
    shades = np.where(inside, values - values[inside].mean(), 0.0) if spread > _SHADE else np.zeros_like(values)
    return np.concatenate([_unit(values - values.mean()), _unit(shades)])


def _square(content: Image.Image) -> np.ndarray:
    side = max(content.size)
    square = ImageOps.pad(content, (side, side), color=0)
    return np.asarray(square.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX), dtype=np.float64).ravel()


def _unit(values: np.ndarray) -> np.ndarray:
    return values / max(float(np.linalg.norm(values)), 1e-9)


def alike(thumbnails: np.ndarray) -> list[tuple[int, int]]:
    """The pairs i < j of thumbnails `[N, 512]` that are nearly equal, also if one is mirrored."""
    count = len(thumbnails)
    halves = thumbnails.reshape(count, 2, _THUMBNAIL, _THUMBNAIL)
    plain = np.abs(halves[:, 1]).sum(axis=(1, 2)) == 0  # the inside has one shade
    pairs: list[tuple[int, int]] = []
    for first in range(0, count, _ROWS):
        rows = slice(first, first + _ROWS)
        found = np.zeros((len(halves[rows]), count), dtype=bool)
        for others in (halves, halves[:, :, :, ::-1]):
            whole, inside = (halves[rows, i].reshape(-1, 256) @ others[:, i].reshape(-1, 256).T for i in (0, 1))
            found |= (whole >= _ALIKE) & ((inside >= _INSIDE) | (plain[rows][:, None] & plain))
        pairs += [(first + int(i), int(j)) for i, j in np.argwhere(np.triu(found, k=first + 1))]
    return pairs
