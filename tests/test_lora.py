"""LoRA: trained and frozen parameters, merging of adapters, and runs that save, resume and load adapters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import tiny_models
from openblip2.config import RunSettings, change
from openblip2.errors import UserError
from openblip2.model import language as language_module
from openblip2.model.build import add_adapters, parts_table
from openblip2.model.language import Decoding
from openblip2.model.lora import QFORMER_LAYERS, add_lora, has_lora, merge_lora
from openblip2.model.stage2 import Stage2
from openblip2.runs import read_tensors
from openblip2.train.parameters import (
    fill_trained,
    parameter_groups,
    save_trained,
    saved_parameters,
    trained_parameters,
)
from test_cli import Home, call, home  # noqa: F401  (the fixture)
from test_stage2 import CAPTIONS, PROMPTS, stage2

RANKS = {"qformer.lora_rank": 3, "language.lora_rank": 2}


def adapted(kind: str = "llama", drawn: bool = True, **ranks: int) -> Stage2:
    """A redrawn stage 2 with adapters; `drawn` gives the adapters random values, because new ones change nothing."""
    model = stage2(kind, dropout=0.0)
    torch.manual_seed(0)
    settings = change(RunSettings(stage="stage2"), {name.replace("_", ".", 1): rank for name, rank in ranks.items()})
    add_adapters(model, settings)
    if drawn:
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def both(kind: str = "llama", drawn: bool = True) -> Stage2:
    return adapted(kind, drawn, qformer_lora_rank=3, language_lora_rank=2)


def loss_of(model: Stage2) -> Tensor:
    return model.losses(PROMPTS, CAPTIONS, features=tiny.features())["lm"]


@pytest.mark.parametrize("kind", tiny_models.MODELS)
def test_fresh_adapters_change_nothing(kind: str) -> None:
    torch.manual_seed(0)  # fixes an encoder-decoder's split
    plain = loss_of(stage2(kind, dropout=0.0))
    model = both(kind, drawn=False)
    torch.manual_seed(0)
    # If an adapter needs gradients, attention is computed in another way, which rounds differently.
    torch.testing.assert_close(plain, loss_of(model), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", tiny_models.MODELS)
def test_only_adapters_and_what_is_named_move_in_a_step(kind: str) -> None:
    model = both(kind).train()
    assert not model.language.llm.training
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss_of(model).backward()
    torch.optim.SGD(trained_parameters(model).values(), lr=0.1).step()
    whole = ("projection.", "qformer.queries", "qformer.image_norm.")
    for name, parameter in model.named_parameters():
        moves = ".lora_" in name or name.startswith(whole)
        assert parameter.requires_grad == moves, name
        if not moves:
            assert torch.equal(parameter, before[name]), name
        elif not name.endswith("key.lora_B.default.bias"):
            assert not torch.equal(parameter, before[name]), name
    # The Q-Former has 4 layers, 2 of them with cross-attention; each attention has 4 linear layers.
    assert sum("qformer" in name and "lora_A" in name for name in before) == (4 + 2) * 4
    assert not any("lm_head" in name and "lora" in name for name in before)


def test_the_usual_layers_of_a_llama_are_adapted() -> None:
    names = [name.split(".")[-4] for name, _ in both().language.named_parameters() if "lora_A" in name]
    assert set(names) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(names) == 2 * 7


@pytest.mark.parametrize("kind", tiny_models.MODELS)
def test_folded_adapters_are_the_same_model(kind: str) -> None:
    model, plain = both(kind), stage2(kind)
    torch.manual_seed(0)
    apart = loss_of(model).detach()
    assert merge_lora(model.language) is model.language
    merge_lora(model.qformer)
    torch.manual_seed(0)
    torch.testing.assert_close(loss_of(model).detach(), apart, rtol=1e-5, atol=1e-5)
    assert not has_lora(model)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    add_lora(model.qformer, 1, QFORMER_LAYERS)  # nothing of the first adapters is left
    assert has_lora(model.qformer)


def test_a_layer_is_its_weight_and_twice_the_product_of_its_adapters() -> None:
    model = both()
    layer: Any = model.qformer.layers[0].attention.query  # pyright: ignore
    weight, low, high = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert low.shape == (3, tiny.D)
    rows = torch.randn(2, 5, tiny.D)
    expected = rows @ (weight + 2 * high @ low).T + layer.base_layer.bias
    torch.testing.assert_close(layer(rows), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_text_in_front_of_the_picture_carries_gradient_to_the_adapters(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text is processed once for all rows; loss and gradients are the same as when every row contains it."""
    model = both(kind)
    model.language.template = "<s>a photo of two{image}{prompt}"
    once = loss_of(model)
    read_once = tiny.gradients(once, model)
    monkeypatch.setattr(language_module, "common_text", lambda heads: [])
    whole = loss_of(model)
    torch.testing.assert_close(once, whole, rtol=1e-5, atol=1e-5)
    in_one_piece = tiny.gradients(whole, model)
    tiny.assert_same_gradients(read_once, in_one_piece)
    monkeypatch.undo()
    # Shows that the test can fail: without that path, the gradients differ.
    monkeypatch.setattr(type(model.language), "adapted", False)
    cut = tiny.gradients(loss_of(model), model)
    lost = {n: float((cut[n] - g).abs().max() / g.abs().max()) for n, g in in_one_piece.items() if "lora_B" in n}
    assert max(lost.values()) > 0.01


