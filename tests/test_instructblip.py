"""InstructBLIP: the same numbers and texts as in transformers, conversion in both directions, unusable folders."""

import copy
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import openblip2
import tiny
import tiny_blip2
import tiny_runs
from openblip2.apps.serve.engine import Engine, Served, Write
from openblip2.cli import app
from openblip2.config import change
from openblip2.data.records import Record, read_records
from openblip2.errors import UserError
from openblip2.evaluate.validation import effective_rank
from openblip2.inference.attend import look
from openblip2.inference.captioner import ANSWER, CAPTION, SAMPLED, Captioner, greedy
from openblip2.inference.chat import Chat
from openblip2.model.language import Decoding
from openblip2.presets import fine_tuning
from openblip2.progress import Progress
from openblip2.train.recipes import train_stage
from openblip2.weights.assemble import _FILES
from openblip2.weights.checkpoint import Parts
from openblip2.weights.run import read_run
from test_parity import (
    CAPTIONS,
    DECODINGS,
    MOST,
    PICTURES,
    PROMPTS,
    B,
    Generators,
    close,
    close_gradients,
    padded,
    rows,
)
from test_parity import parameter_name as blip2_name
from tiny_blip2 import IMAGE, POSITIONS, pixel_values

Q = tiny.Q
KINDS = ("opt", "llama", "t5")
SHORT = greedy(Decoding(max_new_tokens=6, min_new_tokens=0))
QUESTION = "What colour is the red dog?"  # with a capital letter, because instructions are not lower-cased
DEFAULT = "A short image description:"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in transformers' format for each kind of language model, and llama-run, converted from "llama"."""
    home = tmp_path_factory.mktemp("instructblip")
    for kind in KINDS:
        tiny_blip2.instructed(kind, home / kind)
    openblip2.convert(home / "llama", home / "llama-run", "openblip2")
    return home


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, home: Path) -> Generators:
    kind: str = request.param
    captioner = load(home / kind)
    theirs = hf.InstructBlipForConditionalGeneration.from_pretrained(home / kind)
    return Generators(kind, captioner, captioner.model, theirs, hf.AutoTokenizer.from_pretrained(home / kind))


def load(source: Path) -> Captioner:
    captioner = openblip2.load(source, "cpu", precision="fp32")
    assert isinstance(captioner, Captioner)
    return captioner


def pictures(count: int = B) -> list[Any]:
    return list(PICTURES[:count].permute(0, 2, 3, 1).numpy())


def read(prompts: list[str]) -> dict[str, Tensor]:
    """Prompts as input of transformers' Q-Former."""
    found = tiny_blip2.bert()(prompts, padding=True, return_tensors="pt")
    return {"qformer_input_ids": found["input_ids"], "qformer_attention_mask": found["attention_mask"]}


def parameter_name(name: str) -> str:
    """The name that transformers gives to one of our trained parameters."""
    found = re.sub(r"^embeddings\.", "qformer.embeddings.", blip2_name(name))
    return found.replace("qformer.layernorm", "qformer.embeddings.layernorm")


def their_texts(model: Any, folder: Path, prompts: list[str], how: Decoding) -> list[str]:
    """Texts that transformers generates after prompts about `pictures()`, with the folder's own processor."""
    processor: Any = hf.InstructBlipProcessor.from_pretrained(folder, backend="pil")
    texts = []
    for picture, prompt in zip(pictures(len(prompts)), prompts, strict=True):
        given = processor(images=picture, text=prompt, return_tensors="pt")
        beams = {"num_beams": how.beams, "length_penalty": how.length_penalty} if how.beams > 1 else {}
        written = model.generate(**given, max_new_tokens=how.max_new_tokens, do_sample=False, **beams)
        start = 0 if model.language_model.config.is_encoder_decoder else given["input_ids"].shape[1]
        texts.append(processor.batch_decode(written[:, start:], skip_special_tokens=True)[0].strip())
    return texts


# The same results.


