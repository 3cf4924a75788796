"""One shard: a tar file of pictures with captions, as img2dataset and webdataset write it, read and written safely.

A sample is the members of one name: `000017.jpg` (or another of `PICTURES`), `000017.txt` with a caption and
`000017.json` with what else is known. Where the .json holds "captions", a list of texts or of `{"text": ...,
"score": ...}`, best first, these are the sample's captions; else the .txt is; else the .json's "caption" is.

Nothing is unpacked, so nothing can be written outside a folder; what is read has limits, so no shard exhausts memory.
A remote shard (any fsspec URL) is copied to a nameless temporary file first, which goes when it is closed.
"""

import io
import json
import os
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from openblip2.data.images import MAX_BYTES
from openblip2.data.web.shard_file import open_shard
from openblip2.data.web.shard_names import expand as expand  # part of this module's interface
from openblip2.data.web.tar_members import Member, shown, tar_members
from openblip2.errors import UserError, one_line
from openblip2.runs import atomic_write, locked

PICTURES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif"})
MAX_CAPTION = 64 * 2**10  # bytes of one caption
MAX_JSON = 2**20  # bytes of one .json


class Sample(NamedTuple):
    """One picture of a shard: its name there, the picture's file and suffix ("jpg"), its captions, its .json."""

    key: str
    image: bytes
    suffix: str
    captions: tuple[str, ...]
    about: dict[str, Any]


class Shard:
    """A shard opened for reading: `len` samples, each read where it lies, from any number of threads.

    Args:
        problem: is told each thing that is wrong, "shard: member: what; what would be right".

    Raises:
        UserError: the file cannot be opened. What is wrong in it never raises.
    """

    def __init__(self, url: str, problem: Callable[[str], object]) -> None:
        self.url, self.problem = url, lambda what: problem(f"{url}: {what}")
        self._file, self._lock = open_shard(url), threading.Lock()
        members = tar_members(self._file, os.fstat(self._file.fileno()).st_size, self.problem)
        self._keys, self._suffixes, self._places = _samples(members, self.problem)

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, number: int) -> Sample | None:
        """Sample `number` from 0; None where its picture cannot be had, which was said."""
        key, suffix = self._keys[number], self._suffixes[number]
        image = self._member(number, 0, suffix)
        assert image is not None
        if not 0 < image.size <= MAX_BYTES:
            self.problem(f"{shown(image.name)}: has {image.size:,} bytes; a picture of 1 to {MAX_BYTES:,}")
            return None
        picture = self._bytes(image)
        return None if picture is None else Sample(key, picture, suffix, *self.texts(number))

    def texts(self, number: int) -> tuple[tuple[str, ...], dict[str, Any]]:
        """The captions and the .json of sample `number`; its picture is not read."""
        key, text, about = self._keys[number], self._member(number, 1, "txt"), self._member(number, 2, "json")
        known = self._about(about) if about else {}
        captions = self._captions(key, known) if "captions" in known else ()
        if not captions and text:
            captions = self._text(text)
        if not captions and isinstance(known.get("caption"), str):
            captions = self._usable(key, [known["caption"]])
        return captions, known

    def _member(self, number: int, kind: int, suffix: str) -> Member | None:
        offset, size = self._places[number, kind].tolist()
        return Member(f"{self._keys[number]}.{suffix}", offset, size) if size >= 0 else None

    def key(self, number: int) -> str:
        """The name of sample `number`."""
        return self._keys[number]

    def close(self) -> None:
        self._file.close()

    def _bytes(self, member: Member) -> bytes | None:
        try:
            with self._lock:
                self._file.seek(member.offset)
                content = self._file.read(member.size)
        except OSError as error:
            self.problem(f"{shown(member.name)}: cannot be read ({error.strerror}); a readable file")
            return None
        if len(content) < member.size:
            self.problem(f"{shown(member.name)}: the file is cut off in it; a whole tar file")
            return None
        return content

    def _about(self, member: Member) -> dict[str, Any]:
        if member.size > MAX_JSON:
            self.problem(f"{shown(member.name)}: has {member.size:,} bytes; at most {MAX_JSON:,}")
            return {}
        content = self._bytes(member)
        if content is None:
            return {}
        try:
            about = json.loads(content)
        except (ValueError, RecursionError) as error:
            self.problem(f"{shown(member.name)}: is not JSON ({one_line(error)[:80]}); one object")
            return {}
        if not isinstance(about, dict):
            self.problem(f"{shown(member.name)}: is JSON, but no object; one object")
            return {}
        return about

    def _text(self, member: Member) -> tuple[str, ...]:
        if member.size > MAX_CAPTION:
            self.problem(f"{shown(member.name)}: has {member.size:,} bytes; a caption of at most {MAX_CAPTION:,}")
            return ()
        content = self._bytes(member)
        try:
            return self._usable(member.name, [(content or b"").decode("utf-8-sig")])
        except UnicodeDecodeError:
            self.problem(f"{shown(member.name)}: is not UTF-8 text; a caption")
            return ()

    def _captions(self, key: str, about: dict[str, Any]) -> tuple[str, ...]:
        listed = [about["captions"]] if isinstance(about["captions"], str) else about["captions"]
        if not isinstance(listed, list):
            self.problem(
                f'{shown(key)}.json: "captions" is no list; ["text", ...] or [{{"text": ..., "score": ...}}, ...]'
            )
            return ()
        return self._usable(key, [entry.get("text") if isinstance(entry, dict) else entry for entry in listed])

    def _usable(self, where: str, texts: list[Any]) -> tuple[str, ...]:
        found: list[str] = []
        for text in texts:
            try:
                if len(text.encode()) > MAX_CAPTION:
                    self.problem(
                        f"{shown(where)}: a caption of {len(text):,} characters; at most {MAX_CAPTION:,} bytes"
                    )
                elif text.strip():
                    found.append(text)
            except (AttributeError, UnicodeEncodeError):  # JSON's "\ud800" is a str, but no Unicode text
                self.problem(f"{shown(where)}: a caption is {ascii(text)[:40]}; Unicode text")
        return tuple(found)


