"""The benchmark runs, checks that outputs are equal, and reports its measurements. Timings are not asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openblip2.apps.bench import alternate, peak_memory, run_bench
from openblip2.apps.bench.cases import CACHED, CASES
from openblip2.errors import UserError
from openblip2.progress import Progress

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict, list[str]]:
    out = tmp_path_factory.mktemp("bench") / "bench.json"
    said: list[str] = []
    figures = run_bench("tiny", [], out, 1, "fp32", said.append, QUIET)
    return figures, json.loads(out.read_text()), said


@pytest.mark.slow
def test_every_case_is_equal_before_it_is_timed(found: tuple[dict, dict, list[str]]) -> None:
    figures, written, said = found
    assert figures == written
    assert list(figures["cases"]) == list(CASES)
    for name, case in figures["cases"].items():
        assert case["difference"] <= (1e-3 if name in CACHED else 1e-4), name  # a cache stores fp16
        (other,) = case["times_faster"]
        assert case["times_faster"][other] == pytest.approx(case[other]["seconds"] / case["openblip2"]["seconds"])
        assert any(line.startswith(name) for line in said)
    assert figures["cases"]["stage2-features"]["share_of_matmul_peak"] > 0


def test_unequal_outputs_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    import openblip2.apps.bench.cases as cases

    monkeypatch.setattr(cases, "naive_rerank", lambda model, features, *rest: (torch.ones(1, 8), None))
    with pytest.raises(UserError, match="rerank: outputs differ"):
        run_bench("tiny", ["rerank"], None, 1, "fp32", lambda line: None, QUIET)


def test_what_is_unknown_is_named() -> None:
    for size, case, word in (("huge", [], "'huge'"), ("tiny", ["chat"], "'chat'")):
        with pytest.raises(UserError, match=word):
            run_bench(size, case, None, 1, "fp32", lambda line: None, QUIET)


def test_peak_memory_is_what_a_run_takes() -> None:
    size = 64 * 2**20
    peak = peak_memory(lambda: torch.ones(size // 4).sum(), torch.device("cpu"))
    if peak is not None:  # Linux only
        assert 0.9 * size < peak < 2 * size


def test_runs_take_turns() -> None:
    order: list[str] = []
    alternate({name: lambda name=name: order.append(name) for name in "ab"}, 3, torch.device("cpu"))
    assert order == [*"abab", *"ababab"]


def test_the_comparison_with_lavis_finds_what_it_imports() -> None:
    """The full comparison needs LAVIS in a separate environment: `make bench-lavis`."""
    script = Path(__file__).parents[1] / "benchmarks" / "lavis" / "compare.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--lavis" in done.stdout
