"""Published weights: every format is read, written and read again without changing a bit."""

import argparse
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import openblip2
import tiny
import tiny_blip2
import tiny_models
import tiny_runs
from openblip2.errors import UserError
from openblip2.inference.captioner import greedy
from openblip2.model.language import Decoding
from openblip2.model.stage1 import Stage1
from openblip2.runs import locked
from openblip2.weights.assemble import read_checkpoint
from openblip2.weights.checkpoint import Checkpoint, Parts

HEADS = tiny.HEADS
SHORT = greedy(Decoding(max_new_tokens=6))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Transformers folders opt, t5, llama, retriever; LAVIS files of the same weights: opt.pth, t5.pth, stage1.pth."""
    home = tmp_path_factory.mktemp("weights")
    for kind in ("opt", "t5", "llama"):
        tiny_blip2.generator(kind, home / kind)
    tiny_blip2.retriever(home / "retriever")
    tiny_runs.bert(home / "bert")
    for kind in ("opt", "t5"):
        torch.save(
            {"model": as_lavis(load_file(home / kind / "model.safetensors"), kind), "epoch": 3}, home / f"{kind}.pth"
        )
    torch.save({"model": stage1_as_lavis(load_file(home / "retriever" / "model.safetensors"))}, home / "stage1.pth")
    return home


def as_lavis(theirs: dict[str, Tensor], kind: str, tower: bool = False) -> OrderedDict[str, Tensor]:
    """Renames tensors to LAVIS' names by reversing the replacements of transformers' conversion from LAVIS."""
    found = OrderedDict()
    for name, tensor in theirs.items():
        if name.startswith("language_model.") or (name.startswith("vision_model.") and "post_layernorm" not in name):
            continue
        name = name.replace("vision_model.post_layernorm", "ln_vision")
        name = name.replace("embeddings.word_embeddings", "Qformer.bert.embeddings.word_embeddings")
        name = name.replace("embeddings.position_embeddings", "Qformer.bert.embeddings.position_embeddings")
        name = re.sub(r"^qformer\.layernorm", "Qformer.bert.embeddings.LayerNorm", name)
        name = re.sub(r"^qformer\.", "Qformer.bert.", name).replace("attention.attention", "attention.self")
        name = name.replace("language_projection", "t5_proj" if kind == "t5" else "opt_proj")
        name = name.replace("vision_projection", "vision_proj").replace("text_projection", "text_proj")
        found[name] = tensor
    if tower:
        found |= tower_as_lavis(theirs)
    return found


def tower_as_lavis(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in theirs.items():
        if not name.startswith("vision_model.") or "post_layernorm" in name:
            continue
        name = name.replace("vision_model.embeddings.class_embedding", "visual_encoder.cls_token")
        name = name.replace("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed")
        name = name.replace("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj")
        name = name.replace("vision_model.encoder.layers", "visual_encoder.blocks").replace("self_attn", "attn")
        name = name.replace("layer_norm", "norm").replace("attn.projection", "attn.proj")
        if name.endswith("qkv.bias"):
            found[name.replace("qkv.bias", "q_bias")], _, found[name.replace("qkv.bias", "v_bias")] = tensor.chunk(3)
        else:
            found[name] = tensor
    return found


def stage1_as_lavis(theirs: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Adds what transformers cannot store to the retriever's weights: temperature, ITG head, tied decoder."""
    found = as_lavis(theirs, "opt")
    words = found["Qformer.bert.embeddings.word_embeddings.weight"]
    random = torch.Generator().manual_seed(3)
    head = "Qformer.cls.predictions."
    found["temp"] = torch.tensor(0.05)
    found["Qformer.bert.embeddings.position_ids"] = torch.arange(tiny_blip2.POSITIONS)[None]
    found[head + "bias"] = torch.randn(len(words), generator=random)
    found[head + "transform.dense.weight"] = torch.randn(tiny.D, tiny.D, generator=random)
    found[head + "transform.dense.bias"] = torch.randn(tiny.D, generator=random)
    found[head + "transform.LayerNorm.weight"] = torch.randn(tiny.D, generator=random)
    found[head + "transform.LayerNorm.bias"] = torch.randn(tiny.D, generator=random)
    found[head + "decoder.weight"], found[head + "decoder.bias"] = words, found[head + "bias"]
    return found


def pictures(count: int = 3) -> list[Any]:
    return [picture.permute(1, 2, 0).numpy() for picture in tiny_models.pictures(count)]


