"""docs/compare.md: what it says about openblip2 exists, and every row that names a test as its check is tested."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import typer.main

import openblip2
import tiny_blip2
import tiny_models
from openblip2 import cli
from openblip2.config import RunSettings, _names
from openblip2.presets import FINE_TUNING, PRESETS

PAGE = Path(__file__).parents[1] / "docs" / "compare.md"
# what -> (openblip2, LAVIS, transformers, checked by)
ROWS = {
    what: cells
    for what, *cells in (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text("utf-8").splitlines()
        if line[:2] == "| "
    )
}
HEAD = ROWS.pop("what")


def generator(folder: Path, kind: str = "opt") -> Any:
    return hf.Blip2ForConditionalGeneration.from_pretrained(tiny_blip2.generator(kind, folder / kind))


def asked(model: Any) -> dict[str, Any]:
    """A picture and a prompt in the input format of transformers' BLIP-2."""
    pixels = tiny_blip2.pixel_values(tiny_models.pictures(1))
    places = [tiny_blip2.IMAGE] * model.config.num_query_tokens
    tokens = torch.tensor([[*places, *tiny_models.ids("a| dog")]])
    return {"pixel_values": pixels, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def scores_without_losses(folder: Path) -> None:
    model: Any = hf.Blip2ForImageTextRetrieval.from_pretrained(tiny_blip2.retriever(folder / "retriever"))
    pixels = tiny_blip2.pixel_values(tiny_models.pictures(2))
    tokens = torch.tensor([[2, 5, 3], [2, 6, 3]])
    for matching in (False, True):
        options = {"attention_mask": torch.ones_like(tokens), "use_image_text_matching_head": matching}
        found = model(pixel_values=pixels, input_ids=tokens, **options)
        assert found.loss is None
        assert found.logits_per_image.shape == (2, 2)
    heads = {name for name, part in model.named_children() if isinstance(part, torch.nn.Linear)}
    assert heads == {"vision_projection", "text_projection", "itm_head"}  # no head for ITG
    assert all(parameter.numel() > 1 for parameter in model.parameters())  # no temperature


def a_loss_of_labels(folder: Path) -> None:
    model = generator(folder)
    given = asked(model)
    assert model(**given).loss is None
    assert model(**given, labels=given["input_ids"]).loss > 0


def nothing_frozen(folder: Path) -> None:
    assert all(parameter.requires_grad for parameter in generator(folder).parameters())


def one_form_of_image_encoder(folder: Path) -> None:
    model = generator(folder)
    assert type(model.vision_model) is hf.Blip2VisionModel
    model.config.vision_config = hf.CLIPVisionConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(AttributeError, match="CLIPVisionConfig"):  # a setting that only EVA-CLIP has
        hf.Blip2ForConditionalGeneration(model.config)


def both_kinds_of_language_model(folder: Path) -> None:
    found = [type(generator(folder, kind).language_model) for kind in ("gpt2", "t5")]
    assert found == [hf.GPT2LMHeadModel, hf.T5ForConditionalGeneration]


def qformer_without_question(folder: Path) -> None:
    model, seen = generator(folder), []
    model.qformer.register_forward_pre_hook(lambda part, args, options: seen.append(options), with_kwargs=True)
    model(**asked(model))
    tensors = {name for name, value in seen[0].items() if isinstance(value, torch.Tensor)}
    assert tensors == {"query_embeds", "encoder_hidden_states", "encoder_attention_mask"}


def prompt_in_the_qformer(folder: Path) -> None:
    model: Any = hf.InstructBlipForConditionalGeneration.from_pretrained(tiny_blip2.instructed("opt", folder / "opt"))
    given, losses = asked(model), []
    for words in ([2, 5, 3], [2, 6, 3]):
        found = model(**given, qformer_input_ids=torch.tensor([words]), labels=given["input_ids"])
        losses.append(float(found.loss.detach()))
    assert losses[0] != losses[1]


def adapters_and_bits(folder: Path) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig, inject_adapter_in_model

    # peft's own function, because transformers' `add_adapter` may require an unpublished peft (5.24: 0.22).
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), generator(folder))
    assert any("lora" in name for name, _ in model.named_parameters())
    assert hf.BitsAndBytesConfig(load_in_8bit=True).load_in_8bit


# The row's name -> the check of its statement about transformers.
HELD: dict[str, Callable[[Path], None]] = {
    "training stage 1: ITC, ITM, ITG": scores_without_losses,
    "training stage 2": a_loss_of_labels,
    "frozen parts": nothing_frozen,
    "image encoder": one_form_of_image_encoder,
    "language model": both_kinds_of_language_model,
    "fine-tuning for retrieval": scores_without_losses,
    "fine-tuning for VQA, the question in the Q-Former (paper, 4.3)": qformer_without_question,
    "InstructBLIP: the Q-Former reads the prompt": prompt_in_the_qformer,
    "LoRA, 8 and 4 bits": adapters_and_bits,
}


def test_a_row_says_test_if_one_holds_it() -> None:
    assert HEAD == ["openblip2", "LAVIS 1.0.2", "transformers 5", "checked by"]
    assert hf.__version__.startswith("5.")
    assert {what for what, cells in ROWS.items() if cells[3] == "test"} == set(HELD)
    assert {cells[3] for cells in ROWS.values()} == {"test", "reading"}


@pytest.mark.parametrize("what", HELD)
def test_what_is_said_of_transformers(what: str, tmp_path: Path) -> None:
    HELD[what](tmp_path)


@pytest.mark.parametrize("what", ROWS)
def test_what_is_said_of_us_exists(what: str) -> None:
    commands: Any = typer.main.get_command(cli.app)
    settings = set(_names(RunSettings))
    named = re.findall(r"`([^`]+)`", ROWS[what][0])
    found = [name for name in named if name.startswith("openblip2") or name in settings]
    assert found, "no command, setting or class"
    for name in found:
        if name.startswith("openblip2."):
            assert name.removeprefix("openblip2.") in openblip2.__all__
        elif name.startswith("openblip2 "):
            _, command, *rest = name.split()
            assert command in commands.commands
            assert set(rest) <= {*PRESETS, *FINE_TUNING}
