"""The training command on shards: held-out pictures, resuming, several processes and refused input."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import distributed as dist

import processes
import tiny_runs
from openblip2.data.batches import joined_ids
from openblip2.data.records import read_records
from openblip2.data.web.mixture import count_parts, read_parts
from openblip2.data.web.pairs import ShardPairs
from openblip2.train import loop
from openblip2.train.bookkeeping import pictures_trained_on
from test_cli import call
from tiny_shards import sample, write_shard


class Home(NamedTuple):
    root: Path
    options: list[str]

    def train(self, out: str, *more: object) -> Path:
        said = call("train", "stage1", "--data", self.root / "set", "--out", self.root / out, *self.options, *more)
        assert said.code == 0, said.err
        return self.root / out


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("shards")
    tiny_runs.vision(root / "vision")
    tiny_runs.bert(root / "bert")
    (root / "set").mkdir()
    words = [f"{colour} {noun}" for colour in tiny_runs.COLOURS for noun in tiny_runs.NOUNS]
    for shard in range(4):
        samples = [sample(shard, n, f"a {words[n % 6]}", f"the {words[n % 6]}") for n in range(6)]
        if shard == 2:
            samples[4] = samples[4]._replace(image=b"no picture")
        write_shard(root / "set" / f"{shard:05}.tar", samples)
    return Home(root, [*tiny_runs.options(root), "--set", "data.held_out=0.2", "--set", "data.open_shards=2"])


def losses(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds",)} for row in rows]


def test_a_run_on_shards_and_the_same_run_interrupted(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = home.train("whole", "--set", "train.steps=9")
    assert len([row for row in losses(whole) if "loss" in row]) == 9
    held, _ = read_records(whole / "held_out")
    assert [record.id for record in held] == [f"00000/{n:09}" for n in range(4)]  # a share of 0.2 of 24
    (told,) = json.loads((whole / "shards.json").read_text())["parts"]
    assert (told["counts"], told["held_out"]) == ([6, 6, 6, 6], [4, 0, 0, 0])
    skipped = (whole / "skipped.jsonl").read_text().splitlines()
    assert len(skipped) == 1
    assert "002000004.jpg" in skipped[0]
    assert not (whole / "trained_on.txt").exists()
    assert pictures_trained_on(held, [whole]) is None  # unknown for runs on shards

    step = loop.learning_rate

    def dies(number: int, *rest: object) -> float:
        if number == 5:
            raise KeyboardInterrupt
        return step(number, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(loop, "learning_rate", dies)
    said = call(
        "train",
        "stage1",
        "--data",
        home.root / "set",
        "--out",
        home.root / "cut",
        *home.options,
        "--set",
        "train.steps=9",
    )
    assert said.code == 130
    monkeypatch.undo()
    cut = home.train("cut", "--set", "train.steps=9", "--resume")
    assert losses(cut) == losses(whole)
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_words_beyond_the_fiftieth_are_named(home: Home, tmp_path: Path) -> None:
    words = [f"w{n}" for n in range(80)]
    long = [sample(0, n, " ".join(words if n == 2 else words[:50])) for n in range(4)]
    write_shard(tmp_path / "0.tar", long)
    problems: list[str] = []
    pairs = ShardPairs(count_parts(read_parts(str(tmp_path / "0.tar")), print), 4, 0, 8, 1, problems.append)
    captions = [caption for n in range(3) for caption in pairs(n).captions]
    assert set(captions) == {" ".join(words[:50])}
    (line,) = problems
    assert "000000002.jpg: a caption is cut after" in line
    assert line.endswith("w48 w49'; give at most 50 words and 1,000 characters")


def test_pictures_to_validate_on_may_be_given(home: Home) -> None:
    data = tiny_runs.pictures(home.root / "data", 6)
    run = home.train("given", "--held-out", data, "--set", "vision.whiten=true", "--set", "warm_start=true")
    assert json.loads((run / "shards.json").read_text())["parts"][0]["held_out"] == [0, 0, 0, 0]
    assert not (run / "held_out").exists()
    assert any("validation" in row for row in losses(run))


def test_what_shards_cannot_do(home: Home) -> None:
    shards, options = home.root / "set", home.options
    for arguments, message in (
        (("train", "stage1", "--data", shards, "--features", "x"), "--features"),
        (("train", "stage1", "--data", shards, "--split", "train"), "--split"),
        (("train", "stage1", "--data", shards, "--set", "data.held_out=0.01"), "held out"),
        (("train", "stage1", "--data", "nowhere://x.tar"), "nowhere"),
    ):
        said = call(*arguments[:2], *options, *arguments[2:], "--out", home.root / "refused")
        assert said.code == 2
        assert message in said.err.splitlines()[-1]


def _ids(rank: int, folder: str) -> tuple[torch.Tensor, list[str]]:
    parts = count_parts(read_parts(folder), print)
    loader = ShardPairs(parts, 6, 0, 8, 2, print, part=(rank, dist.get_world_size()))
    batch = loader(1)
    return joined_ids(batch, torch.device("cpu")), batch.captions


def test_pairs_that_belong_together_are_found_over_processes(home: Home) -> None:
    found = processes.run(2, _ids, home.root / "meet", str(home.root / "set"))
    joined = ShardPairs(count_parts(read_parts(str(home.root / "set")), print), 6, 0, 8, 2, print)(1)
    assert [caption for _, captions in found for caption in captions] == joined.captions
    assert torch.cat([ids for ids, _ in found]).tolist() == joined.ids.tolist()
