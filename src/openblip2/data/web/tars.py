"""A shard: a tar file of images with captions, as img2dataset and webdataset write it.

A sample consists of the members with one name: `000017.jpg` (or `.png` and so on), `000017.txt` with a
caption, and `000017.json` with everything else. The captions are "captions" in the .json, a list of texts or of
`{"text": ..., "score": ...}`, best first; if it is missing, the .txt; if that is missing, one of `CAPTIONS` in the
.json.

Nothing is unpacked to disk, and memory use is limited. Problems in a shard are reported and do not raise errors.
"""

import json
import os
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from openblip2.data.images import MAX_BYTES, PICTURE_SUFFIXES, UNREADABLE
from openblip2.data.text import is_unicode
from openblip2.data.web import open_shard
from openblip2.errors import one_line

PICTURES = frozenset(suffix[1:] for suffix in PICTURE_SUFFIXES)
KINDS = ("image", "txt", "json")
CAPTIONS = ("caption", "TEXT", "phrase")  # in img2dataset, in the tables of COCO and LAION, in Visual Genome
MAX_CAPTION = 64 * 2**10  # bytes of one caption
MAX_JSON = 2**20  # bytes of one .json
MOST_HEADER = 64 * 2**10  # bytes of a long name or of pax keywords; usual ones have some hundred
_EXTRA_HEADERS = (b"L", b"K", b"x", b"g", b"X")  # of GNU and pax: they describe the next member
_TOO_LONG = b"!"  # not a type that tar uses

Problem = Callable[[str], object]


class Sample(NamedTuple):
    """One image of a shard."""

    key: str  # its name in the shard
    image: bytes  # the content of the image file
    suffix: str  # of the image file, for example "jpg"
    captions: tuple[str, ...]
    about: dict[str, Any]  # the content of its .json


class Member(NamedTuple):
    """A file in a tar file."""

    name: str
    offset: int  # of its content
    size: int  # in bytes


class _Header(tarfile.TarInfo):
    """A tarfile header with limited size, because tarfile would read extra headers of any length into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0:
            raise tarfile.HeaderError("a negative size")
        if header.type in _EXTRA_HEADERS and header.size > MOST_HEADER:
            header.type = _TOO_LONG  # so tarfile skips its content
        return header


def tar_members(file: BinaryIO, size: int, problem: Problem) -> list[Member]:
    """The regular files in an uncompressed tar file of `size` bytes, in its order.

    Links, devices, names that lead out of a folder, and extra headers above `MOST_HEADER` with their member are left
    out and reported. A member that is cut off, or bytes that are not a header, end the list.
    """
    members: list[Member] = []
    place, too_long = 0, False
    try:
        tar = tarfile.TarFile(fileobj=file, tarinfo=_Header, encoding="utf-8")
        while info := tar.next():
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # tarfile would keep all of them
            if tar.offset <= place:  # possible with the pax keyword "size"
                raise tarfile.HeaderError("a negative size")
            if info.type == _TOO_LONG:
                problem(
                    f"byte {place}: a header of {info.size:,} bytes; give at most {MOST_HEADER:,}; its file is skipped"
                )
            elif info.offset_data + info.size > size:
                problem(f"{shown(info.name)}: the tar file is cut off in this member; give the complete tar file")
                return members
            elif not too_long and not info.isdir():
                if wrong := _wrong(info):
                    problem(f"{shown(info.name)}: {wrong}; give a regular file with a relative path")
                else:
                    members.append(Member(info.name, info.offset_data, info.size))
            too_long = info.type == _TOO_LONG
            place = tar.offset
        file.seek(place)
        end = file.read(tarfile.BLOCKSIZE)
        if end != bytes(tarfile.BLOCKSIZE):
            what = "no tar header, so the rest is not read" if len(end) == tarfile.BLOCKSIZE else "the file is cut off"
            problem(f"byte {place}: {what}; give the complete tar file")
    except (tarfile.TarError, OSError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        problem(f"byte {place}: no tar header ({one_line(error)}), so the rest is not read; give a plain tar file")
    return members


def shown(name: str) -> str:
    """A member's name for a message: one line of at most 80 characters."""
    return name[:80] if name.isprintable() else ascii(name)[:80]


def _wrong(info: tarfile.TarInfo) -> str:
    path = info.name.replace("\\", "/")
    if not info.isreg() or info.issparse():
        return "is not a regular file"
    if not path.isprintable():
        return "has a name with bytes that are not text"
    if path.startswith("/") or path[1:2] == ":":
        return "has an absolute path"
    return "has a path that leads out of the archive (..)" if ".." in path.split("/") else ""


