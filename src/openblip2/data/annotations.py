"""Annotation files: checking their values, and finding the images."""

import functools
import gc
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openblip2.data.text import is_unicode
from openblip2.errors import UserError


class Pictures:
    """The image files in a folder. Each subfolder is listed once, which is faster than looking for every image.

    Links are followed, because the images may be links to other folders.

    Raises:
        UserError: `root` is not a folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"{root}: no such folder: give the folder of the pictures")
        self._listed = functools.cache(self._list)

    def find(self, name: object) -> Path:
        """The file with the path `name` relative to the folder, or else with the last part of `name`.

        So for "val2014/x.jpg", the folder can be "coco", as the annotations require, or "coco/val2014".

        Raises:
            UserError: `name` is not text, leads out of the folder, or does not exist.
        """
        name = text(name, "picture name", "a path relative to the folder of pictures")
        if os.path.isabs(name) or os.path.splitdrive(name)[0] or ".." in re.split(r"[/\\]", name):
            raise UserError(f"image {brief(name)} is outside the folder of pictures: give a path inside {self.root}")
        folder, _, file = name.rpartition("/")
        for place in dict.fromkeys((folder, "")):
            path, files = self._listed(place)
            if file in files:
                return path / file
        raise UserError(f"image {brief(name)} is missing: it must be in {self.root}")

    def _list(self, name: str) -> tuple[Path, frozenset[str]]:
        folder = self.root / name
        try:
            with os.scandir(folder) as entries:
                return folder, frozenset(entry.name for entry in entries if _is_file(entry))
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: an impossible name
            return folder, frozenset()
        except OSError as error:
            raise UserError(f"{folder}: cannot be listed ({error.strerror}): give a readable folder") from error


def _is_file(entry: os.DirEntry[str]) -> bool:
    # Unlike entry.is_file(), os.path.isfile() does not raise for a link to itself.
    return os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()


@dataclass
class AnnotationFile:
    """An annotation file that is being read."""

    path: Path
    data: Any  # its content
    pictures: Pictures
    split: str | None = None  # selected by the user
    questions: Path | None = None  # the second file
    skipped: list[str] = field(default_factory=list)  # "where: what; what would be right" of each entry left out

    def entries(self, name: str, values: object, right: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The objects in the list `name` with their positions, "file: name[0]". Other entries are skipped.

        Raises:
            UserError: `values` is not a list. The messages say that `right` would be a correct entry.
        """
        if not isinstance(values, list):
            raise UserError(f'{self.path}: "{name}" is {brief(values)}: it must be a list of objects')
        for number, entry in enumerate(values):
            where = f"{self.path}: {name}[{number}]"
            if isinstance(entry, dict):
                yield where, entry
            else:
                self.skipped.append(f"{where}: {brief(entry)} is not an object; expected {right}")

    @contextmanager
    def skipping(self, where: str) -> Iterator[None]:
        """A `UserError` within the block skips the entry at `where`."""
        try:
            yield
        except UserError as problem:
            self.skipped.append(f"{where}: {problem}")


@contextmanager
def uncollected() -> Iterator[None]:
    """Switches garbage collection off, which visits all objects of a large file many times (VQAv2: 9 s, not 5 s)."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def text(value: object, what: str, right: str) -> str:
    """`value`, if it is Unicode text that is not empty.

    Raises:
        UserError: it is not such a text. The message calls it `what`, and says that `right` would be correct.
    """
    if not isinstance(value, str):
        raise UserError(f"{what} is {brief(value)}; expected {right}")
    if not value.strip():
        raise UserError(f"the {what} is empty; expected {right}")
    if not is_unicode(value):
        raise UserError(f"the {what} {brief(value)} is not Unicode text; expected {right}")
    return value


def identity(value: object, what: str) -> str:
    """The id `value` as text.

    Raises:
        UserError: it is neither a whole number nor one line of text. The message calls it `what`.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    name = text(value, what, "a whole number or text")
    if not name.isprintable():
        raise UserError(f"{what} is {brief(name)}: it must be a whole number or text of one line")
    return name


def first_entry(values: object) -> dict[str, Any]:
    """The first object in the list `values`, which shows the format of a file; empty if there is none."""
    return next((value for value in values if isinstance(value, dict)), {}) if isinstance(values, list) else {}


def brief(value: object) -> str:
    """`value` for a message: one line of at most 80 characters."""
    return ascii(value)[:80]
