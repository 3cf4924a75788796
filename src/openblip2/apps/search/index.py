"""An index of a folder of pictures on disk: make it and keep it up to date.

INDEX/index.json      folder of the pictures, run, hash of its weights, Q, E
INDEX/pictures.jsonl  one row per picture: number, path in the folder, size and time of the file
INDEX/vectors.faiss   their query vectors in 8 bits (vectors.py)
INDEX/thumbnails/     NUMBER.jpg, at most 256 px wide and high
"""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from openblip2.apps.search.vectors import Array, Vectors, recall_of, require_faiss
from openblip2.data.images import PICTURE_SUFFIXES, THREADS, left_out, open_picture
from openblip2.errors import UserError
from openblip2.evaluate.run import weights_digest
from openblip2.inference.load import load
from openblip2.inference.matcher import Matcher
from openblip2.progress import Progress
from openblip2.runs import atomic_write, make_folder, read_json, write_json

SIDE = 256  # px, the longer side of a thumbnail
GROUP = 64  # pictures that are read together
SAVE_EVERY = 100  # groups
CHECKED = 2000  # pictures among which search in 8 bits is compared with exact search


class Row(NamedTuple):
    """A picture of the index: number, path in the folder, and its file's bytes and time (ns) when it was read."""

    number: int
    path: str
    bytes: int
    time: int


@dataclass
class Index:
    """An open index.

    Attributes:
        folder: of the index.
        about: content of `index.json`.
        rows: by number.
        vectors: of the same pictures.
    """

    folder: Path
    about: dict[str, Any]
    rows: dict[int, Row]
    vectors: Vectors

    @property
    def root(self) -> Path:
        return Path(self.about["root"])

    def path(self, number: int) -> Path | None:
        """The file of a picture; None if it is missing now, or a link that leads out of the folder."""
        path = (self.root / self.rows[number].path).resolve()
        return path if path.is_relative_to(self.root.resolve()) and path.is_file() else None

    def thumbnail(self, number: int) -> Path:
        return self.folder / "thumbnails" / f"{number}.jpg"

    def add(self, rows: Sequence[Row], pictures: Sequence[Image.Image], matcher: Matcher) -> Array:
        """Adds N new pictures and writes their thumbnails. Returns their vectors `[N, Q, E]`."""
        vectors = matcher.features(pictures).projected.numpy()
        self.vectors.add([row.number for row in rows], vectors)
        for row, picture in zip(rows, pictures, strict=True):
            small = picture.copy()
            small.thumbnail((SIDE, SIDE))
            small.save(self.thumbnail(row.number), quality=85)
            self.rows[row.number] = row
        return vectors

    def remove(self, numbers: list[int]) -> None:
        """Removes pictures."""
        self.vectors.remove(numbers)
        for number in numbers:
            del self.rows[number]
            self.thumbnail(number).unlink(missing_ok=True)

    def save(self) -> None:
        """Writes the files one after another; `open_index` drops pictures that are not in both of the first two."""
        self.vectors.save(self.folder / "vectors.faiss")
        with atomic_write(self.folder / "pictures.jsonl") as draft, draft.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row._asdict()) + "\n" for row in self.rows.values())
        write_json(self.about, self.folder / "index.json")


@dataclass(frozen=True)
class Updated:
    """What an update did.

    Attributes:
        pictures: in the index now.
        added: new and changed ones.
        gone: deleted and changed ones.
        skipped: a line for each file that could not be read, and for each kind of pictures that were left out.
        recall: recall@10 of the 8 bits compared with exact search; None without new pictures.
        among: number of new pictures among which it was measured.
    """

    pictures: int
    added: int
    gone: int
    skipped: list[str]
    recall: float | None
    among: int


def open_index(folder: Path) -> Index:
    """Opens what `update_index` wrote.

    Raises:
        UserError: it is not an index, or broken.
    """
    about = read_json(folder / "index.json") if (folder / "index.json").exists() else None
    if not isinstance(about, dict) or not {"root", "run", "weights", "queries", "width"} <= about.keys():
        raise UserError(f"{folder}: is not an index: give a folder that `openblip2 index` wrote")
    try:
        with (folder / "pictures.jsonl").open(encoding="utf-8") as file:
            rows = {row.number: row for row in (Row(**json.loads(line)) for line in file)}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / 'pictures.jsonl'}: cannot be read: make the index again") from error
    vectors = Vectors.read(folder / "vectors.faiss", about["queries"], about["width"])
    # After an interruption between two files, pictures that are not in both are dropped, so that they are read again.
    numbers = vectors.numbers()
    vectors.remove(sorted(numbers - rows.keys()))
    return Index(folder, about, {number: row for number, row in rows.items() if number in numbers}, vectors)


