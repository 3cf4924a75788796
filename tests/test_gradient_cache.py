"""A training step in chunks against the same step on the whole batch: same losses and gradients, less memory."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
import tiny_models
from openblip2.model.fast.gradient_cache import stage1_losses, stage2_losses, step_losses
from openblip2.model.objectives import HardNegatives, matching, same_image
from openblip2.model.stage1 import Stage1, itm_pairs
from openblip2.model.stage2 import Stage2
from tiny import B

IDS = torch.tensor([5, 3, 5, 8, 2, 3, 11, 5])
# For most chunk sizes, many of the negatives are in another chunk than their row; two rows have none.
NEGATIVES = HardNegatives(torch.tensor([1, 0, 4, -1, 3, 6, 2, 5]), torch.tensor([6, 2, -1, 7, 0, 4, 1, 3]))
CAPTIONS = ["a red dog", "the blue bus", "two small cat", "a bird sits", "it", "no tree is", "yes it is on grass"]
CAPTIONS += ["what is it"]
PROMPTS = ["", "a photo of"] * 4


def stage1(dropout: float = 0.0, detach_gathered: bool = False) -> Stage1:
    """The tiny stage-1 model in training mode."""
    return tiny.stage1(detach_gathered, dropout).train()


def stepped(model: nn.Module, losses: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Loss values and the gradients that `backward` gives every trained parameter; removes them from the model."""
    torch.stack(list(losses.values())).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return {name: loss.detach() for name, loss in losses.items()}, found


def assert_same_step(
    mine: tuple[dict[str, Tensor], dict[str, Tensor | None]],
    theirs: tuple[dict[str, Tensor], dict[str, Tensor | None]],
    tolerance: float = 1e-5,
) -> None:
    assert list(mine[0]) == list(theirs[0])
    for name, loss in theirs[0].items():
        torch.testing.assert_close(mine[0][name], loss, rtol=tolerance, atol=tolerance)
    assert {n for n, g in mine[1].items() if g is None} == {n for n, g in theirs[1].items() if g is None}
    tiny.assert_same_gradients(
        {n: g for n, g in mine[1].items() if g is not None},
        {n: g for n, g in theirs[1].items() if g is not None},
        tolerance,
    )


def inputs(count: int = B) -> tuple[Tensor, Tensor, Tensor]:
    tokens, valid = tiny.texts(count)
    return tokens, valid, torch.cat([IDS, 20 + torch.arange(count)])[:count]


def given() -> dict[str, Any]:
    return {"features": tiny.features(), "negatives": NEGATIVES}


def test_losses_are_the_models_own_unless_chunks_are_asked_for() -> None:
    first, second = stage1(), Stage2(tiny.qformer(vocabulary=0), tiny_models.language("llama"), None)
    assert step_losses(first, 0) == first.losses
    assert step_losses(second, 0) == second.losses
    for model, wanted in ((first, stage1_losses), (second, stage2_losses)):
        chosen: Any = step_losses(model, 3)
        assert (chosen.func, chosen.args) == (wanted, (model, 3))


@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
@pytest.mark.parametrize("chunk", [1, 3, 4, 7, B, 100])
def test_chunks_are_the_whole_batch(chunk: int, drawn: bool) -> None:
    model, patches = stage1(), tiny.features()
    options: dict[str, Any] = {"features": patches} | ({} if drawn else {"negatives": NEGATIVES})
    torch.manual_seed(7)
    whole = stepped(model, model.losses(*inputs(), **options))
    assert list(whole[0]) == ["itc", "itm", "itg"]
    assert all(g is not None and g.abs().max() > 0 for g in whole[1].values())
    torch.manual_seed(7)
    assert_same_step(stepped(model, stage1_losses(model, chunk, *inputs(), **options)), whole)


@pytest.mark.parametrize("ids", [torch.full((B,), 3), torch.tensor([4, 4, 4, 4, 4, 4, 4, 9]), None])
def test_rows_without_a_rival(ids: Tensor | None) -> None:
    """All rows have the same image id, all but one have the same, or each row has its own."""
    model, (tokens, valid, _) = stage1(), inputs()
    torch.manual_seed(7)
    whole = stepped(model, model.losses(tokens, valid, ids, features=tiny.features()))
    torch.manual_seed(7)
    assert_same_step(stepped(model, stage1_losses(model, 3, tokens, valid, ids, features=tiny.features())), whole)


