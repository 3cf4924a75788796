"""Picture search: compared with exact search, and after folder changes, interruptions and bad files."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import tiny_runs
from openblip2.apps.search import ImageSearch, update_index
from openblip2.apps.search.index import Vectors, open_index
from openblip2.cli import app
from openblip2.commands.serving import _like_a_path
from openblip2.errors import UserError
from openblip2.inference.load import load
from openblip2.inference.matcher import Matcher
from openblip2.progress import Progress

pytest.importorskip("faiss")


def unit(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    rows = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_the_best_are_those_of_exact_search() -> None:
    pictures, asked = unit(300, 5, 64), unit(20, 64, seed=1)
    vectors = Vectors(5, 64)
    vectors.add(list(range(300)), pictures)
    stored = np.stack([vectors.of(n) for n in range(300)])
    assert np.abs(stored - pictures).max() < 0.01
    recalls = []
    for one in asked:
        scores, exact = ((rows @ one).max(axis=1) for rows in (stored, pictures))
        found = vectors.best(one, 10)
        recalls.append(len({number for number, _ in found} & set(np.argsort(-exact)[:10].tolist())) / 10)
        assert [number for number, _ in found] == np.argsort(-scores)[:10].tolist()
        np.testing.assert_allclose([score for _, score in found], np.sort(scores)[::-1][:10], atol=1e-4)
    assert np.mean(recalls) > 0.95


def test_more_are_asked_for_than_there_are() -> None:
    vectors = Vectors(2, 8)
    assert vectors.best(unit(8), 3) == []
    vectors.add([7], unit(1, 2, 8))
    assert [number for number, _ in vectors.best(unit(8), 3)] == [7]


def test_a_picture_is_most_like_itself_and_what_is_removed_is_gone() -> None:
    pictures = unit(50, 4, 16)
    vectors = Vectors(4, 16)
    vectors.add(list(range(100, 150)), pictures)
    assert vectors.alike(pictures[20], 3)[0][0] == 120
    vectors.remove([120])
    assert vectors.numbers() == {*range(100, 120), *range(121, 150)}
    assert vectors.alike(pictures[20], 3)[0][0] != 120


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("search")
    tiny_runs.home(root, count=16)
    given = ["train", "stage1", "--data", str(root / "data"), "--out", str(root / "stage1"), *tiny_runs.options(root)]
    assert CliRunner().invoke(app, given).exit_code == 0
    return root / "stage1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures, two of them in a subfolder."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    random = np.random.default_rng(0)
    for n in range(10):
        path = tmp_path / "photos" / ("more" if n > 7 else ".") / f"{n}.png"
        Image.fromarray(random.integers(0, 255, (20, 30, 3), np.uint8)).save(path)
    return tmp_path / "photos"


def quiet() -> Progress:
    return Progress(quiet=True)


def test_search_is_the_matchers_similarity(run: Path, folder: Path, tmp_path: Path) -> None:
    done = update_index(folder, str(run), tmp_path / "index", quiet())
    assert (done.pictures, done.added, done.gone, done.skipped) == (10, 10, 0, [])
    finder = ImageSearch(tmp_path / "index")
    matcher = load(run)
    assert isinstance(matcher, Matcher)
    paths = sorted(folder.rglob("*.png"))
    scores = matcher.similarity(paths, ["a red dog"])[:, 0]
    hits = finder.by_text("a red dog", best=10)
    assert {hit.path for hit in hits} == set(paths)
    for hit in hits:
        assert hit.similarity == pytest.approx(float(scores[paths.index(hit.path)]), abs=0.02)
    reranked = finder.by_text("a red dog", best=3, rerank=5)
    few = [hit.path for hit in hits[:5]]
    matches = matcher.match(few, ["a red dog"] * 5)
    assert [hit.path for hit in reranked] == [few[n] for n in matches.argsort(descending=True)[:3]]
    alike = {hit.path: hit.similarity for hit in finder.by_picture(paths[4], best=10)}
    assert alike[paths[4]] == pytest.approx(1, abs=0.02)  # such a small model gives all pictures similar vectors
    assert max(alike.values()) <= 1
    assert Image.open(finder.index.thumbnail(hits[0].number)).size == (30, 20)


def test_an_index_follows_its_folder(run: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    update_index(folder, str(run), out, quiet())
    (folder / "0.png").unlink()
    Image.new("RGB", (9, 9), "red").save(folder / "1.png")
    Image.new("RGB", (9, 9), "blue").save(folder / "new.jpg")
    (folder / "broken.png").write_bytes(b"no picture")
    done = update_index(folder, str(run), out, quiet())
    assert (done.pictures, done.added, done.gone) == (10, 2, 2)
    assert len(done.skipped) == 1
    assert "broken.png" in done.skipped[0]
    index = open_index(out)
    assert {row.path for row in index.rows.values()} == {
        *(f"{n}.png" for n in range(1, 8)),
        "more/8.png",
        "more/9.png",
        "new.jpg",
    }
    assert index.vectors.numbers() == index.rows.keys()
    assert sorted(int(p.stem) for p in (out / "thumbnails").iterdir()) == sorted(index.rows)
    assert update_index(folder, str(run), out, quiet()).added == 0


def test_an_interruption_between_two_files_is_healed(run: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    update_index(folder, str(run), out, quiet())
    rows = (out / "pictures.jsonl").read_text().splitlines()
    # Leaves vectors without a row and a row without vectors, and sets "next" to a number that is too small.
    (out / "pictures.jsonl").write_text(
        "\n".join([*rows[:-2], json.dumps(json.loads(rows[-1]) | {"number": 77})]) + "\n"
    )
    about = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps(about | {"next": 0}))
    done = update_index(folder, str(run), out, quiet())
    assert (done.pictures, done.added) == (10, 2)
    index = open_index(out)
    assert index.vectors.numbers() == index.rows.keys()
    assert index.vectors.index.ntotal == 10 * index.vectors.queries


def test_links_that_lead_out_are_not_followed(run: Path, folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    os.symlink(tmp_path / "secret.png", folder / "link.png")
    update_index(folder, str(run), tmp_path / "index", quiet())
    index = open_index(tmp_path / "index")
    assert "link.png" not in {row.path for row in index.rows.values()}
    number = next(n for n, row in index.rows.items() if row.path == "0.png")
    (folder / "0.png").unlink()
    os.symlink(tmp_path / "secret.png", folder / "0.png")
    assert index.path(number) is None
    # Files that are now missing or broken come after the files with an ITM score.
    (folder / "1.png").write_bytes(b"no picture")
    hits = ImageSearch(index).by_text("a dog", best=10, rerank=10)
    assert len(hits) == 10
    assert [hit.match is None for hit in hits] == [False] * 8 + [True] * 2
    assert {hit.path.name for hit in hits[8:]} == {"0.png", "1.png"}


def test_pictures_of_all_kinds_are_counted(run: Path, folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 30)).save(folder / "a.jfif", "JPEG")
    Image.new("L", (20, 30)).save(folder / "b.pgm")
    for name in ("c.HEIC", "more/d.heic", "notes.txt"):
        (folder / name).touch()
    done = update_index(folder, str(run), tmp_path / "index", quiet())
    assert (done.pictures, done.added) == (12, 12)
    assert done.skipped == [f"{folder}: 2 .heic files are left out; convert them to JPEG"]
    (tmp_path / "iphone").mkdir()
    (tmp_path / "iphone/1.HEIC").touch()
    with pytest.raises(UserError, match=r"no pictures in it; .*: 1 \.heic file is left out; convert it to JPEG"):
        update_index(tmp_path / "iphone", str(run), tmp_path / "index2", quiet())


def test_a_folder_that_is_suddenly_empty_costs_nothing(run: Path, folder: Path, tmp_path: Path) -> None:
    """An unmounted disk looks like an empty folder; the index and its thumbnails must be kept."""
    out = tmp_path / "index"
    update_index(folder, str(run), out, quiet())
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    folder.rename(tmp_path / "away")
    folder.mkdir()
    with pytest.raises(UserError, match="no pictures in it"):
        update_index(folder, str(run), out, quiet())
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_what_cannot_be_used_is_refused(run: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    with pytest.raises(UserError, match="is not a folder"):
        update_index(tmp_path / "none", str(run), out, quiet())
    with pytest.raises(UserError, match="is not an index: give a folder that"):
        open_index(out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures in it"):
        update_index(tmp_path / "empty", str(run), tmp_path / "other", quiet())
    update_index(folder, str(run), out, quiet())
    with pytest.raises(UserError, match="is an index of"):
        update_index(tmp_path / "empty", str(run), out, quiet())
    with pytest.raises(UserError, match="is not empty and not an index"):
        update_index(folder, str(run), folder, quiet())
    (out / "vectors.faiss").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot be read"):
        open_index(out)


def test_an_index_of_other_weights_is_refused(run: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    update_index(folder, str(run), out, quiet())
    matcher: Any = load(run)
    with torch.no_grad():
        matcher.model.temperature += 1
    with pytest.raises(UserError, match="was made with other weights"):
        ImageSearch(out, matcher)


@pytest.mark.parametrize(
    "query", ["photos/nope.png", "nope.png", "./nope", "my photos/a cat.jpg", "a\\b.heic", "{}/no"]
)
def test_what_looks_like_a_path_is_not_searched_for_as_a_text(tmp_path: Path, query: str) -> None:
    done = CliRunner().invoke(app, ["search", str(tmp_path / "index"), query.replace("{}", str(tmp_path))])
    assert "looks like a path, but there is no such image file" in str(done.exception)
    assert not _like_a_path("a black/white photo of 1.5 cats in the U.S.")
    assert not _like_a_path("a dog " * 2000)


def test_the_commands(run: Path, folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "index")
    done = CliRunner().invoke(app, ["index", str(folder), "--run", str(run), "--out", out])
    assert done.exit_code == 0, done.output
    assert "10 pictures; 10 read, 0 deleted or changed" in done.stdout
    found = CliRunner().invoke(app, ["search", out, "a red dog", "--best", "3", "--rerank", "4", "--json"])
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(rows) == 3
    assert all(0 <= row["match"] <= 1 for row in rows)
    alike = CliRunner().invoke(app, ["search", out, str(folder / "3.png"), "--best", "1"])
    (row,) = alike.stdout.splitlines()
    similarity, path = row.split("\t")
    assert float(similarity) == pytest.approx(1, abs=0.02)
    assert Path(path).parent in (folder, folder / "more")
