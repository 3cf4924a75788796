"""Stage 1 compared with a naive oracle that shares no computation: separate passes, one pair at a time, no padding."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tiny
import tiny_models
from openblip2.model.objectives import HardNegatives, hard_negatives, same_image, similarity
from openblip2.model.qformer import QFormer, bidirectional_mask, causal_mask, unimodal_mask
from openblip2.model.stage1 import Stage1, itm_pairs, see
from tiny import CLS, DEC, WORDS, B, D, E, P, Q, T, V

IDS = torch.tensor([5, 3, 5, 8, 2, 3, 11, 5])
# The negative text of each image and the negative image of each text, with another id; two rows have none (-1).
NEGATIVES = HardNegatives(torch.tensor([1, 0, 4, -1, 3, 6, 2, 5]), torch.tensor([6, 2, -1, 7, 0, 4, 1, 3]))


def one_pass(model: Stage1, patches: Tensor, tokens: Tensor, mask: Any, start: int = CLS) -> tuple[Tensor, Tensor]:
    """Runs one image and one text in a joint pass; returns query outputs `[Q, D]` and text outputs `[n, D]`."""
    tokens = torch.cat([torch.tensor([start]), tokens[1:]])[None]
    seen = model.qformer(model.qformer.encode_image(patches[None]), tokens, mask(Q, torch.ones_like(tokens).bool()))
    assert seen.queries is not None
    assert seen.text is not None
    return seen.queries[0], seen.text[0]


def oracle(
    model: Stage1, patches: Tensor, tokens: Tensor, valid: Tensor, ids: Tensor, negatives: HardNegatives
) -> dict[str, Tensor]:
    """Computes the three losses of METHOD section 3 term by term."""
    count = len(ids)
    texts = [tokens[n][valid[n]] for n in range(count)]

    apart = [one_pass(model, patches[n], texts[n], unimodal_mask) for n in range(count)]
    image = [F.normalize(model.vision_proj(queries), dim=-1) for queries, _ in apart]
    text = [F.normalize(model.text_proj(rows[0]), dim=-1) for _, rows in apart]
    scores = torch.stack([torch.stack([(i @ t).max() for t in text]) for i in image]) / model.temperature
    same = (ids[:, None] == ids).float()
    targets = 0.9 * same / same.sum(1, keepdim=True) + 0.1 / count
    to_text, to_image = scores.log_softmax(dim=1), scores.T.log_softmax(dim=1)
    itc = -(targets * (to_text + to_image)).sum() / (2 * count)

    pairs = [(n, n, True) for n in range(count)]
    pairs += [(n, int(m), False) for n, m in enumerate(negatives.texts) if m >= 0]
    pairs += [(int(m), n, False) for n, m in enumerate(negatives.images) if m >= 0]
    itm = torch.tensor(0.0)
    for i, t, match in pairs:
        queries, _ = one_pass(model, patches[i], texts[t], bidirectional_mask)
        logits = torch.stack([model.itm_head(query) for query in queries]).mean(dim=0)
        itm = itm - logits.log_softmax(dim=0)[int(match)] / len(pairs)

    terms = []
    assert model.qformer.word_embeddings is not None
    assert model.lm_head is not None
    for n in range(count):
        _, rows = one_pass(model, patches[n], texts[n], causal_mask, start=DEC)
        logs = model.lm_head(rows, model.qformer.word_embeddings).log_softmax(dim=-1)
        for place, word in enumerate(texts[n][1:].tolist()):
            terms.append(-0.9 * logs[place, word] - 0.1 * logs[place].mean())
    return {"itc": itc, "itm": itm, "itg": torch.stack(terms).mean()}


def word_logits(model: Stage1, rows: Tensor) -> Tensor:
    assert model.lm_head is not None
    return rows @ model.qformer.get_parameter("word_embeddings.weight").T + model.lm_head.bias


def test_the_tiny_model_tells_images_queries_and_texts_apart() -> None:
    """Otherwise the tests below would pass even if the model ignored its inputs."""
    model = tiny.stage1()
    image = model.image_vectors(model.qformer.query_output(tiny.features()))
    text = model.text_vectors(*tiny.texts())
    for spread in (image.std(dim=0), image.std(dim=1), text.std(dim=0)):
        assert spread.mean() > 0.03


def test_losses_and_gradients_equal_the_oracle() -> None:
    model = tiny.stage1()
    patches, (tokens, valid) = tiny.features(), tiny.texts()
    ours = model.losses(tokens, valid, IDS, features=patches, negatives=NEGATIVES)
    naive = oracle(model, patches, tokens, valid, IDS, NEGATIVES)
    assert list(ours) == ["itc", "itm", "itg"]
    for name, loss in ours.items():
        torch.testing.assert_close(loss, naive[name], rtol=1e-5, atol=1e-5)
        tiny.assert_same_gradients(tiny.gradients(loss, model), tiny.gradients(naive[name], model))


@pytest.mark.parametrize("wanted", [{"itc"}, {"itg"}, {"itm", "itc"}, {"itg", "itm"}, {"itc", "itg"}])
def test_objectives_that_are_left_out_change_nothing_of_the_others(wanted: set[str]) -> None:
    model = tiny.stage1()
    tokens, valid = tiny.texts()
    options: dict[str, Any] = {"features": tiny.features(), "negatives": NEGATIVES}
    every = model.losses(tokens, valid, IDS, **options)
    some = model.losses(tokens, valid, IDS, **options, objectives=wanted)
    assert list(some) == [name for name in every if name in wanted]
    for name, loss in some.items():
        torch.testing.assert_close(loss, every[name], rtol=0, atol=0)
        tiny.assert_same_gradients(tiny.gradients(loss, model), tiny.gradients(every[name], model), 0)


def test_every_trained_parameter_gets_a_gradient() -> None:
    model = tiny.stage1()
    tokens, valid = tiny.texts()
    sum(model.losses(tokens, valid, IDS, features=tiny.features()).values(), torch.tensor(0.0)).backward()
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        # A key's bias adds a constant to all scores of a row. Softmax ignores it, so its gradient is 0.
        assert name.endswith("key.bias") or parameter.grad.abs().max() > 1e-7, name


def test_drawn_negatives_are_those_of_hard_negatives() -> None:
    model = tiny.stage1()
    patches, (tokens, valid) = tiny.features(), tiny.texts()
    torch.manual_seed(3)
    drawn = model.losses(tokens, valid, IDS, features=patches)
    image = model.image_vectors(model.qformer.query_output(patches))
    scores = similarity(image, model.text_vectors(tokens, valid)) / model.temperature
    torch.manual_seed(3)
    given = model.losses(
        tokens, valid, IDS, features=patches, negatives=hard_negatives(scores, scores.T, same_image(IDS))
    )
    assert drawn == given
    torch.manual_seed(4)
    assert model.losses(tokens, valid, IDS, features=patches)["itm"] != drawn["itm"]


def test_without_ids_all_images_differ() -> None:
    model = tiny.stage1()
    patches, (tokens, valid) = tiny.features(), tiny.texts()
    unnamed = model.losses(tokens, valid, features=patches, negatives=NEGATIVES)
    named = model.losses(tokens, valid, torch.arange(B), features=patches, negatives=NEGATIVES)
    assert unnamed == named
    assert model.losses(tokens, valid, IDS, features=patches, negatives=NEGATIVES)["itc"] != named["itc"]


def test_a_batch_of_one() -> None:
    model = tiny.stage1()
    patches, (tokens, valid) = tiny.features(1), tiny.texts(1)
    losses = model.losses(tokens, valid, features=patches)
    nobody = HardNegatives(torch.tensor([-1]), torch.tensor([-1]))
    naive = oracle(model, patches, tokens, valid, torch.zeros(1), nobody)
    for name, loss in losses.items():
        assert loss.shape == ()
        torch.testing.assert_close(loss, naive[name], rtol=1e-5, atol=1e-5)
    sum(losses.values(), torch.tensor(0.0)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_captions_of_one_image_alone_in_a_batch() -> None:
    """There are no negatives for ITC or ITM, so no caption is pushed away from its image."""
    model = tiny.stage1()
    patches, (tokens, valid) = tiny.features(1).expand(B, -1, -1), tiny.texts()
    ids = torch.full((B,), 7)
    losses = model.losses(tokens, valid, ids, features=patches)
    nobody = HardNegatives(torch.full((B,), -1), torch.full((B,), -1))
    naive = oracle(model, patches, tokens, valid, ids, nobody)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, naive[name], rtol=1e-5, atol=1e-5)


def test_more_padding_and_junk_in_it_change_no_loss() -> None:
    model = tiny.stage1()
    patches, (tokens, valid) = tiny.features(), tiny.texts()
    losses = model.losses(tokens, valid, IDS, features=patches, negatives=NEGATIVES)
    wider = torch.cat([tokens.where(valid, 33), tokens.new_full((B, 4), 9)], dim=1)
    wider_valid = torch.cat([valid, valid.new_zeros(B, 4)], dim=1)
    padded = model.losses(wider, wider_valid, IDS, features=patches, negatives=NEGATIVES)
    for name, loss in losses.items():
        torch.testing.assert_close(padded[name], loss, rtol=1e-5, atol=1e-5)


def test_pairs() -> None:
    tokens = torch.arange(15).view(3, 5)
    valid = torch.ones(3, 5).bool()
    pairs = itm_pairs(tokens, valid, HardNegatives(texts=torch.tensor([2, -1, 1]), images=torch.tensor([-1, 0, 0])))
    assert pairs.images.tolist() == [0, 1, 2, 0, 0, 0, 2]
    assert (pairs.tokens[:, 0] // 5).tolist() == [0, 1, 2, 1, 2, 2, 1]
    assert pairs.is_match.tolist() == [True, True, True, False, False, False, False]
    assert pairs.valid.shape == (7, 5)


def test_a_token_moves_no_word_logit_before_it() -> None:
    model = tiny.stage1()
    patches, (tokens, valid) = tiny.features(), tiny.texts(shortest=T)
    _, cache = model.qformer.query_pass(model.qformer.encode_image(patches))

    def logits(tokens: Tensor) -> Tensor:
        return word_logits(model, model.write(cache, tokens, valid)[0]).view(B, T - 1, WORDS)

    before = logits(tokens)
    assert torch.equal(before, logits(tokens.index_fill(1, torch.tensor([0]), 20))), "[DEC] stands there"
    for t in range(1, T):
        changed = tokens.clone()
        changed[:, t] = changed[:, t] % 30 + 5
        after = logits(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert t == T - 1 or (before - after)[:, t:].abs().amax(dim=(0, 2)).min() > 1e-3


def test_what_is_written() -> None:
    """The targets of ITG include `[SEP]`, but not `[DEC]` and padding."""
    model = tiny.stage1()
    tokens, valid = tiny.texts()
    _, cache = model.qformer.query_pass(model.qformer.encode_image(tiny.features()))
    rows, targets = model.write(cache, tokens, valid)
    expected = torch.cat([row[real][1:] for row, real in zip(tokens, valid, strict=True)])
    assert torch.equal(targets, expected)
    assert rows.shape == (len(targets), D)
    assert int((targets == tiny.SEP).sum()) == B


def test_vectors_have_length_one() -> None:
    model = tiny.stage1()
    image = model.image_vectors(model.qformer.query_output(tiny.features()))
    text = model.text_vectors(*tiny.texts())
    assert (image.shape, text.shape) == ((B, Q, E), (B, E))
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(B, Q))
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(B))


def test_detach_gathered_reaches_the_loss() -> None:
    tokens, valid = tiny.texts()
    found = []
    for detach_gathered in (False, True):
        model = tiny.stage1(detach_gathered=detach_gathered)
        loss = model.losses(tokens, valid, IDS, features=tiny.features(), negatives=NEGATIVES)["itc"]
        found.append((loss.detach(), tiny.gradients(loss, model)["vision_proj.weight"]))
    assert torch.equal(found[0][0], found[1][0])
    assert (found[0][1] - found[1][1]).abs().max() > 1e-4


def test_see_takes_either_images_or_features() -> None:
    eyes, patches = tiny_models.vision(), tiny.features()
    assert see(eyes, None, patches) is patches
    assert see(None, None, patches) is patches
    assert torch.equal(see(eyes, tiny_models.pictures(), None), eyes(tiny_models.pictures()))
    assert eyes(tiny_models.pictures()).shape == (B, P, V)
    for images, given in ((None, None), (tiny_models.pictures(), patches)):
        with pytest.raises(ValueError, match="either images or features"):
            see(eyes, images, given)
    with pytest.raises(ValueError, match="without an image encoder"):
        see(None, tiny_models.pictures(), None)


def test_frozen_stays_and_trained_moves() -> None:
    eyes = tiny_models.vision()
    model = Stage1(tiny.qformer(), eyes, E)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens, valid = tiny.texts()
    model.train()
    losses = model.losses(tokens, valid, IDS, images=tiny_models.pictures())
    sum(losses.values(), torch.tensor(0.0)).backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("vision."), name
    assert all(p.grad is None for p in eyes.parameters())
    assert not any(module.training for module in eyes.modules())
    assert all(module.training for module in model.qformer.modules())


def test_images_are_seen_as_their_features() -> None:
    model, eyes = tiny.stage1(), tiny_models.vision()
    tokens, valid = tiny.texts()
    by_features = model.losses(tokens, valid, IDS, features=eyes(tiny_models.pictures()), negatives=NEGATIVES)
    model.vision = eyes
    assert model.losses(tokens, valid, IDS, images=tiny_models.pictures(), negatives=NEGATIVES) == by_features


def test_it_learns_a_batch_by_heart() -> None:
    torch.manual_seed(0)
    small = QFormer(D, 2, tiny.HEADS, tiny.FFN, Q, V, WORDS, T, dropout=0.0)
    model = tiny.redraw(Stage1(small, None, E), std=0.15)
    nn.init.constant_(model.temperature, 0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    patches, (tokens, valid) = tiny.features(), tiny.texts()
    patches = patches[:, :1] + 0.1 * patches
    losses: dict[str, Tensor] = {}
    for _ in range(100):
        losses = model.losses(tokens, valid, features=patches)
        optimizer.zero_grad()
        sum(losses.values(), torch.tensor(0.0)).backward()
        optimizer.step()
    # Chance levels: ITC ln B = 2.08, ITM 0.6365, ITG ln W = 3.71. Label smoothing: ITC is at least 0.47, ITG 0.68.
    assert losses["itc"] < 0.8
    assert losses["itm"] < 0.5
    assert losses["itg"] < 1.2


def test_parameter_counts_of_the_paper() -> None:
    """The exact count of METHOD section 2, with a frozen ViT-g (V = 1408)."""
    with torch.device("meta"):
        model = Stage1(QFormer(), None)
    assert sum(p.numel() for p in model.parameters()) == 186_705_470
    assert all(p.is_meta and p.requires_grad for p in model.parameters())
    assert isinstance(model.temperature, nn.Parameter)
