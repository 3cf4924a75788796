"""Compares a plan's figures with the models themselves, with formulas written out, and with published numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import test_presets as sizes
import tiny
from openblip2.apps.bench import peak_memory
from openblip2.cli import app
from openblip2.commands.scale import read_gpus
from openblip2.config import change
from openblip2.errors import UserError
from openblip2.model.qformer import QFormer, bidirectional_mask, unimodal_mask
from openblip2.model.stage1 import Stage1
from openblip2.plan import Meter, make_plan
from openblip2.presets import preset

G = 1e9


@pytest.fixture(scope="module")
def vit_g() -> dict[str, Any]:
    return make_plan(preset("stage1", "vit-g"), "A100-40G", 16)


@pytest.fixture(scope="module")
def opt() -> dict[str, Any]:
    return make_plan(preset("stage2", "vit-l-opt-2.7b"), "A100-40G", 16)


def forward(plan: dict[str, Any], part: str) -> float:
    """Multiply-adds of one pair."""
    return plan["flops_of_a_pair"][part]["forward"] / 2


def test_published_figures_of_stage_1(vit_g: dict[str, Any]) -> None:
    """The image encoder's 260 GMAC, and a run of "less than 6 days" on 16 A100-40G (paper, 3.4)."""
    assert forward(vit_g, "image encoder") / G == pytest.approx(260.4, abs=0.1)
    assert vit_g["flops_of_a_pair"]["image encoder"]["backward"] == 0
    assert vit_g["features"]["bytes_of_an_image"] == 257 * 1408 * 2
    assert 4 < vit_g["run"]["days"] < 6
    assert vit_g["parameters"]["image encoder"] == sizes.VIT_G
    with torch.device("meta"):
        built = Stage1(QFormer(image_width=1408))
    assert vit_g["parameters"]["trained"] == sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize(("text", "whole", "shared"), [(32, 40.1, 30.1), (14, 31.8, 21.8)])
def test_the_papers_passes(text: int, whole: float, shared: float, vit_g: dict[str, Any]) -> None:
    """Published: GMAC of the paper's forward passes, and with keys and values computed once for each image."""
    pairs, found = 4, {}
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model = Stage1(QFormer(image_width=1408))
        features, tokens = torch.empty(pairs, 257, 1408), torch.zeros(pairs, text, dtype=torch.long)
        valid, former = torch.ones(pairs, text, dtype=torch.bool), model.qformer
        assert model.lm_head is not None
        assert former.word_embeddings is not None
        with Meter(model) as meter:
            memory = former.encode_image(features)
            found["image"] = meter.lap()
            _, cache = former.query_pass(memory)
            found["query"] = meter.lap()
            former(tokens=tokens, mask=unimodal_mask(0, valid))
            found["text"] = meter.lap()
            former(memory, tokens, bidirectional_mask(32, valid))
            found["joint"] = meter.lap()
            model.lm_head(former.causal_pass(cache, tokens, valid), former.word_embeddings)
            found["causal"] = meter.lap()
    gmac = {name: flops / 2 / pairs / G for name, flops in found.items()}
    once = gmac["query"] + gmac["text"] + 3 * gmac["joint"] + gmac["causal"]
    assert once + 4 * gmac["image"] == pytest.approx(whole, abs=0.1)
    assert once + gmac["image"] == pytest.approx(shared, abs=0.1)
    if text == 32:
        assert gmac["query"] + gmac["image"] == pytest.approx(6.4, abs=0.06)
        assert gmac["text"] == pytest.approx(2.7, abs=0.06)
        assert 3 * (gmac["joint"] + gmac["image"]) == pytest.approx(27.5, abs=0.06)
        assert gmac["causal"] == pytest.approx(3.5, abs=0.06)
        step = vit_g["flops_of_a_pair"]["Q-Former and heads"]
        assert step["forward"] / 2 / G < whole
        assert step["backward"] / step["forward"] == pytest.approx(2, abs=0.2)


