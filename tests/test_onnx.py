"""Compares the ONNX graph with torch: every family of encoders, both stages, batch sizes other than the traced one."""

import copy
import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import tiny
import tiny_models
from openblip2.data.images import RESIZE
from openblip2.errors import UserError
from openblip2.model.lora import adapt_qformer, has_lora
from openblip2.model.qformer import QFormer
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2
from openblip2.model.vision import HFVision, fit_whitening
from openblip2.weights.onnx import export_onnx

SIZES: dict[str, Any] = {"hidden_size": 22, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES |= {"image_size": 12, "patch_size": 4, "intermediate_size": 40}  # 3 x 3 patches
FAMILIES: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "blip2": lambda: hf.Blip2VisionModel(hf.Blip2VisionConfig(**SIZES)),
    "clip": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**SIZES)),
    "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIZES)),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**SIZES)),
}
LAYERS = 2  # of the Q-Former, one with cross-attention; only 2, because the export takes seconds per layer
SHAPES = {"image_vectors": [tiny.Q, tiny.E], "soft_prompt": [tiny.Q, tiny_models.L]}


def vision(family: str, side: int = 12) -> HFVision:
    if family == "dinov2_with_registers":
        return tiny_models.vision()
    return HFVision(tiny.redraw(FAMILIES[family](), std=0.4), -2, side)


def stage1(encoder: HFVision) -> Stage1:
    qformer = QFormer(tiny.D, LAYERS, tiny.HEADS, tiny.FFN, tiny.Q, encoder.width, tiny.WORDS, tiny.POSITIONS)
    model = Stage1(tiny.redraw(qformer), None, tiny.E)
    tiny.redraw(model.vision_proj)
    model.vision = encoder
    return model.eval()


def stage2(encoder: HFVision) -> Stage2:
    qformer = QFormer(tiny.D, LAYERS, tiny.HEADS, tiny.FFN, tiny.Q, encoder.width, vocabulary=0)
    model = Stage2(tiny.redraw(qformer), tiny_models.language("opt"), encoder)
    tiny.redraw(model.projection)
    return model.eval()


def pictures(side: int, count: int) -> Tensor:
    random = torch.Generator().manual_seed(40 + count)
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=random)


@torch.no_grad()
def in_torch(model: Stage1 | Stage2, images: Tensor) -> Tensor:
    if isinstance(model, Stage2):
        return model.soft_prompt(images=images)
    assert model.vision is not None
    return model.image_vectors(model.qformer.query_output(model.vision(images)))


def in_onnx(file: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.mark.parametrize(
    ("family", "build", "side", "whiten"),
    [
        ("clip", stage1, 20, False),  # positions interpolated from 3 x 3 to 5 x 5
        ("siglip", stage2, 12, True),
        pytest.param("blip2", stage2, 12, False, marks=pytest.mark.slow),
        pytest.param("dinov2_with_registers", stage1, 12, False, marks=pytest.mark.slow),
        pytest.param("vit", stage1, 12, True, marks=pytest.mark.slow),
    ],
)
def test_the_graph_equals_torch_at_every_batch_size(
    family: str,
    build: Callable[[HFVision], Stage1 | Stage2],
    side: int,
    whiten: bool,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    encoder = vision(family, side)
    plain = encoder(pictures(side, 9))
    if whiten:
        encoder.whitening = fit_whitening(plain)
        assert (encoder(pictures(side, 9)) - plain).abs().mean() > 0.1
    model, file = build(encoder), tmp_path / "new" / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        difference = export_onnx(model, file)
    assert capfd.readouterr() == ("", "")
    assert difference <= 1e-5
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]

    name = "soft_prompt" if isinstance(model, Stage2) else "image_vectors"
    for count in (1, 2, 5):
        images = pictures(side, count)
        expected, found = in_torch(model, images), in_onnx(file, images)
        assert list(found.shape) == [count, *SHAPES[name]]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert (found[0] - found[1]).abs().max() > 1e-3 * found.abs().max(), "the graph does not look at the picture"

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["B", 3, side, side])
    assert (made.name, made.type, made.shape) == (name, "tensor(float)", ["B", *SHAPES[name]])
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["image_mean"]) == list(encoder.mean)
    assert json.loads(about["image_std"]) == list(encoder.std)
    assert (about["resize"], about["image_size"], about["normalization"]) == (RESIZE, str(side), "in the graph")
    # The graph contains neither the text path nor the language model.
    graph = onnx.load(file).graph
    used = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= used


