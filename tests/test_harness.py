"""lmms-eval evaluates a run. If that harness is not installed, a stand-in with its names replaces it."""

import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fake_lmms_eval
import tiny_blip2
import tiny_models
from openblip2.errors import UserError
from openblip2.model.decoding import Decoding
from openblip2.model.language import LanguageModel
from openblip2.model.likelihood import likelihoods
from tiny_models import BOS, EOS, embed, ids

fake_lmms_eval.stand_in()

from lmms_eval.api.instance import Instance  # noqa: E402  # pyright: ignore[reportMissingImports]
from loguru import logger  # noqa: E402  # pyright: ignore[reportMissingImports]

from openblip2 import harness  # noqa: E402
from openblip2.harness import OpenBlip2  # noqa: E402

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
FORM = "question: {} answer:"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder of a tiny BLIP-2 in the published format, for each kind."""
    root = tmp_path_factory.mktemp("harness")

    def run(kind: str) -> Path:
        return root / kind if (root / kind).exists() else tiny_blip2.generator(kind, root / kind)

    return run


def pictures(count: int) -> list[Image.Image]:
    return [Image.fromarray(array.permute(1, 2, 0).numpy()) for array in tiny_models.pictures(count)]


class Task:
    """Documents, and the requests that lmms-eval makes for them."""

    def __init__(self, model: OpenBlip2, seen: list[Any], options: dict[str, Any] = GREEDY) -> None:
        self.options = options
        model.task_dict["task"] = {"test": [{"seen": one} for one in seen]}

    @staticmethod
    def look(document: dict[str, Any]) -> Any:
        return document["seen"]

    def instance(self, kind: str, place: int, *arguments: Any) -> Any:
        metadata = {"task": "task", "doc_id": place, "repeats": 1}
        return Instance(kind, (*arguments, place, "task", "test"), idx=0, metadata=metadata)

    def generate(self, place: int, words: str, **options: Any) -> Any:
        return self.instance("generate_until", place, words, self.options | options, self.look)

    def judge(self, place: int, words: str, text: Any) -> Any:
        return self.instance("loglikelihood", place, words, text, self.look)


def model(run: Path, **options: Any) -> OpenBlip2:
    return OpenBlip2(str(run), device="cpu", precision="fp32", **{"question": FORM, **options})


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The logged warnings."""
    lines: list[str] = []
    number = logger.add(lambda line: lines.append(str(line)), format="{message}")
    yield lines
    logger.remove(number)


def test_the_entry_point_leads_to_the_model() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["entry-points"]["lmms_eval.models"] == {"openblip2": "openblip2.harness:manifest"}
    found = harness.manifest()
    assert (found.model_id, found.chat_class_path) == ("openblip2", None)
    assert found.simple_class_path == "openblip2.harness.OpenBlip2"
    assert issubclass(OpenBlip2, harness.lmms)
    assert OpenBlip2.is_simple


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
@pytest.mark.parametrize("batch", [1, "3"])
def test_requests_are_answered_as_by_the_captioner(runs: Callable[[str], Path], kind: str, batch: Any) -> None:
    lm = model(runs(kind), batch_size=batch)
    shown = pictures(4)
    task = Task(lm, [[one] for one in shown] + [None, [None], []])
    words = ["what is it", "is it red", "is it a small dog", "what", "what is it", "what is it", "is it red"]
    how = [{}, {"num_beams": 3}, {}, {"max_new_tokens": 2}, {}, {"num_beams": 3}, {}]
    requests = [task.generate(n, f" <image> {w}\n", **h) for n, (w, h) in enumerate(zip(words, how, strict=True))]
    found = lm.generate_until(requests)
    decodings = [Decoding(6, beams=1), Decoding(6, beams=3), Decoding(6, beams=1), Decoding(2, beams=1)]
    prompts = [FORM.replace("{}", one) for one in words]
    assert found[:4] == [
        lm.captioner.generate([one], [prompt], decoding)[0]
        for one, prompt, decoding in zip(shown, prompts[:4], decodings, strict=True)
    ]
    assert len(set(found[:4])) == 4
    # Without a picture, the language model answers alone.
    nothing = torch.zeros(1, 0, tiny_models.L)
    for n, beams in ((4, 1), (5, 3), (6, 1)):
        assert [found[n]] == lm.language.generate(nothing, [prompts[n]], Decoding(6, beams=beams))
    assert found[4] != found[0]