def test_parts_with_adapters_have_two_rows() -> None:
    model = both()
    rows = parts_table(model)
    assert [(name, state) for name, _, state in rows] == [
        ("qformer", "trained"),
        ("qformer", "frozen"),
        ("language", "trained"),
        ("language", "frozen"),
        ("projection", "trained"),
    ]
    assert sum(count for _, count, _ in rows) == sum(p.numel() for p in model.parameters())
    assert sum(count for _, count, state in rows if state == "trained") == sum(
        p.numel() for p in trained_parameters(model).values()
    )


def test_a_run_keeps_what_is_nowhere_else(tmp_path: Path) -> None:
    model, other = both(), tiny.redraw(both(), seed=5)
    other.language.llm.load_state_dict(model.language.llm.state_dict())
    for name, parameter in other.language.named_parameters():
        if ".lora_" in name:
            torch.nn.init.ones_(parameter)
    save_trained(model, tmp_path / "model.safetensors")
    kept = read_tensors(tmp_path / "model.safetensors")
    assert kept.keys() == {n for n, _ in model.named_parameters() if "language" not in n or ".lora_" in n}
    fill_trained(other, kept, "run")
    for (name, mine), (_, theirs) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    with pytest.raises(UserError, match="does not fit this model"):
        fill_trained(stage2(), kept, "run")
    plain = stage2()
    assert saved_parameters(plain).keys() == trained_parameters(plain).keys()  # without LoRA nothing else is saved