def read_tar(url: str, problem: Callable[[str], object], start: int = 0) -> Iterator[Sample]:
    """The samples of a shard in its order, from number `start` on.

    `problem` is told each thing that is wrong, "shard: member: what; what would be right"; nothing of that raises.

    Raises:
        UserError: the shard cannot be opened.
    """
    shard = Shard(url, problem)
    try:
        for number in range(start, len(shard)):
            if sample := shard.read(number):
                yield sample
    finally:
        shard.close()


@contextmanager
def write_tar(path: Path) -> Iterator["TarWriter"]:
    """Writes a shard, which gets its name when it is whole and on the disk.

    Raises:
        UserError: another process writes it, or it cannot be written.
    """
    # Locked: two parts of one job may have the same shard.
    with locked(path.parent, f".{path.name}.lock"), atomic_write(path) as draft:
        try:
            tar = tarfile.open(draft, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); a folder that can be written to") from error
        with tar:
            yield TarWriter(path, tar)


class TarWriter:
    """A shard being written (`write_tar`).

    The same samples give the same bytes: members carry no time, owner or other trace of where they were written.
    """

    def __init__(self, path: Path, tar: tarfile.TarFile) -> None:
        self.path, self.count = path, 0
        self._tar, self._keys = tar, set[str]()

    def add(self, sample: Sample) -> None:
        """Appends a sample.

        The .txt holds its first caption. Its .json is `about`, with "captions" as they are there if they are the
        sample's, else as plain texts where there are several.

        Raises:
            UserError: a key that no reader would take, or that stands there already; a suffix of no picture.
        """
        key, suffix, captions = sample.key, sample.suffix, sample.captions
        parts = key.split("/")
        if (
            not key.isprintable()
            or "\\" in key
            or "." in parts[-1]
            or {"", ".", ".."} & set(parts)
            or key in self._keys
        ):
            raise UserError(f"{self.path}: key {ascii(key)[:80]} stands there already or is none; a name without dots")
        if suffix not in PICTURES:
            raise UserError(f"{self.path}: {shown(key)}: suffix {suffix!r} is no picture's; one of {sorted(PICTURES)}")
        self._keys.add(key)
        about = {name: value for name, value in sample.about.items() if name != "captions"}
        if captions and "captions" in sample.about and _texts(sample.about["captions"]) == captions:
            about["captions"] = sample.about["captions"]
        elif len(captions) > 1:
            about["captions"] = list(captions)
        self._write(f"{key}.{suffix}", sample.image)
        if captions:
            self._write(f"{key}.txt", captions[0].encode())
        if about:
            self._write(f"{key}.json", json.dumps(about, sort_keys=True).encode())
        self.count += 1

    def _write(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._tar.addfile(member, io.BytesIO(content))


def _texts(captions: Any) -> tuple[Any, ...]:
    entries = captions if isinstance(captions, list) else []
    return tuple(entry.get("text") if isinstance(entry, dict) else entry for entry in entries)


def _samples(
    members: list[Member], problem: Callable[[str], object]
) -> tuple[list[str], list[str], np.ndarray[Any, Any]]:
    """The members by sample, whatever order they stand in: keys, suffixes of the pictures, places.

    Places: int64 `[N, 3, 2]`, offset and size of picture, .txt and .json; size -1 = none. Ten thousand samples are a
    megabyte so, and many shards are open at once.
    """
    found: dict[str, dict[str, Member]] = {}
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        kind = "image" if suffix.lower() in PICTURES else suffix.lower()
        if not stem or kind not in ("image", "txt", "json"):
            continue  # a member that others use
        sample = found.setdefault(folder + slash + stem, {})
        if kind in sample:
            problem(f"{shown(member.name)}: the sample has two of this kind, {shown(sample[kind].name)} is taken; one")
        else:
            sample[kind] = member
    for key, sample in found.items():
        if "image" not in sample:
            problem(f"{shown(key)}: no picture; {shown(key)}.jpg beside its text")
    keys = [key for key, sample in found.items() if "image" in sample]
    suffixes = [sys.intern(found[key]["image"].name.rpartition(".")[2].lower()) for key in keys]
    none = Member("", 0, -1)
    places = [[found[key].get(kind, none)[1:] for kind in ("image", "txt", "json")] for key in keys]
    return keys, suffixes, np.array(places, np.int64).reshape(len(keys), 3, 2)
