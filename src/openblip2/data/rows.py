"""Unchecked rows of data sets: JSON lines, tables, folders of images."""

import ast
import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from openblip2.data.images import PICTURE_SUFFIXES, UNREADABLE, left_out
from openblip2.data.text import is_unicode
from openblip2.errors import UserError, number_of, refuse_lfs_pointer

RECORDS = "records.jsonl"
LISTS = (RECORDS, "metadata.jsonl", "metadata.csv", "captions.txt")  # a folder's list: the first one found
TABLES = (".csv", ".tsv", ".txt", ".token")
# Names of our columns and keys in other tools: Hugging Face's image folders, kohya, COCO, Flickr30k.
SYNONYMS = {
    "image": ("file_name", "filename", "image_path", "file_path", "filepath", "image_file", "image_name", "path"),
    "caption": ("text", "comment", "raw"),
}
ACCEPTED = (
    f"a folder with {RECORDS}, a .jsonl file, a .csv or .tsv file with the columns image and caption "
    "(or image, question and answer), or a folder of pictures each with a .txt of the same name"
)
DELIMITERS = (",", "\t", ";", "|")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_AS_UTF8 = "save it as UTF-8 (in Excel: CSV UTF-8)"
MOST_LINES = 100  # in one row; a caption has at most 50 words
_ROW = 'write one {"image": "cat.jpg", "caption": "a cat"} per line'

# The keys and values of one row, or the reason why it could not be read.
Row = dict[str, Any] | UserError


def read_rows(source: Path) -> Iterator[tuple[str, Row]]:
    """The position of each row of `source` ("file:line", or the path of an image), and the row.

    Rows of all sources have the keys of `records.jsonl`, and "image" is relative to the folder.

    Raises:
        UserError: `source` does not exist or is not `ACCEPTED`.
        OSError: it cannot be read.
    """
    listed = find_list(source) if source.is_dir() else source
    if listed is None:
        return _pictures(source)
    if not listed.exists():
        raise UserError(f"{source}: does not exist; give {ACCEPTED}")
    if listed.suffix.lower() == ".jsonl":
        return _json_lines(listed)
    if listed.suffix.lower() in TABLES:
        return _table(listed)
    raise UserError(f"{source}: is not in a supported format; give {ACCEPTED}")


def find_list(folder: Path) -> Path | None:
    """The file that lists the pictures of a folder; None if there is none."""
    for path in (folder / name for name in LISTS):
        # A captions.txt may also be a text about one image or about all images, without a list.
        if path.exists() and (path.suffix != ".txt" or (path.is_file() and _form(next(_lines(path), ""))[1])):
            return path
    return None


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file, UTF-8 or UTF-16 with a byte-order mark; bytes that are not UTF-8 become lone surrogates.

    Raises:
        UserError: the file is a git-LFS pointer, or many of its lines are not UTF-8.
    """
    with path.open("rb") as file:
        start = file.read(64)
    refuse_lfs_pointer(path, start)
    encoding, errors = ("utf-16", "strict") if start[:2] in _UTF16 else ("utf-8-sig", "surrogateescape")
    count = bad = 0
    try:
        with path.open(encoding=encoding, errors=errors, newline="") as file:
            for line in file:
                count, bad = count + 1, bad + (not is_unicode(line))
                yield line
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not valid UTF-16 text; {_AS_UTF8}") from error
    # A single such line is skipped. Many mean another encoding; the ASCII lines alone would be another data set.
    if bad > max(1, count / 20):
        raise UserError(f"{path}: {bad:,} of its {count:,} lines are not UTF-8 text; {_AS_UTF8}")


def _json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield f"{path}:{number}", _parsed(line)


def _parsed(line: str) -> Row:
    if not is_unicode(line):
        return UserError(f"not UTF-8 text; {_ROW}")
    try:
        row = json.loads(line.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        return UserError(f"not JSON ({error.msg} at character {error.pos + 1}); {_ROW}")
    except (ValueError, RecursionError):
        return UserError(f"not UTF-8 text, or JSON that cannot be read; {_ROW}")
    if not isinstance(row, dict):
        return UserError(f"JSON, but not an object: {_ROW}")
    names = _our_names(list(row))
    return dict(zip(names, row.values(), strict=True))


def _our_names(names: list[str]) -> list[str]:
    """Names of columns or keys, with ours in place of the first synonym of each that is missing."""
    renamed = list(names)
    for ours, others in SYNONYMS.items():
        # A "text" next to a question may be anything, not only a caption.
        if ours in names or (ours == "caption" and {"captions", "question", "questions"} & set(names)):
            continue
        if found := next((name for name in others if names.count(name) == 1), None):
            renamed[names.index(found)] = ours
    return renamed


def _form(line: str, delimiters: Sequence[str] = DELIMITERS) -> tuple[str, list[str]]:
    """The delimiter and the columns of a table by its first line; no columns if it does not name them."""
    for delimiter in delimiters:
        cells = next(csv.reader([line[:10_000]], delimiter=delimiter), [])
        columns = _our_names([cell.strip().lower() for cell in cells])
        once = {name for name in columns if columns.count(name) == 1}
        if once >= {"image", "question", "answer"} or (once >= {"image"} and once & {"caption", "captions"}):
            return delimiter, columns
    return "", []


def _table(path: Path) -> Iterator[tuple[str, Row]]:
    lines = list(_lines(path))
    if not lines:
        return
    first, delimiters = 1, DELIMITERS
    if len(lines) > 1 and (named := re.fullmatch(r'"?sep=([^\w"])"?', lines[0].rstrip("\r\n"), re.IGNORECASE)):
        first, delimiters = 2, (named[1],)  # the first line for Excel
    top = lines[first - 1]
    delimiter, header = _form(top, delimiters)
    if not header:
        right = "it has to name the columns image and caption, or image, question and answer: rename them"
        if "\0" in top or not is_unicode(top):
            right = f"it is not UTF-8 text: {_AS_UTF8}"
        elif re.search(r"^[^\t]*#\d\t", top):  # the original files of Flickr8k and Flickr30k
            right = "no line names the columns: add image<TAB>caption as line 1, and remove #0, #1, ... from the names"
        elif any(top.lower().count(name) > 1 for name in ("image", "caption")):
            right = "it names a column twice: rename one of the two"
        elif any(Path(cell.strip(' "')).suffix.lower() in PICTURE_SUFFIXES for cell in re.split(r"[,\t;|]", top)):
            right = "no line names the columns: add one before it, for example image,caption"
        raise UserError(f"{path}:{first}: the first line is {ascii(top.strip())[:80]}; {right}")
    while first < len(lines):
        cells, after = _cells(lines, first, header, delimiter, path.parent)
        if not all(map(is_unicode, lines[first:after])):
            cells = UserError(f"not Unicode text in UTF-8; {_AS_UTF8}")
        if cells:
            yield f"{path}:{first + 1}", cells if isinstance(cells, UserError) else _table_row(cells, header)
        first = after


def _cells(
    lines: list[str], first: int, header: list[str], delimiter: str, folder: Path
) -> tuple[list[str] | UserError, int]:
    """The cells of the row that begins in line `first`, counted from 0, and the number of the line after the row."""
    rows = 0
    for after in range(first + 1, min(first + MOST_LINES, len(lines)) + 1):
        # A text in quotation marks may have several lines, and the first or the last one contains the image. If another
        # line looks like a row, too, a quotation mark is not closed.
        rows += _is_row(lines[after - 1], header, delimiter, folder)
        if rows > 1:
            break
        try:
            # strict: otherwise the reader guesses where a text with a wrong quotation mark ends.
            return next(csv.reader(lines[first:after], delimiter=delimiter, strict=True)), after
        except csv.Error as error:
            if str(error) != "unexpected end of data":
                right = 'write text with quotation marks as "so ""said"""'
                return UserError(f"not a table row ({error}): {right}"), first + 1
    return UserError("a quotation mark is not closed: close it, or write it twice if it belongs to the text"), first + 1


