"""Each frozen part in its own precision, and language models in 8 and 4 bits."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import openblip2
import tiny
import tiny_models
import tiny_runs
from openblip2.config import RunSettings, change
from openblip2.data.features import FeatureCache
from openblip2.errors import UserError
from openblip2.model.build import build_stage2, build_vision, parts_table
from openblip2.model.language import Decoding, LanguageModel
from openblip2.model.load import load_language
from openblip2.model.lora import add_lora, merge_lora
from openblip2.model.precision import DTYPES
from openblip2.model.vision import HFVision
from test_cli import Home, call, home  # noqa: F401  (the fixture)
from test_stage2 import CAPTIONS, PROMPTS, stage2

AUTOCAST = pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
WEIGHTS = pytest.mark.parametrize("weights", DTYPES)
QUANTISED = pytest.mark.parametrize("bits", [8, 4])


def bf16(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def products(model: nn.Module) -> set[torch.dtype]:
    """The output dtypes of all linear layers; hooks add them when the layers run."""
    seen: set[torch.dtype] = set()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda layer, given, output: seen.add(output.dtype))
    return seen


def off(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference, relative to the norm of `wanted`."""
    return float((found.float() - wanted).norm() / wanted.norm())


def seen_by(vision: HFVision, pictures: Tensor) -> Tensor:
    with torch.no_grad():
        return vision(pictures)


@AUTOCAST
@WEIGHTS
def test_the_encoder_computes_in_its_own_precision(weights: str, autocast: bool) -> None:
    pictures, vision = tiny_models.pictures(), tiny_models.vision()
    exact = seen_by(vision, pictures)
    seen = products(vision.to(DTYPES[weights]))
    with bf16(autocast):
        features = seen_by(vision, pictures)
    assert seen == {DTYPES[weights]}
    assert features.dtype == DTYPES[weights]
    error = off(features, exact)
    assert error == 0 if weights == "fp32" else 0 < error < {"bf16": 0.05, "fp16": 0.005}[weights]


def test_autocast_to_the_weights_own_dtype_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast keeps norms and softmax in fp32, and measured results were obtained with this."""
    vision, model, pictures = tiny_models.vision().to(torch.bfloat16), stage2("llama"), tiny_models.pictures()
    model.language.llm.to(torch.bfloat16)  # pyright: ignore
    with bf16():
        ours = seen_by(vision, pictures), model.losses(PROMPTS, CAPTIONS, features=tiny.features())["lm"]
        for module in ("vision", "language"):
            monkeypatch.setattr(f"openblip2.model.{module}.own_precision", lambda *given: nullcontext())
        theirs = seen_by(vision, pictures), model.losses(PROMPTS, CAPTIONS, features=tiny.features())["lm"]
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@AUTOCAST
@WEIGHTS
@pytest.mark.parametrize("kind", tiny_models.MODELS)
def test_the_language_model_computes_in_its_own_precision(kind: str, weights: str, autocast: bool) -> None:
    torch.manual_seed(0)
    model = stage2(kind, dropout=0.0)
    features, how = tiny.features().to(torch.float16), Decoding(max_new_tokens=3, beams=2)
    exact = model.losses(PROMPTS, CAPTIONS, features=features)["lm"]
    wanted = tiny.gradients(exact, model)
    model.language.llm.to(DTYPES[weights])  # pyright: ignore
    seen = products(model.language)
    torch.manual_seed(0)
    with bf16(autocast):
        loss = model.losses(PROMPTS, CAPTIONS, features=features)["lm"]
        assert len(model.generate(PROMPTS, how, features=features)) == tiny.B
    assert seen == {DTYPES[weights]}
    assert loss.dtype == torch.float32
    assert abs(loss.item() / exact.item() - 1) < (0.05 if weights == "bf16" or autocast else 0.005)
    assert {p.dtype for p in model.qformer.parameters()} == {torch.float32}
    found = tiny.gradients(loss, model)["qformer.queries"]
    assert found.isfinite().all()
    assert torch.cosine_similarity(found.flatten(), wanted["qformer.queries"].flatten(), dim=0) > 0.8


def wide(folder: Path, kind: str) -> Path:
    """A model wide enough that rounding errors are not only noise, with a tokenizer of whole words."""
    sizes = tiny_models.SHARED
    torch.manual_seed(0)
    if kind == "t5":
        shape: dict[str, Any] = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": 2}
        shape["decoder_start_token_id"] = 0
        llm: Any = hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **shape))
    else:
        config = hf.LlamaConfig(**sizes, **tiny_runs.named(width=64, layers=2, heads=4, ffn=128))
        llm = hf.LlamaForCausalLM(config)
        for weight in llm.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.15)
    llm.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


def loss_and_gradient(lm: LanguageModel, autocast: bool = False) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient with respect to the soft prompt."""
    soft = 0.15 * torch.randn(3, tiny.Q, 64, generator=torch.Generator().manual_seed(0))
    soft.requires_grad_()
    torch.manual_seed(0)
    with bf16(autocast):
        loss = lm.scored(soft, ["", "a photo of", ""], ["a red dog", "two small cat", "a bird sits"])[0]
    return loss.detach(), torch.autograd.grad(loss, soft)[0].flatten()


