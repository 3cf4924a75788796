"""Closed-form starts: they equal naive ridge regression, and models use the picture before the first step."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import tiny
import tiny_models
from openblip2.data.text import BertTokens
from openblip2.evaluate.ranking import recalls, similarities
from openblip2.model.qformer import Attention, Layer, QFormer
from openblip2.model.stage2 import Stage2
from openblip2.train.warm_start import (
    align_heads,
    content_embeddings,
    fit_linear,
    grid_cells,
    open_image_path,
    place_queries,
    warm_start_stage1,
    warm_start_stage2,
)


def ridge(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Returns weight and bias by least squares, with the penalty as extra rows; this function centres the data."""
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    extra = penalty**0.5 * torch.eye(x.shape[1], dtype=x.dtype)
    rows = torch.cat([x - mean_x, extra])
    weight = torch.linalg.lstsq(rows, torch.cat([y - mean_y, torch.zeros(len(extra), y.shape[1])])).solution
    return weight, mean_y - mean_x @ weight


def test_the_heads_are_whitening_and_ridge_regression() -> None:
    torch.manual_seed(0)
    model = tiny.stage1()
    queries, texts = torch.randn(60, tiny.D) @ torch.randn(tiny.D, tiny.D) + 2, torch.randn(60, tiny.D) * 3 - 1
    r2 = align_heads(model, queries, texts, penalty=6.0)
    white = model.text_proj(texts).detach()
    assert torch.allclose(torch.cov(white.T, correction=0), torch.eye(tiny.E), atol=0.02)  # largest variances
    variance = queries.double().var(0, correction=0).mean()
    weight, bias = ridge(queries, white, 6.0 * float(variance))
    found = model.vision_proj(queries).detach()
    wanted = (queries.double() @ weight + bias).float()
    assert torch.allclose(found, wanted, atol=1e-4)
    assert abs(r2 - float(1 - (white - wanted).square().sum() / white.square().sum())) < 1e-4


def test_a_shared_space_wider_than_the_text_is_filled_with_zeros() -> None:
    torch.manual_seed(0)
    model = tiny.stage1()
    model.text_proj, model.vision_proj = torch.nn.Linear(tiny.D, tiny.D + 2), torch.nn.Linear(tiny.D, tiny.D + 2)
    align_heads(model, torch.randn(80, tiny.D), torch.randn(80, tiny.D))
    assert int((model.text_proj.weight.abs().sum(1) == 0).sum()) == 2


def test_the_cells_of_a_grid() -> None:
    cells = grid_cells(1 + 16, 4)  # [CLS], then 4 x 4 patches
    assert torch.equal(cells[0], torch.full((4,), 0.25))
    assert cells[1:].argmax(1).tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    assert torch.equal(cells.sum(1), torch.ones(17))
    assert grid_cells(9, 6).argmax(1).tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5]  # 2 x 3 cells, no token before them
    assert grid_cells(5, 7).sum(1).tolist() == [1] * 5


def placed(queries: int) -> tuple[QFormer, Tensor]:
    """A Q-Former with heads of width 8 and placed queries, and pictures whose patches encode their positions."""
    torch.manual_seed(0)
    sizes = {"width": 32, "heads": 4, "layers": 4, "ffn": 48, "vocabulary": 0, "dropout": 0.0}
    model = QFormer(**sizes, queries=queries, image_width=24, cross_every=2).eval()
    patches = torch.randn(90, 1 + 36, 24) + 2 * torch.randn(37, 24)
    with torch.no_grad():
        patches = model.image_norm(patches)
        open_image_path(model, patches)
        place_queries(model, patches)
    return model, patches


def test_each_query_begins_at_its_own_cell_in_every_head() -> None:
    model, patches = placed(4)
    crossing = [layer.cross for layer in model.layers if isinstance(layer, Layer) and layer.cross is not None]
    for cross in crossing:
        assert isinstance(cross, Attention)
        cross.watched = []
    with torch.no_grad():
        output = model.query_output(patches)
    cells = grid_cells(37, 4)
    for cross in crossing:
        assert cross.watched is not None
        (weights,) = cross.watched
        own = (weights * (cells.T == 1)).sum(-1)  # [N, H, Q]: share of attention on the query's cell; uniform: 0.24
        assert own.mean() > 0.6
        assert own.mean((0, 1)).min() > 0.5
    # The part of the output that depends on the picture differs between queries.
    apart = torch.nn.functional.normalize(output - output.mean(0), dim=-1)
    cosines = apart @ apart.mT
    assert cosines[:, ~torch.eye(4, dtype=torch.bool)].abs().mean() < 0.4


