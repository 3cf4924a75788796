"""Settings are strict and frozen, and the paper's presets have the paper's numbers."""

import dataclasses
import json
from typing import Any

import pytest

from openblip2.config import RENAMED, RunSettings, change, from_dict
from openblip2.errors import UserError
from openblip2.presets import PRESETS, preset

EVERY = [(stage, name) for stage, presets in PRESETS.items() for name in presets]


def refusal(changes: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        change(RunSettings(), changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_old_names_of_settings_are_read_in_a_run_and_refused_in_a_command() -> None:
    values = dataclasses.asdict(RunSettings())
    del values["stage1"]["detach_gathered"], values["stage1"]["itm_start_step"]
    values["stage1"] |= {"one_sided": True, "matching_from": 7}
    found = from_dict(values)
    assert (found.stage1.detach_gathered, found.stage1.itm_start_step) == (True, 7)
    assert values["stage1"]["matching_from"] == 7  # the input is not changed
    assert (
        refusal({"stage1.matching_from": 7}) == "setting 'stage1.matching_from' is now called 'stage1.itm_start_step'"
    )
    assert refusal({"stage1.one_sided": True}) == "setting 'stage1.one_sided' is now called 'stage1.detach_gathered'"


def test_every_old_name_means_a_setting_of_today() -> None:
    for old, new in RENAMED.items():
        values = dataclasses.asdict(RunSettings())
        section, name = old.split(".")
        values[section][name] = values[section].pop(new.split(".")[1])
        assert from_dict(values) == RunSettings()
        assert refusal({old: "x"}) == f"setting {old!r} is now called {new!r}"


def test_a_setting_that_is_gone_is_ignored_in_a_run_and_refused_in_a_command() -> None:
    values = dataclasses.asdict(RunSettings())
    values["qformer"] |= {"cross_attention_std": 0.08, "self_attention_scale": 1.0, "queries": 16}
    assert from_dict(values) == change(RunSettings(), {"qformer.queries": 16})
    values["qformer"]["self_attention_scale"] = 0.1
    with pytest.raises(
        UserError, match=r"qformer\.self_attention_scale=0\.1 was removed: load this model with an earlier"
    ):
        from_dict(values)
    assert "was removed" in refusal({"qformer.cross_attention_std": 0.08})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("optim.lr", "5e-5", 5e-5),
        ("optim.lr", "1", 1.0),
        ("optim.betas", "[0.8, 0.95]", (0.8, 0.95)),
        ("train.steps", "7", 7),
        ("train.steps", "1e3", 1000),
        ("data.source", "caf\udce9", "caf\udce9"),  # a file name with bytes that are not text
        ("vision.layer", "-1", -1),
        ("vision.name", "google/siglip-base-patch16-224", "google/siglip-base-patch16-224"),
        ("data.augment", "false", False),
        ("language.end", "null", None),
        ("language.end", r'"\n"', "\n"),
        ("language.prompts", '["a photo of", ""]', ("a photo of", "")),
        ("language.question", "Question: {} Answer:", "Question: {} Answer:"),
        ("stage1.objectives", '["itc", "itm"]', ("itc", "itm")),
        ("train.precision", "bf16", "bf16"),
        ("start", "runs/stage1", "runs/stage1"),
        ("warm_start", "true", True),
    ],
)
def test_text_is_read_as_its_fields_type(name: str, text: str, value: object) -> None:
    changed = change(RunSettings(), {name: text})
    found: Any = changed
    for part in name.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)
    before = dataclasses.asdict(RunSettings())
    after = dataclasses.asdict(changed)
    section, _, field = name.partition(".")
    (after[section] if field else after)[field or section] = (before[section] if field else before)[field or section]
    assert after == before  # nothing else has changed


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("train.steps", "abc", "integer"),
        ("train.steps", "2.5", "integer"),
        ("train.steps", "0", "greater than or equal to 1"),
        ("train.steps", "null", "integer"),
        ("optim.lr", "fast", "number"),
        ("optim.lr", "0", "greater than 0"),
        ("optim.lr", "-1e-4", "greater than 0"),
        ("optim.lr", "inf", "valid number"),
        ("optim.clip", "Infinity", "finite number"),
        ("train.seed", "99999999999999999999999", "less than 4294967296"),
        ("language.question", "what is it?", "pattern"),
        ("optim.betas", "[0.9]", "betas"),
        ("optim.betas", "[0.9, 1.0]", "less than 1"),
        ("qformer.dropout", "1", "less than 1"),
        ("data.held_out", "0", "greater than 0"),
        ("data.augment", "perhaps", "boolean"),
        ("train.precision", "fp8", "'auto', 'bf16' or 'fp32'"),
        ("stage", "stage3", "'stage1' or 'stage2'"),
        ("vision.name", "7", "string"),
        ("language.prompts", "a photo of", "array"),
        ("language.prompts", "[]", "at least 1 item"),
        ("stage1.objectives", '["itc", "itx"]', "'itc', 'itm' or 'itg'"),
    ],
)
def test_a_value_that_does_not_fit_is_named(name: str, value: str, why: str) -> None:
    message = refusal({name: value})
    assert message.startswith(f"setting {name}")
    assert why in message


