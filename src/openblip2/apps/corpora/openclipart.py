"""openclipart 0.18: drawings as PNG, with English captions from the titles in the SVG files of the same drawings.

Half of the titles are not captions: they name the collection of a drawing, or they are in Italian or French.
"""

import html
import re
from collections import Counter
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

from openblip2.data.records import Record
from openblip2.errors import UserError, one_line

_MAX_BYTES = 16 * 2**20  # of an SVG; the package's largest has 1.7 million
_DUBLIN = "{http://purl.org/dc/elements/1.1/}"

# Folders with drawings that a file name does not describe: toolbar icons, 1,379 stars by their number of points,
# gradients and patterns. Icons with a title of their own are used.
_UNNAMED = ("computer/icons/", "shapes/stars/")
_NO_PICTURES = ("special/",)
_BELIEVED = 3  # a title that more drawings share is that of a collection

# Parts of titles that do not describe the image: who drew it, the kind of clip art, and numbers.
_NOT_ABOUT_IT = (
    (r"^Clipart by .*? - ", ""),
    (r"(?i)\((b and w|bw)\)", " in black and white"),
    (r"(?<=[a-z])(?=[A-Z])", " "),  # BlueFolder
    (r"[\s#]*\b0\d+\b", ""),
    (r"([\s#.-]*\d+)+$", ""),
    (r"(?i)\s*-\s+(clothing|body part|rpg map elements)$", ""),
)


def openclipart(packages: Path) -> tuple[list[Record], list[str]]:
    """The drawings with an English caption, with their paths as ids, and lines about those that were left out.

    A caption is the title of a drawing, or the words of its file name if more than three drawings share the title and
    it does not agree with the name: then it is the title of a collection. All words must be in the dictionary. A flag
    is called "flag of ...". Links are ignored: they are other names of drawings that are read anyway.

    Licence: public domain (Debian packages openclipart-png and openclipart-svg).

    Args:
        packages: The folder with the unpacked packages openclipart-png, openclipart-svg and wamerican.

    Raises:
        UserError: A package is missing, or no drawing has a caption.
    """
    pictures = packages / "openclipart-png/usr/share/openclipart/png"
    drawings = packages / "openclipart-svg/usr/share/openclipart/svg"
    for folder in (pictures, drawings):
        if not folder.is_dir():
            raise UserError(f"{folder}: openclipart is missing; the unpacked packages openclipart-png and -svg")
    words = _words(packages / "wamerican/usr/share/dict/american-english")
    skipped: list[str] = []
    found: dict[str, tuple[str, bool]] = {}
    for path in sorted(drawings.rglob("*.svg")):
        name = path.relative_to(drawings).with_suffix("").as_posix()
        if path.is_symlink() or (pictures / f"{name}.png").is_symlink():
            continue
        try:
            found[name] = _metadata(path)
        except UserError as problem:
            skipped.append(str(problem))
    owners = Counter(title.lower() for title, _ in found.values())
    records: list[Record] = []
    for name, (title, flag) in found.items():
        caption = _caption(name, title, owners[title.lower()])
        if not _is_english(caption, words):
            continue
        if flag and "flag" not in caption.lower():
            caption = f"flag of {caption}"
        if (pictures / f"{name}.png").is_file():
            records.append(Record(name, pictures / f"{name}.png", (caption,)))
        else:
            skipped.append(f"{pictures / name}.png: is missing; the picture of {drawings / name}.svg")
    if not records:
        raise UserError(f"{drawings}: no drawing with an English title and a picture; the package openclipart-svg")
    without = len(found) - len(records)
    return records, [*skipped, f"{drawings}: {without:,} drawings have no English caption of their own; left out"]


def _words(dictionary: Path) -> frozenset[str]:
    try:
        return frozenset(dictionary.read_text(encoding="utf-8").lower().split())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{dictionary}: cannot be read ({error}); a list of English words") from error


def _metadata(path: Path) -> tuple[str, bool]:
    """The cleaned title of a drawing, "" if it has none, and whether it is tagged as a flag."""
    title, tags = "", set[str]()
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path}: has more than {_MAX_BYTES:,} bytes; a drawing")
        content = path.read_bytes()
        if b"<!ENTITY" in content:
            raise UserError(f"{path}: defines entities, which are not expanded; a drawing without")
        for _, element in ElementTree.iterparse(BytesIO(content)):
            name = element.tag.rpartition("}")[2]
            if name == "Work":
                title = element.findtext(f"{_DUBLIN}title") or ""
            elif name == "li":
                tags.add((element.text or "").strip().lower())
            elif name == "metadata":
                break  # the drawing itself is not parsed
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f"{path}: is not SVG that can be read ({one_line(error)}); a drawing") from error
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
