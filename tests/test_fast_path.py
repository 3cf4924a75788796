"""Skipping rows, chunks, recomputation, compilation and prefetching change no result, forward or backward."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

import tiny
import tiny_models
from openblip2.apps.bench.naive import naive_losses
from openblip2.config import RunSettings, change
from openblip2.data.batches import PairBatch, Prefetcher
from openblip2.errors import UserError
from openblip2.hardware import computing
from openblip2.model.blocks import compile_blocks
from openblip2.model.build import set_speed
from openblip2.model.decoding import Decoding
from openblip2.model.fast import chunked_loss
from openblip2.model.fast.chunked_loss import chunked_cross_entropy, ends_in_head
from openblip2.model.lora import add_lora
from openblip2.model.qformer import QFormer, bidirectional_mask
from openblip2.model.stage1 import Stage1
from openblip2.train.parameters import saved_parameters
from test_stage1 import IDS, NEGATIVES
from test_stage2 import CAPTIONS, PROMPTS, stage2
from tiny import WORDS, B, D, E, P, Q, T, V

# Stage 1 against the plain computation.


def losses_of(model: Stage1, **options: Any) -> dict[str, Tensor]:
    tokens, valid = tiny.texts()
    return model.losses(tokens, valid, IDS, features=tiny.features(), negatives=NEGATIVES, **options)


def test_losses_and_gradients_are_those_of_the_plain_way() -> None:
    model = tiny.stage1()
    tokens, valid = tiny.texts()
    fast, slow = losses_of(model), naive_losses(model, tokens, valid, IDS, tiny.features(), NEGATIVES)
    for name, loss in slow.items():
        torch.testing.assert_close(fast[name], loss, rtol=1e-5, atol=1e-5)
        tiny.assert_same_gradients(tiny.gradients(fast[name], model), tiny.gradients(loss, model))


def test_the_plain_way_pads_to_32_and_reads_every_image_five_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that the reference computation really does what the fast path avoids."""
    model = tiny.redraw(Stage1(QFormer(D, 2, tiny.HEADS, tiny.FFN, Q, V, WORDS, 40), None, E))
    tokens, valid = tiny.texts()
    read: list[tuple[int, ...]] = []
    cross: Any = model.qformer.layers[0].cross
    cross.key.register_forward_hook(lambda module, given, output: read.append(output.shape))
    shapes: list[int] = []
    for layer in model.qformer.layers:
        layer.text_ffn.register_forward_hook(lambda module, given, output: shapes.append(output.shape[1]))  # pyright: ignore
    slow = naive_losses(model, tokens, valid, IDS, tiny.features(), NEGATIVES)
    wrong = [int((part >= 0).sum()) for part in NEGATIVES]
    assert sorted(shape[0] for shape in read) == sorted([B, B, *wrong, B])
    assert set(shapes) == {32}
    read.clear()
    fast = losses_of(model)
    assert [shape[0] for shape in read] == [B]
    for name, loss in slow.items():
        torch.testing.assert_close(fast[name], loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [0, 1, 3, T])
def test_rows_that_are_read_are_the_same_whatever_is_left_out(keep: int) -> None:
    model, patches, (tokens, valid) = tiny.qformer(), tiny.features(), tiny.texts()
    memory, mask = model.encode_image(patches), bidirectional_mask(Q, valid)
    whole, part = model(memory, tokens, mask), model(memory, tokens, mask, keep_text=keep)
    assert whole.queries is not None
    assert whole.text is not None
    weights = torch.randn(B, Q + T, D, generator=torch.Generator().manual_seed(7)) / (Q + T)
    torch.testing.assert_close(part.queries, whole.queries, rtol=1e-6, atol=1e-6)
    mine = (part.queries * weights[:, :Q]).sum()
    theirs = (whole.queries * weights[:, :Q]).sum()
    if keep:
        assert part.text.shape == (B, keep, D)
        torch.testing.assert_close(part.text, whole.text[:, :keep], rtol=1e-6, atol=1e-6)
        mine = mine + (part.text * weights[:, Q : Q + keep]).sum()
        theirs = theirs + (whole.text[:, :keep] * weights[:, Q : Q + keep]).sum()
        _, cache = model.query_pass(memory)
        written = model.causal_pass(cache, tokens, valid)
        kept = model.causal_pass(cache, tokens, valid, keep_text=keep)
        torch.testing.assert_close(kept, written[:, :keep], rtol=1e-6, atol=1e-6)
    else:
        assert part.text is None
    tiny.assert_same_gradients(tiny.gradients(mine, model), tiny.gradients(theirs, model))


