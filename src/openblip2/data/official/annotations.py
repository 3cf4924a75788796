"""Annotation files: reading JSON, checking its values, and finding the images."""

import gc
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openblip2.data.text import is_unicode
from openblip2.errors import UserError, refuse_lfs_pointer


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
        self._folders: dict[str, tuple[Path, frozenset[str]]] = {}

    def find(self, name: object) -> Path:
        """The file `name`, a path relative to the folder, or its last part.

        So the folder can be the one that the annotations mean ("coco" for "val2014/x.jpg") or "coco/val2014".

        Raises:
            UserError: `name` is not text, leads out of the folder, or does not exist.
        """
        name = text(name, "picture name", "a path relative to the folder of pictures")
        if os.path.isabs(name) or os.path.splitdrive(name)[0] or ".." in re.split(r"[/\\]", name):
            raise UserError(f"image {shown(name)} is outside the folder of pictures: give a path inside {self.root}")
        folder, _, file = name.rpartition("/")
        for place in (folder, "") if folder else ("",):
            if place not in self._folders:
                self._folders[place] = self.root / place, self._list(place)
            path, files = self._folders[place]
            if file in files:
                return path / file
        raise UserError(f"image {shown(name)} is missing: it must be in {self.root}")

    def _list(self, folder: str) -> frozenset[str]:
        try:
            with os.scandir(self.root / folder) as entries:
                return frozenset(entry.name for entry in entries if _is_file(entry))
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: an impossible name
            return frozenset()
        except OSError as error:
            raise UserError(
                f"{self.root / folder}: cannot be listed ({error.strerror}): give a readable one"
            ) from error


def _is_file(entry: os.DirEntry[str]) -> bool:
    # Unlike entry.is_file(), os.path.isfile() does not raise for a link to itself.
    return os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()


@contextmanager
def uncollected() -> Iterator[None]:
    """Switches garbage collection off, which visits all objects of a large file many times.

    With it, reading the questions of VQAv2's validation split takes 9 s, without it 5 s (one core).
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it is missing, cannot be read, is cut off or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): give an annotation file, .json") from error
    except json.JSONDecodeError as error:
        refuse_lfs_pointer(path)
        problem = f"not JSON, or cut off ({error.msg} at character {error.colno})"
        raise UserError(f"{path}:{error.lineno}: {problem}: give the complete, unpacked annotation file") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON in UTF-8: give an annotation file, .json") from error


def repeated_keys(path: Path) -> set[str]:
    """The keys that occur more than once in the JSON object in `path`. `read_json` keeps only the last of each."""
    outermost: list[tuple[str, Any]] = []

    def keep(pairs: list[tuple[str, Any]]) -> None:
        outermost[:] = pairs  # called for the outermost object last

    json.loads(path.read_bytes(), object_pairs_hook=keep)
    seen: set[str] = set()
    return {key for key, _ in outermost if key in seen or seen.add(key)}


def text(value: object, what: str, right: str) -> str:
    """`value`, if it is Unicode text that is not empty.

    Args:
        value: from a file.
        what: its name in the message.
        right: what would be right.

    Raises:
        UserError: it is not.
    """
    if not isinstance(value, str):
        raise UserError(f"no {what}, but {shown(value)}; {right}")
    if not value.strip():
        raise UserError(f"the {what} is empty; {right}")
    if not is_unicode(value):
        raise UserError(f"the {what} {shown(value)} is not Unicode text; {right}")
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
        raise UserError(f"{what} is {shown(name)}: it must be a whole number or text of one line")
    return name


def each(
    entries: Iterable[tuple[str, object]], right: str, use: Callable[[str, dict[str, Any]], None], skipped: list[str]
) -> None:
    """Calls `use(where, entry)` for each entry.

    Args:
        entries: the position of each in the file, and the entry.
        right: what would be right instead of an entry that is not an object.
        use: may raise a `UserError`.
        skipped: gets a line for each entry that is not an object, or for which `use` raises.
    """
    for where, entry in entries:
        try:
            if not isinstance(entry, dict):
                raise UserError(f"no object, but {shown(entry)}; {right}")
            use(where, entry)
        except UserError as problem:
            skipped.append(f"{where}: {problem}")


def numbered(path: Path, name: str, values: object) -> Iterator[tuple[str, object]]:
    """The entries of a list, each with its position, "file: name[0]".

    Args:
        path: the file.
        name: of the list in the file.
        values: the list.

    Raises:
        UserError: `values` is not a list.
    """
    if not isinstance(values, list):
        raise UserError(f'{path}: "{name}" is {shown(values)}: it must be a list of objects')
    return ((f"{path}: {name}[{number}]", value) for number, value in enumerate(values))


def first_entry(values: object) -> dict[str, Any]:
    """The first object in the list `values`, which shows the format of a file; empty if there is none."""
    return next((value for value in values if isinstance(value, dict)), {}) if isinstance(values, list) else {}


def shown(value: object) -> str:
    """`value` in a message: one line, not long."""
    return ascii(value)[:80]
