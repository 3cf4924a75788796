"""Fine-tuning: starting from a whole run, training the image encoder, a Q-Former that reads the question."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny
import tiny_models
import tiny_runs
from openblip2.config import OptimSettings, RunSettings, TrainSettings, change
from openblip2.data.records import read_records
from openblip2.errors import UserError
from openblip2.inference.captioner import Captioner
from openblip2.inference.load import load
from openblip2.inference.matcher import Matcher
from openblip2.model.language import DecoderLM, EncoderDecoderLM
from openblip2.model.stage2 import Stage2
from openblip2.model.vision import HFVision
from openblip2.presets import FINE_TUNING, fine_tuning, preset
from openblip2.progress import Progress
from openblip2.train.loop import fit
from openblip2.train.parameters import adamw, layer_rates
from openblip2.train.recipes import train_stage
from openblip2.weights.convert import convert

Q = 5


def quiet() -> Progress:
    return Progress(quiet=True)


def encoder(kind: str = "vit") -> HFVision:
    sizes: dict[str, Any] = tiny_runs.named(width=24, layers=3, heads=2, ffn=40)
    torch.manual_seed(0)
    if kind == "vit":
        model: Any = hf.ViTModel(hf.ViTConfig(**sizes, image_size=12, patch_size=4))
    else:
        model = hf.Dinov2Model(hf.Dinov2Config(**sizes, image_size=12, patch_size=4))
    return HFVision(model, layer=-2, image_size=12)


def pixels(count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, 3, 12, 12), generator=torch.Generator().manual_seed(5)).to(torch.uint8)


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_an_unfrozen_encoder_gives_the_same_features_and_trains_all_that_they_depend_on(kind: str) -> None:
    vision = encoder(kind)
    before = vision(pixels())
    assert not before.requires_grad
    vision.unfreeze()
    after = vision(pixels())
    assert torch.allclose(before, after, atol=1e-6)
    after.square().sum().backward()
    trained = {name for name, p in vision.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in vision.named_parameters() if p.grad is not None}
    assert any("patch_embed" in name for name in trained)
    assert not any("pooler" in name or "mask_token" in name for name in trained)
    vision.train()
    assert not vision.training  # no dropout, even if its parent is in training mode


def test_layers_computed_again_give_the_same_gradients() -> None:
    plain, again = encoder(), encoder()
    for vision in (plain, again):
        vision.unfreeze()
    again.checkpoint_activations()
    for vision in (plain, again):
        vision(pixels()).square().sum().backward()
    for mine, theirs in zip(again.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None and theirs.grad is not None:
            assert torch.allclose(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)


class Tower(nn.Module):
    """An encoder and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = encoder()
        self.vision.unfreeze()
        self.head = nn.Linear(24, 1)


def test_layer_wise_decay_changes_what_each_layer_moves(tmp_path: Path) -> None:
    """AdamW's first step changes every weight by its learning rate: 1e-2 times the decay for its depth."""
    torch.manual_seed(0)
    model = Tower()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def losses(number: int) -> dict[str, Tensor]:
        return {"loss": model.head(model.vision(pixels())).sum()}

    optim = OptimSettings(lr=1e-2, warmup=0, weight_decay=0.0, layer_decay=0.5)
    train = TrainSettings(steps=1, batch=2, precision="fp32", validate_every=0, checkpoint_every=0)
    fit(model, losses, tmp_path, optim, train, lambda: {}, quiet())
    moved = {name: float((p.detach() - before[name]).abs().median()) for name, p in model.named_parameters()}
    assert moved["head.weight"] == pytest.approx(1e-2, rel=1e-3)
    for name, share in (("layers.1.", 0.5), ("layers.0.", 0.25), ("cls_token", 0.125), ("patch_embeddings", 0.125)):
        found = [moved[n] for n, p in model.named_parameters() if name in n and p.ndim > 1]
        assert found, name
        assert found == pytest.approx([1e-2 * share] * len(found), rel=0.02), name
    assert moved["vision.encoder.pooler.dense.weight"] == 0