def test_rows_that_nobody_reads_are_not_computed() -> None:
    model = tiny.stage1()
    last: Any = model.qformer.layers[-1]
    rows: list[int] = []
    last.text_ffn.register_forward_hook(lambda module, given, output: rows.append(output.shape[1]))
    looking: list[int] = []
    last.attention.query.register_forward_hook(lambda module, given, output: looking.append(output.shape[1]))
    losses_of(model)
    # The queries alone; [CLS]; the text that begins with [DEC], without its last token; the queries of the ITM pairs.
    assert (rows, looking) == ([1, T - 1], [Q, 1, T - 1, Q])


# Cross-entropy in chunks.


def problem(count: int = 37) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(count, D, generator=random), torch.randn(WORDS, D, generator=random)
    targets = torch.randint(WORDS, (count,), generator=random)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randn(WORDS, generator=random), targets


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 100])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("biased", [False, True])
def test_chunks_are_the_whole(chunk: int, smoothing: float, biased: bool) -> None:
    hidden, weight, bias, targets = problem()
    given = [hidden, weight, bias.requires_grad_()] if biased else [hidden, weight]
    mine = chunked_cross_entropy(hidden, weight, bias if biased else None, targets, smoothing, chunk)
    logits = hidden @ weight.T + (bias if biased else 0)
    theirs = F.cross_entropy(logits, targets, label_smoothing=smoothing)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    for ours, wanted in zip(torch.autograd.grad(3 * mine, given), torch.autograd.grad(3 * theirs, given), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden, weight, bias, targets = problem()
    frozen = weight.detach()
    loss = chunked_cross_entropy(hidden, frozen, bias, targets, 0.0, 5)
    (mine,) = torch.autograd.grad(loss, hidden)
    (theirs,) = torch.autograd.grad(F.cross_entropy(hidden @ frozen.T + bias, targets), hidden)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    with torch.no_grad():
        quiet = chunked_cross_entropy(hidden, weight, bias, targets, 0.0, 5)
    assert torch.equal(quiet, loss.detach())
    assert not quiet.requires_grad


def test_under_autocast_chunks_are_as_good_as_the_plain_way() -> None:
    hidden, weight, bias, targets = problem(200)
    given = [hidden, weight, bias.requires_grad_()]
    exact = torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight, bias), targets, label_smoothing=0.1), given)

    def off(loss: Tensor) -> list[float]:
        found = torch.autograd.grad(loss, given)
        assert [g.dtype for g in found] == [torch.float32] * 3
        return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]

    with torch.autocast("cpu", torch.bfloat16):
        plain = F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, label_smoothing=0.1)
        chunks = chunked_cross_entropy(hidden, weight, bias, targets, 0.1, 32)
    assert chunks.dtype == torch.float32
    assert chunks.item() == pytest.approx(plain.item(), rel=1e-3)
    for mine, theirs in zip(off(chunks), off(plain), strict=True):
        assert 0 < mine < 1.1 * theirs + 1e-6
        assert mine < 0.02


def test_never_more_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds for the computation of the loss and for the tensors saved for the backward pass."""
    hidden, weight, bias, targets = problem(64)
    sizes: list[int] = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *given: sizes.append(len(given[0])) or linear(*given))
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        chunked_cross_entropy(hidden, weight, bias, targets, 0.1, 10).backward()
    assert sizes == [10] * 6 + [4]
    assert set(kept) <= {(64, D), (WORDS, D)}
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4 * WORDS * 20)
    monkeypatch.setattr(chunked_loss, "FEWEST_ROWS", 1)
    sizes.clear()
    chunked_cross_entropy(hidden, weight, bias, targets, 0.1)
    assert sizes == [20, 20, 20, 4]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes all losses with chunks use chunks of 7 rows."""
    in_chunks = functools.partial(chunked_cross_entropy, chunk=7)
    monkeypatch.setattr("openblip2.model.stage1.chunked_cross_entropy", in_chunks)
    monkeypatch.setattr("openblip2.model.fast.chunked_loss.chunked_cross_entropy", in_chunks)


@pytest.mark.usefixtures("small_chunks")
def test_writing_in_chunks_is_the_plain_way() -> None:
    test_losses_and_gradients_are_those_of_the_plain_way()


# The language model's output embedding.


def lm_loss(model: Any) -> Tensor:
    torch.manual_seed(0)  # fixes an encoder-decoder's split
    return model.losses(PROMPTS, CAPTIONS, features=tiny.features())["lm"]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", tiny_models.MODELS)
