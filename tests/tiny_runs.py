"""Tiny frozen models and pictures as folders on disk, as a user would name them on the command line."""

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from openblip2.cli import app

SIDE = 12  # px; 3 x 3 patches
COLOURS = {"red": (220, 40, 40), "blue": (40, 60, 220)}
NOUNS = ("dog", "cat", "bus")
WORDS = ["a", "the", "what", "colour", "is", "it", "question:", "answer:", *COLOURS, *NOUNS]
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
LLM_WORDS = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]


def named(width: int, layers: int, heads: int, ffn: int) -> dict[str, Any]:
    """Sizes under the names that transformers uses."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
    }


# The point in an error message after which it says what to do.
REMEDY = re.compile(
    r"; |[:,] (?=give|save|write|add|leave|remove|repeat|use|set|choose|it must|they must|at least|each |the |one )"
)


def vision(folder: Path) -> Path:
    """A ViT of width 24 and 3 layers."""
    sizes = named(width=24, layers=3, heads=2, ffn=40)
    torch.manual_seed(0)
    hf.ViTModel(hf.ViTConfig(**sizes, image_size=SIDE, patch_size=4)).save_pretrained(folder)
    published = {"size": SIDE, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(published))
    return folder


def bert(folder: Path) -> Path:
    """A BERT of width 30 and 2 layers, with its tokenizer."""
    sizes = named(width=30, layers=2, heads=3, ffn=28)
    config = hf.BertConfig(**sizes, vocab_size=len(BERT_WORDS), max_position_embeddings=20)
    torch.manual_seed(1)
    hf.BertForMaskedLM(config).save_pretrained(folder)
    words = {word: n for n, word in enumerate(BERT_WORDS)}
    hf.BertTokenizer(vocab=words).save_pretrained(folder)
    return folder


def language(folder: Path) -> Path:
    """A Llama of width 20 with a tokenizer of whole words."""
    sizes = named(width=20, layers=2, heads=5, ffn=26)
    ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(2)
    llm = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, vocab_size=len(LLM_WORDS), **ids))
    for weight in llm.parameters():
        if weight.ndim == 2:  # with the small usual values, no prompt would change the text
            torch.nn.init.normal_(weight, std=0.5)
    llm.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(LLM_WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names: dict[str, Any] = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    hf.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    return folder


def pictures(folder: Path, count: int = 16) -> Path:
    """Pictures of a single colour with one caption each, listed in `records.jsonl`."""
    folder.mkdir()
    rows = []
    for n in range(count):
        colour, noun = list(COLOURS)[n % 2], NOUNS[n % 3]
        Image.new("RGB", (20, 16), tuple(c - n for c in COLOURS[colour])).save(folder / f"{n}.png")
        rows.append({"image": f"{n}.png", "caption": f"a {colour} {noun}"})
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def home(root: Path, count: int = 0) -> Path:
    """The three models in a folder, each under its builder's name, and `count` pictures in `data`."""
    for build in (vision, bert, language):
        build(root / build.__name__)
    if count:
        pictures(root / "data", count)
    return root


def trained(root: Path) -> Path:
    """A home with 16 pictures and a run of each stage, trained through the command line: `stage1`, `stage2`."""
    home(root, count=16)
    for stage, more in (("stage1", []), ("stage2", ["--start", str(root / "stage1")])):
        words = ["train", stage, "--data", str(root / "data"), "--out", str(root / stage)]
        words += [*for_training(options(root), stage), *more]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    return root


def options(models: Path) -> list[str]:
    """`--set` options for tiny runs of 3 steps with the models in `models`, made by the three builders."""
    settings = {
        "vision.name": models / "vision",
        "vision.image_size": SIDE,
        "vision.layer": -2,
        "qformer.start": models / "bert",
        "qformer.queries": 5,
        "stage1.shared_width": 9,
        "language.name": models / "language",
        "language.template": "{image}{bos}{prompt}",
        "language.end": "null",
        "language.prompts": '[""]',
        "train.steps": 3,
        "train.batch": 4,
        "train.precision": "fp32",
        "train.validate_every": 2,
        "train.checkpoint_every": 2,
        "data.held_out": 0.25,
    }
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


def for_training(words: list[str], what: str) -> list[str]:
    """The options in `words` that have an effect in `train WHAT`."""
    idle = "language." if what in ("stage1", "retrieval") else "stage1."
    return [word for n in range(0, len(words), 2) if not words[n + 1].startswith(idle) for word in words[n : n + 2]]
