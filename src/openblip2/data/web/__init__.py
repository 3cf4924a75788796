"""Shards: tar files of images with captions, read in an order that can start anywhere.

Here: finding the shards that a text names, opening them, and the file next to a shard with its sample count.
"""

import glob
import itertools
import json
import math
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from openblip2.errors import UserError, one_line, refuse_lfs_pointer
from openblip2.runs import write_json

MOST_SHARDS = 1_000_000
WAITS = (1, 5)  # seconds before a remote file is tried again
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_BRACES = re.compile(r"\{([^{}]*)\}")


def is_url(shard: str) -> bool:
    """Whether a shard is read with fsspec."""
    return "://" in shard


def expand(shards: str) -> list[str]:
    """The shards that `shards` names, in order.

    "a.tar::b.tar" is a list. Each item may contain braces ("{00000..00099}", "{train,val}") and may be a glob, a
    folder of .tar files, or one file, which need not exist. In URLs ("s3://..."), only braces are expanded.

    Raises:
        UserError: no shard, a shard twice, more than `MOST_SHARDS`, or a folder or glob without any.
    """
    names = [name for item in shards.split("::") if item for name in _expand_braces(item)]
    found = [shard for name in names for shard in _files(name)]
    if not found:
        raise UserError(f"{shards!r} names no shard: give a folder of .tar files, 'web/{{00000..00099}}.tar', or a URL")
    if len(set(found)) < len(found):
        twice = next(shard for n, shard in enumerate(found) if shard in found[:n])
        raise UserError(f"{shards!r} names {twice} twice: give each shard once")
    return found


def _expand_braces(item: str) -> list[str]:
    pieces = _BRACES.split(item)  # text, content of braces, text, ...
    choices = [_choices(piece, item) if n % 2 else [piece] for n, piece in enumerate(pieces)]
    count = math.prod(map(len, choices))
    if count > MOST_SHARDS:
        raise UserError(f"{item!r} names {count:,} shards: give at most {MOST_SHARDS:,}")
    return ["".join(combination) for combination in itertools.product(*choices)]


def _choices(braces: str, item: str) -> list[str]:
    match = _RANGE.fullmatch(braces)
    if not match:
        return braces.split(",")
    first, last = int(match[1]), int(match[2])
    if not first <= last < first + MOST_SHARDS:
        raise UserError(f"{item!r}: the range {{{braces}}} must be ascending, with at most {MOST_SHARDS:,} shards")
    padded = match[1].startswith("0") or len(match[1]) == len(match[2])
    return [f"{n:0{len(match[1]) if padded else 0}}" for n in range(first, last + 1)]


def _files(name: str) -> list[str]:
    if is_url(name):
        return [name]
    if Path(name).is_dir():
        found = sorted(str(path) for path in Path(name).glob("*.tar") if not path.name.startswith("."))
    elif glob.has_magic(name) and not Path(name).exists():
        found = sorted(glob.glob(name))
    else:
        return [name]
    if not found:
        raise UserError(f"{name}: contains no .tar file: give a folder of shards, or a pattern such as 'web/*.tar'")
    return found


def open_shard(shard: str) -> BinaryIO:
    """A shard's file, seekable. A remote shard is copied to a temporary file, which is deleted when it is closed.

    Raises:
        UserError: it does not exist or is a git-LFS pointer, or a package that its URL needs is not installed.
    """
    if not is_url(shard):
        refuse_lfs_pointer(shard)
        try:
            return open(shard, "rb")
        except OSError as error:
            raise UserError(f"{shard}: cannot be opened ({error.strerror}): give a readable tar file") from error
    for wait in (*WAITS, None):
        copy: Any = tempfile.TemporaryFile(prefix="openblip2-")  # noqa: SIM115 - the reader closes it
        try:
            with fsspec.open(shard, "rb") as remote:
                shutil.copyfileobj(remote, copy, 2**20)  # pyright: ignore[reportArgumentType]
            copy.seek(0)
            return copy
        except Exception as error:  # each of the many file systems raises its own types of errors
            copy.close()
            # A missing file, a missing package or an unknown kind of URL would fail again.
            if wait is None or isinstance(error, FileNotFoundError | ImportError | ValueError):
                raise UserError(
                    f"{shard}: cannot be opened ({one_line(error)}): give a URL that fsspec can open"
                ) from error
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def stats_path(shard: str) -> str:
    """The file next to a shard that contains its number of samples: `00000.tar` -> `00000_stats.json`."""
    return shard.removesuffix(".tar") + "_stats.json"


def stated_samples(shard: str) -> int | None:
    """The "successes" in the file next to a shard; None if there is no such file that can be used."""
    opener: Any = fsspec.open if is_url(shard) else open
    try:
        with opener(stats_path(shard), "rb") as file:
            successes = json.loads(file.read(2**20))["successes"]
    except Exception:  # errors of any file system; the samples are then counted in the shard itself
        return None
    return successes if type(successes) is int and 0 <= successes < 2**40 else None


def read_stats(shard: Path, name: str, value: str) -> dict[str, Any] | None:
    """The file next to a shard that an earlier run completed; None if there is no shard.

    Raises:
        UserError: in this file, `name`, which says what the shard was made with, is not `value`.
    """
    if not shard.exists():
        return None
    try:
        stats = json.loads(Path(stats_path(str(shard))).read_text(encoding="utf-8"))
        if stats[name] == value:
            return stats
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the file is from another program
    raise UserError(f"{shard}: was made by another program or with other {name}: give another folder, or remove it")


def write_stats(shard: Path, samples: int, **more: Any) -> dict[str, Any]:
    """Writes the file next to a shard atomically and returns it: "successes", as in img2dataset, and `more`.

    Call it before the shard gets its name, so that a shard without such a file must be from another program.
    """
    stats = {"successes": samples} | more
    write_json(stats, Path(stats_path(str(shard))))
    return stats
