"""CapFilt on Ray: the bytes of one process, whoever dies; and what cannot be used is one line."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny_capfilt
from openblip2.capfilt.how import How
from openblip2.capfilt.models import Models
from openblip2.capfilt.run import capfilt
from openblip2.errors import UserError
from openblip2.progress import Progress
from test_cli import call
from tiny_capfilt import content, run
from tiny_shards import sample, write_shard

pytestmark = pytest.mark.slow  # each test starts a Ray
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - else they wait for all others


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("ray.data", exc_type=ImportError)
    return tiny_capfilt.build(tmp_path_factory.mktemp("ray"))


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    run(home, home / "whole")
    return home / "whole"


@pytest.fixture
def cluster() -> Iterator[None]:
    """A Ray that is there already, as on a cluster: it has no CPU more than the workers would like."""
    import ray  # pyright: ignore[reportMissingImports]

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_two_workers_make_what_one_process_makes(home: Path, whole: Path, tmp_path: Path) -> None:
    both = ["--captioner", home / "stage2", "--ranker", home / "stage1"]
    said = call("capfilt", home / "set", *both, "--out", tmp_path / "out", "--captions", 3, "--ray", 2)
    assert said.code == 0, said.err
    assert "52 pictures in 3 shards" in said.out
    assert content(tmp_path / "out") == content(whole)


def test_a_worker_that_is_killed_loses_nothing(home: Path, tmp_path: Path, cluster: None) -> None:
    (tmp_path / "set").mkdir()
    for shard in range(6):
        write_shard(tmp_path / "set" / f"{shard:05}.tar", [sample(shard, n, "a dog") for n in range(34)])
    how = How(captions=2)
    models = tiny_capfilt.models(home)
    quiet = Progress(quiet=True)
    capfilt(str(tmp_path / "set"), models, tmp_path / "one", how, quiet)
    killed: list[int] = []

    def kill() -> None:
        """Kills an actor while it is at a shard, and another one later."""
        out = tmp_path / "two"
        for done in (1, 3):
            while len(list(out.glob("*_stats.json"))) < done or not list(out.glob(".*.new")):
                time.sleep(0.005)
            killed.append(_worker(killed))
            os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    written = capfilt(str(tmp_path / "set"), models, tmp_path / "two", how, quiet, workers=2)
    thread.join(timeout=60)
    assert len(killed) == 2
    assert written.counts["pictures"] == 6 * 34
    for folder in ("one", "two"):
        for left in (tmp_path / folder).glob(".*.new"):
            left.unlink()
    assert content(tmp_path / "two") == content(tmp_path / "one")


def _worker(but: list[int]) -> int:
    """A process of an actor, as Ray names it."""
    assert sys.platform == "linux"
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "cmdline").read_bytes()
            ours = _ancestor(process) and int(process.name) not in but
        except OSError:
            continue
        if name.startswith(b"ray::") and b"Worker" in name and ours:
            return int(process.name)
    raise AssertionError("no actor")


def _ancestor(process: Path) -> bool:
    """Whether a process came from this one: others may have a Ray of their own."""
    number = int(process.name)
    while number > 1:
        if number == os.getpid():
            return True
        number = int(Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return False


def test_what_a_worker_refuses_is_one_line(home: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "00000.tar").mkdir()
    with pytest.raises(UserError, match=r"not one of 1 shards can be read; .*cannot be opened"):
        capfilt(
            str(tmp_path / "set"), tiny_capfilt.models(home), tmp_path / "a", How(), Progress(quiet=True), workers=2
        )
    config = (home / "clip" / "config.json").read_text()
    broken = tmp_path / "clip"
    broken.mkdir()
    (broken / "config.json").write_text(config)
    models = Models(str(home / "stage2"), str(broken))
    with pytest.raises(UserError, match=r"ranker .* cannot be loaded"):
        capfilt(str(home / "set"), models, tmp_path / "b", How(), Progress(quiet=True), workers=2)
