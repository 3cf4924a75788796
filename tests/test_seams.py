"""Training, saving, loading and using a caller's own connector or encoder; settings that do not apply are refused."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import torch
from pydantic import Field
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

import openblip2
import tiny_runs
from openblip2.config import RunSettings, change
from openblip2.data.records import read_records
from openblip2.errors import UserError
from openblip2.inference.attend import look
from openblip2.inference.captioner import Captioner
from openblip2.inference.load import load
from openblip2.model.build import CONNECTORS
from openblip2.model.connector import Connector, Question
from openblip2.plan import make_plan
from openblip2.presets import fine_tuning, preset
from openblip2.train.recipes import train_stage
from openblip2.weights.convert import convert
from test_training import log_of, quiet

SIDE, WIDTH = 20, 14  # input side and feature width of the encoder below; it has 5 x 5 patches


class Pooled(Connector):
    """Averages the patches over a grid of `side` x `side` cells and applies one linear layer."""

    name: ClassVar[str] = "pooled"

    def __init__(self, patches: int, image_width: int, side: Annotated[int, Field(ge=1)] = 2, width: int = 18) -> None:
        grid = int(patches**0.5)
        if side > grid:
            raise UserError(f"connector.options: side={side} is more than the {grid} patches along a side")
        super().__init__(side * side, width, image_width)
        self.grid, self.side, self.linear = grid, side, nn.Linear(image_width, width)

    def visual_tokens(self, patches: Tensor, question: Question | None = None) -> Tensor:
        square = patches.float()[:, -(self.grid**2) :].unflatten(1, (self.grid, self.grid)).movedim(3, 1)
        return self.linear(F.adaptive_avg_pool2d(square, self.side).flatten(2).transpose(1, 2))


class Summed(Pooled):
    """A second connector, with another name."""

    name: ClassVar[str] = "summed"


class OwnEncoder(nn.Module):
    """A CNN with dropout and batch-norm statistics, so that tests notice if the frozen encoder is in training mode."""

    width, image_size = WIDTH, SIDE

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem, self.norm = nn.Conv2d(3, WIDTH, 4, stride=4), nn.BatchNorm2d(WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        found = self.norm(self.stem(pixels.float() / 255 - 0.5))
        return F.dropout(found, 0.5, self.training).flatten(2).transpose(1, 2)


@pytest.fixture(autouse=True)
def _connectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONNECTORS, "pooled", Pooled)
    monkeypatch.setitem(CONNECTORS, "summed", Summed)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and pictures, and with a stage-2 run in `pooled`."""
    root = tiny_runs.home(tmp_path_factory.mktemp("seams"), count=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONNECTORS, "pooled", Pooled)
        train(root, "pooled", recipe(root, "stage2", connector__name="pooled", warm_start="true"))
    return root


def recipe(home: Path, stage: str, **changes: Any) -> RunSettings:
    values = dict(word.split("=", 1) for word in tiny_runs.options(home)[1::2]) | {"data.source": str(home / "data")}
    return change(preset(stage, "laptop"), values | {k.replace("__", "."): v for k, v in changes.items()})


def train(home: Path, name: str, settings: RunSettings, **parts: Any) -> Path:
    train_stage(settings, read_records(home / "data")[0], home / name, quiet(), **parts)
    return home / name


def copied(run: Path, to: Path, **changes: Any) -> Path:
    """Copies a run and changes settings in the copy's config.json."""
    shutil.copytree(run, to)
    config = json.loads((to / "config.json").read_text())
    for name, value in changes.items():
        section, field = name.split("__")
        config["settings"][section][field] = value
    (to / "config.json").write_text(json.dumps(config))
    return to