def test_a_step_is_counted_as_torch_counts_it() -> None:
    """On real tensors: compares `Meter` with `FlopCounterMode`, and its peak with the sizes of the tensors in use."""
    model = tiny.stage1(dropout=0.0)
    tokens, _ = tiny.texts()
    valid, ids = torch.ones_like(tokens, dtype=torch.bool), torch.arange(tiny.B)

    def step() -> None:
        losses = model.losses(tokens, valid, features=tiny.features(), negatives=(ids.roll(1), ids.roll(2)))
        torch.stack(list(losses.values())).sum().backward()

    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            step()
        with Meter(model) as meter:
            step()
    assert meter.lap() == counter.get_total_flops() > 0
    assert meter.lap() == 0
    with Meter(model) as meter:
        a = torch.ones(1000)
        b = a + 1
        assert (meter.now, meter.peak) == (8000, 8000)
        del b
        assert (meter.now, meter.peak) == (4000, 8000)
        c = a.view(10, 100)
        assert meter.now == 4000, c.shape  # a view needs no memory


@pytest.mark.slow
def test_predicted_memory_of_a_real_step() -> None:
    """On a CPU: the memory of the process beyond the weights, measured as in `openblip2 bench`."""
    torch.manual_seed(0)
    pairs, text = 48, 16
    model = Stage1(QFormer(192, 4, 6, 768, 16, 256, 500, 64, 2, 0.0))
    features, tokens = torch.randn(pairs, 197, 256), torch.randint(1, 499, (pairs, text))
    valid, ids = torch.ones_like(tokens, dtype=torch.bool), torch.arange(pairs)

    def step() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            losses = model.losses(tokens, valid, features=features, negatives=(ids.roll(1), ids.roll(2)))
            torch.stack(list(losses.values())).sum().backward()
        for parameter in model.parameters():
            parameter.grad = None

    step()
    measured = peak_memory(step, torch.device("cpu"))
    if measured is None:  # it is measured only on Linux
        return
    with Meter(model) as meter:
        step()
    assert 0.65 < meter.peak / measured < 1.2, (meter.peak, measured)


def test_parameters_of_stage_2(opt: dict[str, Any]) -> None:
    plan = make_plan(change(preset("stage2", "vit-g-flant5-xl"), {"train.batch": 4}), "H100", 1, cached=True)
    for found, vision, image_width, language, width in (
        (opt, sizes.VIT_L, 1024, sizes.OPT_2_7B, 2560),
        (plan, sizes.VIT_G, 1408, sizes.FLANT5_XL, 2048),
    ):
        with torch.device("meta"):
            qformer = QFormer(image_width=image_width, vocabulary=0)
        trained = sum(p.numel() for p in qformer.parameters()) + 768 * width + width
        assert found["parameters"] == {"image encoder": vision, "language model": language, "trained": trained}
    assert "image encoder" in opt["flops_of_a_pair"]
    assert "image encoder" not in plan["flops_of_a_pair"]


def test_a_decoder_takes_what_its_layers_take(opt: dict[str, Any]) -> None:
    """Written out: the rows are 32 queries, 1 first token, 32 caption tokens and 1 end token; 33 rows are scored."""
    width, rows = 2560, 32 + 1 + 32 + 1
    layers = 32 * (rows * 12 * width**2 + 2 * rows**2 * width)
    # The chunked loss computes the gradient of its input along with the loss.
    assert forward(opt, "language model") == pytest.approx(layers + 2 * 33 * width * 50272, rel=0.001)
    backward = opt["flops_of_a_pair"]["language model"]["backward"] / 2
    assert backward == pytest.approx(32 * (rows * 12 * width**2 + 5 * rows**2 * width), rel=0.001)