@pytest.mark.parametrize("adapters", [False, True])
def test_the_loss_is_that_of_the_models_own_logits(kind: str, adapters: bool) -> None:
    model = stage2(kind, dropout=0.0)
    if adapters:
        add_lora(model.language.llm, 2)
        for name, parameter in model.language.named_parameters():
            if ".lora_" in name:
                nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    model.language.__dict__["_ends_in_head"] = False
    slow = lm_loss(model)
    del model.language.__dict__["_ends_in_head"]
    fast = lm_loss(model)
    assert model.language.__dict__["_ends_in_head"]
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)
    tiny.assert_same_gradients(tiny.gradients(fast, model), tiny.gradients(slow, model))


SIZES: dict[str, Any] = {
    **tiny_models.SHARED,
    "hidden_size": tiny_models.L,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "intermediate_size": 26,
    "num_hidden_layers": 2,
}
LAST: dict[str, tuple[Callable[[], Any], bool]] = {
    "llama": (tiny_models.llama, True),
    "opt": (tiny_models.opt, True),
    "t5": (tiny_models.t5, True),
    "gemma2": (lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZES, head_dim=4)), False),  # caps logits at 30
    "cohere": (lambda: hf.CohereForCausalLM(hf.CohereConfig(**SIZES)), False),  # scales logits by 1 / 16
    "granite": (lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SIZES, logits_scaling=4.0)), False),
    "granite, scale of 1": (lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SIZES)), True),
}


@pytest.mark.parametrize("kind", LAST)
def test_what_is_done_to_logits_behind_the_output_embedding_is_found_out(kind: str) -> None:
    build, last = LAST[kind]
    llm = build().eval()
    assert ends_in_head(llm) == last
    model = stage2()
    model.language = tiny_models.language("t5" if kind == "t5" else "llama", llm)
    mine = lm_loss(model)
    model.language.__dict__["_ends_in_head"] = False
    torch.testing.assert_close(lm_loss(model), mine, rtol=1e-6, atol=1e-6)


def test_a_word_more_likely_is_found_out() -> None:
    """BART adds a bias to its logits."""
    sizes: dict[str, Any] = {"d_model": 20, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 5}
    sizes |= {"decoder_attention_heads": 5, "encoder_ffn_dim": 26, "decoder_ffn_dim": 26, "max_position_embeddings": 50}
    llm: Any = hf.BartForConditionalGeneration(hf.BartConfig(**tiny_models.SHARED, **sizes)).eval()
    assert ends_in_head(llm)
    llm.final_logits_bias[0, 3] = 2.0
    assert not ends_in_head(llm)


def test_an_adapted_output_embedding_computes_for_itself() -> None:
    llm = tiny_models.llama()
    add_lora(llm, 2, "lm_head")
    assert not ends_in_head(llm)


@pytest.mark.parametrize("kind", tiny_models.MODELS)
def test_logits_of_scored_positions_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = stage2(kind), []
    monkeypatch.setattr(
        chunked_loss,
        "chunked_cross_entropy",
        lambda *given: rows.append(len(given[0])) or chunked_cross_entropy(*given),
    )
    head: Any = model.language.llm.get_output_embeddings()
    made: list[int] = []
    lm_loss(model)
    head.register_forward_hook(lambda module, given, output: made.append(output.numel()))
    lm_loss(model)
    torch.manual_seed(0)
    scored = model.language.scored(model.soft_prompt(features=tiny.features()), PROMPTS, CAPTIONS)[1]
    assert rows == [scored] * 3
    assert made == [0, 0]


# Layers computed again in the backward pass.


