"""The command line: the whole path from training to answers, and one-line errors for input that cannot be used."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
from PIL import Image
from typer.testing import CliRunner

import openblip2
import tiny_runs
from openblip2 import cli
from openblip2.errors import Stopped

HEAVY = {"jinja2", "matplotlib", "torch", "transformers", "numpy", "PIL", "safetensors", "pydantic"}
SOURCE = str(Path(openblip2.__file__).parents[1])


class Said(NamedTuple):
    """The result of a command."""

    code: Any
    out: str
    err: str


def call(*arguments: object) -> Said:
    """Runs `openblip2 ARGUMENTS...` in this process."""
    out, err, code = StringIO(), StringIO(), 0
    with (
        patch.object(sys, "argv", ["openblip2", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
    return Said(code, out.getvalue(), err.getvalue())


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a new process, with this package on its path."""
    environment = {**os.environ, "PYTHONPATH": SOURCE, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("TRANSFORMERS_VERBOSITY", None)
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=100, env=environment, check=False
    )


class Home(NamedTuple):
    """Folders on disk: models, pictures, and a run of each stage, trained by the command itself."""

    root: Path
    options: list[str]
    said: list[Said]

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def stage1(self) -> Path:
        return self.root / "stage1"

    @property
    def stage2(self) -> Path:
        return self.root / "stage2"

    def picture(self, number: int = 0) -> Path:
        return self.data / f"{number}.png"

    def train(self, stage: str, out: str, *more: object) -> tuple[object, ...]:
        options = tiny_runs.for_training(self.options, stage)
        return ("train", stage, "--data", self.data, "--out", self.root / out, *options, *more)

    def broken(self, name: str, change: Callable[[Path], object], run: str = "stage2") -> Path:
        """A copy of a run that `change` has modified."""
        folder = self.root / name
        shutil.copytree(self.root / run, folder, dirs_exist_ok=True)
        change(folder)
        return folder


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("home")
    tiny_runs.home(root, count=16)
    home = Home(root, tiny_runs.options(root), [])
    home.said.append(call(*home.train("stage1", "stage1")))
    home.said.append(call(*home.train("stage2", "stage2", "--start", home.stage1)))
    return home


def test_both_stages_train(home: Home) -> None:
    for said, run in zip(home.said, (home.stage1, home.stage2), strict=True):
        assert said.code == 0, said.err
        assert said.out == f"{run}\n"
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
        assert [row["step"] for row in rows if "validation" in row] == [2, 3]
        assert (run / "model.safetensors").is_file()
    assert "vision              11,048 frozen" in home.said[0].err
    assert "language             7,100 frozen" in home.said[1].err
    assert "started in closed form" in home.said[1].err


def test_a_language_model_that_cannot_generate_is_refused_before_the_first_step(home: Home) -> None:
    import transformers as hf

    folder = home.root / "gpt1"
    shutil.copytree(home.root / "language", folder)  # for its tokenizer
    config = hf.OpenAIGPTConfig(vocab_size=len(tiny_runs.LLM_WORDS), n_embd=20, n_layer=2, n_head=5, n_positions=50)
    hf.OpenAIGPTLMHeadModel(config).save_pretrained(folder)
    said = call(*home.train("stage2", "gpt1-run", "--start", home.stage1, "--set", f"language.name={folder}"))
    assert said.code == 2
    assert "OpenAIGPTLMHeadModel cannot generate text" in said.err.splitlines()[-1]
    assert not (home.root / "gpt1-run" / "log.jsonl").exists()


def test_half_a_character_on_the_command_line_is_one_line(home: Home, tmp_path: Path) -> None:
    half, picture = "caf\udce9", home.picture()  # "café" in Latin-1
    for words in (
        ("rank", home.stage1, half, picture),
        ("attend", home.stage1, picture, "--text", half, "--out", tmp_path / "maps"),
        ("caption", home.stage2, picture, "--prompt", half),
        ("answer", home.stage2, picture, half),
        ("answer", home.stage2, picture, "what is it?", "--among", f"dog,{half}"),
    ):
        said = call(*words)
        assert said.code == 2
        assert said.err.splitlines()[-1].endswith(r"caf\udce9' is not Unicode text: write it in UTF-8")


