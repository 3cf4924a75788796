"""The Q-Former: no information leaks past the masks, cached and joint pass agree, and parity with transformers."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from openblip2.model.blocks import LMHead
from openblip2.model.qformer import Cache, QFormer, bidirectional_mask, causal_mask, unimodal_mask
from tiny import DEC, LAYERS, POSITIONS, WORDS, B, D, E, P, Q, T, V

MASKS = {"unimodal": unimodal_mask, "bidirectional": bidirectional_mask, "causal": causal_mask}


def joint(model: QFormer, patches: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Query rows and text rows of a joint pass."""
    output = model(model.encode_image(patches), tokens, mask)
    return rows(output.queries), rows(output.text)


def seen(model: QFormer, patches: Tensor) -> tuple[Tensor, Cache]:
    """A pass with only the queries."""
    return model.query_pass(model.encode_image(patches))


def rows(part: Tensor | None) -> Tensor:
    assert part is not None
    return part


def close(mine: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_sizes_all_differ() -> None:
    sizes = [P, V, Q, T, D, E, B, LAYERS, POSITIONS, WORDS, tiny.HEADS, tiny.FFN, D // tiny.HEADS]
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize("kind", ["unimodal", "causal"])
def test_text_moves_no_query_row_by_one_bit(kind: str) -> None:
    model, patches = tiny.qformer(), tiny.features()
    tokens, valid = tiny.texts()
    others, _ = tiny.texts(seed=3)
    mask = MASKS[kind](Q, valid)
    queries, text = joint(model, patches, tokens, mask)
    with_other_text, other_text = joint(model, patches, others, mask)
    assert torch.equal(queries, with_other_text)
    assert (text - other_text).abs().mean() > 0.1
    close(queries, model.query_output(patches))
    gradients = tiny.gradients(queries.square().sum(), model)
    for name in ("word_embeddings.weight", "positions.weight", "layers.0.text_ffn.widen.weight"):
        assert not gradients[name].any()


def test_bidirectional_lets_queries_see_text() -> None:
    model, patches = tiny.qformer(), tiny.features()
    tokens, valid = tiny.texts()
    changed = tokens.clone()
    changed[:, 1] = changed[:, 1] % 30 + 5
    mask = bidirectional_mask(Q, valid)
    queries = joint(model, patches, tokens, mask)[0]
    close(model.joint_pass(model.encode_image(patches), tokens, valid), queries)
    difference = queries - joint(model, patches, changed, mask)[0]
    assert difference.abs().amax(dim=(1, 2)).min() > 1e-2


def test_a_token_moves_no_text_row_before_it() -> None:
    model, patches = tiny.qformer(), tiny.features()
    tokens, valid = tiny.texts(shortest=T)
    memory = model.encode_image(patches)
    mask = causal_mask(Q, valid)
    _, cache = model.query_pass(memory)
    written = model.causal_pass(cache, tokens, valid)
    in_joint = rows(model(memory, tokens, mask).text)
    for t in range(T):
        changed = tokens.clone()
        changed[:, t] = changed[:, t] % 30 + 5
        for before, after in (
            (written, model.causal_pass(cache, changed, valid)),
            (in_joint, rows(model(memory, changed, mask).text)),
        ):
            assert torch.equal(before[:, :t], after[:, :t])
            moved = (before - after)[:, t:].abs().amax(dim=(0, 2))
            assert (moved > 1e-3).all(), "a token must be seen by itself and by all that follow it"


def test_under_unimodal_text_sees_no_image() -> None:
    model = tiny.qformer()
    tokens, valid = tiny.texts()
    mask = unimodal_mask(Q, valid)
    queries, text = joint(model, tiny.features(), tokens, mask)
    other_queries, other_text = joint(model, tiny.features(seed=5), tokens, mask)
    assert torch.equal(text, other_text)
    assert (queries - other_queries).abs().mean() > 0.1
    alone = rows(model(tokens=tokens, mask=unimodal_mask(0, valid)).text)
    close(text, alone)
    close(model.text_pass(tokens, valid), text[:, 0])
    gradients = tiny.gradients(text.square().sum(), model)
    for name in (
        "queries",
        "image_norm.weight",
        "layers.2.cross.key.weight",
        "layers.0.query_ffn.widen.weight",
    ):
        assert not gradients[name].any()


def test_under_causal_text_sees_the_image() -> None:
    model = tiny.qformer()
    tokens, valid = tiny.texts()
    mask = causal_mask(Q, valid)
    difference = joint(model, tiny.features(), tokens, mask)[1] - joint(model, tiny.features(seed=5), tokens, mask)[1]
    assert difference.abs().amax(dim=-1).min() > 1e-3


def test_causal_pass_equals_the_joint_pass_forward_and_backward() -> None:
    model, patches = tiny.qformer(), tiny.features().requires_grad_()
    tokens, valid = tiny.texts()
    mask = causal_mask(Q, valid)
    weight = torch.randn(B, Q + T, D, generator=torch.Generator().manual_seed(4)) / (Q + T)

    queries, cache = seen(model, patches)
    fast = torch.cat([queries, model.causal_pass(cache, tokens, valid)], dim=1)
    slow = torch.cat(joint(model, patches, tokens, mask), dim=1)
    close(fast, slow, 2e-6)  # float32 rounding of values up to 4

    fast_gradients = tiny.gradients((fast * weight).sum(), model)
    slow_gradients = tiny.gradients((slow * weight).sum(), model)
    tiny.assert_same_gradients(fast_gradients, slow_gradients)
    # The text rows alone must also give the queries a gradient, so the cache must not be detached.
    through_the_cache = tiny.gradients(model.causal_pass(seen(model, patches)[1], tokens, valid).square().sum(), model)
    assert through_the_cache["queries"].abs().max() > 1e-3
    assert through_the_cache["image_norm.weight"].abs().max() > 1e-3


@pytest.mark.parametrize("kind", MASKS)
def test_padding_changes_nothing(kind: str) -> None:
    model, patches = tiny.qformer(), tiny.features()
    tokens, valid = tiny.texts()
    queries, text = joint(model, patches, tokens, MASKS[kind](Q, valid))
    # No token attends to the padding, so its content does not change a single bit.
    junk = tokens.where(valid, 17)
    junk_queries, junk_text = joint(model, patches, junk, MASKS[kind](Q, valid))
    assert torch.equal(queries, junk_queries)
    assert torch.equal(text[valid], junk_text[valid])
    # The length of the padding does not matter either.
    wider = torch.cat([tokens, tokens.new_full((B, 3), 9)], dim=1)
    wider_valid = torch.cat([valid, valid.new_zeros(B, 3)], dim=1)
    wide_queries, wide_text = joint(model, patches, wider, MASKS[kind](Q, wider_valid))
    close(wide_queries, queries)
    close(wide_text[:, :T][valid], text[valid])


@pytest.mark.parametrize("kind", MASKS)
def test_a_row_is_the_same_alone_and_in_any_batch(kind: str) -> None:
    model, patches = tiny.qformer(), tiny.features()
    tokens, valid = tiny.texts()
    queries, text = joint(model, patches, tokens, MASKS[kind](Q, valid))
    written = model.causal_pass(seen(model, patches)[1], tokens, valid)
    for n in (0, 3, B - 1):
        one, length = slice(n, n + 1), int(valid[n].sum())
        single, single_valid = tokens[one, :length], valid[one, :length]
        own_queries, own_text = joint(model, patches[one], single, MASKS[kind](Q, single_valid))
        assert own_queries.shape == (1, Q, D)
        close(own_queries, queries[one])
        close(own_text, text[one, :length])
        own = model.causal_pass(seen(model, patches[one])[1], single, single_valid)
        close(own, written[one, :length])


def test_memory_is_taken_in_any_order() -> None:
    model, patches = tiny.qformer(), tiny.features()
    order = torch.tensor([3, 0, 3, 7])
    taken, _ = model.query_pass(model.encode_image(patches).take(order))
    close(taken, rows(model.query_output(patches[order])))


@pytest.mark.parametrize(("every", "crossing"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4]), (3, [0, 3])])
def test_which_layers_cross(every: int, crossing: list[int]) -> None:
    model = tiny.qformer(layers=6, cross_every=every)
    names = {name for name, _ in model.named_parameters()}
    assert [n for n in range(6) if f"layers.{n}.cross.key.weight" in names] == crossing
    memory = model.encode_image(tiny.features())
    assert len(memory.layers) == len(crossing)
    assert memory.layers[0][0].shape == (B, tiny.HEADS, P, D // tiny.HEADS)
    # Each of these layers uses its own keys and values of the image.
    model(memory).queries.square().sum().backward()
    for n in crossing:
        assert model.get_parameter(f"layers.{n}.cross.value.weight").grad.abs().max() > 1e-3  # pyright: ignore


def test_dropout_is_on_in_training_alone() -> None:
    tokens, valid = tiny.texts()
    mask = bidirectional_mask(Q, valid)
    model, patches = tiny.qformer(dropout=0.2), tiny.features()
    quiet = torch.cat(joint(model, patches, tokens, mask), dim=1)
    assert torch.equal(quiet, torch.cat(joint(model, patches, tokens, mask), dim=1))
    torch.manual_seed(0)
    noisy = torch.cat(joint(model.train(), patches, tokens, mask), dim=1)
    again = torch.cat(joint(model, patches, tokens, mask), dim=1)
    assert (noisy - quiet).abs().amax(dim=-1).min() > 1e-2, "some row knows no dropout"
    assert not torch.equal(noisy, again)
    without = tiny.qformer(dropout=0.0).train()
    assert torch.equal(torch.cat(joint(without, patches, tokens, mask), dim=1), quiet)


def test_every_kind_of_dropout_is_there() -> None:
    """Dropout of the embedding, of attention weights, and of attention and FFN outputs."""
    patches = tiny.features()
    for place in (
        "dropout",
        "layers.1.attention.dropout",
        "layers.2.cross.dropout",
        "layers.3.query_ffn.dropout",
    ):
        model = tiny.qformer(dropout=0.2)
        quiet = model.query_output(patches)
        model.get_submodule(place).train()
        assert not torch.equal(model.query_output(patches), quiet)
    model = tiny.qformer(dropout=0.0)
    quiet = model.query_output(patches)
    attention: Any = model.layers[0].attention
    attention.drop = 0.2
    assert torch.equal(model.query_output(patches), quiet)
    attention.training = True
    assert not torch.equal(model.query_output(patches), quiet)


def test_half_precision_features_are_normalised_in_float32() -> None:
    model, patches = tiny.qformer(), tiny.features().bfloat16()
    seen: list[torch.dtype] = []
    model.image_norm.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    exact = model.encode_image(patches.float()).layers[0][0]
    assert torch.equal(model.encode_image(patches).layers[0][0], exact)
    with torch.autocast("cpu", torch.bfloat16):
        model.encode_image(patches)
    assert seen == [torch.float32] * 3


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="width 30 is not a multiple of its 4 heads"):
        QFormer(width=30, heads=4)


