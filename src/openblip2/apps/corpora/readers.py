"""Reads packages of images with English captions: returns records, and a line for each entry that is left out.

| source      | images                                       | caption                               |
|-------------|----------------------------------------------|---------------------------------------|
| stamps      | Tux Paint's stamps: photographs and drawings | its sentence ("A rainbow lorikeet.")  |
| openclipart | drawings                                     | its title, or its file's name         |
| emoji       | Noto Emoji, 64 x 64 px, one skin tone        | its Unicode name ("flag of Aruba")    |
| furniture   | renders of Sweet Home 3D's models            | its name in the catalogue ("Armchair")|

Half of openclipart's titles are not captions: they name the collection of a drawing, or they are in Italian or French.
"""

import html
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from xml.etree import ElementTree

from openblip2.data.records import Record
from openblip2.errors import UserError, one_line

T = TypeVar("T")

_MAX_BYTES = 16 * 2**20  # limit for an SVG; the largest in the package has 1.7 million
_DUBLIN = "{http://purl.org/dc/elements/1.1/}"

# Folders with drawings that a file name does not describe: toolbar icons, 1,379 stars by their number of points,
# gradients and patterns. Icons with a title of their own are used.
_UNNAMED = ("computer/icons/", "shapes/stars/")
_NO_PICTURES = ("special/",)
_BELIEVED = 3  # a title that more drawings share is the title of a collection

# Parts of titles that do not describe the image: who drew it, the kind of clip art, and numbers.
_NOT_ABOUT_IT = (
    (r"^Clipart by .*? - ", ""),
    (r"(?i)\((b and w|bw)\)", " in black and white"),
    (r"(?<=[a-z])(?=[A-Z])", " "),  # BlueFolder
    (r"[\s#]*\b0\d+\b", ""),
    (r"([\s#.-]*\d+)+$", ""),
    (r"(?i)\s*-\s+(clothing|body part|rpg map elements)$", ""),
)


class Found(NamedTuple):
    """Records, and one line "where: what is wrong; what would be right" for each entry that was skipped."""

    records: list[Record]
    skipped: list[str]


def _read_each(entries: Iterable[T], read: Callable[[T], Record | None]) -> Found:
    """Reads all entries. An entry is skipped if `read` raises a `UserError`, and ignored if `read` returns None."""
    found = Found([], [])
    for entry in entries:
        try:
            record = read(entry)
        except UserError as problem:
            found.skipped.append(str(problem))
        else:
            found.records.extend([record] if record else [])
    return found


def read_stamps(root: Path) -> Found:
    """All stamps below `root`, whose images are not opened. Raises a `UserError` if there is none."""

    def read(path: Path) -> Record | None:
        text = path.with_suffix(".txt")
        if not text.exists():
            return None  # NAME_mirror.png: the mirrored form of a stamp, if that is not simply its mirror image
        return Record(path.relative_to(root).as_posix(), path, (_sentence(text),))

    found = _read_each(sorted(root.rglob("*.png")), read)
    if not found.records:
        right = "install them: apt-get install tuxpaint-stamps-default"
        raise UserError(f"{root}: Tux Paint's stamps are missing (no NAME.png with NAME.txt); {right}")
    return found


def _sentence(path: Path) -> str:
    lines = _text(path, "save it as UTF-8 text", "utf-8-sig").splitlines()
    if not lines or not lines[0].strip():
        raise UserError(f"{path}: its first line is empty; write an English sentence there")
    return lines[0].strip()