def test_more_queries_than_a_head_is_wide_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model, _ = placed(9)
    fresh = [layer.cross.key.weight.std() for layer in model.layers if layer.cross is not None]  # pyright: ignore
    assert all(abs(float(std.detach()) - 0.02) < 0.002 for std in fresh)


def test_cross_attention_hands_on_the_whitened_patches() -> None:
    torch.manual_seed(0)
    model = tiny.qformer()
    means = torch.randn(90, tiny.V) @ torch.randn(tiny.V, tiny.V) + 3
    before = model.layers[1].query_ffn.narrow.weight.clone()  # pyright: ignore
    open_image_path(model, means.unflatten(0, (10, 9)))
    crossing = [layer.cross for layer in model.layers if isinstance(layer, Layer) and layer.cross is not None]
    assert len(crossing) == 2
    for cross in crossing:
        assert isinstance(cross, Attention)
        handed = cross.value(means)
        assert torch.allclose(handed.mean(0), torch.zeros(tiny.D), atol=1e-4)
        found = torch.linalg.eigvalsh(torch.cov(handed.T, correction=0))[-tiny.V :]
        assert found.max() < 1.001
        assert found.median() > 0.8  # except directions whose variance is below the ridge
        assert torch.equal(cross.out.weight, torch.eye(tiny.D))
    assert torch.allclose(model.layers[1].query_ffn.narrow.weight, 0.3 * before)  # pyright: ignore


def test_stage_1_finds_unseen_pictures_before_its_first_step() -> None:
    torch.manual_seed(0)
    model = tiny.stage1(dropout=0.0)
    tokens, valid = tiny.texts(400, shortest=tiny.T)
    with torch.no_grad():
        hidden = model.qformer.text_pass(tokens, valid)
        content = torch.nn.functional.normalize(hidden - hidden.mean(0), dim=1) @ torch.randn(tiny.D, tiny.V)
        pictures = 2 * content[:, None] + 0.3 * torch.randn(400, tiny.P, tiny.V)

        def found() -> float:
            scores = similarities(model, pictures[300:], tokens[300:], valid[300:])
            return recalls(scores, scores, torch.eye(100, dtype=torch.bool), ks=(5,))["tr@5"]

        def pairs() -> Iterator[tuple[Tensor, Sequence[str]]]:
            for rows in torch.arange(300).split(50):
                yield pictures[rows], [str(int(row)) for row in rows]

        class Rows(BertTokens):
            def __init__(self) -> None: ...

            def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
                rows = torch.tensor([int(text) for text in texts])
                return tokens[rows], valid[rows]

        before = found()
        r2 = warm_start_stage1(model, Rows(), pairs)
        assert 0 < r2 < 1
        assert found() > max(0.3, 3 * before)


def test_the_projection_is_ridge_regression_to_the_captions_content_words() -> None:
    torch.manual_seed(0)
    model = Stage2(tiny.qformer(vocabulary=0), tiny_models.language("opt"))
    captions = ["a cat", "the cat on a mat", "dogs", "a"] * 12
    queries = torch.randn(48, tiny.D)
    targets = content_embeddings(model, captions)
    assert torch.equal(targets[0], content_embeddings(model, ["cat"])[0])  # articles have no weight
    r2 = fit_linear(model.projection, queries, targets, penalty=2.0)
    weight, bias = ridge(queries, targets, 2.0)
    assert torch.allclose(model.projection(queries), (queries.double() @ weight + bias).float(), atol=1e-5)
    assert 0 < r2 < 1


def test_rare_words_weigh_more() -> None:
    model = Stage2(tiny.qformer(vocabulary=0), tiny_models.language("opt"))
    cat, red = content_embeddings(model, ["cat", "red"])
    both, *_ = content_embeddings(model, ["a red cat", "red", "red"])
    rare, common = math.log(4 / 1) ** 2, math.log(4 / 3) ** 2
    assert torch.allclose(both, (rare * cat + common * red) / (rare + common))


def test_stage_2_reads_the_mean_query_output() -> None:
    torch.manual_seed(0)
    model = Stage2(tiny.qformer(vocabulary=0), tiny_models.language("opt"))
    captions = ["a cat", "a dog", "a mat", "two dogs"] * 2
    features = tiny.features(8)
    assert isinstance(model.qformer, QFormer)
    with torch.no_grad():
        found = warm_start_stage2(model, [(features[:4], captions[:4]), (features[4:], captions[4:])])
        started = model.projection.weight.clone()
        queries = model.qformer.query_output(features).mean(1)
        assert abs(found - fit_linear(model.projection, queries, content_embeddings(model, captions), 10.0)) < 1e-5
    assert torch.allclose(started, model.projection.weight, atol=1e-6)
