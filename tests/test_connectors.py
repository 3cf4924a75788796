"""Connectors of other papers: comparison with plain versions, and training, loading and captioning with each."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tiny_runs
from openblip2.config import change
from openblip2.data.records import read_records
from openblip2.errors import UserError
from openblip2.inference.captioner import Captioner
from openblip2.inference.load import load
from openblip2.model.build import CONNECTORS
from openblip2.model.connector import CAbstractor, Connector, PatchMLP, PooledMLP, Resampler
from openblip2.presets import preset
from openblip2.train.recipes import train_stage
from test_training import log_of, quiet

SIDE, FRONT, V = 4, 1, 6  # [CLS], then 4 x 4 patches
P = FRONT + SIDE * SIDE
OTHERS: dict[str, dict[str, Any]] = {
    "mlp": {"width": 10},
    "pooled_mlp": {"width": 10, "grid": 2},
    "resampler": {"width": 12, "queries": 5, "layers": 2, "heads": 3},
    "c_abstractor": {"width": 8, "grid": 3, "depth": 2},
}


def made(name: str, **options: Any) -> Connector:
    torch.manual_seed(0)
    return CONNECTORS[name](P, V, **(OTHERS[name] | options)).eval()  # pyright: ignore[reportCallIssue]


def features(count: int = 3) -> Tensor:
    return torch.randn(count, P, V, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", OTHERS)
def test_tokens_and_width_are_those_it_states_and_pictures_do_not_mix(name: str) -> None:
    connector, patches = made(name), features()
    tokens = connector.visual_tokens(patches)
    assert tokens.shape == (3, connector.tokens, connector.width)
    assert connector.sizes["tokens"] == connector.tokens
    for n in range(3):
        torch.testing.assert_close(connector.visual_tokens(patches[n : n + 1]), tokens[n : n + 1])
    torch.testing.assert_close(connector.visual_tokens(patches.bfloat16().float()), tokens, atol=0.1, rtol=0.1)
    assert connector.visual_tokens(patches.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", OTHERS)
def test_every_weight_gets_a_gradient(name: str) -> None:
    connector = made(name)
    connector.visual_tokens(features()).square().sum().backward()
    assert [n for n, p in connector.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_every_patch_alone_becomes_a_token() -> None:
    mlp, patches = made("mlp"), features()
    assert isinstance(mlp, PatchMLP)
    for n in range(SIDE * SIDE):
        normed = F.layer_norm(patches[:, FRONT + n], (V,), mlp.norm.weight, mlp.norm.bias)
        torch.testing.assert_close(mlp.visual_tokens(patches)[:, n], F.gelu(mlp.hidden(normed)))


def test_pooled_tokens_are_the_means_of_the_cells_row_by_row() -> None:
    pooled, patches = made("pooled_mlp"), features()
    assert isinstance(pooled, PooledMLP)
    square = patches[:, FRONT:].reshape(3, SIDE, SIDE, V)
    for row in range(2):
        for column in range(2):
            cell = square[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((1, 2))
            wanted = F.gelu(pooled.hidden(pooled.norm(cell)))
            torch.testing.assert_close(pooled.visual_tokens(patches)[:, 2 * row + column], wanted)


def test_the_resampler_is_attention_of_queries_to_patches_and_queries() -> None:
    """Compared with one layer with one head that is written out here."""
    resampler, patches = made("resampler", layers=1, heads=1), features(1)
    assert isinstance(resampler, Resampler)
    layer: Any = resampler.layers[0]
    image = layer["patch_norm"](resampler.image(resampler.image_norm(patches)) + resampler.positions)[0]
    queries = resampler.queries[0]
    normed = layer["norm"](queries)
    source = torch.cat([image, normed])
    weights, biases = layer["attention"].in_proj_weight.chunk(3), layer["attention"].in_proj_bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((normed, source, source), weights, biases, strict=True))
    rows = queries + layer["attention"].out_proj((q @ k.T / math.sqrt(12)).softmax(-1) @ v)
    rows = rows + layer["ffn"](rows)
    torch.testing.assert_close(resampler.visual_tokens(patches)[0], resampler.norm(rows))


def test_the_abstractor_sees_neighbours_before_it_pools() -> None:
    """A patch also changes the token of the next cell; with pooling alone, it changes only its own cell."""
    abstractor, patches = made("c_abstractor", grid=4, depth=1), features(1)
    assert isinstance(abstractor, CAbstractor)
    changed = patches.clone()
    changed[0, FRONT] *= -1.0  # the patch at the upper left
    moved = (abstractor.visual_tokens(changed) - abstractor.visual_tokens(patches)).abs().sum(-1)[0]
    assert moved[0] > 0
    assert moved[1] > 1e-4
    pooled = made("pooled_mlp", grid=4)
    still = (pooled.visual_tokens(changed) - pooled.visual_tokens(patches)).abs().sum(-1)[0]
    assert still[0] > 0
    assert not still[1:].any()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pooled_mlp", {"grid": 5}, r"grid=5 gives 25 visual tokens from 16 patches: give at most 4"),
        ("c_abstractor", {"grid": 9}, r"grid=9 gives 81 visual tokens from 16 patches"),
        ("resampler", {"heads": 5}, r"width=12 is not a multiple of heads=5"),
    ],
)
def test_options_that_do_not_fit_are_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(name, **options)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.home(tmp_path_factory.mktemp("connectors"), count=24)


@pytest.mark.parametrize("name", OTHERS)
def test_each_is_trained_loaded_and_writes_captions(home: Path, name: str) -> None:
    records = read_records(home / "data")[0]
    values = dict(word.split("=", 1) for word in tiny_runs.options(home)[1::2])
    options = OTHERS[name] | ({"grid": 2} if "grid" in OTHERS[name] else {})
    changes = {"data.source": str(home / "data"), "connector.name": name, "connector.options": options}
    settings = change(preset("stage2", "laptop"), values | changes)
    run = home / name
    train_stage(settings, records, run, quiet())
    assert all(math.isfinite(row["lm"]) for row in log_of(run) if "lm" in row)
    captioner = load(run)
    assert isinstance(captioner, Captioner)
    assert captioner.model.connector.name == name
    assert captioner.caption([records[0].image]) == captioner.caption([records[0].image])
