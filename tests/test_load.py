"""The load test of the server: how its figures are computed, and (slow) a test with a real server."""

from collections import Counter
from pathlib import Path

import pytest

import tiny_runs
from server_load import Load, measure


def test_figures() -> None:
    load = Load(Counter({"200": 4, "429": 3, "503": 1, "ReadError": 2}), [0.1, 0.2, 0.3, 4.0])
    load.memory += [(0, 10), (2, 100), (3, 120), (5, 150), (6, 104), (7, 112)]
    found = load.figures(8.0)
    assert (found["answered"], found["per_second"], found["errors"]) == (4, 0.5, 3)
    assert found["p50"] == pytest.approx(0.25)
    assert found["p95"] == pytest.approx(3.445)
    assert (found["memory"], found["memory_grew"]) == (150, pytest.approx(108 / 110 - 1))
    assert found["memory_over_time"] == [[0, 10]]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8])
def test_a_server_under_load(tmp_path: Path, batch: int) -> None:
    tiny_runs.trained(tmp_path)
    figures = measure(str(tmp_path / "stage2"), tmp_path / "data", clients=80, seconds=4, batch=batch)
    assert figures["errors"] == 0
    assert figures["answered"] > 0  # the number depends on the machine
    assert figures["statuses"].keys() == {"200", "429"}  # 64 requests are queued; the others get 429
    assert 0 < figures["p50"] <= figures["p95"]
    assert figures["memory"] > 10**8