def test_a_link_to_nothing_in_a_folder_of_pictures_is_named(home: Home, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(home.picture().read_bytes())
    (tmp_path / "1.png").symlink_to("nowhere.png")
    (tmp_path / "2.png").mkdir()
    said = call("caption", home.stage2, tmp_path)
    assert said.code == 2
    assert said.out.startswith(f"{tmp_path / '0.png'}\t")
    assert said.err.endswith(f"1 of 2 pictures cannot be read and have no result: {tmp_path / '1.png'}\n")


def test_caption_writes_a_line_for_each_picture(home: Home) -> None:
    pictures = [home.picture(n) for n in range(3)]
    said = call("caption", home.stage2, *pictures, "--beams", "2")
    assert (said.code, said.err) == (0, "")
    lines = [line.split("\t") for line in said.out.splitlines()]
    assert [line[0] for line in lines] == list(map(str, pictures))
    model: Any = openblip2_load(home.stage2)
    from openblip2.model.language import Decoding

    assert [line[1] for line in lines] == model.caption(pictures, decoding=Decoding(beams=2))
    default = call("caption", home.stage2, pictures[0])
    assert default.out.strip().split("\t")[1:] == model.caption(pictures[:1])
    begun = call("caption", home.stage2, pictures[0], "--beams", "1", "--prompt", "the red dog is")
    assert begun.out.strip().split("\t")[1:] == model.caption(pictures[:1], "the red dog is", Decoding(beams=1))


def test_answer_writes_one_line(home: Home) -> None:
    said = call("answer", home.stage2, home.picture(), "What colour is it?")
    assert (said.code, said.err) == (0, "")
    model: Any = openblip2_load(home.stage2)
    assert said.out == model.answer([home.picture()], ["what colour is it?"])[0] + "\n"


def test_rank_puts_the_best_first(home: Home) -> None:
    pictures = [home.picture(n) for n in range(6)]
    said = call("rank", home.stage1, "A red dog.", *pictures)
    assert (said.code, said.err) == (0, "")
    lines = [line.split("\t") for line in said.out.splitlines()]
    scores = openblip2_load(home.stage1).similarity(pictures, ["a red dog"])[:, 0]
    order = scores.argsort(descending=True).tolist()
    assert [line[1] for line in lines] == [str(pictures[n]) for n in order]
    assert [line[0] for line in lines] == [f"{scores[n]:.3f}" for n in order]


def test_resume_ends_in_the_same_run(home: Home, tmp_path: Path) -> None:
    whole = (home.stage1 / "model.safetensors").read_bytes()
    run = home.broken("resumed", lambda folder: (folder / "model.safetensors").unlink(), "stage1")
    assert [path.name for path in (run / "resume").iterdir()] == ["step-00000002"]
    refused = call(*home.train("stage1", "resumed"))
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "--resume" in refused.err
    said = call(*home.train("stage1", "resumed", "--resume"))
    assert said.code == 0, said.err
    assert (run / "model.safetensors").read_bytes() == whole
    again = call(*home.train("stage1", "resumed", "--resume"))
    assert (again.code, again.err) == (0, f"{run} is finished: there is nothing to resume\n")
    first = call(*home.train("stage1", "at-first", "--resume"))
    assert first.code == 0, first.err
    assert "training starts from step 0" in first.err
    assert (home.root / "at-first" / "model.safetensors").read_bytes() == whole


def test_a_bad_picture_is_skipped_and_named(home: Home) -> None:
    data = home.root / "spoilt"
    shutil.copytree(home.data, data)
    (data / "5.png").write_bytes(b"")
    with (data / "records.jsonl").open("a") as file:
        file.write('{"image": "0.png", "caption": ""}\n')
    said = call("train", "stage1", "--data", data, "--out", home.root / "spoilt-run", *home.options)
    assert said.code == 0, said.err
    skipped = [line for line in said.err.splitlines() if line.startswith("skipped (")]
    assert len(skipped) == 2
    assert str(data / "records.jsonl") in skipped[0]
    assert "17" in skipped[0]
    assert str(data / "5.png") in skipped[1]
    named = [json.loads(line) for line in (home.root / "spoilt-run" / "skipped.jsonl").read_text().splitlines()]
    assert str(data / "5.png") in json.dumps(named)
    assert len(named) == 2


def test_loading_says_nothing(home: Home) -> None:
    said = python("-m", "openblip2", "caption", str(home.stage2), str(home.picture()), "--beams", "1")
    assert said.returncode == 0, said.stderr
    assert said.stderr == ""  # no load report, no progress bar, no warning
    assert said.stdout.startswith(f"{home.picture()}\t")


def test_quiet_is_over_after_loading() -> None:
    from logging import ERROR, INFO

    from transformers.utils import logging

    from openblip2.compat import quiet_transformers

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        with quiet_transformers():
            assert logging.get_verbosity() == ERROR
            assert not logging.is_progress_bar_enabled()
        assert logging.get_verbosity() == INFO
        assert logging.is_progress_bar_enabled()
        with pytest.raises(KeyError), quiet_transformers():
            raise KeyError
        assert logging.get_verbosity() == INFO
    finally:
        logging.set_verbosity(before[0])


def test_help_imports_nothing_heavy() -> None:
    said = python("-X", "importtime", "-m", "openblip2", "--help")
    assert said.returncode == 0
    for command in ("demo", "train", "caption", "answer", "rank"):
        assert f"\n  {command} " in said.stdout
    imported = {line.split("|")[-1].strip().split(".")[0] for line in said.stderr.splitlines() if "|" in line}
    assert "typer" in imported
    assert imported & HEAVY == set()


@pytest.mark.parametrize("command", ["demo", "train", "caption", "answer", "rank"])
def test_every_command_explains_itself(command: str) -> None:
    said = CliRunner().invoke(cli.app, [command, "--help"])
    assert said.exit_code == 0
    first, _, told, *_ = said.stdout.splitlines()
    assert first.startswith("Usage: ")
    assert f" {command} [OPTIONS]" in first
    assert len(told.split()) > 3


@pytest.mark.parametrize(
    "arguments",
    [["train", "stage1"], ["caption"], ["caption", "run", "x.png", "--beams", "0"], ["fly"]],
)
def test_misuse_shows_the_usage(arguments: list[str]) -> None:
    said = CliRunner().invoke(cli.app, arguments)
    assert said.exit_code == 2
    assert "Usage: " in said.output


def test_json_before_the_command_gets_a_hint() -> None:
    said = call("--json", "search", "index", "a dog")
    assert said == (2, "", "openblip2: put --json after the command: openblip2 search ... --json\n")


def test_future_warnings_of_libraries_do_not_reach_users(monkeypatch: pytest.MonkeyPatch) -> None:
    def warned(*, prog_name: str) -> None:
        warnings.warn("this will change", FutureWarning, stacklevel=1)
        warnings.warn("this matters", UserWarning, stacklevel=1)

    monkeypatch.setattr(cli, "app", warned)
    with warnings.catch_warnings(record=True) as seen:
        call()
    assert [str(one.message) for one in seen] == ["this matters"]


def test_interruption_says_how_to_go_on(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    run = home.root / "stopped"

    def stopped(*_: object, **__: object) -> None:
        if begun:
            (run / "resume" / "step-00000002").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("openblip2.train.recipes.train_stage", stopped)
    nothing = "nothing is saved yet: run the same command again"
    for begun, says in ((False, nothing), (True, f"the last checkpoint is in {run}; add --resume to continue")):
        said = call(*home.train("stage1", "stopped"))
        assert said == (130, "", f"openblip2: interrupted; {says}\n")
        assert run.exists() == begun


def test_sigterm_has_an_exit_code_of_its_own(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr("openblip2.train.recipes.train_stage", stopped)
    assert call(*home.train("stage1", "terminated")).code == 143


def test_stage_2_takes_encoder_and_qformer_from_its_start(home: Home) -> None:
    own = [w for w in tiny_runs.for_training(home.options, "stage2") if not w.startswith(("vision.", "qformer."))]
    words = [w for w, next_word in zip(own, [*own[1:], ""], strict=True) if w != "--set" or next_word != "--set"]
    said = call(
        "train", "stage2", "--data", home.data, "--out", home.root / "like-stage1", "--start", home.stage1, *words
    )
    assert said.code == 0, said.err
    runs = [json.loads((home.root / run / "config.json").read_text()) for run in ("stage1", "like-stage1")]
    first, second = (run["settings"] for run in runs)
    assert second["vision"] == first["vision"]
    assert second["qformer"]["queries"] == first["qformer"]["queries"] == 5


# The arguments of each command, and the texts in its one-line error. `{}` is the folder of `home`.
Bad = tuple[Callable[[Home], tuple[object, ...]], tuple[str, ...]]

SETTINGS: dict[str, Bad] = {
    "stage": (
        lambda h: h.train("stage3", "x"),
        ("'stage3'", "one of stage1, stage2, caption, vqa, instruct, retrieval"),
    ),
    "preset": (lambda h: h.train("stage1", "x", "--preset", "lapdog"), ("preset 'lapdog'", "laptop, vit-l")),
    "setting": (lambda h: h.train("stage1", "x", "--set", "train.stepz=3"), ("'train.stepz'", "'train.steps'?")),
    "type": (lambda h: h.train("stage1", "x", "--set", "train.steps=abc"), ("train.steps='abc'", "integer")),
    "range": (lambda h: h.train("stage1", "x", "--set", "train.batch=0"), ("train.batch=0", "greater than")),
    "no value": (lambda h: h.train("stage1", "x", "--set", "train.steps"), ("'train.steps'", "section.field=value")),
    "world": (lambda h: ("demo", "--out", h.root / "x", "--world", "tiny"), ("'tiny'", "small or full")),
    "budget of nothing": (lambda h: ("demo", "--out", h.root / "x", "--budget", 0), ("--budget 0", "above 0")),
    "budget below nothing": (lambda h: ("demo", "--out", h.root / "x", "--budget", "-2"), ("--budget -2", "above 0")),
    "budget of no number": (lambda h: ("demo", "--out", h.root / "x", "--budget", "nan"), ("--budget nan", "above 0")),
    "endless budget": (lambda h: ("demo", "--out", h.root / "x", "--budget", "inf"), ("--budget inf", "above 0")),
    "data": (
        lambda h: ("train", "stage1", "--data", h.root / "nowhere", "--out", h.root / "x"),
        ("{}/nowhere", "does not exist"),
    ),
    "empty data": (lambda h: ("train", "stage1", "--data", "", "--out", h.root / "x"), ("--data is empty", "give a")),
    "out is a file": (lambda h: h.train("stage1", "data/0.png"), ("{}/data/0.png", "give another folder")),
    "few pictures": (lambda h: h.train("stage1", "x", "--set", "data.held_out=0.1"), ("16 pictures", "data.held_out")),
    "vision": (lambda h: h.train("stage1", "x", "--set", f"vision.name={h.data}"), ("{}/data", "image encoder")),
    "start": (lambda h: h.train("stage2", "x", "--start", h.root / "nowhere"), ("{}/nowhere", "not a run")),
    "start is stage 2": (lambda h: h.train("stage2", "x", "--start", h.stage2), ("{}/stage2", "is not a stage-1 run")),
    "start of stage 1": (lambda h: h.train("stage1", "x", "--start", h.stage1), ("{}/stage1", "only stage 2")),
    "layer of another stage 1": (
        lambda h: h.train("stage2", "x", "--start", h.stage1, "--set", "vision.layer=1"),
        ("vision.layer=1", "{}/stage1", "set vision.layer=-2"),
    ),
    "whitening of another stage 1": (
        lambda h: h.train("stage2", "x", "--start", h.stage1, "--set", "vision.whiten=false"),
        ("vision.whiten=false", "{}/stage1", "set vision.whiten=true"),
    ),
    "damaged checkpoint": (
        lambda h: h.train("stage1", h.broken("spoilt-checkpoint", spoil_checkpoint, "stage1").name, "--resume"),
        ("{}/spoilt-checkpoint/resume/step-00000002", "model.safetensors", "--overwrite"),
    ),
    "other settings": (
        lambda h: h.train("stage1", "stage1", "--set", "train.steps=4", "--resume"),
        ("{}/stage1/config.json", "other settings (train.steps); give the same ones"),
    ),
}


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def spoil_checkpoint(run: Path) -> None:
    (run / "model.safetensors").unlink()
    cut(run / "resume" / "step-00000002" / "model.safetensors", 0.9)


def set_queries(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["settings"]["qformer"]["queries"] = 6
    (run / "config.json").write_text(json.dumps(config))


def set_size(run: Path, name: str, size: object) -> None:
    config = json.loads((run / "config.json").read_text())
    config["sizes"][name] = size
    (run / "config.json").write_text(json.dumps(config))


def captioned(change: Callable[[Path], object]) -> Callable[[Home], tuple[object, ...]]:
    return lambda h: ("caption", h.broken("broken", change), h.picture())


WEIGHTS = "{}/broken/model.safetensors"
RUNS: dict[str, Bad] = {
    "text file": (
        lambda h: ("caption", h.data / "records.jsonl", h.picture()),
        ("records.jsonl is not a run", "a LAVIS .pth"),
    ),
    "missing": (lambda h: ("caption", h.root / "nowhere", h.picture()), ("{}/nowhere is not a run", "a LAVIS .pth")),
    "pictures": (lambda h: ("rank", h.data, "a dog", h.picture()), ("{}/data is not a run", "a LAVIS .pth")),
    "no config": (captioned(lambda f: (f / "config.json").unlink()), ("{}/broken is not a run", "a LAVIS .pth")),
    "not JSON": (captioned(lambda f: (f / "config.json").write_text("{")), ("{}/broken/config.json", "not JSON")),
    "other JSON": (
        captioned(lambda f: (f / "config.json").write_text("[]")),
        ("{}/broken is not a run", "a LAVIS .pth"),
    ),
    "unfinished": (captioned(lambda f: (f / "model.safetensors").unlink()), (WEIGHTS, "has its training finished?")),
    "truncated": (captioned(lambda f: cut(f / "model.safetensors", 0.5)), (WEIGHTS, "truncated")),
    "zero bytes": (captioned(lambda f: cut(f / "model.safetensors", 0)), (WEIGHTS, "not a complete safetensors file")),
    "heads": (captioned(lambda f: set_size(f, "heads", 7)), ("{}/broken/config.json", "not a multiple of 7 heads")),
    "no layers": (
        captioned(lambda f: set_size(f, "layers", 0)),
        ("{}/broken/config.json", "sizes.layers is 0", "1 or"),
    ),
    "unknown size": (captioned(lambda f: set_size(f, "depth", 3)), ("{}/broken/config.json", "sizes must contain")),
    "other sizes": (captioned(set_queries), (WEIGHTS, "qformer.queries has shape [1, 5, 30]", "[1, 6, 30]")),
    "other model": (
        captioned(lambda f: shutil.copy(f.parent / "stage1" / "model.safetensors", f)),
        (WEIGHTS, "missing: projection.weight"),
    ),
    "no tokenizer": (
        lambda h: ("rank", h.broken("mute", lambda f: shutil.rmtree(f / "tokenizer"), "stage1"), "a dog", h.picture()),
        ("{}/mute/tokenizer", "no tokenizer"),
    ),
    "stage 1 captions": (lambda h: ("caption", h.stage1, h.picture()), ("{}/stage1 is a stage-1 run", "stage-2 run")),
    "stage 1 answers": (lambda h: ("answer", h.stage1, h.picture(), "what?"), ("{}/stage1 is a stage-1 run",)),
    "stage 2 ranks": (
        lambda h: ("rank", h.stage2, "a dog", h.picture()),
        ("{}/stage2 is a stage-2 run", "stage-1 run"),
    ),
}


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few hundred bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def seen(content: Callable[[bytes], bytes]) -> Callable[[Home], tuple[object, ...]]:
    def arguments(h: Home) -> tuple[object, ...]:
        noise = Image.effect_noise((40, 40), 50)
        noise.save(h.root / "bad.png")
        (h.root / "bad.png").write_bytes(content((h.root / "bad.png").read_bytes()))
        return "caption", h.stage2, h.root / "bad.png"

    return arguments


INPUTS: dict[str, Bad] = {
    "missing": (lambda h: ("caption", h.stage2, h.root / "nowhere.png"), ("{}/nowhere.png", "does not exist")),
    "folder": (lambda h: ("rank", h.stage1, "a dog", h.data), ("{}/data", "is not a file")),
    "truncated": (seen(lambda b: b[: len(b) // 2]), ("{}/bad.png", "truncated")),
    "zero bytes": (seen(lambda b: b""), ("{}/bad.png", "empty")),
    "no picture": (seen(lambda b: b"hello, world"), ("{}/bad.png", "not a picture")),
    "bomb": (seen(lambda b: bomb()), ("{}/bad.png", "pixels", "67,108,864")),
    "bomb to rank": (lambda h: ("rank", h.stage1, "a dog", *seen(lambda b: bomb())(h)[2:]), ("{}/bad.png", "pixels")),
    "empty question": (lambda h: ("answer", h.stage2, h.picture(), " "), ("empty text",)),
    "long question": (
        lambda h: ("answer", h.stage2, h.picture(), "is it " * 30),
        ("is it is it", "60 words", "at most 50"),
    ),
    "empty text": (lambda h: ("rank", h.stage1, "...", h.picture()), ("empty text, '...'",)),
    "long text": (lambda h: ("rank", h.stage1, "a red dog " * 11, h.picture()), ("a red dog", "too long", "20 tokens")),
    "very long text": (lambda h: ("rank", h.stage1, "dog " * 60, h.picture()), ("dog dog", "60 words", "at most 50")),
}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        pytest.param(*bad, id=f"{group}: {name}")
        for group, bads in (("settings", SETTINGS), ("run", RUNS), ("input", INPUTS))
        for name, bad in bads.items()
    ],
)
def test_bad_input_is_one_line(
    home: Home, arguments: Callable[[Home], tuple[object, ...]], told: tuple[str, ...]
) -> None:
    shutil.rmtree(home.root / "broken", ignore_errors=True)
    said = call(*arguments(home))
    assert said.code == 2
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("openblip2: ")
    missing = [part for part in told if part.format(home.root) not in line]
    assert missing == [], line


def openblip2_load(run: Path) -> Any:
    from openblip2.inference.load import load

    return load(run)
