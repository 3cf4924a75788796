"""Unchecked rows of data sets: JSON lines, tables, folders of images."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openblip2.errors import UserError

RECORDS = "records.jsonl"
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif"})
ACCEPTED = (
    f"a folder with {RECORDS}, a .jsonl file, a .csv or .tsv file with the columns image and caption "
    "(or image, question and answer), or a folder of pictures each with a .txt of the same name"
)
MOST_SWALLOWED = 10  # rows within the text of another row; with more, a table is refused
MOST_LINES = 100  # of one row; a caption has 50 words
_ROW = 'one {"image": "cat.jpg", "caption": "a cat"} a line'

# The keys and values of one row, or why it could not be read.
Row = dict[str, Any] | UserError


def read_rows(source: Path) -> Iterator[tuple[str, Row]]:
    """The position of each row of `source` ("file:line", or the path of an image), and the row.

    Rows of all sources have the keys of `records.jsonl`: "image" (relative to the folder), "caption" or "captions",
    "question" and "answer", and other keys of a JSON line.

    Raises:
        UserError: `source` does not exist or is not `ACCEPTED`.
        OSError: it cannot be read.
    """
    suffix = source.suffix.lower()
    if source.is_dir():
        listed = source / RECORDS
        return _json_lines(listed) if listed.exists() else _pictures(source)
    if not source.exists():
        raise UserError(f"{source}: does not exist; give {ACCEPTED}")
    if suffix == ".jsonl":
        return _json_lines(source)
    if suffix in (".csv", ".tsv"):
        return _table(source, delimiter="," if suffix == ".csv" else "\t")
    raise UserError(f"{source}: is not data that can be read; give {ACCEPTED}")


def _json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", _parsed(line)


def _parsed(line: bytes) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        return UserError(f"not JSON ({error.msg} at character {error.pos + 1}); {_ROW}")
    except (ValueError, RecursionError):
        return UserError(f"not UTF-8 text, or JSON that cannot be read; {_ROW}")
    return row if isinstance(row, dict) else UserError(f"JSON, but not an object: write {_ROW}")


def _table(path: Path, delimiter: str) -> Iterator[tuple[str, Row]]:
    # Bytes that are not UTF-8 become lone surrogates, so that only their row is skipped and not the file.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        taken: list[str] = []  # the lines of the current row

        def lines() -> Iterator[str]:
            for line in file:
                taken.append(line)
                yield line

        # strict: otherwise the reader guesses where a text with a wrong quotation mark ends.
        reader = csv.reader(lines(), delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            first = reader.line_num + 1
            where = f"{path}:{first}"
            taken.clear()
            try:
                cells: list[str] | UserError = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                cells = UserError(f'not a table row ({error}): write text with quotation marks as "so ""said"""')
            several = enumerate(taken, first) if len(taken) > 1 else ()
            rows = [n for n, line in several if _is_row(line, header, delimiter, path.parent)]
            # Of the lines of one row, at most the first or the last contains an image.
            swallowed = [n for n in rows if n > first] if len(rows) > 1 or isinstance(cells, UserError) else []
            if len(swallowed) > MOST_SWALLOWED or len(taken) > MOST_LINES:
                raise UserError(
                    f"{where}: a quotation mark is not closed: lines {first} to {reader.line_num} were read as one "
                    "row; close it, or write it twice if it belongs to the text"
                )
            if swallowed:
                cells = UserError("a quotation mark is not closed, so later rows were read as a part of this one")
            if isinstance(cells, UserError):
                yield where, cells
                yield from ((f"{path}:{n}", UserError(f"read as a part of line {first}")) for n in swallowed)
            elif not header:
                header = _header(cells, where, delimiter)
            elif cells:
                yield where, _table_row(cells, header)


def _is_row(line: str, header: list[str], delimiter: str, folder: Path) -> bool:
    """Whether a line without its quotation marks has as many cells as a row and an image in the right column."""
    cells = [cell.strip() for cell in line.replace('"', "").split(delimiter)]
    if not header or len(cells) < len(header):
        return False
    at = header.index("image")
    return any(
        Path(image).suffix.lower() in PICTURE_SUFFIXES or os.path.isfile(folder / image)
        for image in (cells[at], cells[at - len(header)])
        if image
    )


def _header(cells: list[str], where: str, delimiter: str) -> list[str]:
    header = [cell.strip().lower() for cell in cells]
    once = {name for name in header if header.count(name) == 1}
    if {"image", "caption"} <= once or {"image", "question", "answer"} <= once:
        return header
    right = " or ".join(delimiter.join(names) for names in (("image", "caption"), ("image", "question", "answer")))
    right = right.replace("\t", "<tab>")
    raise UserError(f"{where}: the first line is {ascii(delimiter.join(cells))[:80]}: it must be {right}")


def _table_row(cells: list[str], header: list[str]) -> Row:
    if len(cells) != len(header):
        right = "a caption that contains the separator stands in double quotes"
        return UserError(f"{len(cells)} cells under {len(header)} columns; {right}")
    row = dict(zip(header, cells, strict=True))
    return {name: row[name] for name in ("image", "caption", "question", "answer") if name in row}


def _pictures(folder: Path) -> Iterator[tuple[str, Row]]:
    for parent, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in files if not name.startswith("."))
        pictures = [name for name in names if Path(name).suffix.lower() in PICTURE_SUFFIXES]
        for name in pictures:
            path = Path(parent, name)
            yield str(path), _picture(path, folder)
        lonely = {Path(name).stem for name in names if name.endswith(".txt")} - {Path(name).stem for name in pictures}
        for stem in sorted(lonely):
            yield str(Path(parent, stem + ".txt")), UserError(f"no picture beside it: add {stem}.jpg, {stem}.png, ...")


def _picture(path: Path, folder: Path) -> Row:
    right = f"{path.stem}.txt beside it, UTF-8 text, one caption a line"
    try:
        lines = path.with_suffix(".txt").read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return UserError(f"no caption file; {right}")
    except (OSError, ValueError):
        return UserError(f"its caption file cannot be read; {right}")
    captions = [line for line in lines if line.strip()]
    if not captions:
        return UserError(f"its caption file is empty; {right}")
    return {"image": path.relative_to(folder).as_posix(), "captions": captions}


def _raise(error: OSError) -> None:
    # os.walk ignores folders that it cannot read, unless an error is raised here.
    raise error