def test_the_model_stays_as_it_is_and_the_graph_is_float32(tmp_path: Path) -> None:
    """The graph contains the exact values of half-precision weights; in it, dropout is off and adapters are merged."""
    model = stage2(vision("vit"))
    assert model.vision is not None
    adapt_qformer(model.qformer, 2)
    tiny.redraw(model.qformer)
    model.vision.to(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert export_onnx(model, tmp_path / "model.onnx") <= 1e-5
    assert model.qformer.training
    assert has_lora(model.qformer)
    assert model.vision.encoder.dtype == torch.bfloat16
    assert all(p.requires_grad for p in model.projection.parameters())
    expected = in_torch(exact, pictures(12, 3))
    found = in_onnx(tmp_path / "model.onnx", pictures(12, 3))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    rough = in_torch(model.eval(), pictures(12, 3))
    assert (rough - expected).abs().max() > 1e-3, "bf16 rounds too little here for this test to tell"


@pytest.mark.slow
def test_large_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openblip2.weights.onnx.INLINE", 1000)
    model, file = stage2(vision("blip2")), tmp_path / "model.onnx"
    file.write_bytes(b"an older one")
    export_onnx(model, file)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    weights = sum(p.numel() for part in (model.vision, model.qformer, model.projection) for p in parameters(part))
    assert (tmp_path / "model.onnx.data").stat().st_size > 3 * weights  # 4 bytes each; small ones are in the graph
    expected = in_torch(model, pictures(12, 2))
    torch.testing.assert_close(in_onnx(file, pictures(12, 2)), expected, rtol=1e-5, atol=1e-5)
    assert "image_mean" in {entry.key for entry in onnx.load(file, load_external_data=False).metadata_props}


def parameters(part: nn.Module | None) -> list[nn.Parameter]:
    assert part is not None
    return list(part.parameters())


def test_a_graph_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"an older one")
    monkeypatch.setattr("openblip2.weights.onnx.TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match=r"^the ONNX graph differs from torch by \d\.\de-\d\d .* with 1 pictures"):
        export_onnx(stage1(vision("vit")), file)
    assert file.read_bytes() == b"an older one"
    assert list(tmp_path.iterdir()) == [file]


def test_an_encoder_that_cannot_be_exported_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = stage2(vision("vit"))
    assert model.vision is not None
    embeddings = model.vision.encoder.get_submodule("embeddings")
    embeddings.register_forward_hook(lambda module, given, output: -output if bool(output.sum() > 0) else output)
    capfd.readouterr()
    with pytest.raises(UserError, match=r"^image encoder 'vit' cannot be exported to ONNX: \S") as caught:
        export_onnx(model, tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_line(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else there(name))
    with pytest.raises(UserError) as caught:
        export_onnx(stage1(vision("vit")), tmp_path / "model.onnx")
    assert str(caught.value) == f"ONNX export needs {package}: pip install 'openblip2[onnx]'"
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    model = stage1(vision("vit"))
    with pytest.raises(UserError, match=r"is a folder: give the name of the file to write"):
        export_onnx(model, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"model.onnx cannot be written: "):
        export_onnx(model, tmp_path / "file" / "model.onnx")
    model.vision = None
    with pytest.raises(UserError, match=r"without an image encoder"):
        export_onnx(model, tmp_path / "model.onnx")