def parts(home: Path, kind: str) -> dict[str, Any]:
    """Returns the parts that a LAVIS file does not contain, by name."""
    found: dict[str, Any] = {"heads": HEADS, "vision": str(home / ("retriever" if kind == "stage1" else kind))}
    return found | ({"tokenizer": str(home / "bert")} if kind == "stage1" else {"language": str(home / kind)})


def load(source: Path, **options: Any) -> Any:
    return openblip2.load(source, "cpu", precision="fp32", **options)


def same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].dtype == theirs[name].dtype, name
        assert torch.equal(mine[name], theirs[name]), name


def read_pth(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["model"]


# Reading


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_lavis_and_transformers_are_the_same_model(home: Path, kind: str) -> None:
    ours, theirs = load(home / f"{kind}.pth", **parts(home, kind)), load(home / kind)
    # LAVIS normalises image features with an eps of 1e-5, transformers with 1e-6.
    assert (ours.settings.qformer.image_norm_eps, theirs.settings.qformer.image_norm_eps) == (1e-5, 1e-6)
    ours.model.qformer.image_norm.eps = 1e-6
    torch.testing.assert_close(ours.soft_prompt(pictures()), theirs.soft_prompt(pictures()), rtol=0, atol=0)
    assert ours.caption(pictures(), decoding=SHORT) == theirs.caption(pictures(), decoding=SHORT)


def test_a_stage_1_of_lavis_has_all_that_training_needs(home: Path) -> None:
    matcher = load(home / "stage1.pth", **parts(home, "stage1"))
    assert isinstance(matcher, openblip2.Matcher)
    assert float(matcher.model.temperature.detach()) == pytest.approx(0.05)
    tokens, valid = matcher.tokens(["a red dog", "the cat"])
    images = tiny_models.pictures(2)
    negatives = torch.tensor([1, 0]), torch.tensor([1, 0])
    losses = matcher.model.losses(tokens, valid, images=images, negatives=negatives)
    assert losses.keys() == {"itc", "itm", "itg"}
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_transformers_retrieval_scores_but_does_not_train(home: Path) -> None:
    matcher, other = load(home / "retriever"), load(home / "stage1.pth", **parts(home, "stage1"))
    other.model.qformer.image_norm.eps = 1e-6
    texts = ["a red dog", "the cat", "a bus"]
    torch.testing.assert_close(matcher.similarity(pictures(), texts), other.similarity(pictures(), texts))
    torch.testing.assert_close(matcher.match(pictures(), texts), other.match(pictures(), texts))
    tokens, valid = matcher.tokens(texts)
    with pytest.raises(ValueError, match="no ITG head"):
        matcher.model.losses(tokens, valid, images=tiny_models.pictures(3))


def test_parts_may_be_handed_in_ready(home: Path) -> None:
    vision = openblip2.load_vision(str(home / "opt"), -1)
    language = openblip2.load_language(str(home / "opt"), "{image}{bos}{prompt}", "\n")
    ready = load(home / "opt.pth", heads=HEADS, vision=vision, language=language)
    named = load(home / "opt.pth", **parts(home, "opt"))
    assert ready.model.vision is vision
    assert ready.model.language is language
    assert ready.caption(pictures(), decoding=SHORT) == named.caption(pictures(), decoding=SHORT)


def test_a_tower_in_the_file_is_used(home: Path, tmp_path: Path) -> None:
    """A fine-tuned LAVIS model contains its image encoder at the fine-tuned size, but not the number of heads."""
    encoder = tower(side=24, heads=4)
    theirs = load_file(home / "opt" / "model.safetensors")
    theirs = {n: t for n, t in theirs.items() if not n.startswith("vision_model.") and "crossattention" not in n}
    theirs |= {f"vision_model.{name}": tensor for name, tensor in encoder.state_dict().items()}
    theirs |= {n: t for n, t in wide_cross_attention(encoder.config.hidden_size).items()}
    torch.save({"model": as_lavis(theirs, "opt", tower=True)}, tmp_path / "tuned.pth")
    given: dict[str, Any] = {"heads": HEADS, "language": str(home / "opt")}
    for wrong in (None, 0, 5):
        with pytest.raises(UserError, match=r"tuned.pth: its image encoder is 32 wide, .*give vision_heads"):
            load(tmp_path / "tuned.pth", **given, vision_heads=wrong)
    given["vision_heads"] = 4
    model = load(tmp_path / "tuned.pth", **given)
    assert model.model.vision.image_size == 24
    images = torch.randint(256, (2, 3, 24, 24), dtype=torch.uint8)
    expected = encoder(tiny_blip2.pixel_values(images), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(model.model.vision(images), expected, rtol=1e-5, atol=1e-5)

    openblip2.convert(tmp_path / "tuned.pth", tmp_path / "run", "openblip2", **given)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["vision"]["name"] == "./vision"
    again = load(tmp_path / "run")
    torch.testing.assert_close(again.model.vision(images), expected, rtol=1e-5, atol=1e-5)
    notes = openblip2.convert(tmp_path / "run", tmp_path / "back.pth", "lavis", language=str(home / "opt"))
    assert any("4 attention heads" in note and "vision_heads=4" in note for note in notes)
    same(read_pth(tmp_path / "back.pth"), dict(read_pth(tmp_path / "tuned.pth")))


def test_heads_of_an_image_encoder_that_is_not_in_a_lavis_file_are_refused(home: Path) -> None:
    assert "no image encoder in it" in refused(home / "opt.pth", **parts(home, "opt"), vision_heads=4)
    assert "vision_heads is for a LAVIS .pth" in refused(home / "opt", vision_heads=4)


def tower(side: int, heads: int) -> Any:
    sizes = tiny_runs.named(width=32, layers=2, heads=heads, ffn=40)
    return tiny.redraw(hf.Blip2VisionModel(hf.Blip2VisionConfig(**sizes, image_size=side, patch_size=6)))


def wide_cross_attention(width: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(5)
    found = {}
    for n in range(0, tiny.LAYERS, 2):
        block = f"qformer.encoder.layer.{n}.crossattention."
        for name in ("attention.query", "attention.key", "attention.value", "output.dense"):
            columns = width if name.endswith(("key", "value")) else tiny.D
            found[f"{block}{name}.weight"] = 0.1 * torch.randn(tiny.D, columns, generator=random)
            found[f"{block}{name}.bias"] = torch.zeros(tiny.D)
        found[f"{block}output.LayerNorm.weight"] = torch.ones(tiny.D)
        found[f"{block}output.LayerNorm.bias"] = torch.zeros(tiny.D)
    return found


def test_names_of_lavis_at_full_size() -> None:
    """Stage 1 has 346 keys without the encoder."""
    from openblip2.weights.checkpoint import LAVIS, OURS, rename

    with torch.device("meta"):
        model = Stage1(openblip2.QFormer())
    names, without = rename((name for name, _ in model.named_parameters()), OURS, LAVIS)
    assert without == []
    extra = 3  # the position buffer and the tied decoder's weight and bias
    assert len(names) + extra == 346


# Writing, and reading the result


@pytest.mark.parametrize("kind", ["opt", "t5", "stage1"])
def test_lavis_there_and_back_is_bit_equal(home: Path, tmp_path: Path, kind: str) -> None:
    source = home / f"{kind}.pth"
    openblip2.convert(source, tmp_path / "run", "openblip2", **parts(home, kind))
    notes = openblip2.convert(tmp_path / "run", tmp_path / "back.pth", "lavis")
    assert any("image encoder" in note for note in notes)
    same(dict(read_pth(tmp_path / "back.pth")), dict(read_pth(source)))


@pytest.mark.parametrize("kind", ["opt", "llama", "t5", "retriever"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_transformers_there_and_back_is_bit_equal(home: Path, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    source = tmp_path / "source"
    shutil.copytree(home / kind, source)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))

    openblip2.convert(source, tmp_path / "run", "openblip2")
    shutil.rmtree(source)  # the run must contain everything from its source
    assert openblip2.convert(tmp_path / "run", tmp_path / "back", "hf") == []
    same(load_file(tmp_path / "back" / "model.safetensors"), tensors)
    before, after = config, json.loads((tmp_path / "back" / "config.json").read_text())
    for name in ("architectures", "model_type", "num_query_tokens"):
        assert after[name] == before[name], name
    if kind != "retriever":  # a retriever without it accepts texts that have no placeholders for queries
        assert after["image_token_index"] == before["image_token_index"]


def test_ours_to_transformers_names_what_has_no_place(home: Path, tmp_path: Path) -> None:
    notes = openblip2.convert(home / "stage1.pth", tmp_path / "out", "hf", **parts(home, "stage1"))
    told = "\n".join(notes)
    assert "temperature: transformers cannot store it" in told
    assert "lm_head: transformers cannot store it" in told
    assert "image_norm_eps=1e-05" in told
    expected, found = (
        load_file(home / "retriever" / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    same(found, expected)


@pytest.mark.parametrize("kind", ["opt", "llama", "t5"])
def test_an_export_runs_in_transformers(home: Path, tmp_path: Path, kind: str) -> None:
    openblip2.convert(home / kind, tmp_path / "out", "hf")
    ours = load(home / kind)
    model: Any = hf.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    processor: Any = hf.Blip2Processor.from_pretrained(tmp_path / "out", backend="pil")
    pixels = tiny_blip2.pixel_values(tiny_models.pictures(1))
    seen = processor(images=pictures(1), text="question: what", return_tensors="pt")
    torch.testing.assert_close(seen["pixel_values"], pixels, rtol=1e-5, atol=1e-5)
    found = model.generate(**seen, max_new_tokens=6, num_beams=1, do_sample=False)
    found = found if kind == "t5" else found[:, seen["input_ids"].shape[1] :]
    text = processor.batch_decode(found, skip_special_tokens=True)[0].strip()
    assert text == ours.caption(pictures(1), "question: what", SHORT)[0]


def test_what_vllm_wants_of_an_export(home: Path, tmp_path: Path) -> None:
    openblip2.convert(home / "opt.pth", tmp_path / "out", "hf", **parts(home, "opt"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Blip2ForConditionalGeneration"]
    assert config["model_type"] == "blip-2"
    assert config["qformer_config"].get("use_qformer_text_input", False) is False
    assert config["text_config"]["architectures"] == ["OPTForCausalLM"]
    keys = load_file(tmp_path / "out" / "model.safetensors")
    assert "vision_model.encoder.layers.0.self_attn.qkv.weight" in keys
    assert not any(name.startswith(("embeddings.", "vision_projection", "itm_head")) for name in keys)
    assert not any(".intermediate." in name for name in keys if name.startswith("qformer."))
    vocabulary = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    (image,) = [token for token in vocabulary["added_tokens"] if token["content"] == "<image>"]
    assert config["image_token_index"] == image["id"]
    processor = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert processor["num_query_tokens"] == tiny.Q == config["num_query_tokens"]
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("kind", ["opt", "retriever"])
def test_the_card_of_an_export_runs_as_it_stands(
    home: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    openblip2.convert(home / kind, tmp_path / "out", "hf")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: transformers" in card
    Image.fromarray(pictures(1)[0]).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_an_export_at_another_size_has_positions_of_that_size(home: Path, tmp_path: Path) -> None:
    """Other programs do not interpolate positions."""
    side = 2 * tiny_models.SIDE
    vision = openblip2.load_vision(str(home / "opt"), -1, side)
    images = torch.randint(256, (2, 3, side, side), dtype=torch.uint8)
    expected = vision(images)
    notes = openblip2.convert(home / "opt", tmp_path / "out", "hf", vision=vision)
    assert notes == [f"the image encoder's positions: permanently interpolated from {side // 2} to {side} px"]
    model: Any = hf.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out")
    found = model.vision_model(tiny_blip2.pixel_values(images), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert load(tmp_path / "out").model.vision.image_size == side


def test_a_vocabulary_without_room_grows_by_the_image_token(home: Path, tmp_path: Path) -> None:
    small = tmp_path / "llama"
    tiny_models.MODELS["llama"]().save_pretrained(small)
    tiny_blip2.tokenizer("llama").save_pretrained(small)
    model = load(home / "llama", language=str(small))
    notes = openblip2.convert(home / "llama", tmp_path / "out", "hf", language=str(small))
    assert notes == [f"the language model's vocabulary grew from {tiny_models.W} to {tiny_models.W + 1}, for <image>"]
    again = load(tmp_path / "out")
    assert again.caption(pictures(), decoding=SHORT) == model.caption(pictures(), decoding=SHORT)


def test_an_encoder_without_a_place_gets_the_way_of_projected_queries(home: Path, tmp_path: Path) -> None:
    vision = tiny_models.vision()
    stage2 = run_of(vision, home, tmp_path / "run")
    with pytest.raises(UserError, match=r"cannot store .*'dinov2_with_registers'.*--to projected"):
        openblip2.convert(tmp_path / "run", tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()
    assert openblip2.convert(tmp_path / "run", tmp_path / "out", "projected") == []
    Image.fromarray(pictures(1)[0]).save(tmp_path / "picture.png")
    said = subprocess.run(
        [sys.executable, tmp_path / "out" / "image_embeds.py", tmp_path / "picture.png"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert said.returncode == 0, said.stderr
    text = stage2.caption([tmp_path / "picture.png"], decoding=greedy(Decoding(max_new_tokens=30)))[0]
    assert said.stdout.strip() == f"{tmp_path / 'picture.png'}\t{text}".strip()
    assert f"image_embeds [1, {tiny.Q}, {tiny_models.L}]" in said.stderr


def run_of(vision: Any, home: Path, folder: Path) -> Any:
    """Saves a stage-2 run with the given image encoder and transformers' tiny llama."""
    from openblip2.config import QFormerSettings, RunSettings
    from openblip2.inference.captioner import Captioner
    from openblip2.model.stage2 import Stage2

    language = openblip2.load_language(str(home / "llama"))
    model = Stage2(tiny.qformer(vocabulary=0), language, vision)
    tiny.redraw(model.projection)
    settings = RunSettings(stage="stage2", qformer=QFormerSettings(queries=tiny.Q))
    captioner = Captioner(model.eval(), settings, frozenset({"vision", "language"}))
    captioner.save_pretrained(folder)
    return load(folder)


def test_stage_1_with_an_encoder_without_a_place_is_refused(home: Path, tmp_path: Path) -> None:
    vision = tiny_models.vision()
    trained = {n: t for n, t in tiny.stage1().named_parameters()}
    from openblip2.config import QFormerSettings, RunSettings, Stage1Settings
    from openblip2.weights.run import write_run

    settings = RunSettings(qformer=QFormerSettings(queries=tiny.Q), stage1=Stage1Settings(shared_width=tiny.E))
    (tmp_path / "run").mkdir()
    bert = hf.AutoTokenizer.from_pretrained(home / "bert")
    checkpoint = Checkpoint("", settings, tiny.qformer().sizes, trained, carries=frozenset({"vision"}))
    write_run(checkpoint, tmp_path / "run", vision, tokenizer=bert)
    with pytest.raises(UserError, match=r"cannot store the image encoder 'dinov2_with_registers'.*--to onnx$"):
        openblip2.convert(tmp_path / "run", tmp_path / "out", "hf")
    with pytest.raises(UserError, match="stage-1 run: --to projected needs a language model"):
        openblip2.convert(tmp_path / "run", tmp_path / "out", "projected")
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]  # no incomplete files


# save_pretrained and push_to_hub


def test_save_pretrained_and_back(home: Path, tmp_path: Path) -> None:
    captioner = load(home / "opt")
    captioner.save_pretrained(tmp_path / "saved")
    again = openblip2.Captioner.from_pretrained(tmp_path / "saved", "cpu", precision="fp32")
    assert again.caption(pictures(), decoding=SHORT) == captioner.caption(pictures(), decoding=SHORT)
    card = (tmp_path / "saved" / "README.md").read_text()
    for word in (
        "library_name: openblip2",
        "## Parts and their licences",
        "## Data",
        "## Metrics",
        "Not measured",
        "```python",
    ):
        assert word in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(code, "card", "exec")
    with pytest.raises(UserError, match="exists already"):
        captioner.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="is a Captioner, not a Matcher"):
        openblip2.Matcher.from_pretrained(tmp_path / "saved")


def test_push_to_hub_uploads_what_save_pretrained_writes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    uploaded: dict[str, list[str]] = {}

    def upload(self: Any, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        uploaded[repo_id] = sorted(
            str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()
        )

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, private, exist_ok: f"hub:{repo}")
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert load(home / "retriever").push_to_hub("me/eyes") == "hub:me/eyes"
    (files,) = uploaded.values()
    assert {"README.md", "config.json", "model.safetensors", "vision/config.json", "tokenizer/tokenizer.json"} <= set(
        files
    )


def test_a_hub_that_cannot_be_reached_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="me/eyes is not on this machine and cannot be downloaded"):
        openblip2.load("me/eyes")


# Wrapped checkpoints


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "model.module._orig_mod."])
def test_a_prefix_that_all_names_share_is_taken_off(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, prefix: str
) -> None:
    wrapped = {prefix + name: tensor for name, tensor in read_pth(home / "opt.pth").items()}
    torch.save({"model": wrapped}, tmp_path / "wrapped.pth")
    same(
        dict(read_checkpoint(tmp_path / "wrapped.pth", Parts(**parts(home, "opt"))).trained),
        dict(read_checkpoint(home / "opt.pth", Parts(**parts(home, "opt"))).trained),
    )
    (line,) = caplog.messages
    assert "wrapped.pth" in line
    assert repr(prefix) in line


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "ckpt"])
def test_what_trainers_save_beside_the_weights_is_ignored(home: Path, tmp_path: Path, suffix: str) -> None:
    model = read_pth(home / "opt.pth")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    beside = {"optimizer": optimizer.state_dict(), "config": {"run": {"lr": 1e-4}}, "scaler": None, "epoch": 3}
    torch.save({"model": model, **beside, "args": argparse.Namespace(lr=1e-4)}, tmp_path / f"best.{suffix}")
    lightning = {"state_dict": {f"net.{name}": tensor for name, tensor in model.items()}, "optimizer_states": [{}]}
    torch.save({**lightning, "pytorch-lightning_version": "2.5.0"}, tmp_path / f"lightning.{suffix}")
    wanted = read_checkpoint(home / "opt.pth", Parts(**parts(home, "opt"))).trained
    for name in ("best", "lightning"):
        found = read_checkpoint(tmp_path / f"{name}.{suffix}", Parts(**parts(home, "opt"))).trained
        same(dict(found), dict(wanted))


def test_a_prefix_of_some_names_alone_is_no_partial_load(home: Path, tmp_path: Path) -> None:
    def some(model: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name if name == "opt_proj.bias" else f"module.{name}": tensor for name, tensor in model.items()}

    assert "no query_tokens" in bad_lavis(home, tmp_path, some)


# Bad input gives an error of one line with the file and the key


class Code:
    """Runs a shell command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch was-run",)


def test_code_in_a_pickle_is_refused_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"query_tokens": Code()}}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": Code()}))
    for name, code in (("zip.pth", r" \(posix.system\)"), ("plain.pth", "")):
        with pytest.raises(UserError, match=rf"{name}: it contains more than tensors{code},.*; save .*state_dict"):
            openblip2.load(tmp_path / name)
    assert not (tmp_path / "was-run").exists()


def bad_lavis(home: Path, tmp_path: Path, change: Any, kind: str = "opt") -> str:
    model = dict(read_pth(home / f"{kind}.pth"))
    changed = change(model)
    torch.save({"model": model if changed is None else changed}, tmp_path / "bad.pth")
    return refused(tmp_path / "bad.pth", **parts(home, kind))


def refused(source: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(source, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_lavis_files_that_cannot_be_used(home: Path, tmp_path: Path) -> None:
    def told(change: Any, *words: str, kind: str = "opt") -> None:
        line = bad_lavis(home, tmp_path, change, kind)
        assert all(word in line for word in ("bad.pth", *words)), line

    told(
        lambda m: m.update({"Qformer.bert.pooler.weight": torch.ones(1)}),
        "1 keys do not belong to BLIP-2",
        "Qformer.bert.pooler.weight",
    )
    told(lambda m: (m.pop("ln_vision.bias"), None)[1], "1 keys are missing: ln_vision.bias")
    told(lambda m: m.update({"opt_proj.bias": torch.ones(3)}), "opt_proj.bias", "[3]")
    told(lambda m: {"layer.weight": torch.ones(2)}, "no query_tokens")
    told(lambda m: [1, 2], "dict with tensors")
    told(lambda m: m.update({"Qformer.cls.predictions.decoder.bias": torch.ones(2)}), "needs a tied", kind="stage1")
    told(lambda m: (m.pop("itm_head.bias"), None)[1], "itm_head.bias", kind="stage1")
    (tmp_path / "cut.pth").write_bytes((home / "opt.pth").read_bytes()[:5000])
    assert "cut.pth: not a complete .pth" in refused(tmp_path / "cut.pth")
    assert "35" in refused(home / "opt.pth", **{**parts(home, "opt"), "heads": 35})
    assert "heads" in refused(
        home / "opt.pth", **{**parts(home, "opt"), "heads": None}
    )  # BERT's 12 heads do not divide this width
    assert "language" in refused(home / "opt.pth", heads=HEADS, vision=str(home / "opt"))
    assert "vision" in refused(home / "opt.pth", heads=HEADS, language=str(home / "opt"))
    wrong = tiny_models.language("gpt2")
    wrong.width = 19
    assert f"of width {tiny_models.L}, not 19" in refused(home / "opt.pth", **{**parts(home, "opt"), "language": wrong})


def test_transformers_folders_that_cannot_be_used(home: Path, tmp_path: Path) -> None:
    def told(change: Any, *words: str, kind: str = "opt", **options: Any) -> None:
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(home / kind, folder)
        change(folder)
        line = refused(folder, **options)
        assert all(word in line for word in words), line

    config, keys = tiny_blip2.changed_config, tiny_blip2.changed_tensors

    def cut(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    def shards(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        first = {n: t for n, t in tensors.items() if n.startswith("language_model.")}
        save_file(first, folder / "a.safetensors", metadata={"format": "pt"})
        where = {n: "a.safetensors" if n in first else "b.safetensors" for n in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))

    def escaping(folder: Path) -> None:
        shards(folder)
        config(lambda c: c["weight_map"].update({"x": "../opt/model.safetensors"}), "model.safetensors.index.json")(
            folder
        )

    told(cut, "bad/model.safetensors", "truncated")
    told(shards, "bad/b.safetensors: missing", "names it for")
    index = "model.safetensors.index.json"
    told(lambda f: (shards(f), config(lambda c: c.pop("metadata"), index)(f)), index, "metadata and weight_map")
    told(escaping, "'../opt/model.safetensors'", "which is not in this folder")
    told(lambda f: (f / "model.safetensors").unlink(), "no model.safetensors")
    told(keys(lambda t: t.update({"itm_head.weight": torch.ones(2, 2)})), "unexpected: itm_head.weight")
    told(
        keys(lambda t: t.update({"pooler.weight": torch.ones(2)})),
        "do not belong to a Blip2ForConditionalGeneration: pooler.weight",
    )
    told(keys(lambda t: t.pop("qformer.layernorm.bias")), "missing: qformer.layernorm.bias")
    told(keys(lambda t: t.pop("vision_model.encoder.layers.1.mlp.fc1.bias")), "encoder.layers.1.mlp.fc1.bias")
    told(keys(lambda t: t.update({"vision_model.head.weight": torch.ones(2)})), "vision_model.head.weight")
    told(keys(lambda t: t.update({"language_model.head.weight": torch.ones(2)})), "language_model.head.weight")
    told(keys(lambda t: t.pop("language_model.model.decoder.layers.0.fc1.bias")), "layers.0.fc1.bias")
    told(config(lambda c: c.update(model_type="blip")), "'blip'", "another architecture")
    told(config(lambda c: c.update(architectures=["Blip2Model"])), "'Blip2Model'", "Blip2ForImageTextRetrieval")
    told(config(lambda c: c["qformer_config"].update(hidden_act="relu")), "qformer_config.hidden_act is 'relu'")
    told(lambda f: None, "num_attention_heads is 3, not 5", heads=5)

    def without_image(folder: Path) -> None:
        tiny_blip2.tokenizer("opt").save_pretrained(folder)

    told(without_image, "tokenizer.json", "no token '<image>'")


def test_targets_that_cannot_be_written(home: Path, tmp_path: Path) -> None:
    def told(words: str, *arguments: Any) -> None:
        with pytest.raises(UserError, match=words):
            openblip2.convert(*arguments)

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    told("unknown target 'gguf'", home / "opt", tmp_path / "x", "gguf")
    told("full exists already: give another name, or add --overwrite", home / "opt", tmp_path / "full", "hf")
    with pytest.raises(UserError, match="full contains files that do not belong to a model"):
        openblip2.convert(home / "opt", tmp_path / "full", "hf", overwrite=True)
    assert (tmp_path / "full" / "file").exists()
    (tmp_path / "full" / "file").rename(tmp_path / "full" / "model.gguf")
    told(r"model.gguf is not a run and does not end in .pth, .pt, .bin", tmp_path / "full" / "model.gguf", "x", "hf")
    told("ends in .pth", home / "opt", tmp_path / "x", "lavis")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_what_a_lavis_file_repeats_is_not_left_out_of_another(home: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"heads": HEADS, "vision": str(home / "retriever")}
    notes = openblip2.convert(home / "stage1.pth", tmp_path / "copy.pth", "lavis", **more)
    written = read_pth(tmp_path / "copy.pth")
    same(dict(written), dict(read_pth(home / "stage1.pth")))
    assert not [note for note in notes if note.split(":")[0] in written]
    assert len(notes) == 1, "the image encoder alone"


def test_left_out_is_named(home: Path) -> None:
    found = read_checkpoint(home / "stage1.pth", Parts(heads=HEADS, vision=str(home / "retriever")))
    assert [line.split(":")[0] for line in found.left_out] == [
        "Qformer.bert.embeddings.position_ids",
        "Qformer.cls.predictions.decoder.weight",
        "Qformer.cls.predictions.decoder.bias",
    ]


# Adapters and the command line


def test_adapters_are_folded_in(home: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from openblip2.model.build import add_adapters

    captioner = load(home / "llama")
    settings = captioner.settings
    captioner.settings = replace(
        settings, qformer=replace(settings.qformer, lora_rank=2), language=replace(settings.language, lora_rank=2)
    )
    add_adapters(captioner.model, captioner.settings)
    random = torch.Generator().manual_seed(7)
    for name, parameter in captioner.model.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=random)
    plain = load(home / "llama").soft_prompt(pictures())
    assert (captioner.soft_prompt(pictures()) - plain).abs().max() > 0.01
    captions = captioner.caption(pictures(), decoding=SHORT)
    captioner.save_pretrained(tmp_path / "run")
    assert load(tmp_path / "run").caption(pictures(), decoding=SHORT) == captions

    notes = openblip2.convert(tmp_path / "run", tmp_path / "out", "hf")
    assert notes == ["LoRA: merged into the weights, in fp32"]
    folded = load(tmp_path / "out")
    torch.testing.assert_close(folded.soft_prompt(pictures()), captioner.soft_prompt(pictures()), rtol=1e-5, atol=1e-5)
    assert folded.caption(pictures(), decoding=SHORT) == captions
    assert not any("lora" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


def test_a_quantised_language_model_is_not_written(home: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    captioner = load(home / "llama")
    captioner.settings = replace(captioner.settings, language=replace(captioner.settings.language, dtype="int8"))
    with pytest.raises(UserError, match="int8 cannot be written"):
        captioner.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_the_command_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from openblip2.cli import main

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["openblip2", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    more = ("--heads", HEADS, "--vision", home / "opt", "--language", home / "opt")
    code, out, _ = call("convert", home / "opt.pth", tmp_path / "run", "--to", "openblip2", *more)
    assert (code, out) == (0, f"{tmp_path / 'run'}\n")
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    code, out, _ = call("caption", tmp_path / "run", tmp_path / "a.png")
    assert code == 0
    assert out.startswith(f"{tmp_path / 'a.png'}\t")
    code, out, _ = call("convert", tmp_path / "run", tmp_path / "back.pth", "--to", "lavis")
    assert code == 0
    assert "note: the language model" in out
    code, out, err = call("convert", home / "opt", tmp_path / "run", "--to", "hf")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.endswith("run exists already: give another name, or add --overwrite to replace it")
    code, out, err = call("convert", tmp_path / "run", tmp_path / "run", "--to", "hf", "--overwrite")
    assert (code, "is the source" in err) == (2, True)
    with locked(tmp_path, ".run.lock"):
        code, _, err = call("convert", home / "opt", tmp_path / "run", "--to", "hf", "--overwrite")
        assert (code, f"{tmp_path / 'run'} is being written by process" in err) == (2, True)
    code, out, _ = call("convert", home / "opt", tmp_path / "run", "--to", "hf", "--overwrite")
    assert code == 0, "replaced, and as a whole"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model_type"] == "blip-2"
    assert not (tmp_path / "run" / "vision").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "back.pth", "run"]
    code, _, err = call("caption", home / "opt.pth", tmp_path / "a.png")
    assert code == 2
    assert "opt.pth" in err
    assert "vision=" in err


def test_a_hub_name_is_found_in_the_hubs_own_cache(home: Path, tmp_path: Path) -> None:
    """Offline, as on a cluster, the name is enough if the model was downloaded before."""
    cached = tmp_path / "hub" / "models--me--eyes"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123456789")
    shutil.copytree(home / "opt", cached / "snapshots" / "0123456789")
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    said = subprocess.run(
        [sys.executable, "-m", "openblip2", "caption", "me/eyes", tmp_path / "a.png", "--beams", "1"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert said.returncode == 0, said.stderr
    path, text = said.stdout.rstrip("\n").split("\t")
    assert (path, said.stderr) == (str(tmp_path / "a.png"), "")
    assert text