def emoji(folder: Path) -> Found:
    """Noto Emoji with their Unicode (CLDR) names, without variants of skin tone.

    Raises:
        UserError: one of the two packages is missing, or its files are not as published.
    """
    package = folder / "emoji-datasource-google/package"
    table = _json(folder / "unicode-emoji-json/package/data-by-emoji.json", dict)
    names = {_plain_emoji(key): value.get("name") for key, value in table.items() if isinstance(value, dict)}

    def read(row: Any) -> Record | None:
        try:
            code, image, category = row["unified"], row["image"], row["category"]
            name = names.get(_plain_emoji("".join(chr(int(part, 16)) for part in code.split("-"))))
            path = package / "img/google/64" / Path(image).name
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
            wrong = f"an entry without unified, image and category ({row!r:.80})"
            raise UserError(f"{package / 'emoji.json'}: {wrong}; it is skipped") from error
        if category == "Component":  # the skin tones by themselves
            return None
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{path}: unicode-emoji-json has no name for it; it is skipped")
        if not path.is_file():
            raise UserError(f"{path}: the picture of {name!r} is missing; it is skipped")
        return Record(path.stem, path, (re.sub("^flag ", "flag of ", " ".join(name.split())),))

    return _read_each(_json(package / "emoji.json", list), read)


def furniture(folder: Path) -> Found:
    """Sweet Home 3D's furniture, from the catalogues that `fetch` unpacks. Raises a `UserError` if there is none."""
    root = folder / "sweethome3d-furniture/usr/share/sweethome3d/furniture"
    catalogues = {path: _properties(path) for path in sorted(root.glob("*/PluginFurnitureCatalog.properties"))}
    icons = ((path, key) for path, entries in catalogues.items() for key in entries if key.startswith("icon#"))

    def read(icon: tuple[Path, str]) -> Record:
        catalogue, key = icon
        entries, number = catalogues[catalogue], key.removeprefix("icon#")
        path, name = catalogue.parent / entries[key].lstrip("/"), entries.get(f"name#{number}", "").strip()
        if not name:
            raise UserError(f"{catalogue}: entry {number} has no name#{number}; it is skipped")
        if ".." in Path(entries[key]).parts or not path.is_file():
            raise UserError(f"{path}: the picture of {name!r} is missing; it is skipped")
        return Record(f"{catalogue.parent.name}/{path.stem}", path, (name,))

    records, skipped = _read_each(icons, read)
    if not records:
        raise UserError(f"{root}: no furniture with name and picture; fetch the package sweethome3d-furniture again")
    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(record.id, record)
    return Found(list(first.values()), skipped)


def openclipart(packages: Path) -> Found:
    """Reads the drawings that have an English caption, with their paths as ids.

    A caption is the title of a drawing, or the words of its file name if more than three drawings share the title and
    it does not agree with the name: then it is the title of a collection. All words must be in the dictionary. A flag
    is called "flag of ...". Links are ignored: they are other names of drawings that are read anyway.

    Args:
        packages: The folder with the unpacked packages openclipart-png, openclipart-svg and wamerican.

    Raises:
        UserError: A package is missing, or no drawing has a caption.
    """
    pictures = packages / "openclipart-png/usr/share/openclipart/png"
    drawings = packages / "openclipart-svg/usr/share/openclipart/svg"
    for folder in (pictures, drawings):
        if not folder.is_dir():
            raise UserError(f"{folder}: openclipart is missing; fetch the packages openclipart-png and openclipart-svg")
    dictionary = packages / "wamerican/usr/share/dict/american-english"
    words = frozenset(_text(dictionary, "fetch wamerican again").lower().split())
    titles: dict[str, tuple[str, bool]] = {}

    def read_title(path: Path) -> None:
        name = path.relative_to(drawings).with_suffix("").as_posix()
        if not path.is_symlink() and not (pictures / f"{name}.png").is_symlink():
            titles[name] = _metadata(path)

    _, broken = _read_each(sorted(drawings.rglob("*.svg")), read_title)
    owners = Counter(title.lower() for title, _ in titles.values())

    def read(name: str) -> Record | None:
        title, flag = titles[name]
        caption, picture = _caption(name, title, owners[title.lower()]), pictures / f"{name}.png"
        if not _is_english(caption, words):
            return None
        if not picture.is_file():
            raise UserError(f"{picture}: the picture of {drawings / name}.svg is missing; it is skipped")
        return Record(name, picture, (f"flag of {caption}" if flag and "flag" not in caption.lower() else caption,))

    records, missing = _read_each(titles, read)
    if not records:
        raise UserError(
            f"{drawings}: no drawing with English title and picture; fetch the package openclipart-svg again"
        )
    without = f"{drawings}: {len(titles) - len(records):,} drawings have no English caption of their own; left out"
    return Found(records, [*broken, *missing, without])


