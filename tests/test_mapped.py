"""Casting tensor by tensor gives the same model as loading by transformers, with less memory (see test_memory)."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import tiny_models
from openblip2.model.precision import load_in

LOADERS: dict[str, Any] = {
    "llama": hf.AutoModelForCausalLM,
    "opt": hf.AutoModelForCausalLM,
    "t5": hf.AutoModelForSeq2SeqLM,
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_the_same_as_transformers_loads(tmp_path: Path, kind: str, stored: torch.dtype, wanted: torch.dtype) -> None:
    llm: Any = tiny_models.MODELS[kind]()
    llm.to(stored).save_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    mine, report = load_in(LOADERS[kind], str(tmp_path), wanted)
    theirs = LOADERS[kind].from_pretrained(tmp_path, dtype=wanted)
    assert not report["missing_keys"]
    found, expected = mine.state_dict(), theirs.state_dict()
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in expected.items()}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert mine.config.dtype == theirs.config.dtype
    for mine_buffer, their_buffer in zip(mine.buffers(), theirs.buffers(), strict=True):
        assert mine_buffer.dtype == their_buffer.dtype
    # Releasing pages changes neither the file nor other mappings of it.
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    tiny_models.opt().save_pretrained(tmp_path)
    llm, _ = load_in(hf.AutoModelForCausalLM, str(tmp_path), torch.bfloat16)
    assert llm.get_input_embeddings().weight is llm.get_output_embeddings().weight
    assert llm.get_input_embeddings().weight.dtype == torch.bfloat16


def test_a_mixed_file_is_left_to_transformers(tmp_path: Path) -> None:
    llm: Any = tiny_models.llama()
    llm.to(torch.bfloat16)
    llm.model.norm.float()
    llm.save_pretrained(tmp_path)
    mine, _ = load_in(hf.AutoModelForCausalLM, str(tmp_path), torch.float16)
    assert {parameter.dtype for parameter in mine.parameters()} == {torch.float16}
