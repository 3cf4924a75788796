"""Instruction tuning with a mixture of captions and questions; Q-Former and language model read their templates."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from typer.testing import CliRunner

import tiny_runs
from openblip2.cli import app
from openblip2.config import change
from openblip2.data.batches import Batches, FeaturePairs, batch_generator
from openblip2.data.records import Question, Record, read_records
from openblip2.data.samples import Instructions
from openblip2.data.sources import read_source
from openblip2.data.text import BertTokens
from openblip2.errors import UserError
from openblip2.evaluate.run import Options, evaluate
from openblip2.inference.captioner import ANSWER, CAPTION, Captioner
from openblip2.inference.load import load
from openblip2.instructions import CAPTION_TEMPLATES, QUESTION_TEMPLATES
from openblip2.presets import LAPTOP_PROMPT, fine_tuning, preset
from openblip2.progress import Progress
from openblip2.train.recipes import train_stage
from openblip2.weights.convert import convert
from test_control_tokens import CONTROL, EVIL
from test_distributed_batches import Stored
from test_fine_tuning import log_of, quiet, trained_home, tuning
from tiny_models import language

POSITIONS = 20  # of the tiny BERT
CAPTIONS, FORMS = ("the", "what is it:"), ("{}", "question: {} answer:")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_home(tmp_path_factory.mktemp("instruct"))


def settings_of(home: Path, **changes: Any) -> Any:
    wording = {"language__prompts": CAPTIONS, "language__questions": FORMS, "language__question": FORMS[1]}
    return tuning(home, "instruct", "two", **({"data__max_tokens": POSITIONS} | wording | changes))


def records_of(home: Path) -> list[Record]:
    return read_records(home / "data", "questions")[0]


# The mixture.

ASKED = (Question("what {} is it?", "cat", "open", ("cat", "cat", "a cat")), Question("Is it RED?", "yes", "yes/no"))
RECORDS = [Record(str(n), Path(f"{n}.png"), (f"a {n}", f"the {n}"), ASKED) for n in range(8)]


def batches(samples: Instructions, seed: int = 5) -> Batches:
    return FeaturePairs(cast(Any, Stored(list(samples.records))), samples, 6, seed)


def drawn(samples: Instructions, numbers: range, seed: int = 5) -> list[tuple[str, str, str]]:
    """Picture, instruction and text of each sample of some batches."""
    made = [batches(samples, seed)(number) for number in numbers]
    assert all(batch.names and batch.questions for batch in made)
    return [row for batch in made for row in zip(batch.names or (), batch.questions or (), batch.captions, strict=True)]


def test_each_sample_is_a_caption_or_a_question_in_one_of_the_templates() -> None:
    samples = Instructions(RECORDS, CAPTION_TEMPLATES, QUESTION_TEMPLATES, 0.25)
    found, known = drawn(samples, range(200)), {record.id: record for record in RECORDS}
    asked = {form.replace("{}", q.text): q for form in QUESTION_TEMPLATES for q in ASKED}
    kinds = Counter[str]()
    for picture, instruction, text in found:
        if instruction in CAPTION_TEMPLATES:
            kinds["caption"] += 1
            assert text in known[picture].captions
        else:
            kinds["question"] += 1
            assert text in asked[instruction].given
    assert kinds["caption"] / len(found) == pytest.approx(0.25, abs=0.04)
    instructions, answers = {row[1] for row in found}, Counter(row[2] for row in found)
    assert instructions == {*CAPTION_TEMPLATES, *asked}
    assert answers["cat"] / answers["a cat"] == pytest.approx(2, abs=0.5)  # in proportion to their frequency
    assert {row[2] for row in found} >= {text for record in RECORDS for text in record.captions}


def test_a_mixture_is_a_function_of_seed_and_number() -> None:
    samples = Instructions(RECORDS, CAPTIONS, FORMS, 0.5)
    whole = drawn(samples, range(6))
    assert drawn(samples, range(3, 6)) == whole[18:]
    assert drawn(Instructions(RECORDS, CAPTIONS, FORMS, 0.5), range(6)) == whole
    assert drawn(samples, range(6), seed=6) != whole
    # Another share changes which samples are captions; the other samples stay the same.
    fewer = drawn(Instructions(RECORDS, CAPTIONS, FORMS, 0.2), range(6))
    assert all(a == b or (a[1] in CAPTIONS and b[1] not in CAPTIONS) for a, b in zip(whole, fewer, strict=True))
    assert 0 < sum(a != b for a, b in zip(whole, fewer, strict=True)) < len(whole)


@pytest.mark.parametrize(("share", "captions"), [(0.0, 0), (1.0, 12)])
def test_a_picture_gives_what_it_has(share: float, captions: int) -> None:
    found = drawn(Instructions(RECORDS, CAPTIONS, FORMS, share), range(2))
    assert sum(row[1] in CAPTIONS for row in found) == captions
    plain, silent = Record("a", Path("a.png"), ("a dog",)), Record("b", Path("b.png"), (), ASKED)
    for one, is_caption in ((plain, True), (silent, False)):
        samples = Instructions([one], CAPTIONS, FORMS, share)
        _, instructions = samples.draw([0] * 9, batch_generator(1, 1, "caption"))
        assert all((text in CAPTIONS) == is_caption for text in instructions)


def test_control_tokens_in_questions_stay_text(tmp_path: Path) -> None:
    evil = Question(f"{EVIL} [SEP] {{image}} {{}}", "red", "open")
    samples = Instructions([Record("a", Path("a.png"), (), (evil,))], CAPTIONS, FORMS, 0.5)
    _, instructions = samples.draw([0] * 4, batch_generator(0, 0, "caption"))
    words = hf.BertTokenizer.from_pretrained(str(tiny_runs.bert(tmp_path / "bert")))
    for instruction in instructions:
        assert evil.text in instruction
        ((*row,),) = BertTokens(words, 40)([instruction])[0].tolist()
        assert row.count(words.sep_token_id) == row.count(words.cls_token_id) == 1
        model: Any = language("opt")
        own = [one for one in model._head("", 2) if one in CONTROL]
        assert [one for one in model._head(instruction, 2) if one in CONTROL] == own


# A run.


def test_a_run_begins_with_stage_2_and_the_text_path_of_stage_1(home: Path, tmp_path: Path) -> None:
    settings = settings_of(home, optim__lr=1e-12, optim__min_lr=0, optim__weight_decay=0)
    train_stage(settings, records_of(home), tmp_path / "still", quiet())
    one, two = (load_file(home / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in load_file(tmp_path / "still" / "model.safetensors").items():
        assert torch.allclose(tensor, two.get(name, one.get(name)), atol=1e-9), name  # pyright: ignore


def test_a_run_learns_captions_and_answers_and_uses_the_templates(home: Path, tmp_path: Path) -> None:
    run, records = tmp_path / "run", records_of(home)
    train_stage(settings_of(home, train__steps=150, optim__lr=3e-3, train__validate_every=75), records, run, quiet())
    rows = log_of(run)
    losses = [row["lm"] for row in rows if "lm" in row]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    validated = [row["validation"] for row in rows if "validation" in row]
    assert {"accuracy", "accuracy_open", "loss_shuffled", "verdict"} <= validated[-1].keys()

    model = load(str(run), device="cpu", precision="fp32")
    assert isinstance(model, Captioner)
    pictures, asked = [records[0].image, records[1].image], ["What is it?", "what colour is it?"]
    captions, prompts = model.caption(pictures), [FORMS[1].replace("{}", question) for question in asked]
    assert captions == model.caption(pictures, CAPTIONS[0]) == model.generate(pictures, [CAPTIONS[0]] * 2, CAPTION)
    assert model.answer(pictures, asked) == model.generate(pictures, prompts, ANSWER, prompts)
    assert not torch.equal(model.soft_prompt(pictures, prompts), model.soft_prompt(pictures, asked))
    # One model does both: the prompt determines the output.
    assert captions != model.answer(pictures, asked)

    source = read_source(str(home / "data"), "questions")
    result = evaluate("vqa", str(run), source, tmp_path / "vqa.json", Options(beams=1), quiet())
    assert result.protocol["prompt"] == FORMS[1]
    assert result.protocol["question_cleaning"] == "none"
    assert not result.protocol["zero_shot"]
    assert "18 of 24 pictures are among those the run was trained on" in result.warnings[0]
    with pytest.raises(UserError, match="reads questions, and transformers' InstructBLIP cannot store"):
        convert(run, tmp_path / "hf", "hf")
    train_stage(change(settings_of(home, train__steps=1), {"start": str(run)}), records, tmp_path / "more", quiet())


def test_a_resumed_run_is_bit_equal(home: Path, tmp_path: Path) -> None:
    records, settings = records_of(home), settings_of(home, train__steps=5)

    class Stop(Progress):
        """Interrupts after the first checkpoint, which is of step 2."""

        def say(self, text: str) -> None:
            if text.startswith("step 2"):
                raise KeyboardInterrupt

    train_stage(settings, records, tmp_path / "whole", quiet())
    settings = change(settings, {"train.checkpoint_every": 1})
    with pytest.raises(KeyboardInterrupt):
        train_stage(settings, records, tmp_path / "parts", Stop(quiet=True))
    train_stage(settings, records, tmp_path / "parts", quiet(), resume=True)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_without_the_instruction_in_the_qformer(home: Path, tmp_path: Path) -> None:
    settings = settings_of(home, qformer__question_in_qformer="false")
    train_stage(settings, records_of(home), tmp_path / "run", quiet())
    model = load(str(tmp_path / "run"), device="cpu", precision="fp32")
    assert isinstance(model, Captioner)
    assert model.tokens is None
    picture = records_of(home)[0].image
    assert model.answer([picture], ["what is it?"]) == model.generate(
        [picture], [FORMS[1].format("what is it?")], ANSWER
    )


def test_validation_reads_cached_features_in_bf16(home: Path, tmp_path: Path) -> None:
    """Caches hold fp16, which some operations do not accept if a CPU computes in bf16."""
    settings = settings_of(home, train__steps=1, train__precision="bf16")
    train_stage(settings, records_of(home), tmp_path / "run", quiet())
    assert "validation" in log_of(tmp_path / "run")[-1]


# Unusable settings and data.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "one"}, "start=.*one is not a stage-2 run: give the folder that `train stage2 --out` wrote"),
        ({"text_start": "two"}, "start=.*two is not a stage-1 run"),
        ({"language.questions": ["Question:"]}, "language.questions.*should match pattern"),
        ({"data.max_tokens": 21}, "data.max_tokens=21: the Q-Former of this run reads at most 20 tokens"),
        ({"data.balance": True}, "select questions for vqa"),
        ({"stage2.lm_start_step": 1}, "belongs to stage 2 with captions"),
        ({"qformer.question_in_qformer": False, "text_start": "one"}, "text_start=.*is for vqa and instruct"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(
    home: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    changes = {k: str(home / v) if k.endswith("start") else v for k, v in changes.items()}
    with pytest.raises(UserError, match=message) as caught:
        train_stage(change(settings_of(home), changes), records_of(home), tmp_path / "run", quiet())
    assert "\n" not in str(caught.value)


def test_data_without_questions_or_captions_is_one_line(home: Path, tmp_path: Path) -> None:
    records = records_of(home)
    silent = [Record(r.id, r.image, r.captions) for r in records]
    with pytest.raises(UserError, match=r"^instruct: none of 24 pictures has a question; give --data with questions$"):
        train_stage(settings_of(home), silent, tmp_path / "run", quiet())
    bare = [Record(r.id, r.image, (), r.questions) for r in records]
    with pytest.raises(UserError, match=r"instruct mixes captions and questions: none of 24 .* has a caption"):
        train_stage(settings_of(home), bare, tmp_path / "run", quiet())


def test_the_command(home: Path, tmp_path: Path) -> None:
    def run(*words: object) -> Any:
        short = [f"--set={name}={json.dumps(value)}" for name, value in SHORT.items()]
        return CliRunner().invoke(app, ["train", *map(str, words), *short])

    where = ["--data", home / "data", "--start", home / "two", "--text-start", home / "one"]
    done = run("instruct", *where, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert (settings["task"], settings["text_start"]) == ("instruct", str(home / "one"))
    assert settings["language"]["prompts"][:2] == [LAPTOP_PROMPT, f" {CAPTION_TEMPLATES[0]}"]

    tiny_runs.pictures(tmp_path / "plain", 4)
    done = run("instruct", "--data", tmp_path / "plain", "--start", home / "two", "--out", tmp_path / "no")
    assert isinstance(done.exception, UserError)
    assert "plain: contains no picture with a question and its answer; 4 rows" in str(done.exception)
    done = run("caption", *where, "--out", tmp_path / "no")
    assert isinstance(done.exception, UserError)
    assert "is for vqa and instruct with qformer.question_in_qformer=true: leave it out" in str(done.exception)


SHORT = {"train.steps": 1, "train.batch": 4, "data.held_out": 0.25, "data.max_tokens": POSITIONS, "optim.warmup": 0}


def test_the_papers_preset_has_its_templates_and_rates() -> None:
    start = preset("stage2", "vit-g-flant5-xl")
    found = fine_tuning("instruct", "vit-g-flant5-xl", start, "runs/two")
    assert (found.language.prompts, found.language.questions) == (CAPTION_TEMPLATES, QUESTION_TEMPLATES)
    assert (len(CAPTION_TEMPLATES), len(QUESTION_TEMPLATES)) == (13, 10)
    assert found.language.question in QUESTION_TEMPLATES
    assert (found.optim.lr, found.optim.min_lr, found.optim.betas) == (1e-5, 0, (0.9, 0.999))
    assert (found.train.steps, found.train.batch, found.vision.trained) == (60_000, 192, False)
    assert (found.qformer.question_in_qformer, found.reads_prompts, found.start) == (True, True, "runs/two")