def test_any_encoder_and_language_model_from_a_directory(tmp_path: Path) -> None:
    """Grouped-query attention, and the vision part of a larger model, with formulas written out."""
    text: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 90}
    text |= {"num_key_value_heads": 2, "intermediate_size": 40, "head_dim": 6, "max_position_embeddings": 64}
    hf.Qwen3Config(**text).save_pretrained(tmp_path / "llm")
    vision = {"hidden_size": 20, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 28}
    hf.CLIPConfig(vision_config={**vision, "image_size": 32, "patch_size": 8}).save_pretrained(tmp_path / "vit")
    changes = {
        "vision.name": str(tmp_path / "vit"),
        "vision.layer": -2,
        "vision.image_size": 32,
        "language.name": str(tmp_path / "llm"),
        "train.batch": 3,
    }
    plan = make_plan(change(preset("stage2", "vit-g-opt-2.7b"), changes), "H100", 1, text=8)
    p, v, f = 17, 20, 28
    assert forward(plan, "image encoder") == 3 * (p * (4 * v * v + 2 * v * f) + 2 * p * p * v) + 16 * 192 * v
    rows = 32 + 1 + 8 + 1
    linear = 24 * 24 * 2 + 24 * 12 * 2 + 3 * 24 * 40
    assert forward(plan, "language model") == 3 * (rows * linear + 2 * rows * rows * 24) + 9 * 24 * 90
    with torch.device("meta"):
        built = hf.Qwen3ForCausalLM(hf.Qwen3Config(**text))
    assert plan["parameters"]["language model"] == sum(weight.numel() for weight in built.parameters())
    assert plan["memory"]["fits"]


# A small stage 2, so that many settings can be planned.
@pytest.fixture
def small(tmp_path: Path) -> dict[str, str]:
    sizes: Any = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 96}
    hf.CLIPVisionConfig(**sizes, image_size=32, patch_size=8).save_pretrained(tmp_path / "vit")
    hf.BertConfig(**sizes, vocab_size=80, max_position_embeddings=40).save_pretrained(tmp_path / "bert")
    hf.LlamaConfig(**sizes, vocab_size=90).save_pretrained(tmp_path / "llm")
    names = {"vision.name": "vit", "qformer.start": "bert", "language.name": "llm"}
    return {name: str(tmp_path / part) for name, part in names.items()} | {"vision.image_size": "32"}


def test_time_follows_from_flops(small: dict[str, str]) -> None:
    settings = change(preset("stage1", "vit-g"), {**small, "train.batch": 64})
    plan, half = (make_plan(settings, "A100-40G", 16, share) for share in (0.15, 0.075))
    flops = sum(part["forward"] + part["backward"] for part in plan["flops_of_a_pair"].values())
    assert plan["step"]["seconds"] == pytest.approx(64 * flops / (16 * 312e12 * 0.15))
    assert plan["run"]["days"] == pytest.approx(250_000 * plan["step"]["seconds"] / 86400)
    assert half["run"]["days"] == pytest.approx(2 * plan["run"]["days"])
    assert plan["memory"]["total"] == pytest.approx(sum(plan["memory"]["items"].values()))
    # Written out: 4 pairs per GPU, 15 of 16 negatives from other GPUs, 17 tokens of width 64, 2 bytes each.
    assert plan["step"]["sent"]["features of ITM's negatives"] == 4 * 15 / 16 * 17 * 64 * 2
    assert plan["step"]["sent"]["gradients"] == 2 * 15 / 16 * 4 * plan["parameters"]["trained"]


def test_what_chunks_checkpoints_and_objectives_cost(small: dict[str, str]) -> None:
    settings = change(preset("stage1", "vit-g"), {**small, "train.batch": 32})

    def planned(**changes: Any) -> tuple[float, float, float]:
        plan = make_plan(change(settings, {k.replace("__", "."): v for k, v in changes.items()}), "H100", 1)
        work = plan["flops_of_a_pair"]["Q-Former and heads"]
        return work["forward"], work["backward"], plan["memory"]["items"]["activations and temporary tensors"]

    plain, chunked = planned(), planned(train__chunk=8)
    assert planned(train__chunk=32) == plain
    assert chunked[0] > plain[0]
    assert chunked[2] < plain[2] / 2
    again = planned(train__checkpoint_activations=True)
    assert again[0] == plain[0]
    assert again[1] > 1.2 * plain[1]
    assert again[2] < plain[2]
    fewer = planned(stage1__objectives=["itc"])
    assert planned(qformer__lora_rank=2)[1] < plain[1]
    assert fewer[0] < plain[0] / 2