SOURCES: dict[str, Callable[[Path], Found]] = {
    "stamps": lambda folder: read_stamps(folder / "tuxpaint-stamps-default/usr/share/tuxpaint/stamps"),
    "openclipart": openclipart,
    "emoji": emoji,
    "furniture": furniture,
}


def _text(path: Path, right: str, encoding: str = "utf-8") -> str:
    try:
        return path.read_text(encoding=encoding)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); {right}") from error


def _metadata(path: Path) -> tuple[str, bool]:
    """The cleaned title of a drawing, "" if it has none, and whether it is tagged as a flag."""
    title, tags = "", set[str]()
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path}: has more than {_MAX_BYTES:,} bytes; it is skipped")
        content = path.read_bytes()
        if b"<!ENTITY" in content:
            raise UserError(f"{path}: defines entities, which are not expanded; it is skipped")
        for _, element in ElementTree.iterparse(BytesIO(content)):
            name = element.tag.rpartition("}")[2]
            if name == "Work":
                title = element.findtext(f"{_DUBLIN}title") or ""
            elif name == "li":
                tags.add((element.text or "").strip().lower())
            elif name == "metadata":
                break  # the drawing itself is not parsed
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f"{path}: is not SVG that can be read ({one_line(error)}); it is skipped") from error
    return _plain(html.unescape(title)), bool(tags & {"flag", "flags"})


def _caption(name: str, title: str, owners: int) -> str:
    """The caption of the drawing `name`, "" if it has none. Its title is shared by `owners` drawings."""
    folder, _, file = name.rpartition("/")
    called = _plain(re.sub(r"[\d_.-]+", " ", file))
    told = called.lower().split()
    agree = all(any(part.startswith(word[:5]) for part in told) for word in _split(title))
    if f"{folder}/".startswith(_NO_PICTURES):
        return ""
    if title and (owners <= _BELIEVED or agree):
        return title
    return "" if f"{folder}/".startswith(_UNNAMED) else called


def _plain(text: str) -> str:
    text = " ".join(text.replace("_", " ").split())
    for pattern, plain in _NOT_ABOUT_IT:
        text = re.sub(pattern, plain, text)
    return " ".join(text.split()).strip(" -.,")


def _split(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.lower())


def _is_english(text: str, words: frozenset[str]) -> bool:
    """Whether all words are English and one has more than two letters. The only word of one letter is "a"."""
    found = _split(text)
    return any(len(word) > 2 for word in found) and all(
        word == "a" or (word in words and len(word) > 1) for word in found
    )


def _plain_emoji(text: str) -> str:
    return text.replace("\ufe0f", "")  # the selector of the coloured form, which is sometimes omitted


def _json(path: Path, kind: type) -> Any:
    right = "fetch the unpacked package again"
    text = _text(path, right)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); {right}") from error
    if not isinstance(value, kind):
        raise UserError(f"{path}: does not have the form of the published file; {right}")
    return value


def _properties(path: Path) -> dict[str, str]:
    """Reads a Java properties file with one `key=value` per line."""
    lines = _text(path, "fetch the package again", "latin-1").splitlines()
    pairs = (line.partition("=") for line in lines if not line.lstrip().startswith(("#", "!")))
    return {key.strip(): _unescaped(value.strip()) for key, _, value in pairs}


def _unescaped(text: str) -> str:
    return re.sub(r"\\u([0-9a-fA-F]{4})|\\(.)", lambda m: chr(int(m[1], 16)) if m[1] else m[2], text)