@QUANTISED
@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_through_quantised_weights(tmp_path: Path, kind: str, bits: int, dtype: torch.dtype) -> None:
    folder = str(wide(tmp_path, kind))
    exact, wanted = loss_and_gradient(load_language(folder))
    lm = load_language(folder, dtype=dtype, bits=bits)
    assert {p.dtype for p in lm.parameters()} == {dtype, torch.int8 if bits == 8 else torch.uint8}
    output: Any = lm.llm.get_output_embeddings()
    assert output.weight.dtype == lm.llm.dtype == dtype
    assert not any(p.requires_grad for p in lm.parameters())
    autocast = dtype == torch.bfloat16
    loss, found = loss_and_gradient(lm, autocast)
    assert abs(loss.item() / exact.item() - 1) < (0.02 if bits == 8 else 0.1)
    assert torch.cosine_similarity(found, wanted, dim=0) > (0.98 if bits == 8 else 0.6)
    # A pass without gradients, as in validation, does not change the gradients of the next pass.
    with torch.no_grad():
        soft = torch.randn(2, tiny.Q, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
        assert len(lm.generate(soft, ["", "a photo of"], Decoding(max_new_tokens=3, beams=2))) == 2
    again, gradient = loss_and_gradient(lm, autocast)
    assert torch.equal(again, loss)
    assert torch.equal(gradient, found)


@QUANTISED
def test_adapters_train_on_quantised_weights_and_are_not_folded(tmp_path: Path, bits: int) -> None:
    lm = load_language(str(wide(tmp_path, "llama")), bits=bits)
    before, _ = loss_and_gradient(lm)
    add_lora(lm.llm, 2)
    assert torch.equal(before, loss_and_gradient(lm)[0])
    trained = [p for p in lm.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    lm.scored(torch.zeros(1, tiny.Q, 64), [""], ["a red dog"])[0].backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    with pytest.raises(UserError, match=r"weights are quantised; load the run with language\.dtype=bf16$"):
        merge_lora(lm)


@QUANTISED
def test_quantised_weights_are_counted_as_they_were(home: Home, bits: int) -> None:  # noqa: F811
    settings = change(
        RunSettings(stage="stage2"),
        {
            "vision.name": str(home.root / "vision"),
            "vision.image_size": tiny_runs.SIDE,
            "vision.dtype": "fp16",
            "qformer.start": str(home.root / "bert"),
            "language.name": str(home.root / "language"),
            "language.dtype": f"int{bits}",
        },
    )
    vision = build_vision(settings)
    assert {p.dtype for p in vision.parameters()} == {torch.float16}
    rows = {name: count for name, count, _ in parts_table(build_stage2(settings, vision))}
    assert rows["language"] == 7100  # the same as in test_cli
    assert rows["vision"] == 11048


@pytest.mark.parametrize(
    ("vision", "language", "held"),
    [
        ("fp16", "fp16", {torch.float16}),
        ("fp32", "bf16", {torch.bfloat16}),
        ("bf16", "int8", {torch.int8, torch.bfloat16}),
        ("auto", "int4", {torch.uint8, torch.bfloat16}),
    ],
)
def test_a_run_trains_and_loads_in_these_precisions(
    home: Home,  # noqa: F811
    vision: str,
    language: str,
    held: set[torch.dtype],
) -> None:
    run = f"{vision}-{language}"
    options = ["--set", f"vision.dtype={vision}", "--set", f"language.dtype={language}"]
    said = call(*home.train("stage2", run, "--start", home.stage1, *options, "--set", "train.precision=bf16"))
    assert said.code == 0, said.err
    model: Any = openblip2.load(home.root / run)
    assert {p.dtype for p in model.model.language.parameters()} == held
    assert {p.dtype for p in model.model.vision.parameters()} == {DTYPES.get(vision, torch.bfloat16)}
    assert {p.dtype for p in model.model.qformer.parameters()} == {torch.float32}
    said = call("caption", home.root / run, home.picture(), "--beams", "2")
    assert (said.code, said.err) == (0, "")


def test_kept_features_are_of_one_precision(home: Home) -> None:  # noqa: F811
    def made_by(*more: str) -> dict[str, Any]:
        said = call(*home.train("stage1", "kept", "--set", "data.augment=false", "--overwrite", *more))
        assert said.code == 0, said.err
        return FeatureCache(home.root / "kept" / "features" / "pictures").made_by

    assert made_by("--set", "vision.dtype=fp16") != made_by()


def test_without_bitsandbytes_there_is_one_line(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    line = "openblip2: language.dtype=int8 or int4 needs bitsandbytes: pip install 'openblip2[quant]'\n"
    said = call(*home.train("stage2", "none", "--set", "language.dtype=int8"))
    assert (said.code, said.out, said.err) == (2, "", line)  # before anything is computed
    with pytest.raises(UserError, match="needs bitsandbytes"):
        load_language(str(home.root / "language"), bits=4)
