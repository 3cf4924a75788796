"""Fetches real pictures that ordinary packages carry, by package name, through apt-get and npm as they are set up.

| source      | packages                                             | licence                               |
|-------------|------------------------------------------------------|---------------------------------------|
| stamps      | Debian: tuxpaint-stamps-default                      | GPL-2                                 |
| openclipart | Debian: openclipart-png, openclipart-svg, wamerican  | public domain; the word list: SCOWL's |
| emoji       | npm: emoji-datasource-google, unicode-emoji-json     | Apache-2.0 the pictures, MIT the data |
| furniture   | Debian: sweethome3d-furniture                        | CC-BY, CC-0, Free Art: see its file   |

About 500 MB are fetched and 600 MB stay. Nothing is installed and no root is needed. None of it is ever part of this
project: each package's own licence file stays beside its data.
"""

import gzip
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from openblip2.errors import UserError, one_line
from openblip2.runs import atomic_write

_SECONDS = 1800  # for one command
_MAX_BYTES = 2**30  # that one archive may unfold to


@dataclass(frozen=True, slots=True)
class Package:
    """One package of a registry, unpacked into a folder of its name.

    Attributes:
        version: "" = the one that Debian's release has.
        licence: the file, inside the folder, without which a package does not count as fetched.
    """

    name: str
    licence: str
    version: str = ""

    @property
    def tools(self) -> tuple[str, ...]:
        """The programs that fetch it."""
        return ("npm",) if self.version else ("apt-get", "dpkg-deb")


def _debian(name: str) -> Package:
    return Package(name, f"usr/share/doc/{name}/copyright")


PACKAGES: dict[str, tuple[Package, ...]] = {
    "stamps": (_debian("tuxpaint-stamps-default"),),
    "openclipart": (_debian("openclipart-png"), _debian("openclipart-svg"), _debian("wamerican")),
    "emoji": (
        Package("emoji-datasource-google", "package/LICENSE", version="16.0.0"),
        Package("unicode-emoji-json", "package/LICENSE", version="0.9.0"),
    ),
    "furniture": (_debian("sweethome3d-furniture"),),
}

# What is kept of an npm package and of furniture's catalogues, which are zip files: sprite sheets and models are not.
_KEPT_OF_NPM = re.compile(r"package/([^/]+\.(json|md)|LICENSE|img/google/64/[^/]+\.png)")
_KEPT_OF_FURNITURE = re.compile(r"PluginFurnitureCatalog\.properties|LICENSE\.TXT|.+\.png")


def fetch(
    folder: Path, sources: Sequence[str] = tuple(PACKAGES), say: Callable[[str], object] = lambda line: None
) -> list[str]:
    """Fetch the packages of `sources` into `folder`, each unpacked in a folder of its name, its licence with it.

    What is there already is not fetched again: after an interruption, call it once more. `say` is told what is
    being fetched. Returns one line for each source that is left out because the program that fetches it is missing.

    Raises:
        UserError: a source is unknown, a package cannot be fetched or unpacked, or no source is left.
    """
    skipped: list[str] = []
    for source in sources:
        if source not in PACKAGES:
            raise UserError(f"unknown source {source!r}; one of {', '.join(PACKAGES)}")
        wanted = [package for package in PACKAGES[source] if not (folder / package.name).is_dir()]
        tools = {tool for package in wanted for tool in package.tools}
        missing = sorted(tool for tool in tools if shutil.which(tool) is None)
        if missing:
            skipped.append(f"{source}: left out, as {' and '.join(missing)} is missing here; install it")
            continue
        for package in wanted:
            say(f"fetching {package.name}")
            _fetch(package, folder)
    if len(skipped) == len(sources):
        raise UserError(f"{folder}: no source of pictures can be fetched; {'; '.join(skipped) or 'name one at least'}")
    return skipped


def _fetch(package: Package, folder: Path) -> None:
    """A folder of the package's name is whole."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary,
            atomic_write(folder / package.name, concurrent=True) as draft,
        ):
            draft.mkdir()
            if package.version:
                _run(["npm", "pack", "--ignore-scripts", f"{package.name}@{package.version}"], temporary)
                untar(_only(temporary, "*.tgz"), draft, _KEPT_OF_NPM)
            else:
                _run(["apt-get", "download", package.name], temporary)
                _run(["dpkg-deb", "--extract", str(_only(temporary, "*.deb")), str(draft)], temporary)
            for catalogue in sorted(draft.rglob("*.sh3f")):
                unzip(catalogue, catalogue.with_suffix(""), _KEPT_OF_FURNITURE)
                catalogue.unlink()
            if not (draft / package.licence).is_file():
                raise UserError(f"{package.name}: comes without {package.licence}; the package with its licence")
    except OSError as error:
        raise UserError(f"{folder}: {package.name} cannot be unpacked there ({one_line(error)}); free space") from error


def _run(command: list[str], folder: str) -> None:
    shown = " ".join(command[:2])
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[-1]}: {shown} took longer than {_SECONDS} s; try again") from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        told = [line for line in lines if line.startswith(("E:", "npm error", "npm ERR!"))] or lines
        why = told[0] if told else f"exit code {done.returncode}"
        right = "apt-get update, or its name in this release" if command[0] == "apt-get" else "try again"
        raise UserError(f"{command[-1]}: {shown} failed ({why[:300]}); {right}")


def _only(folder: str, pattern: str) -> Path:
    found = sorted(Path(folder).glob(pattern))
    if len(found) != 1:
        raise UserError(f"{folder}: {len(found)} files {pattern} were fetched; exactly one")
    return found[0]


def untar(archive: Path, into: Path, kept: re.Pattern[str]) -> None:
    """Unpack the files of a .tgz whose whole name is `kept`; links and devices are passed over.

    Raises:
        UserError: it is broken, names a path outside, or unfolds to more than a gigabyte.
    """
    try:
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            left = _MAX_BYTES
            for member in tar:
                target = _inside(member.name, archive, into)
                file = tar.extractfile(member) if member.isreg() and kept.fullmatch(member.name) else None
                if file is not None:
                    left = _copy(file, target, archive, left)
            while stream.read(2**20):  # to its end, where the checksum of the whole stands
                pass
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{archive}: is no .tgz that can be unpacked ({one_line(error)}); fetch it again") from error


def unzip(archive: Path, into: Path, kept: re.Pattern[str]) -> None:
    """As `untar`, of a zip file."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            left = _MAX_BYTES
            for member in zipped.infolist():
                target = _inside(member.filename, archive, into)
                if not member.is_dir() and kept.fullmatch(member.filename):
                    with zipped.open(member) as file:
                        left = _copy(file, target, archive, left)
    except (zipfile.BadZipFile, RuntimeError, EOFError, zlib.error) as error:  # RuntimeError: it has a password
        raise UserError(
            f"{archive}: is no zip file that can be unpacked ({one_line(error)}); fetch it again"
        ) from error


def _inside(name: str, archive: Path, into: Path) -> Path:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{archive}: holds {name[:80]!r}, a path outside it; the package as it was published")
    return into / path


def _copy(file: IO[bytes], target: Path, archive: Path, left: int) -> int:
    """Write one member; returns how many bytes the archive may still unfold to."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as copy:
        while chunk := file.read(2**20):
            left -= len(chunk)
            if left < 0:
                raise UserError(f"{archive}: unfolds to more than {_MAX_BYTES:,} bytes; the package as published")
            copy.write(chunk)
    return left
