"""The lock files: complete, with hashes, without an index, consistent with pyproject.toml and with one another."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
LOCKS = {"demo": ["demo"], "dev": ["demo", "dev"], "docs": ["demo", "docs"]}
RUNTIME = ["demo", "eval", "lora", "onnx", "plots", "quant", "search", "serve"]


def direct(extras: list[str]) -> list[Requirement]:
    lines = PROJECT["project"]["dependencies"] + [line for extra in extras for line in EXTRAS[extra]]
    return [requirement for requirement in map(Requirement, lines) if requirement.name != "torch"]


def pins(name: str) -> list[Requirement]:
    """The pins in a file, one requirement per version, without hashes."""
    lines = (ROOT / "requirements" / name).read_text("utf-8").splitlines()
    return [Requirement(line.rstrip(" \\")) for line in lines if re.match(r"\w", line)]


def installed_here(name: str) -> dict[str, Version]:
    """The versions that a file pins for this Python and this operating system."""
    here = [pin for pin in pins(name) if pin.marker is None or pin.marker.evaluate()]
    versions = {str(canonicalize_name(pin.name)): Version(next(iter(pin.specifier)).version) for pin in here}
    assert len(versions) == len(here) > 3, f"{name} has two versions of a package"
    return versions


@pytest.mark.parametrize("name", [*LOCKS, "models"])
def test_a_lock_has_a_hash_for_every_package_and_no_index(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text("utf-8")
    blocks = re.split(r"\n(?=\w)", text)[1:]
    assert len(blocks) == len(pins(f"{name}.txt"))
    assert all("--hash=sha256:" in block for block in blocks)
    assert not re.search(r"://|--(extra-)?index|--find-links|^torch|^nvidia-", text, re.MULTILINE)


@pytest.mark.parametrize(("name", "extras"), LOCKS.items())
def test_a_lock_holds_every_direct_dependency_within_its_range(name: str, extras: list[str]) -> None:
    """Fails if pyproject.toml was changed without `make lock`."""
    locked = installed_here(f"{name}.txt")
    build = map(Requirement, PROJECT["dependency-groups"]["build"] + PROJECT["build-system"]["requires"])
    for requirement in [*direct(extras), *build]:
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), requirement


def test_the_locks_agree() -> None:
    """All are installed into .venv, so the last one must not change a version from another."""
    demo, dev, docs = (installed_here(f"{name}.txt") for name in LOCKS)
    assert demo.items() <= dev.items()
    assert demo.items() <= docs.items()
    assert all(docs[name] == version for name, version in dev.items() if name in docs)


def test_the_lower_bounds_are_the_oldest_set() -> None:
    oldest = {canonicalize_name(pin.name): pin.specifier for pin in pins("versions/oldest.txt")}
    for requirement in direct(RUNTIME):
        (bound,) = [part.version for part in requirement.specifier if part.operator == ">="]
        assert oldest[canonicalize_name(requirement.name)].contains(bound), requirement
