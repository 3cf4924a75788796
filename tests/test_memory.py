"""Peak memory of loading a model and of retrieval, measured in separate processes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

import tiny_blip2
import tiny_models

SHARD = 2**30  # bytes

LOAD = """
import sys
import torch
import transformers.models.blip_2.modeling_blip_2
import transformers.models.opt.modeling_opt
import openblip2, openblip2.inference.load

def peak():  # and not getrusage's, which begins with the parent's
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])

before = peak()
captioner = openblip2.load(sys.argv[1], "cpu", precision=sys.argv[2])
weights = list(captioner.model.parameters())
for weight in weights:  # a file that is only mapped costs nothing until it is read
    weight.detach().sum()
print(peak() - before, sum(weight.numel() * weight.element_size() for weight in weights))
"""


def tokenizer(size: int) -> Any:
    words = {word: n for n, word in enumerate([*tiny_models.SPECIAL, *(f"word{n}" for n in range(size))][:size])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    names: dict[str, Any] = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def published(folder: Path, dtype: torch.dtype) -> int:
    """Writes a BLIP-2 of the published size (ViT-g, OPT-2.7B), random, in shards; returns its parameter count."""
    opt = hf.OPTConfig(
        hidden_size=2560,
        num_hidden_layers=32,
        num_attention_heads=32,
        ffn_dim=10240,
        word_embed_proj_dim=2560,
        bos_token_id=tiny_models.EOS,
        eos_token_id=tiny_models.NEWLINE,
        pad_token_id=tiny_models.PAD,
    )
    config = hf.Blip2Config(text_config=opt, image_token_index=tiny_blip2.IMAGE)
    config.architectures = ["Blip2ForConditionalGeneration"]
    config.dtype = dtype
    with torch.device("meta"):
        model = hf.Blip2ForConditionalGeneration(config)
    folder.mkdir()
    config.save_pretrained(folder)
    tiny_blip2.processor(tokenizer(opt.vocab_size - 8)).save_pretrained(folder)
    where, shard, size, count = {}, {}, 0, 0

    def write() -> None:
        name = f"model-{len(set(where.values())):05}.safetensors"
        where.update(dict.fromkeys(shard, name))
        save_file(shard, folder / name, metadata={"format": "pt"})
        shard.clear()

    random = torch.Generator().manual_seed(0)
    noise = 0.02 * torch.randn(2**20, generator=random)
    for name, parameter in model.named_parameters():
        shard[name] = (
            noise.repeat(-(-parameter.numel() // len(noise)))[: parameter.numel()].view(parameter.shape).to(dtype)
        )
        count += parameter.numel()
        size += parameter.numel() * dtype.itemsize
        if size > SHARD:
            write()
            size = 0
    write()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return count


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "loaded"), [("bfloat16", "bf16"), ("float16", "bf16")])
def test_loading_takes_little_more_than_the_model(tmp_path: Path, stored: str, loaded: str) -> None:
    count = published(tmp_path / "blip2", getattr(torch, stored))
    assert 3.7e9 < count < 3.8e9
    said: Any = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "blip2", loaded], capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stderr
    peak, size = map(int, said.stdout.split())
    print(f"{stored} -> {loaded}: {count:,} parameters, {size / 2**30:.2f} GiB, peak {peak / size:.3f} x")
    assert peak <= 1.2 * size


RANK = """
import sys
import torch
import tiny
from openblip2.evaluate.ranking import best_images, best_texts, log_odds, match_candidates
from openblip2.model.stage1 import Stage1

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])

torch.manual_seed(0)
torch.set_grad_enabled(False)
model = tiny.redraw(Stage1(tiny.qformer(layers=1), None, tiny.E)).eval()
memory = peak()
N, M, Q, E = 5000, 25000, 32, 256  # COCO's test part; the paper's queries and shared space
images = torch.nn.functional.normalize(torch.randn(N, Q, E), dim=-1)
texts = torch.nn.functional.normalize(torch.randn(M, E), dim=-1)
tokens, valid = torch.randint(1, tiny.WORDS, (M, 6)), torch.ones(M, 6, dtype=torch.bool)
features = torch.randn(1, tiny.P, tiny.V)
rankings = best_texts(images, texts, 128), best_images(images, texts, 128)
asked, pairs, match = [], 0, model.match
def counted(memory, rows, valid):
    global pairs
    pairs += len(rows)
    return match(memory, rows, valid)
model.match = counted
of_images, _ = match_candidates(model, lambda n: (asked.append(n), features)[1], tokens, valid, *rankings)
first = rankings[0].by(log_odds(of_images))
assert first.indices.shape == (N, 128) and asked == list(range(N))
print(peak() - memory, pairs)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_retrieval_of_cocos_size_is_bounded() -> None:
    """5,000 pictures and 25,000 texts, 128 candidates in each direction: less than 4 GB beyond the model."""
    here = str(Path(__file__).parent)
    run = subprocess.run([sys.executable, "-c", RANK], cwd=here, capture_output=True, text=True, check=True)
    peak, pairs = map(int, run.stdout.split())
    assert pairs > 3_000_000
    assert peak < 4 * 10**9