def test_without_decay_all_rates_are_alike() -> None:
    model = Tower()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert layer_rates(model, 1.0) == {}
    assert {group["rate"] for group in adamw(trained, OptimSettings(), layer_rates(model, 1.0)).param_groups} == {1.0}
    groups = adamw(trained, OptimSettings(layer_decay=0.9), layer_rates(model, 0.9)).param_groups
    assert sum(len(group["params"]) for group in groups) == len(trained)
    patches = next(p for name, p in trained.items() if "patch_embeddings.projection.weight" in name)
    (found,) = [group for group in groups if any(p is patches for p in group["params"])]
    assert found["weight_decay"] == OptimSettings().weight_decay  # 4-D, but a weight, so it is decayed


def asking() -> Stage2:
    """A stage 2 whose Q-Former reads questions."""
    torch.manual_seed(3)
    return Stage2(tiny.qformer(), tiny_models.language("opt")).eval()


def test_the_soft_prompt_depends_on_the_question_and_not_on_its_padding_or_its_batch() -> None:
    model = asking()
    torch.manual_seed(7)
    features = torch.randn(2, tiny.P, tiny.V)
    tokens = torch.randint(1, tiny.WORDS, (2, 6))
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0, 4:] = False
    both = model.soft_prompt(features=features, question=(tokens, valid))
    other = tokens.clone()
    other[0, 4:] = 1  # padding
    other[1, 2] = (other[1, 2] + 1) % tiny.WORDS
    changed = model.soft_prompt(features=features, question=(other, valid))
    assert torch.equal(both[0], changed[0])
    assert not torch.allclose(both[1], changed[1], atol=1e-3)
    single = model.soft_prompt(features=features[:1], question=(tokens[:1, :4], valid[:1, :4]))
    assert torch.allclose(single, both[:1], atol=1e-5)
    # Questions about one picture share its keys and values.
    one = model.soft_prompt(features=features[:1], question=(tokens, valid))
    repeated = model.soft_prompt(features=features[[0, 0]], question=(tokens, valid))
    assert torch.allclose(one, repeated, atol=1e-5)
    with pytest.raises(ValueError, match="question"):
        model.soft_prompt(features=features)


def test_fine_tuning_an_encoder_decoder_makes_the_whole_text_the_target() -> None:
    language = tiny_models.language("t5")
    assert isinstance(language, EncoderDecoderLM)
    soft = tiny_models.soft_prompts(2)
    texts = ["a red dog left of a blue bus", "two cats"]
    language.splits = False
    _, whole = language.scored(soft, ["what is it", "what is it"], texts)
    words = sum(len(language.tokenizer(text)["input_ids"]) for text in texts)  # pyright: ignore
    assert whole == words + len(texts)  # and the end token of each text
    language.splits = True
    _, suffixes = language.scored(soft, ["what is it", "what is it"], texts)
    assert suffixes < whole


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_home(tmp_path_factory.mktemp("fine-tuning"))