def update_index(root: Path, run: str, folder: Path, progress: Progress) -> Updated:
    """Indexes all pictures of a folder, or updates its index: only new and changed files are read.

    After an interruption, the next call continues; after a kill, from the last `SAVE_EVERY` groups.

    Args:
        root: folder of pictures.
        run: of stage 1.
        folder: of the index.
        progress: shows how far it is.

    Raises:
        UserError: no such folder, not a stage-1 run, an index of another folder or of other weights, no pictures.
    """
    require_faiss()
    if not root.is_dir():
        raise UserError(f"{root}: is not a folder: give a folder of pictures")
    matcher = load(run)
    if not isinstance(matcher, Matcher):
        raise UserError(f"{run} is a stage-2 run: an index needs a stage-1 run")
    index = _open_or_new(root, run, folder, matcher)
    names = list(_files(root, folder))
    others = [f"{root}: {line}" for line in left_out(names)]
    stats = {name: (root / name).stat() for name in names if os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES}
    files = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
    if not files:  # perhaps a disk that is not mounted: an existing index does not change
        raise UserError("; ".join([f"{root}: no pictures in it", *others]))
    number = max(index.rows, default=-1) + 1
    gone = [row.number for row in index.rows.values() if files.get(row.path) != (row.bytes, row.time)]
    index.remove(gone)
    new = sorted(files.keys() - {row.path for row in index.rows.values()})
    skipped: list[str] = []
    exact: dict[int, Array] = {}
    with progress.steps("pictures", len(new)) as bar, ThreadPoolExecutor(THREADS) as threads:
        try:
            for n, start in enumerate(range(0, len(new), GROUP), 1):
                group = new[start : start + GROUP]
                opened = dict(zip(group, threads.map(_open, (root / name for name in group)), strict=True))
                skipped += [one for one in opened.values() if isinstance(one, str)]
                pictures = {name: one for name, one in opened.items() if isinstance(one, Image.Image)}
                rows = [Row(number + k, name, *files[name]) for k, name in enumerate(pictures)]
                number += len(rows)
                vectors = index.add(rows, list(pictures.values()), matcher) if rows else ()
                if len(exact) < CHECKED:
                    exact |= zip((row.number for row in rows), vectors, strict=True)
                if n % SAVE_EVERY == 0:
                    index.save()
                bar.advance(count=len(group))
        finally:
            index.save()
    if not index.rows:
        raise UserError(f"{root}: none of its pictures can be read; the first: {skipped[0]}")
    recall = recall_of(index.vectors, exact) if exact else None
    return Updated(len(index.rows), len(new) - len(skipped), len(gone), others + skipped, recall, len(exact))


def _open_or_new(root: Path, run: str, folder: Path, matcher: Matcher) -> Index:
    weights = weights_digest(matcher)
    if (folder / "index.json").is_file():
        index = open_index(folder)
        if index.root != root.resolve():
            raise UserError(f"{folder}: is an index of {index.root}, not of {root}: give another --out")
        if index.about["weights"] != weights:
            raise UserError(f"{folder}: was made with other weights ({index.about['run']}): give another --out")
        return index
    if folder.exists() and any(path.name != ".lock" for path in folder.iterdir()):
        raise UserError(f"{folder}: is not empty and not an index: give a new folder")
    make_folder(folder / "thumbnails")
    about = {
        "root": str(root.resolve()),
        "run": str(Path(run).resolve()) if Path(run).exists() else run,
        "weights": weights,
        "queries": matcher.model.connector.tokens,
        "width": matcher.model.vision_proj.out_features,
    }
    return Index(folder, about, {}, Vectors(about["queries"], about["width"]))


def _files(root: Path, index: Path) -> Iterator[str]:
    """Paths of files in a folder, without links, hidden folders and the index itself."""
    for parent, folders, files in os.walk(root):
        here = Path(parent)
        folders[:] = [f for f in folders if not f.startswith(".") and (here / f).resolve() != index.resolve()]
        paths = [here / file for file in files]
        yield from (path.relative_to(root).as_posix() for path in paths if path.is_file() and not path.is_symlink())


def _open(path: Path) -> Image.Image | str:
    """The picture, or why it cannot be opened."""
    try:
        return open_picture(path)
    except UserError as error:
        return str(error)