def test_adapters_of_rank_1_are_decayed_and_queries_are_not() -> None:
    model = adapted(qformer_lora_rank=1)
    decayed, others = parameter_groups(trained_parameters(model), 0.05)
    inside = {id(p) for p in decayed["params"]}
    assert all(id(p) in inside for name, p in trained_parameters(model).items() if ".lora_" in name)
    assert id(model.qformer.queries) in {id(p) for p in others["params"]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_are_fp32_in_a_model_of_less(dtype: torch.dtype) -> None:
    model = stage2("llama")
    model.language.llm.to(dtype)  # pyright: ignore
    torch.manual_seed(0)
    add_lora(model.language.llm, 2)
    assert {p.dtype for p in model.language.parameters() if p.requires_grad} == {torch.float32}
    loss = loss_of(model)
    assert loss.isfinite()
    loss.backward()
    assert sum(p.grad.abs().sum() for p in model.language.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize("setting", RANKS)
def test_without_peft_there_is_one_line(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"needs peft: pip install 'openblip2\[lora\]'$"):
        add_adapters(stage2(), change(RunSettings(stage="stage2"), {setting: 2}))


@pytest.fixture(scope="module")
def runs(home: Home) -> Home:  # noqa: F811
    """A run of each stage with adapters; stage 2 starts from the stage-1 run with adapters."""
    ranks = [word for name, rank in RANKS.items() for word in ("--set", f"{name}={rank}")]
    for stage, more in (("stage1", ()), ("stage2", ("--start", home.root / "stage1-lora"))):
        said = call(*home.train(stage, f"{stage}-lora", *ranks, *more))
        assert said.code == 0, said.err
        assert len([line for line in said.err.splitlines() if line.startswith("qformer ")]) == 2
    return home


def test_runs_with_adapters_caption_and_rank(runs: Home) -> None:
    said = call("caption", runs.root / "stage2-lora", runs.picture(), "--beams", "1")
    assert (said.code, said.err) == (0, "")
    said = call("rank", runs.root / "stage1-lora", "A red dog.", runs.picture(), runs.picture(1))
    assert (said.code, said.err) == (0, "")
    import openblip2

    captioner: Any = openblip2.load(runs.root / "stage2-lora")
    kept = read_tensors(runs.root / "stage2-lora" / "model.safetensors")
    for name, parameter in saved_parameters(captioner.model).items():
        assert torch.equal(parameter, kept[name]), name
    before = captioner.caption([runs.picture()], decoding=Decoding(beams=1))
    merge_lora(captioner.model)
    assert captioner.caption([runs.picture()], decoding=Decoding(beams=1)) == before


def test_adapters_learn_while_activations_are_computed_again(runs: Home, tmp_path: Path) -> None:
    """The run also writes the same captions after it is saved, loaded and converted."""
    ranks = [word for name, rank in RANKS.items() for word in ("--set", f"{name}={rank}")]
    more = ("--start", runs.root / "stage1-lora", "--set", "train.checkpoint_activations=true")
    said = call(*runs.train("stage2", "stage2-again", *ranks, *more))
    assert said.code == 0, said.err
    kept = read_tensors(runs.root / "stage2-again" / "model.safetensors")
    high = {name for name in kept if ".lora_B." in name}
    assert {name.split(".")[0] for name in high} == {"qformer", "language"}
    # The loss does not depend on the bias of the keys, because the bias cancels in the softmax.
    still = {name for name in high if not kept[name].any()}
    assert all(name.endswith("key.lora_B.default.bias") for name in still), still
    plain = read_tensors(runs.root / "stage2-lora" / "model.safetensors")
    for name in high - still:
        torch.testing.assert_close(kept[name], plain[name], rtol=1e-3, atol=1e-6)

    import openblip2

    captioner: Any = openblip2.load(runs.root / "stage2-again")
    pictures = [runs.picture(n) for n in range(3)]
    captions = captioner.caption(pictures)
    captioner.save_pretrained(tmp_path / "saved")
    openblip2.convert(runs.root / "stage2-again", tmp_path / "folded", "openblip2")
    for folder in ("saved", "folded"):
        again: Any = openblip2.load(tmp_path / folder)
        assert again.caption(pictures) == captions, folder
    assert not [name for name in read_tensors(tmp_path / "folded" / "model.safetensors") if "lora" in name]


def test_stage_2_starts_from_folded_adapters(runs: Home) -> None:
    """The frozen weights of the second run are those of the first with its adapters merged."""
    first = read_tensors(runs.root / "stage1-lora" / "model.safetensors")
    second = read_tensors(runs.root / "stage2-lora" / "model.safetensors")
    layer = "qformer.layers.1.attention.value"
    low, high = (first[f"{layer}.lora_{side}.default.weight"] for side in "AB")
    assert high.abs().max() > 0  # the adapter has learned something
    folded = first[f"{layer}.base_layer.weight"] + 2 * high @ low
    torch.testing.assert_close(second[f"{layer}.base_layer.weight"], folded, rtol=1e-5, atol=1e-7)
    plain = "qformer.layers.1.query_ffn.widen.weight"
    assert torch.equal(first[plain], second[plain])


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_resumed_run_with_adapters_is_the_same(runs: Home, stage: str) -> None:
    whole = (runs.root / f"{stage}-lora" / "model.safetensors").read_bytes()
    remove: Callable[[Path], object] = lambda folder: (folder / "model.safetensors").unlink()  # noqa: E731
    run = runs.broken(f"{stage}-resumed", remove, f"{stage}-lora")
    assert [path.name for path in (run / "resume").iterdir()] == ["step-00000002"]
    ranks = [word for name, rank in RANKS.items() for word in ("--set", f"{name}={rank}")]
    start = ("--start", runs.root / "stage1-lora") if stage == "stage2" else ()
    said = call(*runs.train(stage, f"{stage}-resumed", *ranks, *start, "--resume"))
    assert said.code == 0, said.err
    assert (run / "model.safetensors").read_bytes() == whole


def test_a_warm_start_goes_before_the_adapters(runs: Home) -> None:
    said = call(
        *runs.train(
            "stage2", "warm-lora", "--start", runs.stage1, "--set", "language.lora_rank=2", "--set", "warm_start=true"
        )
    )
    assert said.code == 0, said.err
    assert "projection started in closed form" in said.err