def test_a_run_is_asked_its_own_way_unless_told_otherwise(runs: Callable[[str], Path]) -> None:
    ways = {None: "Question: {} Answer:", "{} it": "{} it", "{}": "{}"}
    for question, form in ways.items():
        lm = model(runs("gpt2"), question=question)
        (found,) = lm.generate_until([Task(lm, [pictures(1)]).generate(0, "is it red")])
        prompt = form.replace("{}", "is it red")
        assert [found] == lm.captioner.generate(pictures(1), [prompt], Decoding(6, beams=1))


def test_options_of_tasks_are_decodings(runs: Callable[[str], Path], said: list[str]) -> None:
    lm = model(runs("gpt2"))
    assert lm._decoding({}) == harness.GREEDY == Decoding(max_new_tokens=256, beams=1)
    unread = {"temperature": 0.0, "top_p": None, "until": ["x"], "num_beams": 4, "length_penalty": -1.0}
    assert lm._decoding(unread) == Decoding(256, beams=4, length_penalty=-1.0)
    assert lm._decoding({"temperature": 0.7, "top_p": 0.5, "do_sample": False}) == harness.GREEDY
    assert lm._decoding({"temperature": 0, "do_sample": True}) == harness.GREEDY
    warm = Decoding(256, beams=1, sample=True, temperature=0.7, top_p=0.5)
    assert lm._decoding({"temperature": 0.7, "top_p": 0.5}) == warm
    assert lm._decoding({"do_sample": True}) == Decoding(256, beams=1, sample=True)
    assert said == []
    for _ in range(2):
        lm._decoding({"image_aspect_ratio": "pad", "min_new_tokens": 2})
    assert len(said) == 1
    assert "image_aspect_ratio" in said[0]


def test_texts_end_where_the_task_says(runs: Callable[[str], Path]) -> None:
    lm = model(runs("t5"))
    task = Task(lm, [pictures(1)])
    (whole,) = lm.generate_until([task.generate(0, "what is it")])
    first, second, *_ = whole.split()
    assert first != second
    ends = (second, [f" {second}", "zebra"], ["", second, first], None, [])
    found = lm.generate_until([task.generate(0, "what is it", until=until) for until in ends])
    assert found == [first, first, "", whole, whole]


def short(lm: OpenBlip2) -> OpenBlip2:
    """Sets a context of 50 tokens: 5 are for the picture, and the template adds 3 to a task's words."""
    lm.context = 50
    return lm


def test_what_the_model_cannot_take_is_named(runs: Callable[[str], Path], said: list[str]) -> None:
    lm = short(model(runs("llama"), batch_size=2))
    one, two = pictures(2)
    task = Task(lm, [[one], [one, two], ["film.mp4"], [two], [one], [one]])
    texts = ["is it red", "is it red", "is it red", "red " * 42, "red " * 41, "what"]
    found = lm.generate_until([task.generate(n, text) for n, text in enumerate(texts)])
    assert [bool(text) for text in found] == [True, False, False, False, True, True]
    prompt = FORM.replace("{}", ("red " * 41).strip())
    assert [found[4]] == lm.captioner.generate([one], [prompt], Decoding(max_new_tokens=1, beams=1))
    assert sorted(line.split(",")[0:2][1].split()[1] for line in said) == ["1", "2", "3"]
    named = "".join(said)
    assert "has 2 inputs (Image, Image)" in named
    assert "has 1 inputs (str)" in named
    assert "takes 45 tokens with the template, but only 44 fit" in named
    with pytest.raises(UserError, match=r"none of 2 requests: .* has 2 inputs"):
        lm.generate_until([task.generate(1, "what"), task.generate(2, "what")])
    assert lm.generate_until([]) == []


CHOICES = ["a red dog", "yes", " no ", "two small bird"]