@pytest.mark.parametrize("left", [["itc", "itg"], ["itc", "itm"], ["itm", "itg"], ["itc"], ["itm"], ["itg"]])
def test_what_no_loss_reads_has_no_gradient(left: list[str]) -> None:
    model = stage1()
    options: dict[str, Any] = {"features": tiny.features(), "negatives": NEGATIVES, "objectives": left}
    whole = stepped(model, model.losses(*inputs(), **options))
    assert list(whole[0]) == left
    for name, head in (("itc", "vision_proj.weight"), ("itm", "itm_head.weight"), ("itg", "lm_head.bias")):
        assert (whole[1][head] is None) == (name not in left)
    assert_same_step(stepped(model, stage1_losses(model, 3, *inputs(), **options)), whole)


def test_decorrelation_is_that_of_the_whole_batch() -> None:
    model, options = tiny.stage1(dropout=0.0, decorrelation=0.5, smooth_maximum=0.1).train(), given()
    whole = stepped(model, model.losses(*inputs(), **options))
    assert list(whole[0]) == ["itc", "itm", "itg", "decorrelation"]
    assert whole[0]["decorrelation"] > 1e-3
    assert_same_step(stepped(model, stage1_losses(model, 3, *inputs(), **options)), whole)


def test_detach_gathered() -> None:
    """Detaching changes the gradient even in a single process."""
    model, options = stage1(detach_gathered=True), given()
    whole = stepped(model, model.losses(*inputs(), **options))
    assert_same_step(stepped(model, stage1_losses(model, 3, *inputs(), **options)), whole)


def test_the_frozen_encoder_sees_each_image_once() -> None:
    model, eyes = stage1(), tiny_models.vision()
    model.vision = eyes
    pictures, seen = tiny_models.pictures(), []
    whole = stepped(model, model.losses(*inputs(), images=pictures, negatives=NEGATIVES))
    eyes.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    assert_same_step(stepped(model, stage1_losses(model, 3, *inputs(), images=pictures, negatives=NEGATIVES)), whole)
    assert [len(part) for part in seen] == [3, 3, 2]
    assert torch.equal(torch.cat(seen), pictures)


def test_gradients_join_those_that_are_there_scaled() -> None:
    """As the training loop accumulates: two batches, each with half of its loss."""
    model, options = stage1(), given()
    _, whole = stepped(model, model.losses(*inputs(), **options))
    for _ in range(2):
        losses = stage1_losses(model, 3, *inputs(), **options)
        (torch.stack(list(losses.values())).sum() / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-5)


def test_the_sum_is_trained_and_only_once() -> None:
    model, options = stage1(), given()
    losses = stage1_losses(model, 3, *inputs(), **options)
    with pytest.raises(AssertionError, match="no loss has its own"):
        losses["itc"].backward(retain_graph=True)
    total = torch.stack(list(losses.values())).sum()
    total.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="handed out before"):
        total.backward()


def test_dropout_draws_the_same_masks_in_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes compute the same vectors, so the cached gradients fit the second; equal seeds give equal steps."""
    model = stage1(dropout=0.3)
    made: dict[str, list[Tensor]] = {"image_vectors": [], "text_vectors": []}
    for name, vectors in made.items():
        plain = getattr(Stage1, name)

        def kept(*given: Any, plain: Any = plain, vectors: list[Tensor] = vectors) -> Tensor:
            vectors.append(plain(*given))
            return vectors[-1]

        monkeypatch.setattr(Stage1, name, kept)
    steps = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        steps.append(stepped(model, stage1_losses(model, 3, *inputs(), features=tiny.features())))
    for vectors in made.values():
        first, again = torch.cat(vectors[:3]), torch.cat(vectors[3:6])
        assert (first.requires_grad, again.requires_grad) == (False, True)
        torch.testing.assert_close(again, first, rtol=0, atol=1e-6)
        assert (torch.cat(vectors[12:15]) - first).abs().max() > 1e-2, "another seed, other masks"
    assert steps[0][0] == steps[1][0]
    assert steps[0][0] != steps[2][0]
    for name, gradient in steps[0][1].items():
        again = steps[1][1][name]
        assert gradient is not None
        assert again is not None
        assert torch.equal(gradient, again), name


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_with_dropout_it_is_the_step_that_keeps_every_graph(again: bool) -> None:
    """The reference computes each chunk's vectors once and keeps their graphs; ITG and ITM draw their masks later."""
    model, patches, (tokens, valid, ids) = stage1(dropout=0.3), tiny.features(), inputs()
    chunks = torch.arange(B).split(3)
    torch.manual_seed(7)
    caches, image, text = [], [], []
    for rows in chunks:
        queries, cache = model.qformer.query_pass(model.qformer.encode_image(patches[rows]))
        caches.append(cache)
        image.append(model.image_vectors(queries))
        text.append(model.text_vectors(tokens[rows], valid[rows]))
    whole = {"itc": model.contrast(torch.cat(image), torch.cat(text), same_image(ids)).loss}
    whole |= {"itm": torch.tensor(0.0), "itg": torch.tensor(0.0)}
    for rows, cache in zip(chunks, caches, strict=True):
        share = valid[rows, 1:].sum() / valid[:, 1:].sum()
        whole["itg"] = whole["itg"] + model.generation_loss(cache, tokens[rows], valid[rows]) * share
        pairs = itm_pairs(tokens, valid, NEGATIVES, rows)
        logits = model.match(model.qformer.encode_image(patches[pairs.images]), pairs.tokens, pairs.valid)
        whole["itm"] = whole["itm"] + matching(logits, pairs.is_match) * len(logits) / (3 * B - 2)
    expected = stepped(model, whole)
    torch.manual_seed(7)
    model.qformer.checkpoint_activations = again  # `train.checkpoint_activations`: repeats the random draws, too
    found = stage1_losses(model, 3, tokens, valid, ids, features=patches, negatives=NEGATIVES)
    assert_same_step(stepped(model, found), expected)


