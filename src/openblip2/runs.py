"""The files of a run folder: reading, atomic writing, and locks. No file is pickled.

RUN/config.json          the resolved settings, with the versions that made it
RUN/model.safetensors    the trained parts by name, with adapters; config.json names the frozen models
RUN/whitening.safetensors  the whitening of the frozen features, if they are whitened
RUN/tokenizer/           the connector's tokenizer, if it takes text as input
RUN/trained_on.txt       the images that it was trained on (train/bookkeeping.py)
RUN/log.jsonl            one line for each step and each validation
RUN/resume/              the last checkpoints of an unfinished run (train/resume.py)
"""

import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from errno import EIO, ENOSPC, ENOSYS
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from openblip2.compat import __version__
from openblip2.config import RunSettings, from_dict
from openblip2.distributed.collectives import is_first
from openblip2.errors import UserError, refuse_lfs_pointer

# Parts with another name in the weights of earlier versions: old name -> current name.
RENAMED = {
    "qformer.words.": "qformer.word_embeddings.",
    "image_head.": "vision_proj.",
    "text_head.": "text_proj.",
    "match_head.": "itm_head.",
    "word_head.": "lm_head.",
}


@contextmanager
def atomic_write(path: Path, concurrent: bool = False) -> Iterator[Path]:
    """A temporary path to write a file or a folder to; at the end of the block it is renamed to `path`.

    No process reads an incomplete file, not even after a power failure. After an error, `path` is unchanged.

    Args:
        path: The file, which is replaced if it is there; or the folder, which must be missing or empty.
        concurrent: Whether other processes may write to `path` at the same time. Each then has its own temporary path,
            and the file of a process that is killed is not removed.
    """
    _remove(draft := path.with_name(f".{path.name}.{uuid4().hex}.new" if concurrent else f".{path.name}.new"))
    try:
        yield draft
        sync(draft)  # before the rename: the name must not be on the disk before the content
        os.replace(draft, path)
        sync(path.parent)
    finally:
        _remove(draft)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk and so survives a power failure."""
    file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def locked(folder: Path, name: str = ".lock", say: Callable[[str], object] | None = None) -> Iterator[None]:
    """Locks a folder, created if needed, against other processes; in a distributed run, only the first process does.

    The system releases the lock when the process dies. The file exists while the lock is held, and names its holder.

    Args:
        say: Called with a line before waiting for another process; None = raise an error instead of waiting.

    Raises:
        UserError: Another process holds the lock, or the folder cannot be written to.
    """
    if not is_first():
        yield
        return
    path, made = folder / name, [one for one in (folder, *folder.parents) if not one.exists()]
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{folder} cannot be written to ({error.strerror}): give another folder") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            what = folder / name[1:].removesuffix("lock").removesuffix(".")  # ".lock" is the folder's own lock
            holder = f"{what} is being written by {file.read() or 'another process'}"
            if say is None:
                raise UserError(f"{holder}: wait until it is done, or use another folder") from None
            say(f"{holder}: waiting until it is done")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno != ENOSYS:  # on some clusters, Lustre has no locks: let one process at a time write there
                raise
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # the last holder has just removed it: try again
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
    finally:
        # Remove it while the lock is held, so that a process that waits for it finds no file and tries again.
        with suppress(OSError):
            if made and not any(one.is_dir() or one.stat().st_size for one in folder.iterdir() if one != path):
                shutil.rmtree(folder)
                for one in made[1:]:  # from the innermost on, up to one that is not empty
                    one.rmdir()
        path.unlink(missing_ok=True)
        file.close()


def make_folder(folder: Path) -> None:
    """Creates a folder to write to, and its parents, unless they exist; a `UserError` says why it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be created ({error.strerror}): give another folder") from error


def require_absent(path: Path, overwrite: bool, argument: str = "--out") -> None:
    """Raises a `UserError` if a result exists and the user has not asked to replace it."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already: give another {argument}, or add --overwrite to replace it")


@contextmanager
def new_result(path: Path, overwrite: bool) -> Iterator[None]:
    """Locks a result file, which must not exist unless `overwrite` is set, against other processes.

    Raises:
        UserError: It exists or is a folder, another process is writing it, or its folder cannot be written to.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: give --out the name of a file")
    require_absent(path, overwrite)
    with locked(path.parent, f".{path.name}.lock"):
        require_absent(path, overwrite)  # another process may have just finished it
        yield


