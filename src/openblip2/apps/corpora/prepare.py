"""Images with English captions from four sources that copy from each other, in groups of near-duplicates and folds.

| source      | images                                       | caption                               |
|-------------|----------------------------------------------|---------------------------------------|
| stamps      | Tux Paint's stamps: photographs and drawings | its sentence ("A rainbow lorikeet.")  |
| openclipart | drawings                                     | its title, or its file's name         |
| emoji       | Noto Emoji, 64 x 64 px, one skin tone        | its Unicode name ("flag of Aruba")    |
| furniture   | renders of Sweet Home 3D's models            | its name in the catalogue ("Armchair")|

`fetch` downloads the packages; `prepare` converts them to one data folder, which `read_records` reads.
"""

import json
import re
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from openblip2.apps.corpora.groups import alike, folds, joined, thumbnail
from openblip2.apps.corpora.installed import read_stamps
from openblip2.apps.corpora.openclipart import openclipart
from openblip2.data.images import open_picture
from openblip2.data.records import Record, write_records
from openblip2.errors import UserError

SIDE = 384  # px: the maximum for prepared images, so that crops for an encoder at 224 px are not enlarged
_PAPER = 247  # gray levels above this are background
_LEAST = 0.1  # minimum length of the content, as a share of the longer side


class Found(NamedTuple):
    """Records, and one line "where: what is wrong; what would be right" for each entry that was skipped."""

    records: list[Record]
    skipped: list[str]


def stamps(folder: Path) -> Found:
    """Tux Paint's stamps, unpacked in `folder`. Errors as `read_stamps`."""
    records, skipped = read_stamps(folder / "tuxpaint-stamps-default/usr/share/tuxpaint/stamps")
    return Found([replace(record, id=record.id.removesuffix(".png")) for record in records], skipped)


def emoji(folder: Path) -> Found:
    """Noto Emoji with their Unicode (CLDR) names, without variants of skin tone.

    Raises:
        UserError: one of the two packages is missing, or its files are not as published.
    """
    package = folder / "emoji-datasource-google/package"
    told = _json(folder / "unicode-emoji-json/package/data-by-emoji.json", dict)
    names = {_plain_emoji(key): value.get("name") for key, value in told.items() if isinstance(value, dict)}
    records: list[Record] = []
    skipped: list[str] = []
    for row in _json(package / "emoji.json", list):
        try:
            code, image, category = row["unified"], row["image"], row["category"]
            name = names.get(_plain_emoji("".join(chr(int(part, 16)) for part in code.split("-"))))
            path = package / "img/google/64" / Path(image).name
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
            skipped.append(f"{package / 'emoji.json'}: {row!r:.80} is no emoji; unified, image and category")
            continue
        if category == "Component":  # the skin tones by themselves
            continue
        if not isinstance(name, str) or not name.strip():
            skipped.append(f"{path}: has no name; one in unicode-emoji-json")
        elif not path.is_file():
            skipped.append(f"{path}: is missing; the picture of {name!r}")
        else:
            records.append(Record(path.stem, path, (re.sub("^flag ", "flag of ", " ".join(name.split())),)))
    return Found(records, skipped)


def furniture(folder: Path) -> Found:
    """Sweet Home 3D's furniture, from the catalogues that `fetch` unpacks.

    Raises:
        UserError: there is no catalogue.
    """
    root = folder / "sweethome3d-furniture/usr/share/sweethome3d/furniture"
    records: dict[str, Record] = {}
    skipped: list[str] = []
    for catalogue in sorted(root.glob("*/PluginFurnitureCatalog.properties")):
        entries = _properties(catalogue)
        for key, icon in entries.items():
            number = key.removeprefix("icon#")
            if number == key:
                continue
            path = catalogue.parent / icon.lstrip("/")
            name = entries.get(f"name#{number}", "").strip()
            if not name:
                skipped.append(f"{catalogue}: entry {number} has no name; name#{number}=Armchair")
            elif ".." in Path(icon).parts or not path.is_file():
                skipped.append(f"{path}: is missing; the picture of {name!r}")
            else:
                record = Record(f"{catalogue.parent.name}/{path.stem}", path, (name,))
                records.setdefault(record.id, record)
    if not records:
        raise UserError(f"{root}: no furniture with a name and a picture; the unpacked package sweethome3d-furniture")
    return Found(list(records.values()), skipped)


SOURCES: dict[str, Callable[[Path], tuple[list[Record], list[str]]]] = {
    "stamps": stamps,
    "openclipart": openclipart,
    "emoji": emoji,
    "furniture": furniture,
}


