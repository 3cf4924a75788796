"""Runs a stage-1 step of LAVIS 1.0.2 on the inputs in a folder; `compare.py` starts it in a separate environment.

    python theirs.py FOLDER STEPS

FOLDER has `inputs.pt` (features and captions), `vocab.txt` and `sizes.json`. The program writes `weights.pt` there (a
checkpoint in LAVIS' format), `theirs.pt` (losses, sampled negatives, gradients) and `theirs.json` (seconds, memory).
"""

import importlib.machinery
import importlib.util
import json
import resource
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn


def open_packages(*names: str) -> None:
    """Makes packages importable without running their `__init__`, which would import the whole of LAVIS.

    LAVIS needs decord, OpenCV, pycocoevalcap, spaCy, streamlit and others, but a stage-1 step uses none of them.
    """
    for name in names:
        spec = importlib.machinery.PathFinder.find_spec(name.rpartition(".")[2], _search(name))
        assert spec is not None, f"{name} is not installed"
        package = types.ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[name] = package


class Unused(types.ModuleType):
    """Replaces a module that LAVIS imports but a stage-1 step on precomputed features never calls."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__, self.__spec__ = [], importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}", type(name, (), {}))


# The image encoders and the modules that download files.
UNUSED = (
    *("timm", "timm.models", "timm.models.hub", "lavis.models.eva_vit", "lavis.models.clip_vit"),
    *("pandas", "torchvision", "torchvision.datasets", "torchvision.datasets.utils"),
)


def _search(name: str) -> list[str] | None:
    above = name.rpartition(".")[0]
    return list(sys.modules[above].__path__) if above else None


def build(sizes: dict, vocabulary: Path) -> nn.Module:
    """Builds `Blip2Qformer` with the given sizes and random weights; its inputs are features instead of images."""
    open_packages("lavis", "lavis.common", "lavis.models", "lavis.models.blip_models", "lavis.models.blip2_models")
    sys.modules |= {name: Unused(name) for name in UNUSED}
    from lavis.models import base_model

    sys.modules["lavis.models"].BaseModel = base_model.BaseModel  # done by its `__init__` in LAVIS
    from lavis.models.blip2_models import blip2_qformer
    from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel
    from transformers import BertTokenizer

    class FromFeatures(blip2_qformer.Blip2Qformer):
        """Uses the given sizes and a local vocabulary, so that no files of the hub are needed."""

        @classmethod
        def init_tokenizer(cls):
            tokenizer = BertTokenizer(str(vocabulary))
            tokenizer.add_special_tokens({"bos_token": "[DEC]"})
            return tokenizer

        @classmethod
        def init_vision_encoder(cls, *_):
            features = nn.Identity()
            features.num_features = sizes["image_width"]
            return features, nn.LayerNorm(sizes["image_width"], eps=1e-5)

        @classmethod
        def init_Qformer(cls, num_query_token, vision_width, cross_attention_freq=2):
            config = BertConfig(
                vocab_size=sizes["words"],
                hidden_size=sizes["width"],
                num_hidden_layers=sizes["layers"],
                num_attention_heads=sizes["heads"],
                intermediate_size=sizes["ffn"],
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
            config.encoder_width, config.add_cross_attention = vision_width, True
            config.cross_attention_freq, config.query_length = cross_attention_freq, num_query_token
            queries = nn.Parameter(torch.empty(1, num_query_token, config.hidden_size).normal_(std=0.02))
            return BertLMHeadModel(config), queries

    torch.manual_seed(0)
    return FromFeatures(num_query_token=sizes["queries"], max_txt_len=sizes["max_tokens"]).train()


def main(folder: Path, steps: int) -> None:
    """Builds the model, runs the steps, and tests what else works in LAVIS."""
    sizes = json.loads((folder / "sizes.json").read_text("utf-8"))
    inputs = torch.load(folder / "inputs.pt", weights_only=True)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1
    )  # forward needs a process group
    model = build(sizes, folder / "vocab.txt")
    torch.save({"model": model.state_dict()}, folder / "weights.pt")

    drawn: list[int] = []  # the negative image of each text, then the negative text of each image
    multinomial = torch.multinomial

    def recorded(*args, **options):
        drawn.append(int(found := multinomial(*args, **options)))
        return found

    torch.multinomial = recorded
    samples = {"image": inputs["features"], "text_input": inputs["captions"]}
    # With a learning rate of 0 the optimizer does its work but leaves the weights unchanged, so all steps are equal.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    seconds, first = [], {}
    for step in range(steps):
        began = time.perf_counter()
        losses = model(samples)
        losses.loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            found = {"itc": losses.loss_itc, "itm": losses.loss_itm, "itg": losses.loss_lm}
            first = {"losses": {k: v.detach() for k, v in found.items()}, "drawn": drawn[:], "gradients": gradients}
        optimizer.zero_grad()
    torch.save(first, folder / "theirs.pt")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    one = {"image": inputs["features"][:1], "text_input": inputs["captions"][:1]}
    attempts = [attempt("a step with one pair", lambda: model(one))]
    dist.destroy_process_group()
    attempts.append(attempt("a step without a process group", lambda: model(samples)))
    for name in [name for name in sys.modules if name.split(".")[0] == "lavis"]:
        del sys.modules[name]
    attempts.append(attempt("import lavis, with the packages that a stage-1 step needs", lambda: __import__("lavis")))
    written = {"seconds": seconds, "peak_gb": peak, "attempts": attempts}
    (folder / "theirs.json").write_text(json.dumps(written), "utf-8")


def attempt(what: str, run: Callable[[], object]) -> str:
    """Calls `run` and returns a line that says whether it works in LAVIS."""
    try:
        run()
    except Exception as error:
        return f"LAVIS, {what}: does not run ({type(error).__name__}: {str(error).splitlines()[0]})"
    return f"LAVIS, {what}: runs"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