def write_text(text: str, path: Path) -> None:
    """Writes a text file atomically."""
    with atomic_write(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(values: Any, path: Path) -> None:
    """Writes a JSON file atomically."""
    write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", path)


def read_json(path: Path) -> Any:
    """Reads JSON. A `UserError` says if the file does not exist, cannot be read, or is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file: give a JSON file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): give a JSON file") from error
    except (ValueError, RecursionError) as error:
        refuse_lfs_pointer(path)
        raise UserError(f"{path}: not JSON, or truncated ({error}): give the complete file") from error


def cached_json(
    path: Path, of: Mapping[str, Any], make: Callable[[], dict[str, Any] | None], overwrite: bool
) -> dict[str, Any]:
    """The result of `make` with its time in seconds: read from `path` if `of` is the same, else made and written.

    Raises:
        UserError: it was made from another `of`, and `overwrite` is False.
    """
    plain = json.loads(json.dumps(of))
    if path.is_file():
        if (found := read_json(path))["of"] == plain:
            return found
        if not overwrite:
            other = " and ".join(name for name in plain if found["of"].get(name) != plain[name])
            raise UserError(f"{path} was made with other {other}: give another --out, or add --overwrite to replace it")
        path.unlink()  # before `make` overwrites other files of the old result
    began = time.perf_counter()
    found = {"of": plain, **(make() or {}), "seconds": round(time.perf_counter() - began, 1)}
    write_json(found, path)
    return found


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file atomically."""
    with atomic_write(path) as draft:
        try:
            save_file(tensors, draft)
        except SafetensorError as error:  # the type of error that other writers raise
            raise OSError(ENOSPC if "os error 28" in str(error) else EIO, str(error), str(path)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, those in `RENAMED` by their current names.

    Raises:
        UserError: it is missing or not complete.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; a run contains model.safetensors (has its training finished?)")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        refuse_lfs_pointer(path)
        raise UserError(f"{path}: not a complete safetensors file ({error}); it may be truncated") from error
    for old, new in RENAMED.items():
        tensors = {new + name[len(old) :] if name.startswith(old) else name: part for name, part in tensors.items()}
    return tensors


def write_config(run: Path, settings: RunSettings, sizes: Mapping[str, int]) -> None:
    """Writes `config.json`: the resolved settings, the sizes from the checkpoints, and the versions."""
    import transformers

    write_json(
        {
            "settings": asdict(settings),
            "sizes": dict(sizes),
            "versions": {
                "openblip2": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        },
        run / "config.json",
    )


def read_config(run: Path) -> dict[str, Any]:
    """The content of `RUN/config.json`: at least `settings` and `sizes`.

    Raises:
        UserError: It is not a run, or its sizes are impossible for a connector.
    """
    wanted = "give the folder that `openblip2 train ... --out FOLDER` wrote"
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is not a run: {wanted}")
    saved = read_json(run / "config.json")
    if not isinstance(saved, dict) or not {"settings", "sizes"} <= saved.keys():
        raise UserError(f"{run} is not a run (openblip2 did not write its config.json): {wanted}")
    _check_sizes(saved["sizes"], run / "config.json")
    return saved


def read_settings(run: Path) -> RunSettings:
    """The settings of a run, with the errors of `read_config`."""
    return from_dict(read_config(run)["settings"])


def _check_sizes(sizes: Any, path: Path) -> None:
    names, others = ("width", "layers", "heads", "ffn", "vocabulary", "positions"), {"tokens", "width", "image_width"}
    if not isinstance(sizes, dict) or sizes.keys() not in (set(names), others):
        raise UserError(f"{path}: sizes must contain {', '.join(names)}; other connectors: {', '.join(sorted(others))}")
    for name, size in sizes.items():
        least = 0 if name == "vocabulary" else 1  # 0 in stage 2, which has no text embeddings
        if type(size) is not int or size < least:
            raise UserError(f"{path}: sizes.{name} is {size!r}: it must be a whole number, {least} or more")
    if sizes["width"] % sizes.get("heads", 1):
        raise UserError(f"{path}: width {sizes['width']} is not a multiple of {sizes['heads']} heads")