def _is_row(line: str, header: list[str], delimiter: str, folder: Path) -> bool:
    """Whether a line without its quotation marks has as many cells as a row and an image in the right column."""
    cells = [cell.strip() for cell in line.replace('"', "").split(delimiter)]
    if len(cells) < len(header):
        return False
    at = header.index("image")
    return any(
        Path(image).suffix.lower() in PICTURE_SUFFIXES or os.path.isfile(folder / image)
        for image in (cells[at], cells[at - len(header)])
        if image
    )


def _table_row(cells: list[str], header: list[str]) -> Row:
    if len(cells) != len(header):
        right = "write a caption that contains the separator in double quotes"
        return UserError(f"{number_of(len(cells), 'cell')} for {number_of(len(header), 'column')}; {right}")
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    for name in {"caption", "captions"} & row.keys():
        if row[name].startswith(("['", '["')):  # a list in a cell, as written by pandas or in JSON
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                row[name] = ast.literal_eval(row[name])
    return {name: row[name] for name in ("image", "caption", "captions", "question", "answer") if name in row}


def _pictures(folder: Path) -> Iterator[tuple[str, Row]]:
    converted: list[str] = []  # images that must be converted before they can be read
    for parent, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in files if not name.startswith("."))
        listed = find_list(Path(parent))
        texts = {name.lower(): name for name in names if name.lower().endswith(".txt")}
        used: dict[str, str] = {}  # text file -> image
        pictures = [name for name in names if Path(name).suffix.lower() in PICTURE_SUFFIXES]
        others = [name for name in names if Path(name).suffix.lower() in UNREADABLE]
        for name in [*pictures, *others]:  # so that a text belongs to the converted image, if there is one
            path = Path(parent, name)
            text = texts.get(f"{name}.txt".lower()) or texts.get(f"{path.stem}.txt".lower())
            first = name if text is None else used.setdefault(text, name)
            if name in others:
                converted.append(name)
            elif listed and text is None:
                yield str(path), UserError(f"no caption file: give {parent}, because {listed.name} lists its pictures")
            elif first != name:
                yield str(path), UserError(f"{text} is already used for {first}: write a separate {name}.txt")
            else:
                yield str(path), _picture(path, folder, text)
        for text in (name for name in names if name.lower().endswith(".txt") and name not in used):
            yield str(Path(parent, text)), UserError(f"no picture for it: add {text[:-4]}.jpg, {text[:-4]}.png, ...")
    for line in left_out(converted):
        yield str(folder), UserError(line)


def _picture(path: Path, folder: Path, text: str | None) -> Row:
    right = f"write {path.stem}.txt next to it, as UTF-8 text with one caption per line"
    if text is None:
        return UserError(f"no caption file; {right}")
    try:
        content = path.with_name(text).read_bytes()
        lines = content.decode("utf-16" if content[:2] in _UTF16 else "utf-8-sig").splitlines()
    except OSError:
        return UserError(f"its caption file cannot be read; {right}")
    except ValueError:
        return UserError(f"its caption file {text} is not UTF-8 text: save it as UTF-8")
    captions = [line for line in lines if line.strip()]
    if not captions:
        return UserError(f"its caption file is empty; {right}")
    return {"image": path.relative_to(folder).as_posix(), "captions": captions}


def _raise(error: OSError) -> None:
    # os.walk ignores folders that it cannot read, unless an error is raised here.
    raise error
