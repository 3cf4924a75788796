"""The code in a model's repository is never run, and the user is never asked whether to run it."""

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import openblip2
from openblip2.errors import UserError
from openblip2.model.bert import bert_sizes, bert_tokenizer
from openblip2.model.load import is_encoder_decoder, load_language, load_vision
from openblip2.weights.huggingface import load_tokenizer

CODE = """
import pathlib
pathlib.Path("{ran}").touch()
from transformers import PretrainedConfig
class Foo(PretrainedConfig):
    model_type = "foo"
"""


@pytest.mark.parametrize(
    "load", [load_language, is_encoder_decoder, load_vision, bert_sizes, lambda name: bert_tokenizer(name, 100)]
)
def test_a_repository_with_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[[str], object]
) -> None:
    folder, ran = tmp_path / "code", tmp_path / "ran"
    folder.mkdir()
    names = {"AutoConfig": "conf.Foo", "AutoTokenizer": ["conf.Foo", None]}
    for file in ("config.json", "tokenizer_config.json"):
        (folder / file).write_text(json.dumps({"model_type": "foo", "auto_map": names}))
    (folder / "conf.py").write_text(CODE.replace("{ran}", str(ran)))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    with pytest.raises(UserError, match=r"the Python code of its own repository, which openblip2 never runs"):
        load(str(folder))
    with pytest.raises(UserError, match="never runs"):
        load_tokenizer(str(folder), "")
    assert not ran.exists()


def test_every_load_by_transformers_says_so() -> None:
    """Every call of `from_pretrained`, except of our own classes, has `trust_remote_code=False`."""
    missing = []
    for file in Path(openblip2.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr != "from_pretrained" or ast.unparse(node.func.value) in ("Captioner", "Matcher"):
                continue
            said = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if said.get("trust_remote_code") != "False":
                missing.append(f"{file.name}:{node.lineno}")
    assert missing == []
