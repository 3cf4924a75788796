"""The training loop, its optimizer and checkpoints, and both recipes with tiny models."""

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny_runs
from openblip2 import load
from openblip2.config import OptimSettings, RunSettings, TrainSettings, change
from openblip2.data.batches import Sampler, pair_ids
from openblip2.data.records import Question, Record, read_records
from openblip2.data.samples import Answers, Captions, SimilarRows, fewer_negations
from openblip2.errors import UserError
from openblip2.inference.captioner import Captioner
from openblip2.model.language import DecoderLM
from openblip2.presets import preset
from openblip2.progress import Progress
from openblip2.runs import RENAMED
from openblip2.train.loop import fit
from openblip2.train.parameters import fill_trained, learning_rate, parameter_groups, save_trained, trained_parameters
from openblip2.train.recipes import train_stage
from openblip2.train.resume import _digest


class Line(nn.Module):
    """A model that is so small that the result of a training step can be computed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.full((1, 2, 3), 0.5))
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)

    def losses(self, number: int) -> dict[str, Tensor]:
        """Returns losses that depend on the number of the batch and on torch's random state."""
        rows = self.norm(self.linear(self.queries[0] + torch.rand(2, 3) + number))
        return {"near": rows.square().mean(), "far": (rows.sum() * self.temperature - 1).square()}


def quiet() -> Progress:
    return Progress(quiet=True)


def settings(steps: int = 6, **changes: Any) -> TrainSettings:
    return TrainSettings(steps=steps, batch=2, precision="fp32", validate_every=3, checkpoint_every=2, **changes)


OPTIM = OptimSettings(lr=1e-2, min_lr=1e-3, warmup=2, clip=1.0)


def run_line(folder: Path, losses: Callable[[Line], Callable[[int], dict[str, Tensor]]], **options: Any) -> Line:
    torch.manual_seed(0)
    model = Line()
    folder.mkdir(exist_ok=True)
    fit(model, losses(model), folder, OPTIM, options.pop("train", settings()), lambda: {"n": 1}, quiet(), **options)
    return model


def log_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_optimizer_groups_hold_each_trained_parameter_once() -> None:
    model = Line()
    decayed, others = parameter_groups(trained_parameters(model), 0.05)
    assert [id(p) for p in decayed["params"]] == [id(model.linear.weight)]
    wanted = {id(p) for p in (model.queries, model.linear.bias, model.norm.weight, model.norm.bias, model.temperature)}
    assert {id(p) for p in others["params"]} == wanted
    assert len(others["params"]) == len(wanted)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)


def test_learning_rate_warms_up_and_follows_a_cosine_per_step() -> None:
    optim = OptimSettings(lr=1.0, min_lr=0.1, warmup=4)
    rates = [learning_rate(step, 24, optim) for step in range(25)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[14] == pytest.approx(0.55)  # halfway down
    assert rates[24] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))