def test_without_a_text_path_text_is_refused() -> None:
    model = tiny.qformer(vocabulary=0)
    assert not any("text" in name or "words" in name or "positions" in name for name in model.state_dict())
    assert model.query_output(tiny.features()).shape == (B, Q, D)
    with pytest.raises(ValueError, match="no text path"):
        model(tokens=tiny.texts()[0])


def test_fresh_weights_are_as_the_paper_starts() -> None:
    torch.manual_seed(0)
    model = QFormer(width=96, layers=2, heads=4, ffn=128, queries=50, image_width=64, vocabulary=200)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(parameter.mean().item()) < 1e-3


# Parity with an independent implementation.
THEIR_ATTENTION = {"query": "attention.query", "key": "attention.key", "value": "attention.value"}
THEIR_ATTENTION |= {"out": "output.dense", "norm": "output.LayerNorm"}
THEIR_FFN = {
    "query_ffn.widen": "intermediate_query.dense",
    "query_ffn.narrow": "output_query.dense",
    "query_ffn.norm": "output_query.LayerNorm",
    "text_ffn.widen": "intermediate.dense",
    "text_ffn.narrow": "output.dense",
    "text_ffn.norm": "output.LayerNorm",
}


def their_name(name: str) -> str:
    if name.startswith("norm."):
        return "layernorm." + name.removeprefix("norm.")
    _, n, *middle, leaf = name.split(".")
    if middle[0] in ("attention", "cross"):
        block = {"attention": "attention", "cross": "crossattention"}[middle[0]]
        return f"encoder.layer.{n}.{block}.{THEIR_ATTENTION[middle[1]]}.{leaf}"
    return f"encoder.layer.{n}.{THEIR_FFN['.'.join(middle)]}.{leaf}"