def held(run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Number of bytes that the graph of a loss keeps, without the weights, and the loss."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    return sum(kept.values()), loss


def test_a_qformer_computed_again_is_the_same_with_dropout() -> None:
    found = []
    for again in (False, True):
        model = tiny.stage1(dropout=0.2).train()
        model.qformer.checkpoint_activations = again
        torch.manual_seed(5)
        size, loss = held(lambda model=model: torch.stack(list(losses_of(model).values())).sum())
        found.append((loss.detach(), tiny.gradients(loss, model), size))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name
    assert found[1][2] < 0.5 * found[0][2]


@pytest.mark.parametrize("kind", tiny_models.MODELS)
@pytest.mark.parametrize("adapters", [False, True])
def test_a_frozen_language_model_computed_again_is_the_same(kind: str, adapters: bool) -> None:
    """Uses text before the image, which each row then processes for itself because of checkpointing."""
    found = []
    for again in (False, True):
        model = stage2(kind, dropout=0.0).train()
        model.language.template = "<s>a photo of two{image}{prompt}"
        if adapters:
            torch.manual_seed(0)
            add_lora(model.language.llm, 2)
        if again:
            model.language.checkpoint_activations()
        assert not model.language.llm.training
        size, loss = held(lambda model=model: lm_loss(model))
        found.append((loss.detach(), tiny.gradients(loss, model), size))
        model.generate(PROMPTS[:2], Decoding(max_new_tokens=3, beams=2), features=tiny.features(2))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    tiny.assert_same_gradients(found[1][1], found[0][1])
    assert found[1][2] < 0.8 * found[0][2]


def test_the_settings_reach_both_models(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[QFormer] = []
    monkeypatch.setattr("openblip2.model.build.compile_blocks", compiled.append)
    for on in (False, True):
        model = stage2()
        wanted = {"train.checkpoint_activations": on, "train.compile": on}
        set_speed(model, change(RunSettings(stage="stage2"), wanted))
        assert model.qformer.checkpoint_activations == model.language.checkpointed == on
        assert compiled == [model.qformer] * on


def test_a_model_without_layers_fit_for_it_is_refused() -> None:
    lm = tiny_models.language("llama")
    lm.llm.model.layers = nn.ModuleList()  # pyright: ignore
    with pytest.raises(UserError, match=r"^train\.checkpoint_activations=true: LlamaForCausalLM does not support it"):
        lm.checkpoint_activations()


# Batches made ahead.


def batch_of(number: int) -> PairBatch:
    return PairBatch([f"caption {number}"], torch.tensor([number]), features=torch.full((1, P, V), float(number)))


def test_batches_made_ahead_are_the_same_and_end_with_the_run() -> None:
    made: list[tuple[int, str]] = []

    def batches(number: int) -> PairBatch:
        made.append((number, threading.current_thread().name))
        return batch_of(number)

    ahead = Prefetcher(batches, 7)
    for number in (2, 3, 4, 0, 1, 6):  # starts at 2 as a resumed run, then some out of order
        batch = ahead(number)
        assert batch.captions == [f"caption {number}"]
        assert torch.equal(batch.ids, torch.tensor([number]))
        assert batch.features is not None
        assert (batch.features == number).all()
    ahead.thread.shutdown()
    assert [number for number, _ in made] == [2, 3, 4, 5, 0, 1, 2, 6]
    assert all(name.startswith("batches") for _, name in made)


def test_the_next_batch_is_made_while_the_model_works() -> None:
    begun = threading.Event()

    def batches(number: int) -> PairBatch:
        if number == 1:
            begun.set()
        return batch_of(number)

    ahead = Prefetcher(batches, 3)
    ahead(0)
    assert begun.wait(10), "batch 1 is not made before it is asked for"


def test_what_goes_wrong_ahead_is_raised_where_it_is_asked_for() -> None:
    def batches(number: int) -> PairBatch:
        if number == 1:
            raise UserError("batch 1: none of its pictures can be opened")
        return batch_of(number)

    ahead = Prefetcher(batches, 3)
    assert ahead(0).captions == ["caption 0"]
    with pytest.raises(UserError, match="batch 1"):
        ahead(1)
    assert ahead(2).captions == ["caption 2"]


# Compiled blocks.


@pytest.mark.slow
def test_compiled_blocks_are_the_same() -> None:
    """Takes minutes because a C++ compiler runs. Uses texts of two lengths because shapes must not be constants."""
    plain, compiled = tiny.stage1(dropout=0.0).train(), tiny.stage1(dropout=0.0).train()
    names = list(compiled.state_dict())
    compile_blocks(compiled.qformer)
    assert list(compiled.state_dict()) == names
    blocks = [m for m in compiled.qformer.modules() if type(m).__name__ in ("Attention", "FeedForward")]
    assert len(blocks) == 4 * 3 + 2
    assert all(block._compiled_call_impl is not None for block in blocks)
    tokens, valid = tiny.texts()
    for length in (T, T - 1):
        found = []
        for model in (plain, compiled):
            with computing(model, "fp32"):
                given = (tokens[:, :length], valid[:, :length], IDS)
                losses = model.losses(*given, features=tiny.features(), negatives=NEGATIVES)
            total = torch.stack(list(losses.values())).sum()
            found.append((total.detach(), tiny.gradients(total, model)))
        torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
        tiny.assert_same_gradients(found[1][1], found[0][1])


def test_compiled_blocks_are_written_by_their_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.stage1()
    names = set(saved_parameters(model))
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda block, **_: compiled.append(block) or block)
    compile_blocks(model.qformer)
    assert len(compiled) == 1 + 4 * 3 + 2, "a trial and the blocks"
    assert set(saved_parameters(model)) == names
    assert not [name for name in names if "_orig_mod" in name]


def test_without_a_compiler_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(given: Any) -> Any:
        raise RuntimeError("no working C++ compiler\nwas found")

    monkeypatch.setattr(torch, "compile", compile_)
    with pytest.raises(UserError, match=r"^train\.compile=true: .*\(no working C\+\+ compiler\): a CPU") as caught:
        compile_blocks(tiny.qformer())
    assert "\n" not in str(caught.value)