@torch.no_grad()
def test_features_queries_and_soft_prompts(both: Generators) -> None:
    ours, theirs = both.ours, both.theirs
    seen = theirs.get_image_features(pixel_values(PICTURES), **read(PROMPTS))
    tokens, valid = read(PROMPTS).values()
    assert not valid.all(), "no prompt is padded"
    assert ours.vision is not None
    tower = theirs.vision_model(pixel_values(PICTURES), output_hidden_states=True)
    close(ours.vision(PICTURES), tower.hidden_states[-1])
    queries = ours.query_output(images=PICTURES, question=(tokens, valid.bool()))
    close(queries, seen.qformer_outputs.last_hidden_state[:, :Q])
    close(both.captioner.soft_prompt(pictures(), PROMPTS), seen.pooler_output)
    other = both.captioner.soft_prompt(pictures(), [*PROMPTS[1:], PROMPTS[0]])
    assert (other - seen.pooler_output).abs().max() > 0.01, "the prompt changes nothing"


def test_loss_and_gradients(both: Generators) -> None:
    ours, (ids, mask, labels) = both.ours, rows(both)
    tokens, valid = read(PROMPTS).values()
    loss = ours.losses(PROMPTS, CAPTIONS, images=PICTURES, question=(tokens, valid.bool()))["lm"]
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    # Gradients in float32 differ from float64 by up to 0.7e-5 on AMD's CPUs and 2.0e-5 on Intel's with AMX.
    model = copy.deepcopy(both.theirs).double()
    their_loss = model(pixel_values(PICTURES).to(model.dtype), **read(PROMPTS), **given).loss
    close(loss, their_loss)
    names = [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
    assert "qformer.word_embeddings.weight" in names
    expected = {name: model.get_parameter(parameter_name(name)) for name in names}
    close_gradients(loss, ours, their_loss, expected, 4e-5)


def test_texts_in_batches(both: Generators) -> None:
    for how in DECODINGS:
        ids, mask = padded([[IMAGE] * Q + both.words(prompt)["input_ids"] for prompt in PROMPTS], left=True)
        beams = {"length_penalty": how.length_penalty} if how.beams > 1 else {}
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "num_beams": how.beams, **beams}
        written = both.theirs.generate(pixel_values(PICTURES), **read(PROMPTS), **given, max_new_tokens=MOST)
        written = written if both.kind == "t5" else written[:, ids.shape[1] :]
        expected = [text.strip() for text in both.words.batch_decode(written, skip_special_tokens=True)]
        assert both.captioner.generate(pictures(), PROMPTS, how) == expected
        assert len(set(expected)) > 2, "the pictures say nothing"


def test_each_way_to_ask_gives_the_prompt_to_the_qformer(both: Generators, home: Path) -> None:
    """Captions, answers, questions and a chat give the text that transformers generates for the same words."""
    captioner, folder = both.captioner, home / both.kind
    expected = their_texts(both.theirs, folder, [QUESTION] * 3, SHORT)
    assert captioner.caption(pictures(3), QUESTION, SHORT) == expected
    assert captioner.answer(pictures(3), [QUESTION] * 3, SHORT) == expected
    assert captioner.ask(pictures(1)[0], [QUESTION, QUESTION], SHORT) == expected[:1] * 2
    assert Chat(captioner, pictures(1)[0], SHORT).ask(QUESTION) == expected[0]
    assert captioner.caption(pictures(3), decoding=SHORT) == their_texts(both.theirs, folder, [DEFAULT] * 3, SHORT)
    embeds, _ = captioner.embed(pictures(1), [QUESTION])
    soft = captioner.soft_prompt(pictures(1), [QUESTION])
    assert any(torch.equal(embeds[0, n : n + Q], soft[0]) for n in range(embeds.shape[1] - Q + 1))
    assert torch.equal(captioner.soft_prompt(pictures(2)), captioner.soft_prompt(pictures(2), [DEFAULT] * 2))


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_server_gives_the_prompt_to_the_qformer(home: Path, kind: str) -> None:
    engine = Engine(Served(str(home / kind), None, None), lambda text: None, lambda: False)
    captioner, (picture,) = load(home / kind), pictures(1)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    jobs = [Write(file.getvalue(), SHORT, prompt="what is"), Write(file.getvalue(), SHORT)]
    assert [written.text for written in engine.run(jobs)] == [
        captioner.caption([picture], prompt, SHORT)[0] for prompt in ("what is", None)
    ]
    for plain in (True, False):
        (written,) = engine.run([Write(file.getvalue(), SHORT, question=QUESTION, plain=plain)])
        assert written.text == captioner.ask(picture, [QUESTION], SHORT)[0]
    # A prompt that is too long does not stop the others in its batch.
    bad, good = engine.run([Write(file.getvalue(), SHORT, prompt="dog " * 99), Write(file.getvalue(), SHORT)])
    assert "too long" in str(bad)
    assert good.text == captioner.caption([picture], None, SHORT)[0]