def test_autocast_keeps_every_gradient() -> None:
    """Autocast must not reuse a weight that it cast without a graph; it is off in the backward pass."""
    model, cast = stage1(), []
    handle = model.text_proj.weight.register_hook(lambda _: cast.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        chunked = stage1_losses(model, 3, *inputs(), **given())
    handle.remove()
    assert cast
    assert not any(cast)
    _, chunked = stepped(model, chunked)
    with torch.autocast("cpu", torch.bfloat16):
        whole = model.losses(*inputs(), **given())
    for name, theirs in stepped(model, whole)[1].items():
        mine = chunked[name]
        assert mine is not None
        assert theirs is not None
        assert mine.dtype == torch.float32
        assert float((mine - theirs).norm()) < 0.1 * float(theirs.norm()) + 1e-3, name


def most_saved(step: Any) -> int:
    """The largest number of bytes that graphs keep at once while `step` runs; views of one storage count once."""
    alive: dict[int, int] = {}
    most = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal most
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if not isinstance(tensor, nn.Parameter) and place not in alive:
            alive[place] = storage.nbytes()
            weakref.finalize(storage, alive.pop, place, None)
            most = max(most, sum(alive.values()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return most


def test_graphs_take_the_memory_of_a_chunk() -> None:
    model, count, chunk = stage1(dropout=0.1), 64, 4
    tokens, valid, ids = inputs(count)
    patches = tiny.features(count)
    found = {}
    for size in (0, chunk):
        torch.manual_seed(7)
        found[size] = most_saved(
            lambda size=size: stepped(model, step_losses(model, size)(tokens, valid, ids, features=patches))
        )
    assert found[0] > 1_000_000
    assert found[chunk] < 0.2 * found[0]


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_alignment_in_chunks_is_that_of_the_whole_batch(chunk: int) -> None:
    model = Stage2(tiny.qformer(vocabulary=0, dropout=0.0), tiny_models.language("llama"), None).train()
    tiny.redraw(model.projection)
    given: dict[str, Any] = {"features": tiny.features(), "words": model.word_table(CAPTIONS)}
    whole = stepped(model, model.losses(PROMPTS, CAPTIONS, **given))
    found = stepped(model, stage2_losses(model, chunk, PROMPTS, CAPTIONS, **given))
    assert list(found[0]) == ["alignment"]
    assert_same_step(found, whole)


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("chunk", [1, 3, 5, 100])
def test_stage_2_in_chunks_is_the_whole_batch(kind: str, chunk: int) -> None:
    """Captions differ in length: the loss is the mean over all tokens and not the mean of the chunks' means."""
    model = Stage2(tiny.qformer(vocabulary=0, dropout=0.0), tiny_models.language(kind), None).train()
    tiny.redraw(model.projection)
    torch.manual_seed(7)  # an encoder-decoder draws its split points in the same order
    whole = stepped(model, model.losses(PROMPTS, CAPTIONS, features=tiny.features()))
    torch.manual_seed(7)
    found = stepped(model, stage2_losses(model, chunk, PROMPTS, CAPTIONS, features=tiny.features()))
    assert_same_step(found, whole)
    if chunk < B:
        parts = [
            model.losses(PROMPTS[n : n + chunk], CAPTIONS[n : n + chunk], features=tiny.features()[n : n + chunk])["lm"]
            for n in range(0, B, chunk)
        ]
        assert abs(float((torch.stack(parts).mean() - whole[0]["lm"]).detach())) > 1e-3