def trained_home(root: Path) -> Path:
    """Models, pictures with captions and questions, a stage-1 run and a stage-2 run."""
    tiny_runs.home(root, count=24)
    rows = [json.loads(line) for line in (root / "data" / "records.jsonl").read_text().splitlines()]
    for row in rows:
        _, colour, noun = row["caption"].split()
        row["questions"] = [
            {"text": "what colour is it?", "answer": colour, "kind": "open"},
            {"text": "what is it?", "answer": noun, "kind": "open", "answers": [noun] * 9 + ["it"]},
        ]
    (root / "data" / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records, _ = read_records(root / "data")
    more = {"train__steps": 6, "warm_start": "false"}
    train_stage(recipe(root, "stage1", **more), records, root / "one", quiet())
    train_stage(recipe(root, "stage2", start=str(root / "one"), **more), records, root / "two", quiet())
    return root


def recipe(home: Path, stage: str, **changes: Any) -> RunSettings:
    words = tiny_runs.options(home)[1::2]
    values = dict(word.split("=", 1) for word in words) | {"data.source": str(home / "data"), "vision.whiten": "false"}
    return change(preset(stage, "laptop"), values | {k.replace("__", "."): v for k, v in changes.items()})


def tuning(home: Path, task: str, start: str, **changes: Any) -> RunSettings:
    from openblip2.runs import read_settings

    settings = fine_tuning(task, "laptop", read_settings(home / start), str(home / start))
    values = {"train.steps": 3, "train.batch": 4, "train.precision": "fp32", "data.held_out": 0.25}
    values |= {"train.validate_every": 2, "train.checkpoint_every": 2, "optim.warmup": 0}
    return change(settings, values | {k.replace("__", "."): v for k, v in changes.items()})


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_captions_with_an_encoder_that_trains(home: Path, tmp_path: Path) -> None:
    """The encoder's weights change; saving, loading and converting keep them. Frozen weights do not change."""
    records, _ = read_records(home / "data")
    changes = {"vision__trained": "true", "data__augment": "true", "train__checkpoint_activations": "true"}
    settings = tuning(home, "caption", "two", **changes, language__prompts=["a photo of"], optim__layer_decay=0.9)
    train_stage(settings, records, tmp_path / "run", quiet())
    stored, start = load_file(tmp_path / "run" / "model.safetensors"), load_file(home / "two" / "model.safetensors")
    own = {name for name in stored if name.startswith("vision.")}
    assert own
    assert stored.keys() - own == start.keys()
    assert all(not torch.equal(stored[name], start[name]) for name in start if stored[name].ndim > 1)
    named = load(str(home / "two"), device="cpu", precision="fp32").model
    tuned = load(str(tmp_path / "run"), device="cpu", precision="fp32")
    assert isinstance(tuned, Captioner)
    assert any(not torch.equal(stored[name], named.get_parameter(name)) for name in own)
    assert all(torch.equal(stored[name], tuned.model.get_parameter(name)) for name in own)
    picture = Image.new("RGB", (12, 12), (200, 30, 60))
    assert tuned.caption([picture])
    validated = [row["validation"] for row in log_of(tmp_path / "run") if "validation" in row]
    # Validation computes the held-out features with the current encoder.
    assert len({row["loss_right"] for row in validated}) == len(validated) == 2

    copy = tmp_path / "copy"
    convert(tmp_path / "run", copy, "openblip2")
    again = load(str(copy), device="cpu", precision="fp32")
    assert isinstance(again, Captioner)
    assert torch.equal(again.soft_prompt([picture]), tuned.soft_prompt([picture]))

    more = change(settings, {"start": str(tmp_path / "run"), "train.steps": 1})
    train_stage(more, records, tmp_path / "more", quiet())
    with pytest.raises(UserError, match="contains its own image encoder"):
        train_stage(change(more, {"vision.trained": False}), records, tmp_path / "frozen", quiet())


def test_a_resumed_run_with_a_trained_encoder_is_bit_equal(home: Path, tmp_path: Path) -> None:
    records, _ = read_records(home / "data")
    changes = {"vision__trained": "true", "optim__layer_decay": 0.5, "train__steps": 4}
    settings = tuning(home, "retrieval", "one", **changes)
    train_stage(settings, records, tmp_path / "whole", quiet())
    short = change(settings, {"train.steps": 4})

    class Stop(Progress):
        """Interrupts after the first checkpoint."""

        def say(self, text: str) -> None:
            if text.startswith("step 2"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_stage(change(short, {"train.checkpoint_every": 1}), records, tmp_path / "parts", Stop(quiet=True))
    config = tmp_path / "parts" / "config.json"
    config.write_text(config.read_text().replace('"checkpoint_every": 1', '"checkpoint_every": 2'))
    train_stage(short, records, tmp_path / "parts", quiet(), resume=True)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_vqa_reads_the_question_with_stage_1s_text_path(home: Path, tmp_path: Path) -> None:
    records, _ = read_records(home / "data", "questions")
    settings = tuning(home, "vqa", "two", optim__lr=1e-12, optim__min_lr=0, optim__weight_decay=0)
    assert settings.qformer.question_in_qformer
    train_stage(settings, records, tmp_path / "still", quiet())
    stored = load_file(tmp_path / "still" / "model.safetensors")
    one, two = (load_file(home / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in stored.items():
        expected = two[name] if name in two else one[name]
        assert torch.allclose(tensor, expected, atol=1e-9), name
    assert "qformer.word_embeddings.weight" in stored

    settings = tuning(home, "vqa", "two", train__steps=120, optim__lr=3e-3, train__validate_every=60)
    train_stage(settings, records, tmp_path / "run", quiet())
    rows = log_of(tmp_path / "run")
    losses = [row["lm"] for row in rows if "lm" in row]  # training loss, because only two pictures are held out
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    validated = [row["validation"] for row in rows if "validation" in row]
    assert {"accuracy", "accuracy_open", "loss_shuffled", "verdict"} <= validated[-1].keys()
    model = load(str(tmp_path / "run"), device="cpu", precision="fp32")
    assert isinstance(model, Captioner)
    pictures = [records[0].image, records[1].image, records[0].image]
    asked = ["what colour is it?", "What is it?", "what is it?"]
    answers = model.answer(pictures, asked)
    assert answers == [
        model.answer([picture], [question])[0] for picture, question in zip(pictures, asked, strict=True)
    ]
    assert model.ask(records[0].image, asked[::2]) == answers[::2]
    with pytest.raises(UserError, match="Q-Former reads"):
        model.caption(pictures)
    whys = {target: f"reads questions, which --to {target} cannot store" for target in ("lavis", "onnx")}
    whys["hf"] = "reads questions, and transformers' InstructBLIP cannot store the image encoder 'vit'"
    for target, why in whys.items():
        with pytest.raises(UserError, match=why):
            convert(tmp_path / "run", tmp_path / f"out.{'pth' if target == 'lavis' else 'onnx'}", target)
    again = tuning(home, "vqa", "two", train__steps=1)
    train_stage(change(again, {"start": str(tmp_path / "run")}), records, tmp_path / "again", quiet())


def test_vqa_without_the_question_in_the_qformer(home: Path, tmp_path: Path) -> None:
    records, _ = read_records(home / "data", "questions")
    train_stage(tuning(home, "vqa", "two", qformer__question_in_qformer="false"), records, tmp_path / "run", quiet())
    assert load_file(tmp_path / "run" / "model.safetensors").keys() == load_file(home / "two/model.safetensors").keys()
    model = load(str(tmp_path / "run"), device="cpu", precision="fp32")
    assert isinstance(model, Captioner)
    assert len(model.answer([records[0].image], ["what is it?"])) == 1
    with pytest.raises(UserError, match="cannot read questions"):
        model.soft_prompt([records[0].image], ["what is it?"])


def test_retrieval_begins_where_stage_1_ended(home: Path, tmp_path: Path) -> None:
    records, _ = read_records(home / "data")
    settings = tuning(home, "retrieval", "one", optim__lr=1e-12, optim__min_lr=0)
    train_stage(settings, records, tmp_path / "run", quiet())
    first, last = (log_of(folder) for folder in (tmp_path / "run", home / "one"))
    mine = next(row["validation"] for row in first if "validation" in row)
    theirs = [row["validation"] for row in last if "validation" in row][-1]
    assert mine == pytest.approx(theirs, rel=1e-4)
    model = load(str(tmp_path / "run"), device="cpu", precision="fp32")
    assert isinstance(model, Matcher)
    assert "itm" in next(row for row in first if "loss" in row)


@pytest.mark.parametrize(
    ("task", "start", "changes", "message"),
    [
        ("caption", "one", {}, "is not a stage-2 run"),
        ("retrieval", "two", {}, "is not a stage-1 run"),
        ("vqa", "two", {"text_start": "two"}, "is not a stage-1 run"),
        ("caption", "two", {"vision__trained": "true", "vision__dtype": "bf16"}, "trained weights are fp32"),
        ("retrieval", "one", {"vision__trained": "true", "train__chunk": 2}, "frozen image encoder"),
        ("retrieval", "one", {"vision__trained": "true", "data__features": "x"}, "needs vision.trained=false"),
    ],
)
def test_what_cannot_be_fine_tuned_is_one_line(
    home: Path, tmp_path: Path, task: str, start: str, changes: dict[str, Any], message: str
) -> None:
    records, _ = read_records(home / "data", "questions")
    if "text_start" in changes:
        changes = {"text_start": str(home / changes["text_start"])}
    with pytest.raises(UserError, match=message):
        train_stage(tuning(home, task, start, **changes), records, tmp_path / "run", quiet())


def test_what_only_fine_tuning_may_is_refused_elsewhere(home: Path, tmp_path: Path) -> None:
    records, _ = read_records(home / "data", "questions")
    with pytest.raises(UserError, match="is for fine-tuning"):
        train_stage(recipe(home, "stage1", vision__trained="true"), records, tmp_path / "run", quiet())
    with pytest.raises(UserError, match="is for vqa and instruct, but the task is caption"):
        train_stage(
            tuning(home, "caption", "two", qformer__question_in_qformer="true"), records, tmp_path / "run", quiet()
        )
    for extra in ({"data__balance": "true"}, {"data__negations": "0.5"}):
        with pytest.raises(UserError, match="select questions for vqa; caption has none"):
            train_stage(tuning(home, "caption", "two", **extra), records, tmp_path / "run", quiet())
    train_stage(tuning(home, "retrieval", "one", vision__trained="true"), records, tmp_path / "tuned", quiet())
    with pytest.raises(UserError, match="which stage 2 would not use"):
        train_stage(recipe(home, "stage2", start=str(tmp_path / "tuned")), records, tmp_path / "run", quiet())


def test_presets_of_the_paper_keep_the_start_runs_models() -> None:
    start = preset("stage2", "vit-g-opt-6.7b")
    found = fine_tuning("vqa", "vit-g-opt-6.7b", start, "runs/two")
    assert (found.vision.name, found.vision.image_size, found.vision.trained) == (start.vision.name, 490, True)
    assert (found.language.name, found.optim.layer_decay, found.train.batch) == (start.language.name, 0.9, 128)
    assert (found.optim.lr, found.optim.betas, found.optim.warmup) == (1e-5, (0.9, 0.999), 1000)
    assert found.qformer.question_in_qformer
    assert found.start == "runs/two"
    retrieval = fine_tuning("retrieval", "vit-l", preset("stage1", "vit-l"), "runs/one")
    assert (retrieval.optim.lr, retrieval.optim.betas, retrieval.train.batch) == (5e-6, (0.9, 0.98), 224)
    assert (retrieval.stage, retrieval.vision.image_size, retrieval.optim.layer_decay) == ("stage1", 364, 1.0)
    with pytest.raises(UserError, match="presets are laptop, vit-l, vit-g"):
        fine_tuning("retrieval", "huge", start, "x")
    for task, names in FINE_TUNING.items():
        for name in names:
            begins = preset("stage1" if task == "retrieval" else "stage2", name)
            assert fine_tuning(task, name, begins, "x").task == task


def test_a_decoder_has_no_prefix_to_split() -> None:
    assert not hasattr(DecoderLM, "splits")
