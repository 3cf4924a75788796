"""Compares the objectives with simple loops, and with values that can be computed by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from openblip2.model.objectives import (
    contrastive,
    decorrelation,
    generation,
    hard_negatives,
    matching,
    same_image,
    similarity,
)

B, Q, E, WORDS = 6, 5, 9, 41
SMOOTHING = 0.1
IDS = torch.tensor([4, 7, 4, 1, 9, 4])  # three captions of one image


def vectors(count: int = B, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Image vectors, text vectors and a temperature, with gradients."""
    random = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(count, Q, E, generator=random), dim=-1).requires_grad_()
    text = F.normalize(torch.randn(count, E, generator=random), dim=-1).requires_grad_()
    return image, text, torch.tensor(0.3, requires_grad=True)


def cosine(image: Tensor, text: Tensor) -> Tensor:
    """The similarity of one image and one text: the maximum over the queries."""
    return torch.stack([query @ text for query in image]).max()


def smoothed(row: int, ids: Tensor) -> list[float]:
    """The target: 0.9 is divided among the texts of the same image, and 0.1 among all texts."""
    own = [bool(other == ids[row]) for other in ids]
    return [(1 - SMOOTHING) * mine / sum(own) + SMOOTHING / len(own) for mine in own]


def cross_entropy(scores: Tensor, target: list[float]) -> Tensor:
    logs = scores - scores.exp().sum().log()
    return -sum((p * log for p, log in zip(target, logs, strict=True)), start=torch.tensor(0.0))


def loops(image: Tensor, text: Tensor, temperature: Tensor, ids: Tensor, detach_gathered: bool) -> Tensor:
    texts, images = (text.detach(), image.detach()) if detach_gathered else (text, image)
    count = len(ids)
    total = torch.tensor(0.0)
    for n in range(count):
        to_text = torch.stack([cosine(image[n], texts[m]) / temperature for m in range(count)])
        to_image = torch.stack([cosine(images[m], text[n]) / temperature for m in range(count)])
        total = total + cross_entropy(to_text, smoothed(n, ids)) + cross_entropy(to_image, smoothed(n, ids))
    return total / (2 * count)