class Shard:
    """A shard that is open for reading, with `len` samples. They can be read in any order and from any thread.

    Args:
        url: path or URL.
        problem: called with each problem, "shard: member: what is wrong; what would be right".

    Attributes:
        bad: numbers of samples that the caller found unusable.

    Raises:
        UserError: the file cannot be opened.
    """

    def __init__(self, url: str, problem: Problem) -> None:
        self.url, self.problem = url, lambda what: problem(f"{url}: {what}")
        self.bad = set[int]()
        self._file, self._lock = open_shard(url), threading.Lock()
        members = tar_members(self._file, os.fstat(self._file.fileno()).st_size, self.problem)
        samples = _group(members, self.problem)
        self._keys = list(samples)
        self._suffixes = [sample["image"].name.rpartition(".")[2].lower() for sample in samples.values()]
        # Positions as an array: 10,000 samples take half a megabyte, and many shards are open at once.
        none = Member("", 0, -1)
        places = [[sample.get(kind, none)[1:] for kind in KINDS] for sample in samples.values()]
        self._places = np.array(places, np.int64).reshape(len(samples), len(KINDS), 2)

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, number: int) -> Sample | None:
        """Sample `number`, from 0; None if its image cannot be read, which is reported."""
        key, suffix = self._keys[number], self._suffixes[number]
        image = self._content(number, "image", suffix, MAX_BYTES)
        if image == b"":
            self.problem(f"{shown(key)}.{suffix}: is empty (0 bytes); give an image")
        if not image:
            return None
        about = self._json(number)
        captions = self._usable(key, self._listed(key, about["captions"])) if "captions" in about else ()
        if not captions:
            captions = self._usable(f"{key}.txt", self._text(number))
        if not captions:
            texts = (about.get(name) for name in CAPTIONS)
            captions = self._usable(key, [text for text in texts if isinstance(text, str)])[:1]
        return Sample(key, image, suffix, captions, about)

    def close(self) -> None:
        self._file.close()

    def _content(self, number: int, kind: str, suffix: str, most: int) -> bytes | None:
        """The content of a member; None if there is none or if it cannot be read, which is reported."""
        offset, size = self._places[number, KINDS.index(kind)].tolist()
        name = shown(f"{self._keys[number]}.{suffix}")
        if size > most:
            self.problem(f"{name}: has {size:,} bytes; give at most {most:,}")
        if not 0 <= size <= most:
            return None
        try:
            with self._lock:
                self._file.seek(offset)
                content = self._file.read(size)
        except OSError as error:
            self.problem(f"{name}: cannot be read ({error.strerror}); give a readable file")
            return None
        if len(content) < size:
            self.problem(f"{name}: the tar file is cut off in this member; give the complete tar file")
            return None
        return content

    def _json(self, number: int) -> dict[str, Any]:
        content = self._content(number, "json", "json", MAX_JSON)
        if content is None:
            return {}
        try:
            about = json.loads(content)
            if isinstance(about, dict):
                return about
            wrong = "is JSON, but not an object"
        except (ValueError, RecursionError) as error:
            wrong = f"is not JSON ({one_line(error)[:80]})"
        self.problem(f"{shown(self._keys[number])}.json: {wrong}; write one JSON object")
        return {}

    def _text(self, number: int) -> list[str]:
        content = self._content(number, "txt", "txt", MAX_CAPTION)
        try:
            return [] if content is None else [content.decode("utf-8-sig")]
        except UnicodeDecodeError:
            self.problem(f"{shown(self._keys[number])}.txt: is not UTF-8 text; save it as UTF-8")
            return []

    def _listed(self, key: str, captions: Any) -> list[Any]:
        if isinstance(captions, str | list):
            return texts_of([captions] if isinstance(captions, str) else captions)
        self.problem(f'{shown(key)}.json: "captions" is not a list; use ["text", ...] or [{{"text": ...}}, ...]')
        return []

    def _usable(self, where: str, texts: Iterable[Any]) -> tuple[str, ...]:
        captions: list[str] = []
        for text in texts:
            if not isinstance(text, str) or not is_unicode(text) or len(text.encode()) > MAX_CAPTION:
                self.problem(f"{shown(where)}: caption is {ascii(text)[:40]}; give text of up to {MAX_CAPTION:,} bytes")
            elif text.strip():
                captions.append(text)
        return tuple(captions)


def read_tar(url: str, problem: Problem, count: int | None = None) -> Iterator[Sample]:
    """The readable samples among the first `count` of a shard, or among all. Other args and errors: see `Shard`."""
    shard = Shard(url, problem)
    try:
        yield from filter(None, map(shard.read, range(len(shard))[:count]))
    finally:
        shard.close()


def texts_of(captions: list[Any]) -> list[Any]:
    """The texts of a list of captions, with or without scores."""
    return [caption.get("text") if isinstance(caption, dict) else caption for caption in captions]


def _group(members: Sequence[Member], problem: Problem) -> dict[str, dict[str, Member]]:
    """The members of each sample that has an image, by key and kind, in any order."""
    samples: dict[str, dict[str, Member]] = {}
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        kind = "image" if suffix.lower() in PICTURES else suffix.lower()
        if not stem or kind not in KINDS:  # a file for other programs, unless it is an image
            last = os.path.splitext(name)[1].lower()
            if stem and last in UNREADABLE:
                problem(f"{shown(member.name)}: this picture format is not supported; convert it to JPEG")
            elif stem and last in PICTURE_SUFFIXES:
                problem(
                    f"{shown(member.name)}: has a dot within its name, where webdataset begins the suffix; rename it"
                )
            continue
        sample = samples.setdefault(folder + slash + stem, {})
        if kind in sample:
            problem(f"{shown(member.name)}: second {kind} of its sample, {shown(sample[kind].name)} is used; keep one")
        else:
            sample[kind] = member
    for key, sample in samples.items():
        if "image" not in sample:
            problem(f"{shown(key)}: no image; add {shown(key)}.jpg")
    if members and not samples:
        problem(f"none of its {len(members):,} files is a picture ({shown(members[0].name)}, ...); add 000017.jpg, ...")
    return {key: sample for key, sample in samples.items() if "image" in sample}