def spelled(language: LanguageModel, soft: torch.Tensor, prompt: str, text: str) -> tuple[float, bool]:
    """The language model's own mean loss for a row built by hand, and whether each token is the most likely."""
    llm: Any = language.llm
    before = ids(prompt.replace(" ", "| "))
    if llm.config.is_encoder_decoder:
        target = ids(text.replace(" ", "| ") + "|</s>")
        found = llm(inputs_embeds=torch.cat([soft, embed(llm, [*before, EOS])])[None], labels=torch.tensor([target]))
        return float(found.loss), found.logits[0].argmax(1).tolist() == target
    before, target = (
        before if llm.config.model_type == "gpt2" else [BOS, *before],
        ids(f" {text}".replace(" ", "| ")[1:] + "|</s>"),
    )
    row = torch.cat([soft, embed(llm, before + target)])
    found = llm(inputs_embeds=row[None], labels=torch.tensor([[-100] * (len(row) - len(target)) + target]))
    return float(found.loss), found.logits[0, -len(target) - 1 : -1].argmax(1).tolist() == target


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_likelihoods_are_the_models_own_loss(runs: Callable[[str], Path], kind: str) -> None:
    lm = model(runs(kind))
    shown = pictures(6)
    task = Task(lm, [[], *([one] for one in shown)])
    asked = [(n, words, text) for n in range(3) for words in ("what is it", "is it red") for text in CHOICES]
    asked += [(n, "what", "grass") for n in range(7)]  # the Llama writes "grass" about some of the pictures
    found = [result.text for result in lm.loglikelihood([task.judge(*one) for one in asked])]
    soft = [torch.zeros(0, tiny_models.L), *lm.captioner.soft_prompt(shown)]
    for (place, words, text), (loss, likeliest) in zip(asked, found, strict=True):
        own = spelled(lm.language, soft[place], FORM.replace("{}", words), text.strip())
        assert (loss, likeliest) == (pytest.approx(own[0], rel=1e-4), own[1])
    assert len({round(loss, 3) for loss, _ in found}) == len(asked)
    assert kind != "llama" or 0 < sum(likeliest for _, likeliest in found) < 7


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_the_end_of_a_text_counts(kind: str) -> None:
    soft, texts = tiny_models.soft_prompts(1), ["dog", "dog dog"]
    stops = tiny_models.constant(kind, ("</s>", 20.0), (" dog", 15.0), ("dog", 15.0))
    losses, likeliest = likelihoods(stops, soft, "it", texts)
    assert losses.tolist() == pytest.approx([2.5, 10 / 3], abs=0.05)
    assert likeliest.tolist() == [False, False]
    goes_on = tiny_models.constant(kind, ("</s>", 15.0), (" dog", 20.0), ("dog", 15.0))
    assert likelihoods(goes_on, soft, "it", texts)[1].tolist() == [False, False]
    if kind == "t5":
        assert likelihoods(stops, soft, "it", ["", "dog"])[1].tolist() == [True, False]


def test_a_continuation_may_be_the_documents(runs: Callable[[str], Path]) -> None:
    lm = short(model(runs("llama")))
    task = Task(lm, [pictures(1)])
    requests = [task.judge(0, "what", "yes"), task.judge(0, "what", lambda document: "yes")]
    first, second = lm.loglikelihood(requests)
    assert first.text == pytest.approx(second.text)
    with pytest.raises(UserError, match=r"document 0: .* too long with its answers"):
        lm.loglikelihood([task.judge(0, "red " * 39, "yes"), task.judge(0, "red " * 39, "a small bird")])


def test_what_cannot_be_used_is_refused(runs: Callable[[str], Path], tmp_path: Path) -> None:
    for batch in ("auto", 0, "-1"):
        with pytest.raises(UserError, match=f"batch_size={batch}: give a number"):
            model(runs("gpt2"), batch_size=batch)
    with pytest.raises(UserError, match=r"question=what: it must contain \{\}"):
        model(runs("gpt2"), question="what")
    with pytest.raises(UserError, match="is a Matcher, not a Captioner"):
        model(tiny_blip2.retriever(tmp_path / "retriever"))
    with pytest.raises(UserError, match="does not support tasks with several rounds: remove them from --tasks"):
        model(runs("gpt2")).generate_until_multi_round([])


def test_the_memory_is_freed(runs: Callable[[str], Path]) -> None:
    lm = model(runs("gpt2"))
    lm.clean()
    assert not any(isinstance(value, torch.nn.Module) for value in vars(lm).values())
    assert not hasattr(lm, "captioner")