def theirs(model: QFormer) -> Any:
    """transformers' Q-Former, with all of its weights replaced by ours."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    config = Blip2QFormerConfig(
        vocab_size=WORDS,
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=tiny.HEADS,
        intermediate_size=tiny.FFN,
        max_position_embeddings=POSITIONS,
        cross_attention_frequency=2,
        encoder_hidden_size=V,
        use_qformer_text_input=True,
    )
    other = Blip2QFormerModel(config).eval()
    own = model.state_dict()
    outside = {"queries", "word_embeddings.weight", "positions.weight", "image_norm.weight", "image_norm.bias"}
    other.load_state_dict({their_name(name): own[name] for name in own if name not in outside})
    return other


@torch.no_grad()
def test_queries_equal_those_of_transformers() -> None:
    model, patches = tiny.qformer(), tiny.features()
    expected = theirs(model)(
        query_embeds=model.queries.expand(B, -1, -1), encoder_hidden_states=model.image_norm(patches)
    ).last_hidden_state
    close(model.query_output(patches), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", MASKS)
def test_joint_pass_equals_that_of_transformers(kind: str) -> None:
    model, patches = tiny.qformer(), tiny.features()
    tokens, valid = tiny.texts()
    tokens[:, 0] = DEC
    words, positions = model.get_submodule("word_embeddings"), model.get_parameter("positions.weight")
    embeds = torch.cat([model.queries.expand(B, -1, -1), words(tokens) + positions[:T]], dim=1)
    mask = MASKS[kind](Q, valid)
    expected = theirs(model)(
        query_embeds=embeds,
        query_length=Q,
        attention_mask=torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min),
        encoder_hidden_states=model.image_norm(patches),
    ).last_hidden_state
    queries, text = joint(model, patches, tokens, mask)
    close(queries, expected[:, :Q])
    close(text[valid], expected[:, Q:][valid])


def test_the_lm_head_is_tied_to_the_words() -> None:
    model = tiny.qformer()
    assert model.word_embeddings is not None
    head = tiny.redraw(LMHead(D, model.word_embeddings))
    assert sum(p.numel() for p in head.parameters()) == D * D + D + 2 * D + WORDS
    logits = head(torch.randn(B, D), model.word_embeddings)
    assert logits.shape == (B, WORDS)
    logits.sum().backward()
    assert model.word_embeddings.weight.grad is not None
