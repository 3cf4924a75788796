"""Undocumented names of other libraries are used in one file only, and are correct for the installed versions."""

import ast
import logging
import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from packaging.requirements import Requirement

import tiny_models
from openblip2 import compat

SRC = Path(compat.__file__).parent
OTHERS = ("transformers", "peft", "accelerate", "bitsandbytes", "faiss")
# The documented modules of transformers and peft; every other module is internal.
PUBLIC = {"transformers", "transformers.utils", "transformers.utils.logging", "peft"}
PRIVATE = re.compile(r"\._(is_stateful|keep_in_fp32_modules|dynamo|supports_\w+|tied_weights_keys)\b")


def internal_imports(file: Path) -> list[str]:
    """Undocumented modules of other libraries that a file imports at run time."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = [
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for part in block.body
        for node in ast.walk(part)
    ]
    found = []
    for node in ast.walk(tree):
        if node in typing_only or not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        found += [name for name in names if name.split(".")[0] in OTHERS[:-1] and name not in PUBLIC]
    return found


def test_internal_names_are_in_one_file() -> None:
    files = [file for file in SRC.rglob("*.py") if file.name != "compat.py"]
    assert len(files) > 50
    assert {file.name: found for file in files if (found := internal_imports(file))} == {}
    assert [file.name for file in files if PRIVATE.search(file.read_text(encoding="utf-8"))] == []
    assert len(internal_imports(SRC / "compat.py")) >= 4, "the search finds nothing"


@pytest.mark.parametrize("kind", tiny_models.MODELS)
def test_the_cache_has_the_name_of_the_installed_version(kind: str) -> None:
    """The cache is passed and returned under that name, without a warning and without effect on the logits."""
    llm = tiny_models.language(kind).llm
    name = compat.cache_name(llm)
    newer = tuple(map(int, hf.__version__.split(".")[:2])) >= (5, 24)
    assert name == ("cache" if newer else "past_key_values")
    if not llm.config.is_encoder_decoder:
        ids = torch.tensor([[5, 6, 7, 8]])
        whole = llm(input_ids=ids).logits
        cache = compat.cache_of(llm(input_ids=ids[:, :2], use_cache=True))
        rest = llm(input_ids=ids[:, 2:], **{str(name): cache}).logits
        assert (rest - whole[:, 2:]).abs().max() < 1e-5


def test_a_version_out_of_range_is_one_warning(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(compat.metadata, "requires", lambda name: ["transformers>=99,<100", "torch>=2", "peft<0.1"])
    with caplog.at_level(logging.WARNING, logger="openblip2"):
        compat.warn_of_versions()
    (record,) = caplog.records
    assert f"transformers {hf.__version__} is not supported: <100,>=99" in record.getMessage()
    assert "torch" not in record.getMessage()


def test_the_installed_versions_are_in_range(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    requirements = compat.metadata.requires("openblip2")
    assert requirements
    monkeypatch.setattr(compat.metadata, "requires", lambda name: [*requirements, "not-a-package-anywhere>=3"])
    compat.warn_of_versions()
    assert not caplog.records


def test_the_range_of_transformers_is_the_one_that_is_named_in_compat() -> None:
    ranges = {r.name: r.specifier for r in map(Requirement, compat.metadata.requires("openblip2") or [])}
    assert compat.__doc__
    first, last = re.search(r"transformers (5\.\d+) to (5\.\d+)", compat.__doc__).groups()  # pyright: ignore
    assert ranges["transformers"].contains(f"{first}.0")
    assert ranges["transformers"].contains(f"{last}.0")