def prepare(folder: Path, out: Path, sources: Sequence[str] = tuple(SOURCES)) -> Found:
    """Converts the packages in `folder` to the data folder `out`: images and `records.jsonl`.

    Each image is written on white, with at most `SIDE` px, as `out/pictures/ID.png`; ids begin with the source. `facts`
    are {"source": its name, "group": the id of the first image of its group}. A group consists of the images of any
    source that are nearly equal (also mirrored), that are numbered in one series of a folder, or that show one emoji as
    man, woman and person. Images are skipped and named if they cannot be read, are too large (`images.MAX_PIXELS`) or
    are nearly empty, and so are sources that are missing.

    The images keep their licences (see `fetch`): use them on this machine and do not pass them on.

    Raises:
        UserError: a source is unknown, all are missing, or `out` cannot be written.
    """
    found: list[tuple[str, Record]] = []
    skipped: list[str] = []
    for source in sources:
        if source not in SOURCES:
            raise UserError(f"unknown source {source!r}: it must be one of {', '.join(SOURCES)}")
        try:
            records, problems = SOURCES[source](folder)
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
        raise UserError(f"{error.filename or out} cannot be written ({error.strerror}): give another") from error
    return Found(records, skipped)


def _written(found: Sequence[tuple[str, Record]], folder: Path, skipped: list[str]) -> list[Record]:
    """Writes the images, reduced, and finds their groups. Images that cannot be used are added to `skipped`."""
    records: list[Record] = []
    thumbnails: list[np.ndarray] = []
    for source, record in found:
        name = f"{source}/{record.id}"
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
    pairs = alike(np.stack(thumbnails)) if thumbnails else []
    for group in joined([[_series(record)] for record in records], pairs):
        for i in group:
            records[i] = replace(records[i], facts={**(records[i].facts or {}), "group": records[group[0]].id})
    return records


def by_fold(records: Sequence[Record], k: int = 5, seed: int = 0) -> list[list[Record]]:
    """The records of `prepare` in `k` random folds. No group is in two of them.

    To test on fold i, train on all others. Every source is divided as evenly as its largest groups allow. The order
    within a fold is that of `records`.

    Raises:
        UserError: a record has no group, or there are fewer groups than folds.
    """
    groups: list[str] = []
    for record in records:
        group = (record.facts or {}).get("group")
        if not isinstance(group, str):
            raise UserError(f"{record.id}: its facts name no group; records as `prepare` writes them")
        groups.append(group)
    if not 2 <= k <= len(set(groups)):
        raise UserError(f"{k} folds of {len(set(groups))} groups; 2 at least, and no more than groups")
    fold: dict[str, int] = {}
    for source in sorted({group.partition("/")[0] for group in groups}):
        own = [group for group in groups if group.partition("/")[0] == source]
        fold |= zip(own, folds(own, k, seed), strict=True)
    return [[record for record, group in zip(records, groups, strict=True) if fold[group] == i] for i in range(k)]


def _small(path: Path) -> Image.Image:
    with warnings.catch_warnings():  # of Pillow, for images below its limit and above ours
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        picture = open_picture(path)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    ink = picture.convert("L").point([255 * (level <= _PAPER) for level in range(256)])
    left, top, right, bottom = ink.getbbox() or (0, 0, 0, 0)
    if max(right - left, bottom - top) < _LEAST * max(picture.size):
        raise UserError(f"{path}: is nearly empty; a picture of something")
    return picture


def _series(record: Record) -> Hashable:
    """What the images of a series have in common: the name without its number, or an emoji as man or woman."""
    folder, _, stem = record.id.rpartition("/")
    if folder == "emoji":
        rest = re.sub(r"\b(man|men|woman|women|person|people)\b", "", record.captions[0]).split()
        return (folder, *rest) if rest else record.id
    stem = re.sub(r"[\d_-]+", "", stem)
    return (folder, stem) if stem else record.id


def _plain_emoji(text: str) -> str:
    return text.replace("\ufe0f", "")  # the selector of the coloured form, which is not always written


def _json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); the unpacked package") from error
    if not isinstance(value, kind):
        raise UserError(f"{path}: contains no {kind.__name__}; the unpacked package")
    return value


def _properties(path: Path) -> dict[str, str]:
    """A Java properties file of one `key=value` a line."""
    try:
        lines = path.read_text(encoding="latin-1").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); a catalogue") from error
    pairs = (line.partition("=") for line in lines if not line.lstrip().startswith(("#", "!")))
    return {key.strip(): _unescaped(value.strip()) for key, _, value in pairs}


def _unescaped(text: str) -> str:
    return re.sub(r"\\u([0-9a-fA-F]{4})|\\(.)", lambda m: chr(int(m[1], 16)) if m[1] else m[2], text)
