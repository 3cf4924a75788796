"""Finished work is never replaced without `--overwrite`, and nothing is skipped without a message."""

import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

import openblip2
from openblip2.config import change
from openblip2.data.records import Record
from openblip2.data.text import only_unknown
from openblip2.data.web.write_shards import write_tar
from openblip2.errors import UserError, number_of
from openblip2.inference.attend import look
from openblip2.inference.captioner import Captioner
from openblip2.inference.matcher import Matcher
from openblip2.presets import preset
from openblip2.progress import Progress
from openblip2.runs import locked, require_absent
from openblip2.train.bookkeeping import Skipped
from openblip2.train.prepare import _require_enough, hold_out
from openblip2.train.resume import require_new
from test_cli import SOURCE, Home, Said, call, home

__all__ = ["home"]


def one_line(said: Said, *parts: object) -> None:
    assert said.code == 2, said.err
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    for part in parts:
        assert str(part) in said.err


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- finished work


def test_training_into_a_finished_run_is_refused_unless_overwrite(home: Home) -> None:
    run = home.broken("finished", lambda folder: None, "stage1")
    before = files(run)
    one_line(call(*home.train("stage1", "finished", "--set", "train.seed=1")), run, "finished run", "--overwrite")
    assert files(run) == before
    one_line(call(*home.train("stage1", "finished", "--resume", "--overwrite")), "--resume", "--overwrite")
    said = call(*home.train("stage1", "finished", "--set", "train.seed=1", "--overwrite"))
    assert said.code == 0, said.err
    assert (run / "model.safetensors").read_bytes() != before[run / "model.safetensors"]