def close(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_same_image() -> None:
    expected = [[int(a) == int(b) for b in IDS] for a in IDS]
    assert same_image(IDS).tolist() == expected
    assert same_image(torch.arange(3)).tolist() == torch.eye(3).bool().tolist()


def test_similarity_is_the_best_query() -> None:
    image, text, _ = vectors()
    found = similarity(image, text[:4])
    assert found.shape == (B, 4)
    close(found, torch.stack([torch.stack([cosine(i, t) for t in text[:4]]) for i in image]))


def test_a_smooth_maximum_is_between_the_mean_and_the_maximum_and_trains_all_queries() -> None:
    image, text, _ = vectors()
    cosines = torch.stack([torch.stack([(queries @ t).exp() for t in text]) for queries in image])  # t = 1: [B, G, Q]
    close(similarity(image, text, 1.0), cosines.mean(-1).log())
    highest = similarity(image, text)
    before = (image @ text.T).mean(dim=1)
    for smooth in (1.0, 0.1, 0.01):
        now = similarity(image, text, smooth)
        assert (before < now).all()
        assert (now < highest).all()
        before = now
    close(similarity(image, text, 1e-6), highest)
    for smooth, trained in ((0.0, 1), (0.1, image.shape[1])):
        (grad,) = torch.autograd.grad(similarity(image, text[:1], smooth).sum(), image)
        assert (grad.abs().sum(-1) > 0).sum(dim=1).tolist() == [trained] * B


@pytest.mark.parametrize("detach_gathered", [False, True])
def test_contrastive_uses_the_smooth_maximum_both_ways(detach_gathered: bool) -> None:
    image, text, temperature = vectors()
    found = contrastive(image, text, temperature, same_image(IDS), SMOOTHING, detach_gathered, smooth_maximum=0.1)
    scores = similarity(image, text, 0.1) / temperature
    close(found.image_to_text, scores)
    close(found.text_to_image, scores.T)
    targets = torch.tensor([smoothed(n, IDS) for n in range(B)])
    both = (scores.log_softmax(dim=1) + scores.T.log_softmax(dim=1)) * targets
    close(found.loss, -both.sum() / (2 * B))


def test_similarity_is_not_rounded_under_autocast() -> None:
    image, text, _ = vectors()
    with torch.autocast("cpu", torch.bfloat16):
        found = similarity(image.bfloat16(), text.bfloat16())
    assert found.dtype == torch.float32
    assert torch.equal(found, similarity(image.bfloat16().float(), text.bfloat16().float()))


@pytest.mark.parametrize("detach_gathered", [False, True])
@pytest.mark.parametrize("ids", [IDS, torch.arange(B)], ids=["several captions", "one caption"])
def test_contrastive_equals_loops(ids: Tensor, detach_gathered: bool) -> None:
    inputs = vectors()
    ours = contrastive(*inputs, same_image(ids), SMOOTHING, detach_gathered)
    naive = loops(*inputs, ids, detach_gathered)
    close(ours.loss, naive)
    for mine, theirs in zip(torch.autograd.grad(ours.loss, inputs), torch.autograd.grad(naive, inputs), strict=True):
        assert theirs.abs().max() > 1e-3
        close(mine, theirs)
    scores = similarity(inputs[0], inputs[1]) / 0.3
    close(ours.image_to_text, scores)
    close(ours.text_to_image, scores.T)


def test_detach_gathered_is_another_gradient_of_the_same_loss() -> None:
    inputs = vectors()
    full = contrastive(*inputs, same_image(IDS), SMOOTHING, detach_gathered=False).loss
    half = contrastive(*inputs, same_image(IDS), SMOOTHING, detach_gathered=True).loss
    assert torch.equal(full, half)
    for whole, part in zip(
        torch.autograd.grad(full, inputs[:2]),
        torch.autograd.grad(half, inputs[:2], retain_graph=True),
        strict=True,
    ):
        assert (whole - part).abs().max() > 1e-2
    # Images get a gradient only from the image-to-text loss, not from the text-to-image loss.
    targets = torch.tensor([smoothed(n, IDS) for n in range(B)])
    finding = -(targets * (similarity(*inputs[:2]) / 0.3).log_softmax(dim=1)).sum() / (2 * B)
    close(torch.autograd.grad(half, inputs[0], retain_graph=True)[0], torch.autograd.grad(finding, inputs[0])[0])


def test_contrastive_at_chance() -> None:
    """If all images and all texts are equal, the loss is ln G for any label smoothing."""
    image, _, temperature = vectors()
    text = F.normalize(torch.ones(B, E), dim=-1)
    same = image[:1].expand(B, -1, -1)
    loss = contrastive(same, text, temperature, same_image(IDS)).loss
    assert loss.item() == pytest.approx(math.log(B), abs=1e-5)


def floor(classes: int) -> float:
    """The minimum of a smoothed cross-entropy: the entropy of its target."""
    rest = SMOOTHING / classes
    top = 1 - SMOOTHING + rest
    return -top * math.log(top) - (classes - 1) * rest * math.log(rest)


def test_contrastive_floor_of_label_smoothing() -> None:
    """1.02 at G = 1024 (METHOD, health bands), reached when the softmax equals the smoothed target."""
    count = 1024
    rest = SMOOTHING / count
    temperature = torch.tensor(1 / math.log((1 - SMOOTHING + rest) / rest))
    perfect = torch.eye(count)
    loss = contrastive(perfect[:, None], perfect, temperature, same_image(torch.arange(count))).loss.item()
    assert loss == pytest.approx(floor(count), abs=1e-4)
    assert loss == pytest.approx(1.02, abs=0.01)
    for other in (0.7, 1.5):
        worse = contrastive(perfect[:, None], perfect, temperature * other, same_image(torch.arange(count)))
        assert worse.loss.item() > loss + 0.01


def test_a_batch_of_one_has_nothing_to_contrast() -> None:
    image, text, temperature = vectors(count=1)
    itc = contrastive(image, text, temperature, same_image(torch.tensor([3])))
    assert itc.loss.item() == pytest.approx(0, abs=1e-6)
    assert all(g.isfinite().all() for g in torch.autograd.grad(itc.loss, (image, text, temperature)))
    rivals = hard_negatives(itc.image_to_text, itc.text_to_image, same_image(torch.tensor([3])))
    assert (rivals.texts.tolist(), rivals.images.tolist()) == ([-1], [-1])


@pytest.mark.parametrize("spread", [0.0, 1.0, 100.0, 1e4, 1e30, 3e38])
def test_hard_negatives_are_never_positives(spread: float) -> None:
    """The weight of a positive is exactly zero, not only small, however dissimilar all other pairs are."""
    torch.manual_seed(0)
    ids = torch.randint(0, 12, (40,))
    ids[::5] = 3
    positives = same_image(ids)
    for _ in range(50):
        # The worst case: positives are as similar as possible, and all other pairs as dissimilar as possible.
        scores = torch.where(positives, spread, -spread) * torch.rand(40, 40)
        for drawn in hard_negatives(scores, scores.T, positives):
            assert drawn.dtype == torch.int64
            assert (drawn >= 0).all()
            assert (ids[drawn] != ids).all()


def test_a_row_without_negatives_gets_none() -> None:
    positives = torch.tensor([[True, True, True], [True, False, True], [True, True, True]])
    for _ in range(20):
        rivals = hard_negatives(torch.randn(3, 3), torch.randn(3, 3) * 1e4, positives)
        assert rivals.texts.tolist() == rivals.images.tolist() == [-1, 1, -1]


def test_hard_negatives_follow_the_softmax() -> None:
    torch.manual_seed(0)
    rows, count = 20_000, 5
    to_text, to_image = torch.randn(count).expand(rows, -1), torch.randn(count).expand(rows, -1)
    positives = torch.zeros(rows, count, dtype=torch.bool)
    positives[:, 2] = True
    rivals = hard_negatives(to_text, to_image, positives)
    for drawn, scores in ((rivals.texts, to_text[0]), (rivals.images, to_image[0])):
        weights = scores.exp() * (torch.arange(count) != 2)
        frequency = drawn.bincount(minlength=count) / rows
        torch.testing.assert_close(frequency, weights / weights.sum(), rtol=0, atol=0.015)  # 4 sigma


def test_hard_negatives_carry_no_gradient() -> None:
    scores = torch.randn(B, B, requires_grad=True)
    rivals = hard_negatives(scores, scores, same_image(IDS))
    assert not rivals.texts.requires_grad
    assert not rivals.images.requires_grad


def test_matching() -> None:
    logits = torch.tensor([[0.3, 1.2], [2.0, -1.0], [0.1, 0.4]])
    expected = 0.0
    for (no, yes), match in zip(logits.tolist(), (True, False, False), strict=True):
        expected -= math.log(math.exp(yes if match else no) / (math.exp(no) + math.exp(yes))) / 3
    assert matching(logits, torch.tensor([True, False, False])).item() == pytest.approx(expected, abs=1e-6)


def test_matching_at_chance() -> None:
    """The loss is 0.6365 if each pair is predicted to match with probability 1/3, the share of true pairs."""
    logits = torch.tensor([2.0, 1.0]).log().expand(3, 2)
    assert matching(logits, torch.tensor([True, False, False])).item() == pytest.approx(0.6365, abs=5e-5)
    for push in (-0.1, 0.1):
        worse = matching(logits + torch.tensor([push, 0.0]), torch.tensor([True, False, False]))
        assert worse.item() > 0.6365


def test_generation_equals_a_loop() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(7, WORDS, generator=random, requires_grad=True)
    targets = torch.randint(WORDS, (7,), generator=random)
    naive = torch.tensor(0.0)
    for row, target in zip(logits, targets, strict=True):
        spread = [(1 - SMOOTHING) * (word == int(target)) + SMOOTHING / WORDS for word in range(WORDS)]
        naive = naive + cross_entropy(row, spread) / 7
    ours = generation(logits, targets, SMOOTHING)
    close(ours, naive)
    close(torch.autograd.grad(ours, logits)[0], torch.autograd.grad(naive, logits)[0])


def test_generation_at_chance_and_at_its_floor() -> None:
    """For BERT's vocabulary, chance is ln W = 10.33 and the minimum is 1.36 (METHOD, health bands)."""
    words, target = 30523, torch.tensor([17])
    assert generation(torch.zeros(1, words), target).item() == pytest.approx(10.33, abs=0.01)
    smooth = torch.full((1, words), SMOOTHING / words)
    smooth[0, 17] += 1 - SMOOTHING
    loss = generation(smooth.log(), target).item()
    assert loss == pytest.approx(floor(words), abs=5e-4)  # fp32 sums of 30,523 terms differ from CPU to CPU
    assert loss == pytest.approx(1.36, abs=0.01)
    certain = torch.zeros(1, words)
    certain[0, 17] = 30.0
    assert generation(certain, target).item() > 2.0, "certainty is punished"
    assert generation(certain, target, 0.0).item() < 1e-6


def test_decorrelation_of_parts_with_the_mean_of_all_is_that_of_all() -> None:
    queries = torch.randn(B, Q, E, generator=torch.Generator().manual_seed(0))
    few, many = (decorrelation(part, queries.mean(dim=0)) for part in (queries[:2], queries[2:]))
    close((2 * few + (B - 2) * many) / B, decorrelation(queries))
    assert (decorrelation(queries[:2]) - few).abs() > 1e-3


def test_losses_are_float32_for_half_precision_logits() -> None:
    logits = torch.randn(4, 2).bfloat16()
    assert matching(logits, torch.ones(4).bool()).dtype == torch.float32
    assert generation(logits, torch.ones(4).long()).dtype == torch.float32


def test_decorrelation_equals_loops() -> None:
    queries = torch.randn(B, Q, E, generator=torch.Generator().manual_seed(3), dtype=torch.float64).float()
    queries.requires_grad_()
    total = torch.tensor(0.0)
    for picture in range(B):
        rows = torch.stack([queries[picture, n] - queries[:, n].detach().mean(0) for n in range(Q)])
        shares = torch.linalg.svdvals(rows).square()
        share = (shares / shares.sum()).square().sum()  # 1 / n for n equal directions
        total = total + (share - 1 / Q) / (1 - 1 / Q)
    close(decorrelation(queries), total / B)


def test_decorrelation_of_equal_orthogonal_and_single_queries() -> None:
    equal = torch.randn(B, 1, E, generator=torch.Generator().manual_seed(4)).expand(B, Q, E)
    constants = torch.randn(Q, E, generator=torch.Generator().manual_seed(5))  # the same for all pictures
    assert float(decorrelation(equal)) == pytest.approx(1, abs=1e-5)
    assert float(decorrelation(equal + 9 * constants)) == pytest.approx(1, abs=1e-4)
    axes = torch.eye(Q, E) * torch.tensor([-1.0, 1.0]).view(2, 1, 1)  # two pictures, the mean is zero
    assert float(decorrelation(axes)) == pytest.approx(0, abs=1e-6)
    # One query varies and the others hardly do: in effect one vector, although no two queries are similar.
    assert float(decorrelation(axes * torch.tensor([1.0] + [0.01] * (Q - 1))[:, None])) > 0.99
    assert float(decorrelation(equal[:, :1])) == 0
    assert float(decorrelation(equal[:1])) == 0  # the mean of one picture is the picture itself, so nothing is left


def test_similarities_that_are_not_numbers_have_negatives_that_exist() -> None:
    scores, positives = torch.full((3, 3), torch.nan), torch.eye(3, dtype=torch.bool)
    for drawn in hard_negatives(scores, scores, positives):  # the losses are NaN, and the step is skipped
        assert drawn.max() < 3