def tensors(run: Path) -> set[str]:
    with safe_open(run / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_a_connector_is_one_class_and_one_line(home: Path, tmp_path: Path) -> None:
    run, picture = home / "pooled", home / "data" / "0.png"
    assert tensors(run) == {f"{part}.{kind}" for part in ("pooled.linear", "projection") for kind in ("weight", "bias")}
    assert json.loads((run / "config.json").read_text())["sizes"] == {"tokens": 4, "width": 18, "image_width": 24}
    assert [row["step"] for row in log_of(run) if "lm" in row] == [1, 2, 3]
    model = load(run)
    assert isinstance(model, Captioner)
    (text,) = model.caption([picture])
    assert isinstance(text, str)
    soft = model.soft_prompt([picture])
    assert soft.shape == (1, 4, 20)
    assert openblip2.Chat(model, picture).ask("what is it") is not None
    model.save_pretrained(tmp_path / "saved", merge=True)
    convert(run, tmp_path / "converted", "openblip2")
    for again in ("saved", "converted"):
        assert torch.equal(load(tmp_path / again).soft_prompt([picture]), soft)  # pyright: ignore
    assert "pooled" in (tmp_path / "saved" / "README.md").read_text()


def test_a_connector_is_fine_tuned_and_resumed(home: Path, tmp_path: Path) -> None:
    chosen = fine_tuning("caption", "laptop", load(home / "pooled").settings, str(home / "pooled"))
    more = {"train.steps": 2, "train.batch": 4, "data.source": str(home / "data"), "data.held_out": 0.25}
    tuned = train(home, "tuned", change(chosen, more))
    assert tensors(tuned) == tensors(home / "pooled")
    train(home, "tuned", change(chosen, more), resume=True)
    other = replace(change(chosen, more), connector=replace(chosen.connector, name="summed"))
    with pytest.raises(UserError, match=r"has the connector 'pooled'.* these settings have 'summed'"):
        train_stage(other, read_records(home / "data")[0], tmp_path / "other", quiet())


def test_the_number_of_tokens_follows_from_an_option(home: Path) -> None:
    options = {"connector.name": "pooled", "connector.options": {"side": 3}}
    run = train(home, "nine", change(recipe(home, "stage2"), options))
    model = load(run)
    assert isinstance(model, Captioner)
    assert model.soft_prompt([home / "data" / "0.png"]).shape == (1, 9, 20)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"connector__name": "pool"}, r"connector.name='pool' is not one of qformer, .*, pooled, summed"),
        (
            {"connector__options": {"side": "two"}},
            "side='two': input should be a valid integer.*'pooled' has side, wid",
        ),
        ({"connector__options": {"side": 0}}, "side=0: input should be greater than or equal to 1"),
        ({"connector__options": {"sides": 2}}, "sides=2: unexpected keyword argument.*'pooled' has side, width"),
        ({"connector__options": {"side": 9}}, "side=9 is more than the 3 patches along a side"),
        (
            {"connector__name": "pooled_mlp", "connector__options": {"grid": True}},
            "grid=True: input should be a valid int",
        ),
        ({"qformer__lora_rank": 2}, "qformer.lora_rank=2 does not apply to the connector 'pooled'"),
        ({"qformer__question_in_qformer": "true", "task": "vqa"}, "question_in_qformer=True does not apply.*'pooled'"),
        ({"start": "{}/pooled"}, "start=.* does not apply to the connector 'pooled'"),
        ({"stage1": True}, "connector.name=pooled: stage 1 trains the Q-Former; .* train stage2"),
        ({"connector__name": "qformer", "connector__options": {"side": 2}}, "options=.*does not apply.*'qformer'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(home: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    stage = "stage1" if changes.pop("stage1", False) else "stage2"
    settings = recipe(home, stage, **({"connector__name": "pooled"} | changes))
    if settings.start:
        settings = replace(settings, start=settings.start.format(home))
    with pytest.raises(UserError, match=said) as caught:
        train_stage(settings, read_records(home / "data")[0], tmp_path / "run", quiet())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_under_another_connector_is_refused(home: Path, tmp_path: Path) -> None:
    run = home / "pooled"
    for name in ("summed", "qformer"):
        with pytest.raises(UserError, match=f"contains a connector 'pooled', but the settings name '{name}'"):
            load(copied(run, tmp_path / name, connector__name=name))
    with pytest.raises(UserError, match=r"'pooled' was trained with .*'tokens': 4.* here it has .*'tokens': 9"):
        load(copied(run, tmp_path / "nine", connector__options={"side": 3}))


def test_what_a_connector_cannot_do_is_refused(home: Path, tmp_path: Path) -> None:
    run, picture = home / "pooled", home / "data" / "0.png"
    for to, out in (("hf", "hf"), ("lavis", "model.pth")):
        with pytest.raises(UserError, match=f"its connector is 'pooled', but --to {to} can store only a Q-Former"):
            convert(run, tmp_path / out, to)
    model = load(run)
    with pytest.raises(UserError, match="the connector 'pooled' has no attention maps"):
        look(model, picture)
    assert isinstance(model, Captioner)
    with pytest.raises(UserError, match="pooled cannot read questions"):
        model.soft_prompt([picture], ["what is it"])


def test_an_encoder_of_the_callers_own(home: Path, tmp_path: Path) -> None:
    """Both stages run with whitening. Runs do not store the module; loading without it gives an error that names it."""
    eyes, picture = OwnEncoder(), home / "data" / "0.png"
    before = {name: value.clone() for name, value in eyes.state_dict().items()}
    one = train(home, "own1", recipe(home, "stage1", vision__whiten="true", warm_start="true"), vision=eyes)
    settings = recipe(home, "stage2", vision__whiten="true", start=str(one))
    two = train(home, "own2", settings, vision=eyes)
    for name, value in eyes.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not [name for name in tensors(two) if name.startswith("vision.")]
    stage1, stage2 = (load(run, vision=OwnEncoder()) for run in (one, two))
    assert isinstance(stage2, Captioner)
    assert stage2.settings.vision.name == "module:OwnEncoder"
    assert isinstance(stage2.caption([picture])[0], str)
    assert look(stage1, picture).queries.shape == (5, 5, 5)
    stage2.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved", vision=eyes).soft_prompt([picture]), stage2.soft_prompt([picture]))  # pyright: ignore
    with pytest.raises(UserError, match=r"vision.name=module:OwnEncoder: .* pass it again as vision="):
        load(two)
    with pytest.raises(UserError, match="OwnEncoder was passed as an object"):
        stage2.save_pretrained(tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()


def test_augmented_pictures_go_through_an_own_encoder(home: Path) -> None:
    settings = recipe(home, "stage2", data__augment="true", connector__name="pooled")
    run = train(home, "augmented", settings, vision=OwnEncoder())
    model = load(run, vision=OwnEncoder())
    assert isinstance(model, Captioner)
    assert model.soft_prompt([home / "data" / "0.png"]).shape == (1, 4, 20)


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"width": None}, "OwnEncoder: it must be an nn.Module with two whole numbers, width and image_size"),
        ({"width": WIDTH + 1}, rf"for one picture it returns \[1, 25, {WIDTH}\], not \[1, P, {WIDTH + 1}\]"),
    ],
)
def test_what_is_no_encoder_is_refused(home: Path, tmp_path: Path, attributes: dict[str, Any], said: str) -> None:
    eyes: Any = OwnEncoder()
    for name, value in attributes.items():
        setattr(eyes, name, value)
    with pytest.raises(UserError, match=said):
        train_stage(recipe(home, "stage1"), [], tmp_path / "run", quiet(), vision=eyes)


