"""Creates an index of a folder of pictures, keeps it up to date, and searches it by text or by another picture."""

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from openblip2.apps.search.index import Index, Row, Vectors, open_index, require_faiss
from openblip2.data.images import PICTURE_SUFFIXES, THREADS, Picture, left_out, open_picture
from openblip2.errors import UserError
from openblip2.evaluate.run import weights_digest
from openblip2.inference.load import load
from openblip2.inference.matcher import Matcher
from openblip2.progress import Progress
from openblip2.runs import make_folder

GROUP = 64  # pictures that are read together
SAVE_EVERY = 100  # groups


@dataclass(frozen=True)
class Updated:
    """The result of an update.

    Attributes:
        pictures: number of pictures in the index now.
        added: number of new and changed pictures.
        gone: number of deleted and changed pictures.
        skipped: a line for each file that could not be read, and for each kind of pictures that were left out.
    """

    pictures: int
    added: int
    gone: int
    skipped: list[str]


def update_index(root: Path, run: str, folder: Path, progress: Progress) -> Updated:
    """Indexes all pictures of a folder, or updates its index: only new and changed files are read.

    After an interruption, the next call continues. After a kill, it continues from the last save (`SAVE_EVERY`).

    Args:
        root: folder of pictures.
        run: a stage-1 run.
        folder: folder of the index.
        progress: shows the progress.

    Raises:
        UserError: `root` is missing or empty, `run` is not of stage 1, or the index is of another folder or weights.
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
    if not files:  # a disk may not be mounted, so an existing index is not changed
        raise UserError("; ".join([f"{root}: no pictures in it", *others]))
    number = max(index.rows, default=-1) + 1
    gone = [row.number for row in index.rows.values() if files.get(row.path) != (row.bytes, row.time)]
    index.remove(gone)
    new = sorted(files.keys() - {row.path for row in index.rows.values()})
    skipped: list[str] = []
    with progress.steps("pictures", len(new)) as bar, ThreadPoolExecutor(THREADS) as threads:
        try:
            for n, start in enumerate(range(0, len(new), GROUP), 1):
                group = new[start : start + GROUP]
                opened = dict(zip(group, threads.map(_open, (root / name for name in group)), strict=True))
                skipped += [one for one in opened.values() if isinstance(one, str)]
                pictures = {name: one for name, one in opened.items() if isinstance(one, Image.Image)}
                rows = [Row(number + k, name, *files[name]) for k, name in enumerate(pictures)]
                number += len(rows)
                if rows:
                    index.add(rows, list(pictures.values()), matcher)
                if n % SAVE_EVERY == 0:
                    index.save()
                bar.advance(count=len(group))
        finally:
            index.save()
    if not index.rows:
        raise UserError(f"{root}: none of its pictures can be read; the first: {skipped[0]}")
    return Updated(len(index.rows), len(new) - len(skipped), len(gone), others + skipped)


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
    """Paths of files in a folder, without links, hidden folders, the index itself and other indexes."""
    for parent, folders, files in os.walk(root):
        here = Path(parent)
        indexes = {
            f for f in folders if (here / f / "vectors.faiss").exists() or (here / f).resolve() == index.resolve()
        }
        folders[:] = [f for f in folders if not f.startswith(".") and f not in indexes]
        paths = [here / file for file in files]
        yield from (path.relative_to(root).as_posix() for path in paths if path.is_file() and not path.is_symlink())


def _open(path: Path) -> Image.Image | str:
    """The picture, or why it cannot be opened."""
    try:
        return open_picture(path)
    except UserError as error:
        return str(error)


@dataclass(frozen=True)
class Hit:
    """A picture that was found.

    Attributes:
        number: its number in the index.
        path: the path of its file.
        similarity: cosine.
        match: probability by ITM, if it was re-ranked.
    """

    number: int
    path: Path
    similarity: float
    match: float | None = None


class ImageSearch:
    """Searches an index with the model that created it.

    Args:
        index: the index or its folder.
        matcher: the model; None = it is loaded from the path that it had when the index was created.

    Raises:
        UserError: the run is missing, or its weights have changed.
    """

    def __init__(self, index: Index | Path, matcher: Matcher | None = None) -> None:
        self.index = index if isinstance(index, Index) else open_index(index)
        model = load(self.index.about["run"]) if matcher is None else matcher
        if not isinstance(model, Matcher) or weights_digest(model) != self.index.about["weights"]:
            raise UserError(
                f"{self.index.folder}: was made with other weights than this run has now ({self.index.about['run']}): "
                "index the folder again with this run"
            )
        self.matcher = model

    def by_text(self, text: str, best: int = 10, rerank: int = 0) -> list[Hit]:
        """The pictures that fit a text best, best first.

        Args:
            text: the text to search for.
            best: number of pictures.
            rerank: how many of the most similar pictures ITM sorts again, which opens their files. Among these
                pictures, those with missing or broken files come last.

        Raises:
            UserError: the text is empty, or longer than the run's text limit.
        """
        vector = np.array(self.matcher.embed_text(text), np.float32)
        hits = self._hits(self.index.vectors.best(vector, max(best, rerank)))
        return (self._rerank(hits[:rerank], text) + hits[rerank:])[:best]

    def by_picture(self, picture: Picture, best: int = 10) -> list[Hit]:
        """The pictures most similar to a picture.

        Args:
            picture: the picture to search for.
            best: number of pictures.

        Raises:
            UserError: the picture cannot be opened.
        """
        vectors = self.matcher.features([open_picture(picture)]).projected[0]
        return self._hits(self.index.vectors.alike(vectors.numpy(), best))

    def _hits(self, scores: Sequence[tuple[int, float]]) -> list[Hit]:
        rows, root = self.index.rows, self.index.root
        # Because of the rounding to 8 bits, a cosine can be slightly above 1.
        return [Hit(number, root / rows[number].path, min(score, 1.0)) for number, score in scores]

    def _rerank(self, hits: Sequence[Hit], text: str) -> list[Hit]:
        there = [hit for hit in hits if self.index.path(hit.number) is not None]
        scores = self.matcher.match([hit.path for hit in there], [text] * len(there)).tolist() if there else []
        pairs = [(hit, score) for hit, score in zip(there, scores, strict=True) if not math.isnan(score)]
        scored = {hit.number: replace(hit, match=score) for hit, score in pairs}
        rest = [hit for hit in hits if hit.number not in scored]  # their files are missing or broken now
        return sorted(scored.values(), key=lambda hit: -(hit.match or 0.0)) + rest