def test_another_programs_model_is_never_replaced(tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text('{"architectures": ["OPTForCausalLM"]}')
        with pytest.raises(UserError, match="do not belong to a run: give another --out"):
            require_new(folder, overwrite=True)
    require_new(tmp_path / "new", overwrite=False)


@pytest.mark.parametrize("name", ["log.jsonl", "tokenizer"])
def test_a_file_of_the_user_is_not_taken_for_a_runs(name: str, home: Home, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    for more in ((), ("--overwrite",)):
        said = call("train", "stage1", "--data", home.data, "--out", tmp_path, *more)
        one_line(said, f"{tmp_path} contains {name}, which does not belong to a run: give another --out")
    assert (tmp_path / name).read_text() == "mine"


def test_a_run_cannot_be_replaced_by_one_that_starts_from_it(home: Home) -> None:
    run = home.broken("start", lambda folder: None, "stage1")
    before = files(run)
    one_line(call(*home.train("stage2", "start", "--start", run, "--overwrite")), run, "starts from", "another --out")
    assert files(run) == before


def test_a_finished_evaluation_is_refused_unless_overwrite(home: Home, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    words = ("evaluate", "retrieval", home.stage1, "--data", home.data, "--out", out, "--rerank", 0)
    out.write_text("mine")
    one_line(call(*words), out, "--overwrite")
    assert out.read_text() == "mine"
    said = call(*words, "--overwrite")
    assert said.code == 0, said.err
    assert json.loads(out.read_text())["samples"] == "scores.samples.jsonl"


def test_earlier_results_are_refused_unless_overwrite(home: Home, tmp_path: Path) -> None:
    maps = ("attend", home.stage1, home.picture(0), "--text", "a dog", "--out", tmp_path / "maps")
    page = ("doctor", home.stage1, "--out", tmp_path / "page.html")
    assert call(*maps).code == 0
    assert call(*page).code == 0
    before = files(tmp_path)
    one_line(call(*maps), tmp_path / "maps" / "attention.png", "exists already", "--overwrite")
    one_line(call(*page), tmp_path / "page.html", "exists already", "--overwrite")
    for name in ("text.png", "queries.png"):  # the file that is written first does not exist
        (tmp_path / name).write_bytes(b"mine")
        one_line(call(*maps[:-1], tmp_path), name, "exists already", "--overwrite")
        assert files(tmp_path) == before | {tmp_path / name: b"mine"}
        (tmp_path / name).unlink()
    figures = tmp_path / "figures.json"
    figures.write_text("mine")
    one_line(call("bench", "--size", "tiny", "--out", figures), figures, "exists already", "--overwrite")
    assert files(tmp_path) == before | {figures: b"mine"}
    assert call(*maps, "--overwrite").code == 0
    assert call(*page, "--overwrite").code == 0


def test_a_folder_in_place_of_a_file_is_refused_before_the_work(home: Home, tmp_path: Path) -> None:
    for words in (
        ("evaluate", "retrieval", home.stage1, "--data", home.data),
        ("doctor", home.stage1),
        ("bench", "--size", "tiny", "--case", "rerank"),
    ):
        said = call(*words, "--out", tmp_path, "--overwrite")
        one_line(said, f"{tmp_path} is a folder: give --out the name of a file")


def test_a_start_of_the_wrong_stage_is_named_before_its_language_model(home: Home) -> None:
    words = ("train", "caption", "--data", home.data, "--out", home.root / "wrong-start", "--start", home.stage1)
    one_line(call(*words, "--set", "language.name=no/model"), f"start={home.stage1} is not a stage-2 run")


def test_an_objective_counts_once(home: Home) -> None:
    words = home.train("stage1", "twice-itc", "--set", 'stage1.objectives=["itc", "itc"]')
    one_line(call(*words), "names one twice: name each once")


def test_thumbnails_of_another_index_are_no_pictures(home: Home, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    shutil.copytree(home.data, tmp_path / "photos")
    for out in (tmp_path / "photos" / "one", tmp_path / "two"):
        said = call("index", tmp_path / "photos", "--run", home.stage1, "--out", out)
        assert "16 pictures; 16 read" in said.out, said.err
    said = call("caption", home.stage2, tmp_path / "photos")
    assert (said.code, len(said.out.splitlines())) == (0, 16), said.err


def test_two_writers_of_a_result_do_not_mix(home: Home, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    with locked(tmp_path, ".scores.json.lock"):
        said = call("evaluate", "retrieval", home.stage1, "--data", home.data, "--out", out)
        one_line(said, f"{out} is being written by process {os.getpid()} on", "another folder")
    with locked(tmp_path / "shards"):
        one_line(call("prepare", home.data, "--out", tmp_path / "shards"), tmp_path / "shards", "is being written by")
    assert list(tmp_path.rglob("*.*")) == []


def test_a_finished_demo_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    one_line(call("demo", "--out", tmp_path), tmp_path / "metrics.json", "--overwrite")
    require_absent(tmp_path / "metrics.json", overwrite=True)
    (tmp_path / "mine.txt").touch()
    said = call("demo", "--out", tmp_path, "--overwrite")
    one_line(said, f"{tmp_path} contains mine.txt, which is not part of a demo: give another --out")


# --- pictures


def test_the_doctor_goes_on_after_a_bad_picture(home: Home, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(home.picture().read_bytes()[:60])
    said = call("doctor", home.stage1, home.picture(0), bad, home.picture(1), home.picture(2), "--json")
    assert said.code == 2
    assert json.loads(said.out)["pictures"] == 3
    assert str(bad) in caplog.text
    (last,) = said.err.splitlines()
    assert f"1 of 4 pictures cannot be read and have no result: {bad}" in last
    said = call("doctor", home.stage1, home.picture(0), bad)
    assert (said.code, said.out) == (2, "")
    assert "1 of 2 pictures" in said.err


def test_pictures_of_one_colour_or_of_extreme_shapes_have_numbers(home: Home, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    shapes = {"black": (40, 30), "one": (1, 1), "tall": (1, 30_000), "wide": (30_000, 1)}
    pictures = [photos / f"{name}.png" for name in shapes]
    for picture, size in zip(pictures, shapes.values(), strict=True):
        Image.new("RGB", size, (0, 0, 0)).save(picture)
    model = openblip2.load(home.stage1)
    assert isinstance(model, Matcher)
    assert model.similarity(pictures, ["a red dog"]).isfinite().all()
    assert model.match(pictures, ["a red dog"] * 4).isfinite().all()
    for picture in pictures:
        for by in ("itc", "itm"):
            out = tmp_path / f"{picture.stem}-{by}"
            said = call("attend", home.stage1, picture, "--text", "a red dog", "--by", by, "--out", out)
            assert (said.code, said.err) == (0, "")
            assert len(list(out.glob("*.png"))) == 3
        assert np.isfinite(look(model, picture, "a red dog").average).all()
    said = call("index", photos, "--run", home.stage1, "--out", tmp_path / "index", "--json")
    assert (said.code, json.loads(said.out)["pictures"]) == (0, 4)
    said = call("search", tmp_path / "index", "a red dog", "--json")
    assert all(-1 <= json.loads(line)["similarity"] <= 1 for line in said.out.splitlines())
    said = call("search", tmp_path / "index", pictures[3])
    assert said.code == 0
    assert said.out.count("\n") == 4


# --- data that changed


def test_resume_with_other_data_is_refused(home: Home) -> None:
    run = home.broken("other-data", lambda folder: (folder / "model.safetensors").unlink(), "stage1")
    rows = home.data / "records.jsonl"
    before = rows.read_text()
    try:
        rows.write_text(before.replace("a red dog", "a red bus", 1))
        said = call(*home.train("stage1", "other-data", "--resume"))
        one_line(said, run, "the data have changed", "16 pictures", "a new --out")
        rows.write_text("".join(before.splitlines(keepends=True)[1:]))
        one_line(call(*home.train("stage1", "other-data", "--resume")), "15 pictures")
        held = call(*home.train("stage1", "other-data", "--resume", "--held-out", home.data))
        assert "30 pictures" in held.err.splitlines()[-1]  # after the line about data.held_out, which has no effect
    finally:
        rows.write_text(before)
    said = call(*home.train("stage1", "other-data", "--resume"))
    assert said.code == 0, said.err
    assert (run / "model.safetensors").read_bytes() == (home.stage1 / "model.safetensors").read_bytes()


# --- skipped data


def test_too_few_pictures_name_what_was_skipped_and_settings_that_work(home: Home, tmp_path: Path) -> None:
    rows = (home.data / "records.jsonl").read_text().splitlines()
    data = tmp_path / "data"
    data.mkdir()
    for n in range(3):
        (data / f"{n}.png").write_bytes(home.picture(n).read_bytes())
    (data / "records.jsonl").write_text("\n".join(rows))
    said = call("train", "stage1", "--data", data, "--out", tmp_path / "run", *home.train("stage1", "")[6:])
    assert said.code == 2
    *skipped, last = said.err.splitlines()
    assert [line.split(": ")[0] for line in skipped] == [f"skipped ({n + 1} so far)" for n in range(13)]
    assert "3 pictures (13 more were skipped) are too few" in last
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) == 13


@pytest.mark.parametrize("count", [*range(4, 60), 67, 99])
def test_the_settings_that_are_suggested_work(count: int, tmp_path: Path) -> None:
    settings = change(preset("stage1", "laptop"), {"data.held_out": 0.001})
    records = [Record(str(n), Path(f"{n}.png"), ("a dog",)) for n in range(count)]
    skipped = Skipped(tmp_path, Progress(quiet=True))
    with pytest.raises(UserError) as refused:
        _require_enough(*hold_out(records, settings), settings, skipped, share=True)
    suggested = str(refused.value).partition("; add --set ")[2].split(" --set ")
    settings = change(settings, dict(one.split("=") for one in suggested))
    held, trained = hold_out(records, settings)
    _require_enough(held, trained, settings, skipped, share=True)
    assert settings.train.batch <= len(trained)


def test_texts_that_are_cut_or_unknown_are_counted_and_named_in_stage_2(home: Home, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (home.data / "records.jsonl").read_text().splitlines()]
    rows[3]["caption"] = "a red dog " * 20
    rows[5]["caption"] = "Schnee"
    data = tmp_path / "data"
    data.mkdir()
    for row in rows:
        (data / row["image"]).write_bytes((home.data / row["image"]).read_bytes())
    (data / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("train", "stage2", "--data", data, "--start", home.stage1, "--out", tmp_path / "run", *home.options)
    said = call(*words, "--set", "train.batch=64")
    assert said.code == 0, said.err
    assert "1 text had to be cut at 50 words or 1,000 characters; the first belongs to 3.png" in said.err
    assert "1 text of 16 (6.2 %) became only <unk>, because the tok" in said.err
    assert "train.batch=64 is reduced: there are only 12 training pictures" in said.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [next(iter(line.items())) for line in lines] == [
        ("cut", f"3.png: {rows[3]['caption']}"),
        ("unknown", "5.png: schnee"),
    ]


def test_an_unknown_text_in_use_is_named(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    matcher = openblip2.load(home.stage1)
    assert isinstance(matcher, Matcher)
    matcher.similarity([home.picture()], ["a dog in the Schnee", "Schnee"])
    assert [record.getMessage() for record in caplog.records] == [
        "text 'schnee': the model's tokenizer knows none of its words and returns only [UNK]"
    ]
    assert only_unknown(hf.AutoTokenizer.from_pretrained(home.root / "bert"), ["", "a", "x y", "x a"]) == [2]


# --- bad pictures in a batch


def test_a_bad_picture_does_not_end_a_batch(home: Home, tmp_path: Path) -> None:
    bad, gone = tmp_path / "bad.png", tmp_path / "gone.png"
    bad.write_bytes(b"not a picture")
    given = [home.picture(0), bad, home.picture(1), gone, home.picture(2)]
    for command, key in ((("caption", home.stage2), "caption"), (("rank", home.stage1, "a red dog"), "similarity")):
        said = call(*command, *given, "--json")
        rows = {row["path"]: row[key] for row in map(json.loads, said.out.splitlines())}
        assert said.code == 2
        assert [path for path, value in rows.items() if value is None] == [str(bad), str(gone)]
        alone = call(*command, given[2], "--json")
        assert alone.code == 0
        assert rows[str(given[2])] == pytest.approx(json.loads(alone.out)[key])
        *_, last = said.err.splitlines()
        assert last == f"openblip2: 2 of 5 pictures cannot be read and have no result: {bad}, {gone}"
        plain = call(*command, *given)
        assert (plain.code, len(plain.out.splitlines())) == (2, 3)


def test_lists_in_python_have_none_for_a_bad_picture(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    given = [home.root / "gone.png", home.picture(1), home.root / "gone.png", home.picture(0)]
    captioner, matcher = openblip2.load(home.stage2), openblip2.load(home.stage1)
    assert isinstance(captioner, Captioner)
    assert isinstance(matcher, Matcher)
    good, texts = [given[1], given[3]], ["a red dog", "a blue bus", "a cat"]
    assert captioner.caption(given) == [None, *captioner.caption(good)[:1], None, *captioner.caption(good)[1:]]
    questions = ["what colour is it", "is it a dog"] * 2
    answers = captioner.answer(good, [questions[1], questions[3]])
    assert captioner.answer(given, questions) == [None, answers[0], None, answers[1]]
    assert captioner.caption(given[:1]) == [None]
    assert [record.getMessage() for record in caplog.records].count(
        f"{given[0]}: does not exist: give the path of a picture"
    ) == 3
    for found, expected in (
        (matcher.similarity(given, texts), matcher.similarity(good, texts)),
        (matcher.match(given, [*texts, "a dog"]), matcher.match(good, [texts[1], "a dog"])),
        *zip(matcher.rerank(given, texts), matcher.rerank(good, texts), strict=True),
    ):
        assert found[[0, 2]].isnan().all()
        torch.testing.assert_close(found[[1, 3]], expected)
    with pytest.raises(UserError, match="an empty text"):
        captioner.answer(given, ["."] * 4)


def test_one_bad_picture_alone_is_one_line_and_null(home: Home) -> None:
    gone = home.root / "gone.png"
    for words in (
        ("caption", home.stage2, gone),
        ("answer", home.stage2, gone, "what"),
        ("rank", home.stage1, "a", gone),
    ):
        one_line(call(*words), gone, "does not exist")
        said = call(*words, "--json")
        one_line(said, gone)
        assert None in json.loads(said.out).values()


def test_a_line_break_in_a_file_name_breaks_no_line(home: Home, tmp_path: Path) -> None:
    odd = [tmp_path / "a\nb\t.png", tmp_path / "c.png"]
    for path in odd:
        path.write_bytes(home.picture().read_bytes())
    for words in (("caption", home.stage2), ("rank", home.stage1, "a dog")):
        said = call(*words, *odd)
        assert (said.code, len(said.out.splitlines())) == (0, 2)
        assert f"{tmp_path}/a\\nb\\t.png" in said.out
    one_line(call("caption", home.stage2, tmp_path / "x\ny.png"), f"{tmp_path}/x\\ny.png: does not exist")


# --- two processes and one folder


HOLD = """
import sys, time
from pathlib import Path
from openblip2.runs import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_has_one_writer_whose_lock_ends_with_it(home: Home, tmp_path: Path) -> None:
    run, photos = tmp_path / "run", tmp_path / "index"
    for out in (run, photos):
        environment = os.environ | {"PYTHONPATH": SOURCE}
        holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, env=environment)
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            words = home.train("stage1", str(run)) if out == run else ("index", home.data, "--run", home.stage1)
            said = call(*words, *(() if out == run else ("--out", out)))
            one_line(said, out, f"process {holder.pid} on {platform.node()}", "another folder")
            assert [path.name for path in out.iterdir()] == [".lock"]
        finally:
            holder.kill()
            holder.wait()
        with locked(out):  # although the lock file of the killed process still exists
            assert (out / ".lock").read_text() == f"process {os.getpid()} on {platform.node()}"
        assert list(out.iterdir()) == []


def test_what_is_refused_leaves_nothing(home: Home, tmp_path: Path) -> None:
    def refused(*words: object, says: str) -> None:
        one_line(call(*words), says)
        assert list(tmp_path.iterdir()) == []

    out = tmp_path / "new" / "run"
    refused(*home.train("stage1", str(out), "--set", "data.held_out=0.01"), says="too few")
    refused(*home.train("stage1", str(out), "--set", "qformer.start=no/bert"), says="'no/bert' cannot be loaded")
    words = home.train("stage2", str(out), "--start", home.stage1)
    refused(*words, "--set", "language.name=no/model", says="'no/model' cannot be loaded")
    refused("prepare", home.root / "nowhere", "--out", out, says="does not exist")
    refused("index", home.root / "nowhere", "--run", home.stage1, "--out", out, says="nowhere")
    scores = tmp_path / "new" / "scores.json"
    refused("evaluate", "retrieval", home.stage1, "--data", home.root / "nowhere", "--out", scores, says="nowhere")
    # A folder that the user created is kept.
    out.mkdir(parents=True)
    one_line(call(*home.train("stage1", str(out), "--set", "qformer.start=no/bert")), "no/bert")
    assert list(tmp_path.rglob("*")) == [out.parent, out]


def test_what_stage_2_cannot_use_is_refused_before_pictures_are_encoded(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encoded(*_: object, **__: object) -> None:
        raise AssertionError("pictures were encoded")

    monkeypatch.setattr("openblip2.train.recipes.prepare", encoded)
    for changed, says in (
        ("language.template={prompt}", "must contain {image} exactly once"),
        ("language.template={imgae}{prompt}", "slots are {image}, {prompt} and {bos}"),
        ("language.template=chat", "no chat template"),
        ("language.end=wordless", "wordless"),
        ("language.exact_gelu=true", "for T5 models"),
        ("qformer.queries=6", "does not fit this stage 2"),
    ):
        words = home.train("stage2", "unusable", "--start", home.stage1, "--set", changed)
        one_line(call(*words), says)
    words = home.train("stage2", "unusable", "--set", "connector.name=mlp", "--set", 'connector.options={"depth": 2}')
    assert "connector.options: depth=2" in call(*words).err.splitlines()[-1]
    assert not (home.root / "unusable").exists()


def test_texts_are_cut_at_the_positions_of_the_qformer(home: Home, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (home.data / "records.jsonl").read_text().splitlines()]
    for row in rows[:4]:
        row["caption"] = "a red dog " * 10
    data = tmp_path / "data"
    shutil.copytree(home.data, data)
    (data / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("train", "stage1", "--data", data, *home.train("stage1", "")[6:], "--set", "data.max_tokens=1000")
    said = call(*words, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    assert "4 texts had to be cut at 20 tokens" in said.err  # the tiny BERT has 20 positions
    one_line(call("rank", tmp_path / "run", "a red dog " * 10, home.picture(0)), "20 tokens")
    words = ("evaluate", "retrieval", tmp_path / "run", "--data", data, "--out", tmp_path / "scores.json")
    assert call(*words).code == 0


def test_one_is_no_plural(home: Home, tmp_path: Path) -> None:
    assert [number_of(n, "row", "was") for n in (0, 1, 1200)] == ["0 rows were", "1 row was", "1,200 rows were"]
    assert number_of(1, "picture") == "1 picture"
    (tmp_path / "0.png").write_bytes(home.picture().read_bytes())
    (tmp_path / "0.txt").write_text("a dog")
    said = call("prepare", tmp_path, "--out", tmp_path / "shards")
    assert said.out.endswith("shards: 1 sample in 1 shard\n")
    said = call("train", "stage1", "--data", tmp_path, *home.train("stage1", "few")[4:])
    one_line(said, "1 picture is too few")
    (tmp_path / "rows.csv").write_text("image,caption\n1.png,a dog\n")
    said = call("train", "stage1", "--data", tmp_path / "rows.csv", *home.train("stage1", "few")[4:])
    one_line(said, "1 row cannot be used")


KINDS = {"run": "config.json", "cache": "features.jsonl", "index": "index.json", "capfilt": "capfilt.json"}
KINDS |= {"shards": "00000.tar", "demo": "metrics.json", "ablate": "ablation.json", "real": "real.json"}
KINDS |= {"data": "records.jsonl"}


def test_outputs_of_different_kinds_do_not_mix(home: Home, tmp_path: Path) -> None:
    sets = [word for word in home.options if word.startswith("vision.")]
    sets = [word for one in sets for word in ("--set", one)]
    commands = {
        "run": (*home.train("stage1", "x")[:4], "--out", "{}", *home.train("stage1", "x")[6:]),
        "cache": ("features", home.data, "--out", "{}", *sets),
        "shards": ("prepare", home.data, "--out", "{}"),
        "capfilt": ("capfilt", tmp_path / "shards", "--captioner", home.stage2, "--ranker", home.stage1, "--out", "{}"),
        "index": ("index", home.data, "--run", home.stage1, "--out", "{}"),
        "demo": ("demo", "--out", "{}"),
        "ablate": ("ablate", "itg", "--out", "{}"),
        "real": ("bench-real", "--out", "{}"),
    }
    for own, words in commands.items():
        for kind, mark in KINDS.items():
            folder = tmp_path / f"{own}-into-{kind}"
            folder.mkdir()
            (folder / mark).write_text("{}")
            if kind in (own, "shards" if own == "capfilt" else ""):
                continue
            one_line(call(*(folder if word == "{}" else word for word in words)), f"{folder} contains", mark, "--out")
            assert files(folder) == {folder / mark: b"{}"}
    for own in ("run", "cache", "shards"):
        data = tmp_path / f"{own}-into-its-data"
        data.mkdir()
        (data / "0.png").write_bytes(home.picture().read_bytes())
        (data / "0.txt").write_text("a dog")
        before = files(data)
        words = [data if word in ("{}", home.data) else word for word in commands[own]]
        one_line(call(*words), f"{data} is the folder of the images: give another --out")
        assert files(data) == before


# --- settings without effect


def test_settings_without_effect_are_named(home: Home) -> None:
    sets = {
        "stage1": (
            *("language.name=x", "data.caption_share=0.1", "optim.layer_decay=0.9", "stage2.lm_start_step=0"),
            *("train.parallel=fsdp2", "data.open_shards=3", "stage1.similar_start_step=1"),
        ),
        "retrieval": ("stage1.temperature=0.1", "qformer.start=x", "warm_start=true"),
        "stage2": ("stage1.temperature=0.1", "data.max_tokens=9", 'language.questions=["{}"]'),
    }
    for stage, changes in sets.items():
        more = [] if stage == "stage1" else ["--start", home.stage1]
        words = [word for one in changes for word in ("--set", one)]
        said = call(*home.train(stage, f"idle-{stage}", *more, *words, "--set", "train.steps=1"))
        assert said.code == 0, said.err
        (line,) = [line for line in said.err.splitlines() if "without effect" in line]
        assert all(one.partition("=")[0] in line for one in changes)
        assert "train.steps" not in line
    given = ("--held-out", home.data, "--set", "data.most_held_out=9", "--set", "train.steps=1")
    said = call(*home.train("stage1", "idle-held-out", *given))
    assert "data.held_out, data.most_held_out (used only in runs without --held-out)" in said.err
    shards = home.root / "idle-shards"
    assert call("prepare", home.data, "--out", shards).code == 0
    words = ("--data", shards, "--set", "data.open_shards=3", "--set", "train.steps=1")
    said = call(*home.train("stage1", "idle-of-shards", *words))
    assert (said.code, "without effect" in said.err) == (0, False), said.err
    said = call(*home.train("stage1", "idle-similar", *words[:2], "--set", "stage1.similar_start_step=0"))
    assert "stage1.similar_start_step (used only in runs without shards)" in said.err


def test_settings_that_arguments_say_are_refused(home: Home) -> None:
    for changed, remedy in (
        ("stage=stage2", "the word after train"),
        ("data.source=x", "--data"),
        ("start=x", "--start"),
    ):
        one_line(call(*home.train("stage1", "twice", "--set", changed)), f"--set {changed}", f"give it as {remedy}")
    one_line(call(*home.train("stage1", "twice", "--set", "language.question=what?")), "language.question")


def test_two_writers_of_a_shard_do_not_mix(tmp_path: Path) -> None:
    with write_tar(tmp_path / "00000.tar"):
        with (
            pytest.raises(UserError, match=rf"00000.tar is being written by process {os.getpid()} on"),
            write_tar(tmp_path / "00000.tar"),
        ):
            pass
        with write_tar(tmp_path / "00001.tar"):
            pass
        (tmp_path / "00001.tar").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["00000.tar"]


def test_a_waiting_writer_goes_on_when_the_first_one_is_done(tmp_path: Path) -> None:
    order: list[str] = []
    first = locked(tmp_path)
    first.__enter__()

    def wait() -> None:
        with locked(tmp_path, say=lambda line: order.append(line.partition(": ")[2])):
            order.append("second")

    thread = threading.Thread(target=wait)
    thread.start()
    while not order:
        time.sleep(0.01)
    order.append("first is done")
    first.__exit__(None, None, None)
    thread.join(60)
    assert order == ["waiting until it is done", "first is done", "second"]