def test_the_command_line(home: Path, tmp_path: Path) -> None:
    path, captioner = tmp_path / "a.png", load(home / "llama")
    Image.fromarray(pictures(1)[0]).save(path)

    def told(*arguments: str) -> str:
        result = CliRunner().invoke(app, [*arguments])
        assert result.exit_code == 0, result.output
        return result.stdout.strip()

    for run in ("llama", "llama-run"):
        assert told("caption", str(home / run), str(path)) == f"{path}\t{captioner.caption([path])[0]}"
        asked = told("caption", str(home / run), str(path), "--prompt", QUESTION)
        assert asked == f"{path}\t{captioner.caption([path], QUESTION)[0]}"
        assert told("answer", str(home / run), str(path), QUESTION) == captioner.answer([path], [QUESTION])[0]


def test_attention_maps_of_the_default_prompt_and_of_a_question(home: Path) -> None:
    captioner = load(home / "llama")
    assert look(captioner, pictures(1)[0]).text == captioner.caption(pictures(1), None, CAPTION)[0]
    assert look(captioner, pictures(1)[0], QUESTION).text == captioner.answer(pictures(1), [QUESTION], ANSWER)[0]


def test_captions_likelihoods_choices_and_features_read_the_prompt(home: Path) -> None:
    captioner, given = load(home / "llama"), pictures(3)
    drawn = captioner.captions(given, 2, QUESTION, replace(SAMPLED, max_new_tokens=5), score=True)
    for picture, own in zip(given, drawn, strict=True):
        assert own is not None
        assert len(own) == 2
        alone = captioner.captions([picture], 1, QUESTION, replace(SAMPLED, max_new_tokens=5))[0]
        assert alone is not None
        assert alone[0].text == own[0].text
    firsts = [own[0] for own in drawn if own is not None]
    scores = captioner.log_likelihood(given, [one.text for one in firsts], QUESTION)
    assert scores.tolist() == pytest.approx([one.logprob for one in firsts], abs=1e-4)

    answers = ["red", "a dog"]
    chances = captioner.choose(given, [QUESTION] * 3, answers)
    logs = torch.stack([captioner.log_likelihood(given, [answer] * 3, QUESTION) for answer in answers], 1)
    torch.testing.assert_close(chances, logs.softmax(1))

    for texts in (None, [QUESTION] * 3):
        found = captioner.features(given, texts)
        torch.testing.assert_close(found.projected, captioner.soft_prompt(given, texts or [DEFAULT] * 3))
        assert captioner.effective_rank(given, texts) == pytest.approx(effective_rank(found.queries), rel=1e-4)
    long = ["dog " * POSITIONS] * 3
    for refused in (
        lambda: captioner.captions(given, 2, long[0]),
        lambda: captioner.log_likelihood(given, answers[:1] * 3, long[0]),
        lambda: captioner.choose(given, long, answers),
        lambda: captioner.features(given, long),
        lambda: captioner.soft_prompt(given, long),
    ):
        with pytest.raises(UserError, match="too long: the Q-Former reads at most"):
            refused()
    with pytest.raises(UserError, match="3 pictures and 2 questions"):
        captioner.features(given, [QUESTION] * 2)


# Conversion in both directions.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_there_and_back_is_bit_equal(home: Path, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    source = tmp_path / "source"
    shutil.copytree(home / kind, source)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))

    assert openblip2.convert(source, tmp_path / "run", "openblip2") == []
    shutil.rmtree(source)  # the run contains everything from its source
    assert openblip2.convert(tmp_path / "run", tmp_path / "back", "hf") == []
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype, name
        assert torch.equal(found[name], tensor), name
    after = json.loads((tmp_path / "back" / "config.json").read_text())
    for name in ("architectures", "model_type", "num_query_tokens", "image_token_index"):
        assert after[name] == config[name], name
    assert after["vision_config"]["model_type"] == config["vision_config"]["model_type"]
    assert {**after["qformer_config"], "dtype": None} == {**config["qformer_config"], "dtype": None}


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_an_export_runs_in_transformers(home: Path, tmp_path: Path, kind: str) -> None:
    openblip2.convert(home / kind, tmp_path / "run", "openblip2")
    openblip2.convert(tmp_path / "run", tmp_path / "out", "hf")
    model: Any = hf.InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    expected = their_texts(model, tmp_path / "out", [QUESTION] * 3, SHORT)
    for folder in (tmp_path / "run", tmp_path / "out"):
        assert load(folder).caption(pictures(3), QUESTION, SHORT) == expected