def test_frozen_weights_shared_out_and_quantised(small: dict[str, str]) -> None:
    settings = change(preset("stage2", "vit-g-opt-2.7b"), {**small, "train.batch": 8})

    def held(**changes: str) -> float:
        changed = change(settings, {k.replace("__", "."): v for k, v in changes.items()})
        return make_plan(changed, "H100", 8)["memory"]["items"]["language model, frozen"]

    layer, words = 4 * 64**2 + 3 * 64 * 96, 2 * 90 * 64
    norms = 2 * 64
    assert held() == 2 * (4 * (layer + norms) + words + 64)
    assert held(language__dtype="int4") == 0.5 * 4 * layer + 2 * (4 * norms + words + 64)
    assert held(train__parallel="fsdp2") == 2 * (4 / 8 + 2) * (layer + norms) + 2 * (words + 64)


def test_gpus_are_read() -> None:
    assert read_gpus("16xa100-40g") == ("A100-40G", 16)
    assert read_gpus("4090") == ("4090", 1)
    for text in ("16xA10", "0xH100", "cpu", ""):
        with pytest.raises(UserError, match="16xA100-40G; the GPUs are A100-40G"):
            read_gpus(text)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--preset", "vit-g"], "stage1-vit-g"),
        (["--preset", "stage1-vit-h"], "presets are laptop"),
        (["--preset", "stage1-vit-g", "--parallel", "tp"], "train.parallel"),
        (["--preset", "stage1-vit-g", "--efficiency", "15"], "fraction of the peak"),
        (["--preset", "stage1-vit-g", "--images", "many"], "129M"),
        (["--preset", "stage1-vit-g", "--batch", "3"], "at least one pair for each"),
        (["--preset", "stage1-vit-g", "--text-tokens", "2"], "4 to 512"),
        (["--preset", "stage1-vit-g", "--set", "vision.name=who/knows"], "downloads nothing"),
        (["--preset", "stage1-vit-g", "--set", "train.bach=3"], "train.batch"),
        (["--preset", "stage1-vit-g", "--set", "stage1.objectives=[]"], "nothing to train"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(options: list[str], word: str) -> None:
    with pytest.raises(UserError, match=word) as error:
        CliRunner().invoke(app, ["plan", "--gpus", "16xA100-40G", *options], catch_exceptions=False)
    assert "\n" not in str(error.value)


def test_a_plan_names_settings_without_effect(vit_g: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openblip2.plan.make_plan", lambda *_: json.loads(json.dumps(vit_g)))
    words = [
        "plan",
        "--preset",
        "stage1-vit-g",
        "--gpus",
        "H100",
        "--set",
        "language.dtype=int8",
        "--set",
        "optim.lr=1",
    ]
    for more, parallel in (([], False), (["--parallel", "fsdp2"], True)):
        said = CliRunner().invoke(app, [*words, *more], catch_exceptions=False).stderr
        assert "without effect in plan --preset stage1-vit-g: language.dtype (used only in trainings with a lan" in said
        assert ("train.parallel (used only in runs of several processes)" in said) == parallel
        assert "optim.lr" not in said


def test_the_documents_example_is_what_is_printed(vit_g: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openblip2.plan.make_plan", lambda *_: json.loads(json.dumps(vit_g)))  # not computed again
    text = (Path(__file__).parents[1] / "docs" / "planning.md").read_text(encoding="utf-8")
    (command,) = [line for line in text.splitlines() if line.startswith("openblip2 plan --preset stage1-vit-g")]
    shown = text.split("```text\n")[1].split("```")[0]
    printed = CliRunner().invoke(app, command.split()[1:], catch_exceptions=False)
    assert printed.output.strip() == shown.strip()
    values = json.loads(CliRunner().invoke(app, [*command.split()[1:], "--json"], catch_exceptions=False).output)
    assert f"250,000 steps: {values['run']['days']:.3g} days" in shown
    assert values["features"]["images"] == 129_000_000
