"""The statements in the documents agree with the code."""

import ast
import importlib
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
import typer.main

import openblip2
from openblip2 import cli
from openblip2.apps.scenes.draw import colours_of
from openblip2.apps.scenes.vocabulary import WORLDS
from openblip2.config import REMOVED, RunSettings, _names
from openblip2.presets import PRESETS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "openblip2"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# Folder or module -> what it may import, besides itself: CONTRIBUTING.md's table.
GROUND = {"compat", "errors", "config", "distributed", "hardware", "progress", "runs"}
BELOW = {
    "errors": set(),
    "compat": set(),
    "config": {"errors"},
    "hardware": set(),
    "distributed": {"errors", "config", "hardware"},
    "progress": set(),
    "runs": {"compat", "errors", "config", "distributed"},
    "model": GROUND,
    "data": GROUND,
    "instructions": set(),
    "presets": {"config", "errors", "instructions"},
    "evaluate": GROUND | {"model", "data"},
    "train": GROUND | {"model", "data", "evaluate"},
    "weights": GROUND | {"model", "data", "evaluate", "train", "presets"},
}
BELOW["inference"] = BELOW["weights"] | {"weights"}
BELOW["capfilt"] = BELOW["inference"] | {"inference"}
# Modules of `evaluate/` that use trained runs; the others are metrics, which training imports.
TASKS = {"caption", "vqa", "retrieval", "pointing", "result", "run"}
BELOW["tasks"] = BELOW["inference"] | {"inference"}


def layer(parts: Sequence[str]) -> str:
    """The row of the table for a module inside the package."""
    return "tasks" if parts[0] == "evaluate" and parts[-1] in TASKS else parts[0]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)


def test_snippets_run(capsys: pytest.CaptureFixture[str]) -> None:
    (trained,) = blocks(ROOT / "README.md", "python")
    compile(trained, "README.md", "exec")  # not run, because it needs the demo's runs
    (untrained,) = blocks(ROOT / "docs" / "api.md", "python")
    exec(compile(untrained, "api.md", "exec"), {})
    assert set(re.findall(r"'(\w+)': ", capsys.readouterr().out)) == {"itc", "itm", "itg"}


def test_snippets_of_the_pages_name_what_exists() -> None:
    found = [(document.name, block) for document in DOCUMENTS for block in blocks(document, "python")]
    assert len(found) > 4
    for name, block in found:
        for node in ast.walk(ast.parse(block, name)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "openblip2":
                assert node.attr in openblip2.__all__, (name, node.attr)


def test_notebook_is_kept_without_what_it_printed() -> None:
    notebook = json.loads((ROOT / "docs" / "first-steps.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def test_every_page_is_in_the_site() -> None:
    listed = set(re.findall(r"^([a-z-]+)$", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), re.MULTILINE))
    pages = {file.stem for file in (ROOT / "docs").iterdir() if file.suffix in (".md", ".ipynb")}
    assert pages - {"index", "decisions"} == listed  # decisions.md is for those who change the code


def test_public_names_are_in_the_reference() -> None:
    reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    missing = [name for name in openblip2.__all__ if not re.search(rf":: openblip2\.{name}\b", reference)]
    assert not missing


def test_every_section_of_settings_is_shown() -> None:
    shown = re.findall(r":pyobject: (\w+)", (ROOT / "docs" / "settings.md").read_text(encoding="utf-8"))
    sections = {type(getattr(RunSettings(), field.name)).__name__ for field in fields(RunSettings)}
    assert set(shown) == {"RunSettings"} | {name for name in sections if name.endswith("Settings")}


def test_commands_of_the_documents_exist_with_their_options() -> None:
    command = typer.main.get_command(cli.app)
    lines = [line for d in DOCUMENTS for b in blocks(d, "bash") for line in b.splitlines()]
    lines += [m for d in DOCUMENTS for m in re.findall(r"`(openblip2 [a-z]+ [^`]*)`", d.read_text(encoding="utf-8"))]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("openblip2 ")]
    assert len(commands) >= 6
    for name, *words in commands:
        known = {option for p in command.commands[name].params for option in p.opts}  # type: ignore[attr-defined]
        assert {word for word in words if word.startswith("--")} <= known, (name, words)
        if "--preset" in words:
            preset = words[words.index("--preset") + 1]
            stage, preset = preset.split("-", 1) if name == "plan" else (words[0], preset)
            assert preset in PRESETS[stage]


def test_settings_named_in_the_documents_exist() -> None:
    known = {*_names(RunSettings), *REMOVED}  # docs/decisions.md also names removed settings
    one_of = "|".join({name.split(".")[0] for name in known if "." in name})
    for document in DOCUMENTS:
        for name in re.findall(rf"(?<!openblip2\.)\b((?:{one_of})\.[a-z_]+)\b(?!\()", document.read_text("utf-8")):
            assert name in known or (SOURCE / name.replace(".", "/")).exists() or name.endswith((".py", ".md")), name


def test_paper_map_names_what_exists() -> None:
    text = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| `([\w/]+)\.py` \| (.+?) \|\n", text)
    assert len(rows) > 15
    for path, names in rows:
        module = importlib.import_module(f"openblip2.{path.replace('/', '.')}")
        for name in re.findall(r"`([\w.]+)`", names):
            thing = module
            for part in name.split("."):
                thing = getattr(thing, part)


def test_files_named_in_the_documents_exist() -> None:
    for document in DOCUMENTS:
        for path in re.findall(r"\]\(([\w/.-]+\.md)\)|`(src/[\w/.]+|tests/[\w/.]+)`", document.read_text("utf-8")):
            target = (path[0] and document.parent / path[0]) or ROOT / path[1]
            assert target.exists(), (document.name, path)


def test_imports_only_point_down() -> None:
    for file in SOURCE.rglob("*.py"):
        part = layer(file.relative_to(SOURCE).with_suffix("").parts)
        if part not in BELOW:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("openblip2."):
                used = layer(str(node.module).split(".")[1:])
                assert used == part or used in BELOW[part], f"{file.name} imports {node.module}"


def test_public_names_can_be_used() -> None:
    for name in openblip2.__all__:
        assert callable(getattr(openblip2, name)), name
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = openblip2.lode


def test_texts_that_the_docs_search_for_are_in_the_test_set() -> None:
    """The test set is that of the demo, in which no noun has a colour that it has in training."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/serving.md"))
    queries = re.findall(r'^(?:\$ )?openblip2 search \S+ "(.+?)"', text, re.MULTILINE)
    queries += re.findall(r'^(?:\$ )?openblip2 rank \S+ "(.+?)"', text, re.MULTILINE)
    assert len(queries) >= 3
    for query in queries:
        words = query.split()
        pairs = [(noun, before) for before, noun in pairwise(words) if noun in WORLDS["small"]]
        assert pairs, query
        assert all(colour in colours_of(noun, "test") for noun, colour in pairs), query