def test_a_language_model_of_the_callers_own(home: Path, tmp_path: Path) -> None:
    words = openblip2.load_language(str(home / "language"), template="{image}a {prompt}")
    words.llm.name_or_path = ""  # like a model that was created in memory
    run = train(home, "spoken", recipe(home, "stage2", connector__name="pooled"), language=words)
    with pytest.raises(UserError, match=r"language.name=module:LlamaForCausalLM: .* as language="):
        load(run)
    model = load(run, language=words)
    assert isinstance(model, Captioner)
    assert model.model.language.template == "{image}a {prompt}"
    assert isinstance(model.caption([home / "data" / "0.png"])[0], str)


def test_a_plan_knows_other_connectors(home: Path) -> None:
    planned = make_plan(recipe(home, "stage2", connector__name="pooled"), "H100", 1)
    assert planned["parameters"]["trained"] == (24 + 1) * 18 + (18 + 1) * 20


def test_the_examples_of_the_page_run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "bring-your-own.md").read_text(encoding="utf-8")
    encoder, connector = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class" in block)
    monkeypatch.setattr(openblip2, "preset", lambda stage, _: recipe(home, stage))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(home / "data")
    names: dict[str, Any] = {}
    exec(compile(encoder, "bring-your-own.md", "exec"), names)
    assert names["captioner"].soft_prompt(["pictures/1.png"]).shape == (1, 5, 20)
    exec(compile(connector, "bring-your-own.md", "exec"), names)
    train_stage(names["settings"], names["records"], tmp_path / "pooled", quiet())
    model = load(tmp_path / "pooled")
    assert isinstance(model, Captioner)
    assert model.soft_prompt(["pictures/1.png"]).shape == (1, 9, 20)
