"""CapFilt that is killed at any moment and then continued writes the same files as an undisturbed run.

OPENBLIP2_KILLS=200 sets the number of kills. `pytest -m slow -s` prints at which points they happened.
"""

import os
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

import tiny_capfilt
from lives import Lives, die_at
from tiny_capfilt import content, run

KILLS = int(os.environ.get("OPENBLIP2_KILLS", "60"))
MODULES = (
    "test_capfilt_kill",
    "transformers.models.vit.modeling_vit",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "PIL.JpegImagePlugin",
)


def life(root: str, out: str) -> None:
    torch.set_num_threads(1)
    run(Path(root), Path(out))


def short_life(root: str, out: str, count: int) -> None:
    torch.set_num_threads(1)
    die_at(count, out)
    run(Path(root), Path(out))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that also has the set of an uninterrupted run, in `whole`."""
    home = tiny_capfilt.build(tmp_path_factory.mktemp("capfilt"))
    run(home, home / "whole")
    return home


def settled(out: Path) -> dict[str, bytes]:
    """All files of an output folder, except drafts and locks of killed processes."""
    return {name: body for name, body in content(out).items() if not name.endswith((".new", ".lock"))}


@pytest.mark.slow
def test_killed_at_an_operation_on_its_files(root: Path, tmp_path: Path) -> None:
    drawn = random.Random(3)
    with Lives(*MODULES) as server:
        lives, number = 0, 0
        while lives < 6:
            out, codes = tmp_path / f"out-{number}", [-9]
            while codes == [-9]:
                codes, _ = server.live(short_life, root, out, drawn.randint(5, 60))
                lives += codes == [-9]
            assert codes == [0]
            assert settled(out) == content(root / "whole")
            number += 1


@pytest.mark.slow
def test_killed_at_any_time(root: Path, tmp_path: Path) -> None:
    drawn = random.Random(4)
    fell = Counter[str]()
    with Lives(*MODULES) as server:
        number = 0
        while fell.total() < KILLS:
            out, codes = tmp_path / f"out-{number}", [-9]
            while codes == [-9]:
                codes, _ = server.live(life, root, out, seconds=drawn.uniform(0.05, 1.2))
                if codes == [-9]:
                    done = len(list(out.glob("*_stats.json")))
                    writing = any(out.glob(".*.tar.new")) if out.exists() else False
                    fell[f"{done} shards done{', one begun' * writing}"] += 1
            assert codes == [0]
            assert settled(out) == content(root / "whole")
            number += 1
    print(f"{fell.total()} kills over {number} runs: {dict(sorted(fell.items()))}")
