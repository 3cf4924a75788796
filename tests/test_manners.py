"""How commands behave: examples, completion, JSON, progress, quiet, interruptions, exit codes."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
from rich.console import Console
from typer.testing import CliRunner

from openblip2 import cli, progress
from openblip2.commands import learn, measure, scale
from openblip2.evaluate.result import PartialTexts
from openblip2.inference.captioner import Captioner
from openblip2.progress import Progress
from test_cli import SOURCE, Home, call, home, python  # noqa: F401  (the fixture)

COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_command_ends_with_an_example_that_parses(name: str) -> None:
    said = CliRunner().invoke(cli.app, [name, "--help"])
    *_, heading, example = said.stdout.rstrip().splitlines()
    assert heading == "  Example:"
    assert example.startswith(f"    openblip2 {name} ")
    assert len(example) <= 80
    COMMANDS[name].make_context(name, shlex.split(example)[2:])


def complete(shell: str, words: str) -> list[str]:
    """The completions that a shell gets for the last of these words."""
    environment = {
        **os.environ,
        "PYTHONPATH": SOURCE,
        "_OPENBLIP2_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": words,  # bash
        "COMP_CWORD": str(len(words.split()) - 1),
        "_TYPER_COMPLETE_ARGS": words,  # zsh and fish
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    module = [sys.executable, "-m", "openblip2"]
    return subprocess.run(module, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_and_values(shell: str) -> None:
    named = (re.findall(r'(?:^|")(cap\w+)(?="|\t|$)', line) for line in complete(shell, "openblip2 ca"))
    assert [name for names in named for name in names] == ["capfilt", "caption"]
    presets = " ".join(complete(shell, "openblip2 train stage1 --preset vit-g-opt"))
    assert re.findall(r"vit-[\w.-]+", presets) == ["vit-g-opt-2.7b", "vit-g-opt-6.7b"]


def test_what_is_completed_is_what_there_is() -> None:
    from openblip2.apps.bench.models import SIZES
    from openblip2.apps.demo.plan import DemoPlan
    from openblip2.apps.scenes.vocabulary import WORLDS
    from openblip2.apps.studies.design import STUDIES
    from openblip2.capfilt.shard import How
    from openblip2.data.features import CACHE_DTYPES
    from openblip2.evaluate.run import Task
    from openblip2.evaluate.vqa import METRICS
    from openblip2.inference.attend import BY
    from openblip2.presets import FINE_TUNING, PRESETS
    from openblip2.weights.convert import Target

    def values(kind: type, name: str) -> tuple[str, ...]:
        return get_args(kind.__annotations__[name])

    assert values(DemoPlan, "world") == tuple(learn.WORLDS)
    assert {world: len(nouns) for world, nouns in WORLDS.items()} == learn.WORLDS
    assert (*PRESETS, *FINE_TUNING) == learn.TRAININGS
    assert tuple(CACHE_DTYPES) == learn.STORED
    assert get_args(Task) == measure.TASKS
    assert tuple(METRICS) == measure.METRICS
    assert tuple(SIZES) == measure.SIZES
    assert tuple(PRESETS) == scale.STAGES
    assert values(How, "filter") == scale.FILTERS
    assert tuple(STUDIES) == measure.STUDIES
    assert get_args(Target) == learn.TARGETS
    assert BY == ("itc", "itm")


def test_json_is_all_that_stands_on_standard_output(home: Home, tmp_path: Path) -> None:  # noqa: F811
    def lines(*words: object, quiet: bool = True) -> list[dict[str, Any]]:
        said = call(*words, "--json")
        assert said.code == 0, said.err
        assert not quiet or said.err == ""
        return [json.loads(line) for line in said.out.splitlines()]

    pictures = [home.picture(n) for n in range(2)]
    told = [line.split("\t") for line in call("caption", home.stage2, *pictures).out.splitlines()]
    rows = lines("caption", home.stage2, *pictures)
    assert all(row.pop("logprob") < 0 for row in rows)
    assert rows == [{"path": path, "caption": text} for path, text in told]
    (answer,) = lines("answer", home.stage2, pictures[0], "what colour is it?")
    assert answer["answer"] + "\n" == call("answer", home.stage2, pictures[0], "what colour is it?").out
    told = [line.split("\t") for line in call("rank", home.stage1, "a red dog", *pictures).out.splitlines()]
    assert [
        (f"{row['similarity']:.3f}", row["path"]) for row in lines("rank", home.stage1, "a red dog", *pictures)
    ] == [(score, path) for score, path in told]
    (maps,) = lines("attend", home.stage1, pictures[0], "--text", "a dog", "--out", tmp_path / "maps")
    assert all(Path(file).is_file() for file in maps["files"])
    assert maps["text"] == "a dog"
    (made,) = lines("prepare", home.data, "--out", tmp_path / "shards", "--size", 10)
    assert made == {"out": str(tmp_path / "shards"), "samples": 16, "shards": 2, "skipped": []}
    sets = ["--set", f"vision.name={home.root / 'vision'}", "--set", "vision.image_size=12", "--set", "vision.layer=-2"]
    (takes,) = lines("features", home.data, "--out", tmp_path / "cache", *sets, quiet=False)
    assert takes["pictures"] == 16
    assert takes["bytes"] == 16 * 10 * 24 * 2
    assert takes["skipped"] == 0
    (converted,) = lines("convert", home.stage2, tmp_path / "exported", "--to", "projected")
    assert Path(converted["out"]).is_dir()
    assert isinstance(converted["notes"], list)
    result = tmp_path / "result.json"
    (scored,) = lines("evaluate", "retrieval", home.stage1, "--data", home.data, "--out", result, "--rerank", 0)
    assert scored["scores"] == json.loads(result.read_text())["scores"]
    compared = lines("compare", result, result)
    assert [row["difference"] for row in compared] == [0] * len(compared)
    assert {row["better"] for row in compared} == {"not significant"}
    findings = lines("doctor", home.stage1, "--out", tmp_path / "doctor.html")
    assert {"level", "about", "seen"} <= findings[0].keys()
    (plan,) = lines("plan", "--preset", "stage1-vit-g", "--gpus", "16xA100-40G")
    assert plan["step"]
    (figures,) = lines("bench", "--size", "tiny", "--case", "rerank", "--repeats", 1)
    assert list(figures["cases"]) == ["rerank"]


def test_index_in_json(home: Home, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("faiss")
    said = call("index", home.data, "--run", home.stage1, "--out", tmp_path / "index", "--json")
    (row,) = map(json.loads, said.out.splitlines())
    assert said.err == ""
    assert (row["pictures"], row["added"], row["skipped"]) == (16, 16, [])


def test_quiet_leaves_errors_alone(home: Home) -> None:  # noqa: F811
    loud = call(*home.train("stage1", "loud"))
    assert "vision " in loud.err
    quiet = call("--quiet", *home.train("stage1", "quiet"))
    assert (quiet.code, quiet.out, quiet.err) == (0, f"{home.root / 'quiet'}\n", "")
    refused = call("-q", *home.train("stage3", "quiet"))
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "vision " in call(*home.train("stage1", "again")).err  # the next command prints as usual


def on_terminal() -> tuple[Progress, StringIO]:
    shown, says = StringIO(), Progress()
    says.console = Console(file=shown, force_terminal=True, width=140, soft_wrap=True)
    says.fancy = True
    return says, shown


def test_a_bar_on_a_terminal_has_a_rate_and_the_time_left(capfd: pytest.CaptureFixture[str]) -> None:
    says, shown = on_terminal()
    says.doing("loading")
    with says.steps("captions", 64, unit="pictures") as bar:
        bar.advance({"loss": 0.5}, 32)
        print('{"path": "a.png"}')
        bar.advance({"loss": 0.25}, 32)
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown.getvalue())
    assert "loading ..." in plain
    assert re.search(r"captions \S+ +64/64 [\d.]+ pictures/s loss 0.250 0:00:00 left 0:00:00", plain)
    assert capfd.readouterr().out == '{"path": "a.png"}\n'  # standard output gets only the results, not the bar


def test_elsewhere_short_work_is_silent_and_long_work_says_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    says = Progress()
    says.doing("loading")
    with says.steps("training", 4, unit="steps") as bar:
        for _ in range(4):
            now += 3
            bar.advance()
    assert capsys.readouterr().err == ""
    with says.steps("training", 20, 10, unit="steps") as bar:
        for _ in range(10):
            now += 4
            bar.advance({"loss": 0.5})
    assert capsys.readouterr().err.splitlines() == [
        "training 14/20 15.0 steps/min loss 0.500 24 s left",
        "training 18/20 15.0 steps/min loss 0.500 8 s left",
        "training 20/20 15.0 steps/min loss 0.500 0 s left",
    ]


def test_rates_are_of_a_readable_size() -> None:
    found = [progress._rate(count, seconds, "pictures") for count, seconds in ((90, 60), (30, 60), (3, 600))]
    assert found == ["1.5 pictures/s", "30.0 pictures/min", "18.0 pictures/h"]


LONG: dict[str, tuple[str, tuple[str, ...], str]] = {
    "caption": ("inference.captioner.Captioner.captions", ("{stage2}", "{data}/0.png"), ""),
    "rank": ("inference.matcher.Matcher.similarity", ("{stage1}", "a dog", "{data}/0.png"), ""),
    "features": (
        "train.encode.write_features",
        ("{data}", "--out", "{out}", "--set", "vision.name={root}/vision", "--set", "vision.layer=-2"),
        "o/x",
    ),
    "prepare": ("data.web.write_shards.write_shards", ("{data}", "--out", "{out}"), "o/x"),
    "capfilt": (
        "capfilt.capfilt",
        ("{data}", "--captioner", "{stage2}", "--ranker", "{stage1}", "--out", "{out}"),
        "o/x",
    ),
    "evaluate": (
        "evaluate.run.evaluate",
        ("caption", "{stage2}", "--data", "{data}", "--out", "{out}"),
        "o.partial.jsonl",
    ),
    "bench": ("apps.bench.Bench", ("--size", "tiny", "--out", "{out}"), "o"),
    "bench-real": ("apps.studies.real.bench_real", ("--out", "{out}"), "o/x"),
    "ablate": ("apps.studies.ablate", ("itg", "--out", "{out}"), "o/x"),
    "demo": ("apps.demo.run_demo", ("--out", "{out}"), "o/stage1/resume/x"),
    "plan": ("plan.make_plan", ("--preset", "stage1-vit-g", "--gpus", "H100"), ""),
}


def call_long(name: str, home: Home, tmp_path: Path) -> Any:  # noqa: F811
    """Calls one of `LONG`, with its output at `tmp_path / "o"`."""
    places = {"stage1": home.stage1, "stage2": home.stage2, "data": home.data, "root": home.root, "out": tmp_path / "o"}
    return call(name, *(word.format(**places) for word in LONG[name][1]))


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("name", LONG)
def test_an_interrupted_command_says_in_one_line_what_is_kept(
    name: str,
    begun: bool,
    home: Home,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, _, kept = LONG[name]

    def stopped(*_: object, **__: object) -> None:
        if begun and kept:
            (tmp_path / kept).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / kept).write_text("something")
        raise KeyboardInterrupt

    monkeypatch.setattr(f"openblip2.{target}", stopped)
    said = call_long(name, home, tmp_path)
    assert said.code == 130
    (line,) = said.err.splitlines()
    assert re.fullmatch(r"openblip2: interrupted(; .+)?", line)
    assert (str(tmp_path / "o") in line) == (begun and bool(kept))
    assert line.endswith("nothing is saved yet: run the same command again") == (not begun and bool(kept))


@pytest.mark.parametrize("name", LONG)
def test_sigterm_ends_every_command_as_ctrl_c_does(
    name: str,
    home: Home,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(f"openblip2.{LONG[name][0]}", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    said = call_long(name, home, tmp_path)
    assert (said.code, said.err.count("\n")) == (143, 1)
    assert said.err.startswith("openblip2: interrupted")
    assert signal.getsignal(signal.SIGTERM) is before


def interrupted_after(calls: int, real: Callable[..., Any], counted: list[int]) -> Callable[..., Any]:
    def wrapped(*given: Any, **more: Any) -> Any:
        counted.append(1)
        if len(counted) > calls:
            raise KeyboardInterrupt
        return real(*given, **more)

    return wrapped


def test_an_interrupted_index_keeps_the_pictures_it_has_read(
    home: Home,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("faiss")
    from openblip2.apps import search
    from openblip2.apps.search import index

    monkeypatch.setattr(search, "GROUP", 4)
    words = ("index", home.data, "--run", home.stage1, "--out", tmp_path / "index")
    with monkeypatch.context() as patch:
        patch.setattr(index.Index, "add", interrupted_after(2, index.Index.add, []))
        said = call(*words)
    assert (said.code, said.err.count("\n")) == (130, 1)
    assert len(index.open_index(tmp_path / "index").rows) == 8
    assert "16 pictures; 8 read, 0 deleted or changed" in call(*words).out


def test_an_interrupted_evaluation_keeps_its_texts(
    home: Home,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr("openblip2.evaluate.caption.GROUP", 6)

    def evaluate(name: str, calls: int = 9) -> tuple[int, list[int]]:
        counted: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(Captioner, "generate", interrupted_after(calls, Captioner.generate, counted))
            words = ("--data", home.data, "--out", tmp_path / f"{name}.json", "--beams", 1)
            return call("evaluate", "caption", home.stage2, *words).code, counted

    assert evaluate("whole") == (0, [1] * 3)
    assert evaluate("cut", 2) == (130, [1] * 3)
    assert evaluate("cut") == (0, [1])
    whole, cut = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "cut"))
    assert whole["scores"] == cut["scores"]
    assert not (tmp_path / "cut.partial.jsonl").exists()


def test_kept_texts_are_of_the_same_samples_and_whole(tmp_path: Path) -> None:
    path, asked = tmp_path / "a.partial.jsonl", list[str]()

    def texts(of: str, samples: str) -> list[str]:
        def write(rows: slice) -> list[str]:
            asked.append(samples[rows])
            return [one.upper() for one in samples[rows]]

        return PartialTexts(path, of).texts("texts", "texts", list(samples), 2, write, Progress(quiet=True), "greedy")

    assert texts("a", "pqrst") == list("PQRST")
    assert texts("a", "pqrst") == list("PQRST")
    assert asked == ["pq", "rs", "t"]
    path.write_text(path.read_text()[:-3])  # the last line is cut off
    assert texts("a", "pqrst") == list("PQRST")
    assert asked == ["pq", "rs", "t", "t"]
    assert texts("b", "pqrst") == list("PQRST")  # texts of run a are not reused for run b
    assert asked[4:] == ["pq", "rs", "t"]
    assert texts("b", "pqrsu") == list("PQRSU")
    assert asked[7:] == ["pq", "rs", "u"]


def test_a_reader_that_goes_away_is_no_traceback(home: Home) -> None:  # noqa: F811
    words = [sys.executable, "-m", "openblip2", "plan", "--preset", "stage1-vit-g", "--gpus", "H100", "--json"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": SOURCE}
    ) as started:
        assert started.stdout is not None
        assert started.stderr is not None
        started.stdout.close()
        assert started.stderr.read() == b""
    assert started.returncode == 1


def test_mistaken_words_end_with_2() -> None:
    for words in (["fly"], ["caption"], ["plan", "--preset", "x", "--gpus", "H100"], ["--loud"]):
        said = python("-m", "openblip2", *words)
        assert said.returncode == 2, words
        assert said.stdout == ""
        assert "Traceback" not in said.stderr


def test_a_full_disk_is_one_line(home: Home) -> None:  # noqa: F811
    words = [sys.executable, "-m", "openblip2", "answer", str(home.stage2), str(home.picture()), "what is it?"]
    environment = {**os.environ, "PYTHONPATH": SOURCE, "HF_HUB_OFFLINE": "1"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("openblip2: the output cannot be written (No space left on device): free disk space")
    assert done.stderr.count("\n") == 1


def test_chat_without_standard_input_is_one_line(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(sys, "stdin", None)
    said = call("chat", home.stage2, home.picture())
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "chat reads questions from standard input, but it is closed" in said.err
