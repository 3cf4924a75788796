"""A shard's file, here or remote, and the file beside it that says how many samples it has."""

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

from openblip2.errors import UserError, one_line
from openblip2.runs import write_json

WAITS = (1, 5)  # seconds before a remote file is tried again


def is_url(shard: str) -> bool:
    """Whether a shard is reached through fsspec."""
    return "://" in shard


def open_shard(shard: str) -> BinaryIO:
    """A shard's file, seekable: the file itself, or a nameless copy of a remote one, which goes when it is closed.

    Raises:
        UserError: there is none, or what its URL needs is not installed.
    """
    if not is_url(shard):
        try:
            return open(shard, "rb")
        except OSError as error:
            raise UserError(f"{shard}: cannot be opened ({error.strerror}); a tar file that can be read") from error
    for wait in (*WAITS, None):
        copy = tempfile.TemporaryFile(prefix="openblip2-")  # noqa: SIM115 - the reader closes it
        try:
            with _open_remote(shard) as remote:
                shutil.copyfileobj(remote, copy, 2**20)
            copy.flush()
            return copy  # pyright: ignore[reportReturnType]
        except UserError:
            copy.close()
            raise
        except Exception as error:  # of file systems there are many, and each raises what it likes
            copy.close()
            if wait is None or isinstance(error, FileNotFoundError):
                raise UserError(
                    f"{shard}: cannot be opened ({one_line(error)}); a tar file that can be read"
                ) from error
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def stats_path(shard: str) -> str:
    """The file beside a shard that says how many samples it has ("successes"): `00000.tar` -> `00000_stats.json`."""
    return shard.removesuffix(".tar") + "_stats.json"


def told_samples(shard: str) -> int | None:
    """How many samples a shard has, as the file beside it says; None where there is none that can be used."""
    try:
        if is_url(shard):
            with _open_remote(stats_path(shard)) as file:
                told = json.loads(file.read(2**20))
        else:
            told = json.loads(Path(stats_path(shard)).read_bytes())
        successes = told["successes"]
    except Exception:  # of file systems there are many, and each raises what it likes; then the shard is looked into
        return None
    return successes if type(successes) is int and 0 <= successes < 2**40 else None


def write_stats(shard: Path, samples: int, **more: Any) -> None:
    """Writes the file beside a shard, whole or not at all: "successes", as img2dataset calls it, and `more`."""
    write_json({"successes": samples} | more, Path(stats_path(str(shard))))


def _open_remote(url: str) -> Any:
    """A remote file as a context manager.

    Raises:
        UserError: its kind of URL is unknown, or what it needs is not installed.
    """
    import fsspec

    try:
        return fsspec.open(url, "rb")
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {one_line(error)}; a path, or a URL that fsspec can open") from error
