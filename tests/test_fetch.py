"""Fetching packages by name, with stand-ins for apt-get, dpkg-deb and npm; broken and malicious archives."""

import io
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest

from openblip2.apps.corpora import fetch as module
from openblip2.apps.corpora.fetch import PACKAGES, fetch_packages, unpack
from openblip2.errors import UserError

SCRIPTS = {
    # apt-get and npm log their arguments. All three leave the files that the real programs leave.
    "apt-get": 'echo "$@" >> "$LOG"; [ "$1" = download ] && echo "$2" > "$2_1.0-1_all.deb"',
    "dpkg-deb": """
        name=$(/bin/cat "$2"); [ "$1" = --extract ] || exit 2
        /bin/mkdir -p "$3/usr/share/doc/$name"; echo GPL > "$3/usr/share/doc/$name/copyright"
        if [ "$name" = sweethome3d-furniture ]; then /bin/cp "$STORE/Maker.sh3f" "$3"; fi""",
    "npm": 'echo "$@" >> "$LOG"; for last; do :; done; /bin/cp "$STORE/package.tgz" "${last%@*}-1.0.0.tgz"',
}


def tgz(path: Path, members: Mapping[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            if isinstance(content, bytes):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                tar.addfile(content)
    return path


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def install(tools: Path, name: str, script: str) -> None:
    (tools / name).write_text(f"#!/bin/sh\n{script}\n")
    (tools / name).chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on the path; it holds the stand-ins."""
    tools, store = tmp_path / "tools", tmp_path / "store"
    tools.mkdir()
    store.mkdir()
    for name, script in SCRIPTS.items():
        install(tools, name, script)
    names = ["LICENSE", "emoji.json", "img/google/64/1f600.png"]
    tgz(store / "package.tgz", {f"package/{name}": name.encode() for name in names})
    names = ["PluginFurnitureCatalog.properties", "LICENSE.TXT", "m/a.png"]
    zipped(store / "Maker.sh3f", {name: name.encode() for name in names})
    for name, value in {"PATH": tools, "STORE": store, "LOG": tmp_path / "log"}.items():
        monkeypatch.setenv(name, str(value))
    return tools


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Leaves only some of the sources."""
    return lambda *names: monkeypatch.setattr(module, "PACKAGES", {name: PACKAGES[name] for name in names})


def called(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- packages


def test_every_package_is_fetched_once_with_its_licence(tools: Path, tmp_path: Path) -> None:
    folder, said = tmp_path / "real", []
    assert fetch_packages(folder, say=said.append) == []
    packages = [package for each in PACKAGES.values() for package in each]
    assert sorted(os.listdir(folder)) == sorted(package.name for package in packages)
    assert all((folder / package.name / package.licence).is_file() for package in packages)
    assert said == [f"fetching {package.name}" for package in packages]
    assert "download openclipart-svg" in called(tmp_path)
    assert "pack --ignore-scripts emoji-datasource-google@16.0.0" in called(tmp_path)
    before = called(tmp_path)
    assert fetch_packages(folder, say=said.append) == []
    assert (called(tmp_path), len(said)) == (before, len(packages))


def test_archives_in_packages_are_unpacked(tools: Path, tmp_path: Path, only: Callable[..., None]) -> None:
    only("emoji", "furniture")
    fetch_packages(tmp_path / "real")
    assert files(tmp_path / "real/emoji-datasource-google") == [
        "package/LICENSE",
        "package/emoji.json",
        "package/img/google/64/1f600.png",
    ]
    assert files(tmp_path / "real/sweethome3d-furniture") == [
        "Maker/LICENSE.TXT",
        "Maker/PluginFurnitureCatalog.properties",
        "Maker/m/a.png",
        "usr/share/doc/sweethome3d-furniture/copyright",
    ]


@pytest.mark.parametrize(
    ("missing", "sources"), [("npm", ["emoji"]), ("dpkg-deb", ["stamps", "openclipart", "furniture"])]
)
def test_a_source_whose_program_is_missing_is_left_out_and_named(
    missing: str, sources: list[str], tools: Path, tmp_path: Path
) -> None:
    (tools / missing).unlink()
    skipped = fetch_packages(tmp_path / "real")
    assert [line.split(":")[0] for line in skipped] == sources
    assert all(f"not installed: {missing};" in line for line in skipped)
    assert called(tmp_path)
    assert all(missing == "npm" or "pack" in line for line in called(tmp_path))


def test_without_any_program_no_source_remains(tools: Path, tmp_path: Path, only: Callable[..., None]) -> None:
    only("stamps")
    fetch_packages(tmp_path / "real")
    for tool in tools.iterdir():
        tool.unlink()
    only(*PACKAGES)
    assert len(fetch_packages(tmp_path / "real")) == 3  # the stamps were fetched above
    only("emoji", "furniture")
    with pytest.raises(UserError, match=r"no source of pictures can be fetched.*not installed: npm") as error:
        fetch_packages(tmp_path / "real")
    one_line(error)


FAILURES = {
    "apt-get": ("echo 'W: a warning' >&2; echo 'E: Unable to locate package' >&2; exit 100", "E: Unable to locate"),
    "dpkg-deb": ("echo 'is not a Debian archive' >&2; exit 2", "is not a Debian archive"),
    "npm": ("echo 'npm warn old' >&2; echo 'npm error code E404' >&2; exit 1", "npm error code E404"),
}


@pytest.mark.parametrize("tool", FAILURES)
def test_a_failed_download_is_one_line_and_leaves_nothing(
    tool: str, tools: Path, tmp_path: Path, only: Callable[..., None]
) -> None:
    script, why = FAILURES[tool]
    only("emoji" if tool == "npm" else "stamps")
    install(tools, tool, script)
    with pytest.raises(UserError, match=re.escape(why)) as error:
        fetch_packages(tmp_path / "real")
    assert tool in one_line(error)
    assert os.listdir(tmp_path / "real") == []
    install(tools, tool, SCRIPTS[tool])
    assert fetch_packages(tmp_path / "real") == []


@pytest.mark.parametrize(
    ("tool", "script", "why"),
    [
        ("apt-get", "exit 0", r"0 files \*\.deb were fetched"),
        ("dpkg-deb", "exit 0", "its licence file usr/share/doc/tuxpaint-stamps-default/copyright"),
        ("apt-get", "exit 7", "exit code 7"),
        ("apt-get", "while :; do :; done", "took longer than 1 s"),
    ],
)
def test_a_tool_that_does_otherwise_is_caught(
    tool: str,
    script: str,
    why: str,
    tools: Path,
    tmp_path: Path,
    only: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only("stamps")
    monkeypatch.setattr(module, "_SECONDS", 1)
    install(tools, tool, script)
    with pytest.raises(UserError, match=why) as error:
        fetch_packages(tmp_path / "real")
    one_line(error)
    assert os.listdir(tmp_path / "real") == []


def test_a_folder_that_cannot_be_written_is_one_line(tools: Path, tmp_path: Path) -> None:
    (tmp_path / "real").write_text("a file")
    with pytest.raises(UserError, match="cannot be unpacked there") as error:
        fetch_packages(tmp_path / "real")
    one_line(error)


# --- archives


@pytest.mark.parametrize("name", ["../outside", "package/../../outside", "/absolute/outside"])
def test_nothing_is_written_outside(name: str, tmp_path: Path) -> None:
    members = {"fine": b"1", name: b"2"}
    with pytest.raises(UserError, match="cannot be unpacked") if ".." in name else nullcontext():
        unpack(tgz(tmp_path / "a.tgz", members), tmp_path / "into", "gztar")
    unpack(zipped(tmp_path / "a.zip", members), tmp_path / "into", "zip")
    assert {path for path in files(tmp_path) if not path.startswith("into/")} == {"a.tgz", "a.zip"}
    assert not Path("/absolute").exists()


def test_links_are_not_followed_out(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    for target in (str(tmp_path / "outside"), "../outside"):
        members = {"door": link("door", target), "door/file": b"1"}
        with pytest.raises(UserError, match="cannot be unpacked"):
            unpack(tgz(tmp_path / "a.tgz", members), tmp_path / "into", "gztar")
    assert files(tmp_path / "outside") == []


@pytest.mark.parametrize("harm", ["cut", "something else", "empty"])
def test_a_broken_archive_is_one_line(harm: str, tmp_path: Path) -> None:
    members = {name: os.urandom(5000) for name in "abc"}
    for kind, archive in (("gztar", tgz(tmp_path / "a.tgz", members)), ("zip", zipped(tmp_path / "a.zip", members))):
        harmed = {"cut": archive.read_bytes()[:8000], "something else": b"<html>" * 99, "empty": b""}
        archive.write_bytes(harmed[harm])
        with pytest.raises(UserError, match="cannot be unpacked") as error:
            unpack(archive, tmp_path / "into", kind)
        assert str(archive) in one_line(error)