def test_the_card_of_an_export_runs_as_it_stands(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    openblip2.convert(home / "llama-run", tmp_path / "out", "hf")
    Image.fromarray(pictures(1)[0]).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    assert "InstructBlipProcessor" in code
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.strip()


SHORT_TRAINING = {
    "train.steps": 2,
    "train.batch": 4,
    "train.precision": "fp32",
    "data.held_out": 0.25,
    "optim.warmup": 0,
}


def asked_records(folder: Path) -> list[Record]:
    """Pictures with a caption and a question each."""
    tiny_runs.pictures(folder, 12)
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    for row in rows:
        row["questions"] = [{"text": "What colour is it?", "answer": row["caption"].split()[1], "kind": "open"}]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_records(folder, "questions")[0]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_instruction_tuning_begins_with_it_and_becomes_one(home: Path, tmp_path: Path, kind: str) -> None:
    openblip2.convert(home / kind, tmp_path / "start", "openblip2")
    start, records = read_run(tmp_path / "start", Parts()).settings, asked_records(tmp_path / "data")
    settings = fine_tuning("instruct", "laptop", start, str(tmp_path / "start"))
    with pytest.raises(
        UserError, match=f"data.max_tokens=128: the Q-Former of this run reads at most {POSITIONS} tokens"
    ):
        train_stage(settings, records, tmp_path / "tuned", Progress(quiet=True))
    wording = {"language.prompts": ("A red dog:", "a"), "language.questions": ("{}", "Is it {}?")}
    wording |= {"language.question": "Is it {}?", "data.max_tokens": POSITIONS}
    train_stage(change(settings, SHORT_TRAINING | wording), records, tmp_path / "tuned", Progress(quiet=True))

    tuned = load(tmp_path / "tuned")
    captions, answers = tuned.caption(pictures(3), None, SHORT), tuned.answer(pictures(3), [QUESTION] * 3, SHORT)
    openblip2.convert(tmp_path / "tuned", tmp_path / "out", "hf")
    model: Any = hf.InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert their_texts(model, tmp_path / "out", ["A red dog:"] * 3, SHORT) == captions
    assert their_texts(model, tmp_path / "out", [f"Is it {QUESTION}?"] * 3, SHORT) == answers
    back = load(tmp_path / "out")
    assert back.settings.task == "instruct"
    assert back.caption(pictures(3), None, SHORT) == captions
    assert back.answer(pictures(3), [QUESTION] * 3, SHORT) == answers


def test_fine_tuning_for_vqa_begins_with_it_and_becomes_one(home: Path, tmp_path: Path) -> None:
    records = asked_records(tmp_path / "data")
    run = str(home / "llama-run")
    start = read_run(Path(run), Parts()).settings
    settings = fine_tuning("vqa", "laptop", start, run)
    changes = SHORT_TRAINING
    train_stage(change(settings, changes), records, tmp_path / "tuned", Progress(quiet=True))
    before, after = (load_file(folder / "model.safetensors") for folder in (Path(run), tmp_path / "tuned"))
    assert before.keys() == after.keys()
    assert not torch.equal(before["qformer.word_embeddings.weight"], after["qformer.word_embeddings.weight"])

    tuned = load(tmp_path / "tuned")
    asked = "what colour is it?"  # the cleaned question, because transformers does not clean it
    answers = tuned.answer(pictures(3), ["What colour is it?"] * 3, SHORT)
    with pytest.raises(UserError, match="Q-Former reads questions"):
        tuned.caption(pictures(1))
    openblip2.convert(tmp_path / "tuned", tmp_path / "run", "openblip2")
    openblip2.convert(tmp_path / "run", tmp_path / "out", "hf")
    model: Any = hf.InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert their_texts(model, tmp_path / "out", [asked] * 3, SHORT) == answers
    back = load(tmp_path / "out")  # the export stores that the model answers questions
    assert back.answer(pictures(3), ["What colour is it?"] * 3, SHORT) == answers
    with pytest.raises(UserError, match="Q-Former reads questions"):
        back.caption(pictures(1))
    caption = change(fine_tuning("caption", "laptop", start, run), changes)
    with pytest.raises(UserError, match="question_in_qformer=true is for vqa and instruct, but the task is caption"):
        train_stage(caption, records, tmp_path / "caption", Progress(quiet=True))


# Unusable folders and prompts.


def test_folders_that_cannot_be_used(home: Path, tmp_path: Path) -> None:
    def told(change: Any, *words: str, **options: Any) -> None:
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(home / "llama", folder)
        change(folder)
        with pytest.raises(UserError) as caught:
            openblip2.load(folder, "cpu", **options)
        line = str(caught.value)
        assert "\n" not in line
        assert all(word in line for word in words), line

    config, keys = tiny_blip2.changed_config, tiny_blip2.changed_tensors

    def other_words(folder: Path) -> None:
        words = {f"w{n}": n for n in range(99)} | dict.fromkeys(("[UNK]", "[CLS]"), 0)
        shutil.rmtree(folder / "qformer_tokenizer")
        hf.BertTokenizer(vocab=words).save_pretrained(folder / "qformer_tokenizer")

    told(
        lambda f: shutil.rmtree(f / "qformer_tokenizer"),
        "bad: no tokenizer in qformer_tokenizer/",
        "InstructBlipProcessor",
    )
    told(
        lambda f: (f / "qformer_tokenizer" / "tokenizer.json").unlink(),
        "no tokenizer in qformer_tokenizer/",
        "tokenizer=",
    )
    told(other_words, "qformer_tokenizer", f"the model {tiny_blip2.RETRIEVER_WORDS}")
    told(config(lambda c: c.update(num_query_tokens=4)), "num_query_tokens is 4", f"has {Q} queries")
    told(config(lambda c: c.pop("num_query_tokens")), "num_query_tokens is 32", f"has {Q} queries")
    told(config(lambda c: c.update(num_query_tokens=4), "processor_config.json"), "processor_config.json", "is 4")
    told(lambda f: tiny_blip2.tokenizer("llama").save_pretrained(f), "no token '<image>'", "InstructBlipProcessor")
    told(keys(lambda t: t.pop("qformer.embeddings.layernorm.bias")), "missing: qformer.embeddings.layernorm.bias")
    told(keys(lambda t: t.update({"qformer.layernorm.bias": torch.ones(2)})), "qformer.layernorm.bias")
    told(keys(lambda t: t.pop("qformer.encoder.layer.1.intermediate.dense.bias")), "layer.1.intermediate.dense.bias")
    told(config(lambda c: c.update(architectures=["InstructBlipModel"])), "'InstructBlipModel'")
    # A tokenizer passed by the caller replaces a missing one.
    tiny_blip2.bert().save_pretrained(tmp_path / "words")
    shutil.copytree(home / "llama", tmp_path / "without")
    shutil.rmtree(tmp_path / "without" / "qformer_tokenizer")
    captioner = openblip2.load(tmp_path / "without", "cpu", tokenizer=str(tmp_path / "words"), precision="fp32")
    assert isinstance(captioner, Captioner)
    assert captioner.caption(pictures(1)) == load(home / "llama").caption(pictures(1))


def test_prompts_that_cannot_be_read(home: Path) -> None:
    captioner = load(home / "llama")
    fits, long = "dog " * (POSITIONS - 2), "dog " * (POSITIONS - 1)  # [CLS] and [SEP] are added
    assert captioner.caption(pictures(1), fits, SHORT) != [None]
    for ask in (
        lambda: captioner.caption(pictures(1), long),
        lambda: captioner.answer(pictures(1), [long]),
        lambda: Chat(captioner, pictures(1)[0]).ask(long),
    ):
        with pytest.raises(UserError, match=f"'dog dog .* too long: the Q-Former reads at most {POSITIONS} tokens"):
            ask()
    with pytest.raises(UserError, match="empty question"):
        captioner.answer(pictures(1), [" "])


def test_what_no_other_format_holds(home: Path, tmp_path: Path) -> None:
    for target, out in (("lavis", "x.pth"), ("onnx", "x.onnx"), ("projected", "x")):
        with pytest.raises(UserError, match=f"reads questions, which --to {target} cannot store"):
            openblip2.convert(home / "llama-run", tmp_path / out, target)


def test_the_second_tokenizer_comes_from_the_hub() -> None:
    files = [f"qformer_tokenizer/{name}" for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")]
    assert list(filter_repo_objects([*files, "model.bin"], allow_patterns=_FILES)) == files