def test_accumulated_batches_are_one_step_of_their_mean(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Line()
    twice = TrainSettings(steps=1, batch=2, accumulate=2, precision="fp32")
    taken: list[int] = []

    def losses(number: int) -> dict[str, Tensor]:
        taken.append(number)
        return {"only": (model.temperature - number).square()}

    before = model.temperature.item()
    fit(model, losses, tmp_path, OPTIM, twice, dict, quiet())
    assert taken == [0, 1]
    assert log_of(tmp_path)[0]["only"] == pytest.approx((before**2 + (before - 1) ** 2) / 2)


def test_checkpoints_hold_the_trained_parts_alone_and_load_strictly(tmp_path: Path) -> None:
    model, other = Line(), Line()
    save_trained(model, tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    assert sorted(stored) == sorted(name for name, _ in model.named_parameters() if not name.startswith("frozen"))
    fill_trained(other, stored, "run")
    assert torch.equal(other.linear.weight, model.linear.weight)
    smaller = nn.Linear(3, 4)
    with pytest.raises(UserError, match=r"does not fit this model: missing: bias, weight; unexpected: linear\.bias"):
        fill_trained(smaller, stored, "run")


def test_sampler_shows_every_picture_once_an_epoch_and_forgets_nothing() -> None:
    sampler = Sampler(16, 4, seed=3)
    for epoch in range(3):
        assert sorted(row for number in range(4) for row in sampler(4 * epoch + number)) == list(range(16))
    assert sampler(2) == Sampler(16, 4, seed=3)(2)
    assert sampler(0) != Sampler(16, 4, seed=4)(0)
    odd = Sampler(10, 4, seed=3)
    seen = [row for number in range(40) for row in odd(number)]  # 160 rows: 16 epochs
    assert {seen.count(row) for row in range(10)} == {16}
    assert len(Sampler(3, 8, seed=3)(0)) == 3


def test_half_of_a_batch_are_similar_rows() -> None:
    captions = [f"a {colour} {noun}" for colour in ("red", "blue", "green") for noun in ("cat", "dog", "bus", "key")]
    captions = ["a", *captions, "a red cat", "a red cat above a blue bus", "a blue bus above a red cat"]
    similar = SimilarRows(captions)
    first = len(captions) - 2
    assert {similar(first, place) for place in (0.0, 0.15)} == {first + 1}  # its words are the same, in another order
    red_cat = captions.index("a red cat")
    for place in (0.0, 0.5, 0.99):
        assert captions[similar(red_cat, place)] != "a red cat"  # the same caption would not be a negative
        assert {"red", "cat"} & set(captions[similar(red_cat, place)].split())
    strange = SimilarRows(["猫", "犬", "鳥", "魚"])  # no caption shares a word with another: any row
    assert [strange(0, place / 2) for place in (0.0, 0.3, 0.6, 0.9)] == [0, 1, 2, 3]
    assert [strange(0, place / 2) for place in (1.0, 1.3, 1.6, 1.9)] == [0, 1, 2, 3]

    plain, mixed = Sampler(len(captions), 5, 3), Sampler(len(captions), 5, 3, similar, similar_from=4)
    assert [mixed(number) for number in range(4)] == [plain(number) for number in range(4)]
    shuffled = [row for number in range(10) for row in plain(number)]
    own = [row for number in range(4, 14) for row in mixed(number)[:3]]
    assert own == shuffled[20:50]  # every row is shown as often as before
    for number in range(4, 14):
        rows = mixed(number)
        near = [{similar(row, place / 10) for place in range(10)} for row in rows[:2]]
        assert all(other in of_row for other, of_row in zip(rows[3:], near, strict=True))
        assert rows == mixed(number)


def test_similar_rows_name_the_same_things_or_other_things_in_the_same_way() -> None:
    # With this many nouns, each noun is rare. TF-IDF then finds captions with the same noun, with any other words.
    nouns = [f"noun{n}" for n in range(20)]
    captions = [f"{start} {noun}" for noun in nouns for start in ("a big", "a small", "the old", "the new")]
    similar = SimilarRows(captions)
    for row in (0, 1, 20):
        start, noun = captions[row].rsplit(" ", 1)
        for place in (0.0, 0.2, 0.49):
            assert captions[similar(row, place)].endswith(f" {noun}")
        for place in (0.5, 0.7, 0.99):
            assert captions[similar(row, place)].startswith(start)
            assert not captions[similar(row, place)].endswith(f" {noun}")


def test_the_same_picture_and_the_same_caption_are_no_negatives() -> None:
    ids = pair_ids([7, 3, 7, 5, 9], ["a cat", "a dog", "a pet", "a dog", "a bus"]).tolist()
    assert ids == [0, 1, 0, 1, 4]


def test_rows_that_other_rows_connect_are_one_group_in_any_order() -> None:
    assert pair_ids([1, 2, 3, 2], ["a", "b", "a", "a"]).tolist() == [0, 0, 0, 0]
    random = torch.Generator().manual_seed(0)
    for _ in range(300):
        count = int(torch.randint(1, 9, (), generator=random))
        pictures, captions = torch.randint(5, (2, count), generator=random)
        joined = (pictures[:, None] == pictures) | (captions[:, None] == captions)
        closure = torch.linalg.matrix_power(joined.double(), count) > 0  # paths of up to `count` steps
        ids = pair_ids(pictures.tolist(), captions.tolist())
        assert torch.equal(ids[:, None] == ids, closure)
        assert torch.equal(ids, closure.int().argmax(dim=1))  # the first row of each group


def test_every_caption_of_a_picture_is_drawn() -> None:
    samples = Captions([Record("0", Path("0.png"), ("a", "b", "c"))])
    drawn = [samples.draw([0], torch.Generator().manual_seed(number))[0][0] for number in range(60)]
    assert {drawn.count(caption) > 8 for caption in "abc"} == {True}


def test_answers_are_drawn_by_how_often_they_were_given() -> None:
    questions = (
        Question("What  is it?", "cat", "open", ("cat", "cat", "cat", "pet")),
        Question("a dog?", "no", "yes/no"),
    )
    samples = Answers([Record("0", Path("0.png"), ()), Record("1", Path("1.png"), (), questions)])
    assert samples.pictures == [1, 1]
    found = [samples.draw([1, 0], torch.Generator().manual_seed(number)) for number in range(400)]
    assert {tuple(asked) for _, asked in found} == {("a dog?", "what is it?")}
    assert {texts[0] for texts, _ in found} == {"no"}
    assert 0.69 < sum(texts[1] == "cat" for texts, _ in found) / 400 < 0.81


def test_balanced_questions_have_yes_as_often_as_no() -> None:
    asked = [("is it red?", "no")] * 6 + [("is it red?", "Yes")] * 2 + [("is it big?", "yes")] + [("what?", "a")] * 3
    asked += [("is it new?", "no")] * 40 + [("is it new?", "yes")]
    records = [
        Record(str(n), Path("a.png"), (), (Question(text, answer, "open" if text == "what?" else "yes/no"),))
        for n, (text, answer) in enumerate(asked)
    ]
    assert len(Answers(records).asked) == len(asked)
    counts = Counter((q.text, q.answer) for _, q in Answers(records, balanced=True).asked)
    assert counts == {
        **{("is it red?", "no"): 6, ("is it red?", "Yes"): 6},  # 2 pictures, three times each
        **{("is it big?", "yes"): 1, ("what?", "a"): 3},  # there is no opposite answer to balance with
        **{("is it new?", "no"): 40, ("is it new?", "yes"): 10},  # one picture, repeated at most ten times
    }


@pytest.mark.parametrize(("share", "kept"), [(0.0, 0), (0.25, 3), (0.5, 6), (1.0, 12)])
def test_questions_with_negations_can_be_left_out(share: float, kept: int) -> None:
    plain, turned = ("is it red?", "what note is it?"), ("is it not red?", "is no dog there?", "Isn\u2019t it big?")
    questions = tuple(Question(text, "yes", "yes/no") for text in (*plain, *turned))
    found = fewer_negations([Record(str(n), Path("a.png"), (), questions) for n in range(4)], share)
    texts = [q.text for record in found for q in record.questions]
    assert [text for text in texts if text in plain] == 4 * list(plain)
    assert sum(text in turned for text in texts) == kept


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.home(tmp_path_factory.mktemp("training"), count=24)


def recipe(home: Path, stage: str, **changes: Any) -> RunSettings:
    words = tiny_runs.options(home)[1::2]
    values = dict(word.split("=", 1) for word in words) | {"data.source": str(home / "data")}
    return change(preset(stage, "laptop"), values | {k.replace("__", "."): v for k, v in changes.items()})


def test_a_tiny_run_learns_and_looks(home: Path, tmp_path: Path) -> None:
    """End to end: held-out ITC falls below chance, the caption loss falls, and a wrong picture gives a higher loss."""
    records, _ = read_records(home / "data")
    more = {"train__steps": 40, "train__batch": 6, "train__validate_every": 20, "optim__lr": 3e-3, "train__seed": 4}
    train_stage(recipe(home, "stage1", **more), records, tmp_path / "one", quiet())
    found = [row["validation"] for row in log_of(tmp_path / "one") if "validation" in row]
    assert found[-1]["itc"] < found[0]["itc"]
    assert found[-1]["ir@1"] > 1.5 / found[-1]["n"]
    more["train__steps"] = 60
    second = recipe(home, "stage2", start=str(tmp_path / "one"), **more)
    train_stage(second, records, tmp_path / "two", quiet())
    found = [row["validation"] for row in log_of(tmp_path / "two") if "validation" in row]
    assert found[-1]["loss_right"] < 0.7 * found[0]["loss_shuffled"]
    assert found[-1]["loss_shuffled"] > found[-1]["loss_right"] * 1.2
    assert "looks" in found[-1]["verdict"]


def test_augmented_training_skips_counts_and_names_a_bad_picture(home: Path, tmp_path: Path) -> None:
    records, _ = read_records(home / "data")
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    records.insert(5, Record("bad", tmp_path / "bad.png", ("a red dog",)))
    changes = {"data__augment": "true", "train__steps": 5, "train__batch": 8}
    train_stage(recipe(home, "stage1", **changes), records, tmp_path / "run", quiet())
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert len(lines) == 1
    assert "bad.png" in lines[0]["skipped"]
    assert [row["step"] for row in log_of(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4, 5]


def test_long_captions_are_cut_counted_and_named(home: Path, tmp_path: Path) -> None:
    records, _ = read_records(home / "data")
    records.append(Record("long", records[0].image, (" ".join(["red dog"] * 12),)))
    train_stage(recipe(home, "stage1", data__max_tokens=12), records, tmp_path / "run", quiet())
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [line["cut"].split(":")[0] for line in lines] == ["long"]


def test_whitened_stage_2_reads_stage_1s_whitening(home: Path, tmp_path: Path) -> None:
    records, _ = read_records(home / "data")
    train_stage(recipe(home, "stage1", vision__whiten="true"), records, tmp_path / "one", quiet())
    second = recipe(home, "stage2", vision__whiten="true", start=str(tmp_path / "one"))
    train_stage(second, records[:-3], tmp_path / "two", quiet())
    one, two = (load_file(tmp_path / name / "whitening.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in ("mean", "matrix"))


def steps_of(folder: Path) -> list[dict[str, float]]:
    return [{k: row[k] for k in ("loss", "grad_norm")} for row in log_of(folder) if "loss" in row]


def test_the_language_model_joins_after_the_alignment(home: Path, tmp_path: Path) -> None:
    records, _ = read_records(home / "data")
    changes = {"stage2__lm_start_step": 2, "train__steps": 4, "train__validate_every": 0}
    train_stage(recipe(home, "stage2", **changes), records, tmp_path / "run", quiet())
    rows = [row for row in log_of(tmp_path / "run") if "loss" in row]
    assert [("alignment" in row, "lm" in row) for row in rows] == [(True, False)] * 2 + [(True, True)] * 2
    with pytest.raises(UserError, match=r"lm_start_step=4: with train\.steps=4 the language model never runs"):
        train_stage(recipe(home, "stage2", **changes | {"stage2__lm_start_step": 4}), records, tmp_path / "no", quiet())
    with pytest.raises(UserError, match="belongs to stage 2 with captions"):
        train_stage(recipe(home, "stage1", **changes), records, tmp_path / "no", quiet())


def test_an_elastic_run_trains_and_answers_with_the_first_tokens(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, _ = read_records(home / "data")
    read: list[int] = []
    scored = DecoderLM.scored

    def noted(self: DecoderLM, soft: Tensor, *rest: Any) -> Any:
        if soft.requires_grad:
            read.append(soft.shape[1])
        return scored(self, soft, *rest)

    monkeypatch.setattr(DecoderLM, "scored", noted)
    elastic = {"stage2__elastic_tokens": "true", "train__steps": 8, "train__validate_every": 4}
    for name in ("run", "again"):
        train_stage(recipe(home, "stage2", **elastic), records, tmp_path / name, quiet())
    queries = load(str(tmp_path / "run"), device="cpu").model.connector.tokens
    assert read[:8] == read[8:]  # the draws depend only on seed and batch number
    assert len(set(read)) > 1
    assert set(read) <= set(range(1, queries + 1))
    few = load(str(tmp_path / "run"), device="cpu", visual_tokens=1)
    assert isinstance(few, Captioner)
    assert few.soft_prompt([str(records[0].image)]).shape[1] == 1
    assert len(few.caption([str(records[0].image)])) == 1
    with pytest.raises(UserError, match=r"elastic_tokens=true belongs to stage 2"):
        train_stage(recipe(home, "stage1", **elastic), records, tmp_path / "no", quiet())
    for wrong in (0, queries + 1):
        with pytest.raises(UserError, match=f"visual_tokens {wrong}: for this model, give 1 to {queries}"):
            load(str(tmp_path / "run"), device="cpu", visual_tokens=wrong)


@pytest.mark.parametrize(("stage", "aligned"), [("stage1", 0), ("stage2", 0), ("stage2", 2)])
def test_chunks_change_no_step(home: Path, tmp_path: Path, stage: str, aligned: int) -> None:
    """The log is the same as with whole batches, also with gradient accumulation."""
    records, _ = read_records(home / "data")
    for name, chunk in (("whole", 0), ("chunks", 3)):
        more = {"train__batch": 8, "train__chunk": chunk, "train__accumulate": 2, "stage2__lm_start_step": aligned}
        # Whitening fitted on so few pictures makes gradients so large that rounding soon makes the two runs differ.
        exact = {"qformer__dropout": 0.0, "vision__whiten": "false", "warm_start": "false"}
        train_stage(recipe(home, stage, **more, **exact), records, tmp_path / name, quiet())
    whole, chunks = steps_of(tmp_path / "whole"), steps_of(tmp_path / "chunks")
    assert len(whole) == 3
    for mine, theirs in zip(chunks, whole, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)
    # Chunks first run without gradients. That selects another attention kernel, which rounds differently.
    assert chunks[0] == pytest.approx(whole[0], rel=5e-5)


def test_matching_can_join_later(home: Path, tmp_path: Path) -> None:
    records, _ = read_records(home / "data")
    train_stage(recipe(home, "stage1", stage1__itm_start_step=2), records, tmp_path / "run", quiet())
    steps = [row for row in log_of(tmp_path / "run") if "loss" in row]
    assert ["itm" in row for row in steps] == [False, False, True]


def test_objectives_are_left_out_and_never_all(home: Path, tmp_path: Path) -> None:
    records, _ = read_records(home / "data")
    two = recipe(home, "stage1", stage1__objectives='["itg", "itm"]', stage1__itm_start_step=1)
    train_stage(two, records, tmp_path / "run", quiet())
    steps = [row for row in log_of(tmp_path / "run") if "loss" in row]
    assert [{"itc", "itm", "itg"} & row.keys() for row in steps] == [{"itg"}, {"itm", "itg"}, {"itm", "itg"}]
    for objectives, later in (("[]", 0), ('["itm"]', 1)):
        changes = {"stage1__objectives": objectives, "stage1__itm_start_step": later}
        with pytest.raises(UserError, match=r"^stage1\.objectives=.*: some steps have nothing to train"):
            train_stage(recipe(home, "stage1", **changes), [], tmp_path / "none", quiet())


def test_pictures_to_validate_on_can_be_given(home: Path, tmp_path: Path) -> None:
    """The run then trains on all records and validates on the given pictures."""
    records, _ = read_records(home / "data")
    train_stage(recipe(home, "stage1"), records[:18], tmp_path / "run", quiet(), held_out=records[18:])
    found = [row["validation"]["n"] for row in log_of(tmp_path / "run") if "validation" in row]
    assert found == [6, 6]
    shown = (tmp_path / "run" / "trained_on.txt").read_text().splitlines()
    train_stage(recipe(home, "stage1"), records, tmp_path / "drawn", quiet())
    assert len(shown) == 18 == len((tmp_path / "drawn" / "trained_on.txt").read_text().splitlines())
    with pytest.raises(UserError, match="too few"):
        train_stage(recipe(home, "stage1"), records, tmp_path / "one", quiet(), held_out=records[:1])


def with_old_names(run: Path) -> None:
    """Rewrites a run and its checkpoints with the names that parts and settings had before they got standard terms."""
    old = {new: old for old, new in RENAMED.items()}
    for path in [run / "model.safetensors", *run.glob("resume/*/*.safetensors")]:
        stored = load_file(path)
        part_of = {name: next((part for part in old if name.startswith(part)), "") for name in stored}
        assert set(part_of.values()) == {"", *old}
        save_file({old.get(part, "") + name.removeprefix(part): stored[name] for name, part in part_of.items()}, path)
    for path in run.glob("resume/*/manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["files"] = {name: _digest(path.parent / name) for name in manifest["files"]}
        path.write_text(json.dumps(manifest))
    config = json.loads((run / "config.json").read_text())
    stage1 = config["settings"]["stage1"]
    stage1["one_sided"], stage1["matching_from"] = stage1.pop("detach_gathered"), stage1.pop("itm_start_step")
    (run / "config.json").write_text(json.dumps(config))


def test_a_run_with_old_names_is_loaded_started_from_and_resumed(home: Path, tmp_path: Path) -> None:
    records, _ = read_records(home / "data")
    settings = recipe(home, "stage1", stage1__itm_start_step=1, vision__whiten="false")
    train_stage(settings, records, tmp_path / "run", quiet())
    copytree(tmp_path / "run", tmp_path / "old")
    with_old_names(tmp_path / "old")
    mine, theirs = (load(str(tmp_path / name)) for name in ("run", "old"))
    assert theirs.settings == mine.settings
    found = theirs.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in mine.model.state_dict().items())
    second = recipe(home, "stage2", start=str(tmp_path / "old"), vision__whiten="false")
    train_stage(second, records, tmp_path / "two", quiet())
    (tmp_path / "old" / "model.safetensors").unlink()  # as if the run had stopped after its checkpoint at step 2 of 3
    train_stage(settings, records, tmp_path / "old", quiet(), resume=True)
    assert (tmp_path / "old/model.safetensors").read_bytes() == (tmp_path / "run/model.safetensors").read_bytes()
