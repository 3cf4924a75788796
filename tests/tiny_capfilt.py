"""Shards, a captioner and rankers for the tests of CapFilt, all tiny."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf

import tiny_runs
from openblip2.capfilt import Finished, capfilt
from openblip2.capfilt.shard import How
from openblip2.progress import Progress
from test_cli import call
from tiny_shards import sample, write_shard

TOKENS = 14  # maximum length of a text for all rankers
HOW = How(captions=3)


def clip(folder: Path) -> Path:
    """A CLIP with random weights, a tokenizer of whole words, and preprocessing that crops."""
    text = tiny_runs.named(width=12, layers=2, heads=2, ffn=20)
    words = {word: n for n, word in enumerate(tiny_runs.BERT_WORDS)}
    ids = {"eos_token_id": words["[SEP]"], "bos_token_id": words["[CLS]"], "pad_token_id": 0}
    eye = tiny_runs.named(width=16, layers=2, heads=2, ffn=24)
    config = hf.CLIPConfig(
        text_config={**text, **ids, "vocab_size": len(words), "max_position_embeddings": TOKENS},
        vision_config={**eye, "image_size": 8, "patch_size": 4},
        projection_dim=10,
    )
    torch.manual_seed(5)
    model = hf.CLIPModel(config)
    for weight in model.parameters():
        if weight.ndim > 1:  # with the small usual values, all pictures would give similar vectors
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    hf.BertTokenizer(vocab=words).save_pretrained(folder)
    published = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 8},
        "do_center_crop": True,
        "crop_size": {"height": 8, "width": 8},
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.3, 0.2, 0.25],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(published))
    return folder


def build(root: Path) -> Path:
    """Makes ROOT/stage1, ROOT/stage2, ROOT/clip, and ROOT/set with three shards of 40, 5 and 7 samples."""
    tiny_runs.home(root, count=16)
    clip(root / "clip")
    common = ["--data", root / "data", *tiny_runs.options(root), "--set", f"data.max_tokens={TOKENS}"]
    assert call("train", "stage1", "--out", root / "stage1", *common).code == 0
    assert call("train", "stage2", "--start", root / "stage1", "--out", root / "stage2", *common).code == 0
    shards(root / "set")
    return root


def shards(folder: Path) -> None:
    folder.mkdir()
    words = [f"{colour} {noun}" for colour in tiny_runs.COLOURS for noun in tiny_runs.NOUNS]
    for shard, count in enumerate((40, 5, 7)):
        samples = []
        for n in range(count):
            about: dict[str, Any] = {"url": f"https://a/{shard}/{n}.jpg", "width": 20, "sha256": f"{n:x}"}
            samples.append(sample(shard, n, f"A {words[n % 6]}!", **about))
        write_shard(folder / f"{shard:05}.tar", samples)


def models(root: Path, ranker: str = "stage1") -> tuple[str, str]:
    return str(root / "stage2"), str(root / ranker)


def run(root: Path, out: Path, how: How = HOW, ranker: str = "stage1", data: str = "set", **more: Any) -> Finished:
    return capfilt(str(root / data), *models(root, ranker), out, how, Progress(quiet=True), **more)


def content(out: Path) -> dict[str, bytes]:
    """The contents of all files; they must be the same, however the run was executed."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