def test_numbers_are_numbers_and_booleans_are_booleans() -> None:
    values = dataclasses.asdict(RunSettings())
    names = [f"{part}.{name}" for part in values if isinstance(values[part], dict) for name in values[part]]
    checked = 0
    for name in [*names, "warm_start"]:
        *section, field = name.split(".")
        default = (values[section[0]] if section else values)[field]
        wrong = ["1", "0", '"true"', "yes"] if isinstance(default, bool) else ["true", '"1"', '"0.5"']
        for value in wrong if isinstance(default, bool | int | float) else []:
            assert (
                "valid boolean" in refusal({name: value})
                or "valid integer" in refusal({name: value})
                or ("valid number" in refusal({name: value}))
            )
            checked += 1
    assert checked > 100
    assert "valid number" in refusal({"optim.betas": "[true, 0.9]"})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("train.step", "train.steps"),
        ("optim.l_r", "optim.lr"),
        ("qformer.querys", "qformer.queries"),
        ("vison.name", "vision.name"),
        ("warmstart", "warm_start"),
        ("vision", "vision.name"),  # a section is not a setting
    ],
)
def test_a_misspelt_name_gets_a_suggestion(name: str, meant: str) -> None:
    assert refusal({name: "1"}) == f"unknown setting {name!r}: did you mean {meant!r}?"


def test_a_name_like_no_other_gets_them_all() -> None:
    message = refusal({"zzz": "1"})
    assert "optim.betas" in message
    assert "train.steps" in message


def test_settings_are_frozen() -> None:
    settings: Any = RunSettings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.stage = "stage2"
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.optim.lr = 1.0
    change(settings, {"optim.lr": 1.0})
    assert settings.optim.lr == 1e-4


@pytest.mark.parametrize(("stage", "name"), EVERY)
def test_presets_are_valid_and_pass_through_json(stage: str, name: str) -> None:
    settings = preset(stage, name)
    assert settings.stage == stage
    again = from_dict(json.loads(json.dumps(dataclasses.asdict(settings))))
    assert again == settings
    assert change(settings, {}) == settings


def test_unknown_and_missing_values_of_a_file() -> None:
    values = dataclasses.asdict(RunSettings())
    values["optim"]["momentum"] = 0.9
    with pytest.raises(UserError, match=r"optim\.momentum"):
        from_dict(values)
    assert from_dict({}) == RunSettings()  # missing settings have their defaults


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown preset 'lapdog' for stage1: presets are laptop, vit-l, vit-g$"):
        preset("stage1", "lapdog")


# METHOD, section 5, and the paper's appendix.
COMMON: dict[str, Any] = {
    "optim.betas": (0.9, 0.98),
    "optim.weight_decay": 0.05,
    "optim.lr": 1e-4,
    "optim.warmup": 2000,
    "optim.clip": 0.0,
    "vision.name": "openai/clip-vit-large-patch14",
    "vision.layer": -2,
    "vision.image_size": 224,
    "qformer.start": "google-bert/bert-base-uncased",
    "qformer.queries": 32,
    "qformer.cross_every": 2,
    "stage1.shared_width": 256,
    "stage1.temperature": 0.07,
    "data.augment": True,
    "data.max_tokens": 32,
    "warm_start": False,
}
PAPER: dict[tuple[str, str], dict[str, Any]] = {
    ("stage1", "vit-l"): {"train.steps": 250_000, "train.batch": 2320, "optim.min_lr": 1e-5},
    ("stage2", "vit-l-opt-2.7b"): {
        "train.steps": 80_000,
        "train.batch": 1920,
        "optim.min_lr": 5e-5,
        "language.name": "facebook/opt-2.7b",
        "language.end": "\n",
        "language.template": "{image}{bos}{prompt}",
        "language.question": "Question: {} Answer:",
    },
    ("stage2", "vit-l-flant5-xl"): {
        "train.steps": 80_000,
        "train.batch": 1520,
        "optim.min_lr": 5e-5,
        "language.name": "google/flan-t5-xl",
        "language.end": None,
        "language.question": "Question: {} Short answer:",
    },
}


@pytest.mark.parametrize(("stage", "name"), PAPER)
def test_the_papers_presets_have_the_papers_numbers(stage: str, name: str) -> None:
    settings = preset(stage, name)
    expected = {**COMMON, **PAPER[stage, name]}
    found = {}
    for setting in expected:
        value: Any = settings
        for part in setting.split("."):
            value = getattr(value, part)
        found[setting] = value
    assert found == expected


def test_both_laptop_presets_fit_each_other() -> None:
    first, second = preset("stage1", "laptop"), preset("stage2", "laptop")
    assert (first.vision, first.qformer, first.data) == (second.vision, second.qformer, second.data)
