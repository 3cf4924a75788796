"""Dialogues about a picture: the turns before a question, the turns that are left out, and what is encoded once."""

import sys
from io import BytesIO, StringIO, TextIOWrapper
from typing import Any, TextIO

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

import tiny
import tiny_models
from openblip2 import cli
from openblip2.commands import use
from openblip2.config import RunSettings, change
from openblip2.data.text import BertTokens
from openblip2.errors import UserError
from openblip2.inference.captioner import ANSWER, Captioner
from openblip2.inference.chat import Chat
from openblip2.model.language import DecoderLM, Decoding
from openblip2.model.stage2 import Stage2
from openblip2.model.template import PAPER_TEMPLATE, dialogue, resolve_template
from openblip2.model.token_rows import context_of
from openblip2.presets import with_examples
from tiny import Q

FORM = "question: {} answer:"
KINDS = ["gpt2", "llama", "t5"]  # the tiny OPT gives the same answer to everything
SHORT = Decoding(max_new_tokens=6, beams=1)
CHAT = """{% for turn in messages %}<s>{{ turn['role'] }} {{ turn['content'] }}</s>
{% endfor %}{% if add_generation_prompt %}<s>turn {it}
{% endif %}"""
EXAMPLES = (("cat", "", "a cat"), ("bus red", " question: is it red answer:", "yes {no}"))
FRAMED = with_examples("<s>user {image}{prompt}</s>\n<s>turn {{it}}\n", EXAMPLES, "</s>\n")
TEMPLATES = [PAPER_TEMPLATE, "chat", FRAMED, "{bos}{prompt} on the{image} left"]


def chatty() -> Any:
    """A tokenizer with a chat template."""
    words = tiny_models.tokenizer()
    words.chat_template = CHAT
    return words


def captioner(
    kind: str = "llama", template: str = PAPER_TEMPLATE, question: str = FORM, reads: bool = False
) -> Captioner:
    """A tiny captioner. `reads`: whether its Q-Former reads questions."""
    lm = (
        tiny_models.language(kind, template=template)
        if kind == "t5"
        else DecoderLM(tiny_models.MODELS[kind](), chatty(), template)
    )
    model = Stage2(tiny.qformer(vocabulary=tiny.WORDS if reads else 0), lm, tiny_models.vision())
    tiny.redraw(model.projection, std=1.0)
    changes = {"language.question": question, "language.template": template, "train.precision": "fp32"}
    settings = change(RunSettings(stage="stage2"), changes)
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "what", "is", "red"])}
    tokens = BertTokens(hf.BertTokenizer(vocab=vocabulary)) if reads else None
    return Captioner(model.eval(), settings, tokens=tokens)


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12, 3), np.uint8))


def prompts_of(model: Captioner, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that collects every prompt that the language model gets from now on."""
    seen: list[str] = []
    generate = model.model.language.generate

    def spied(soft: torch.Tensor, prompts: list[str], *more: Any) -> list[str]:
        seen.extend(prompts)
        return generate(soft, prompts, *more)

    monkeypatch.setattr(model.model.language, "generate", spied)
    return seen


# The wording.


def test_plain_turns_are_the_authors_demo() -> None:
    turns = [("which city is this?", "singapore"), ("why?", "it has a statue of a merlion")]
    question, template = "where is the name merlion coming from?", "Question: {} Answer: {}."
    theirs = " ".join(template.format(*turn) for turn in turns) + " Question: " + question + " Answer:"
    words = chatty()
    for frame in (
        PAPER_TEMPLATE,
        "{prompt}{image}",
        "a{image}{prompt} b",
        "{image}{prompt}{prompt}</s>\n<s>turn {{it}}\n",
    ):
        resolved = resolve_template(frame, words)
        assert dialogue(turns, question, "Question: {} Answer:", resolved, words) == theirs
    words.chat_template = None
    assert dialogue(turns, question, "Question: {} Answer:", resolve_template(FRAMED, words), words) == theirs


def test_one_question_is_the_runs_form() -> None:
    words = chatty()
    for template in TEMPLATES:
        resolved = resolve_template(template, words)
        assert dialogue([], "is {it}?", " Q: {}\n A:", resolved, words) == " Q: is {it}?\n A:"


def test_plain_turns_are_parted_by_one_space_and_one_stop() -> None:
    turns = [("a", "It is red."), ("b", "yes!"), ("c", "")]
    found = dialogue(turns, "d", " Short. {}\n", PAPER_TEMPLATE, chatty())
    assert found == " Short. a\nIt is red. Short. b\nyes! Short. c\n. Short. d\n"


@pytest.mark.parametrize("template", ["chat", FRAMED])
@pytest.mark.parametrize("count", [0, 1, 3, 11])
def test_chat_turns_are_the_tokenizers_own(template: str, count: int) -> None:
    """The picture is in the first user turn, and text before the frame stays before it."""
    words = chatty()
    turns = [(f"{{}} <<{n}>> it", f" a {n}.") for n in range(count)]
    resolved = resolve_template(template, words)
    text = resolved.format(image="PICTURE", prompt=dialogue(turns, "last", "Q {}:", resolved, words))
    messages = []
    for asked, answered in turns:
        messages += [{"role": "user", "content": f"Q {asked}:"}, {"role": "assistant", "content": answered}]
    messages.append({"role": "user", "content": "Q last:"})
    messages[0]["content"] = "PICTURE" + messages[0]["content"]
    own = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    front = resolved.partition("<s>user {image}")[0] if template == FRAMED else ""
    assert text == front.replace("{{", "{").replace("}}", "}") + own


def test_a_chat_template_for_one_turn_is_refused() -> None:
    words = chatty()
    words.chat_template = "user {{ messages[0]['content'] }} turn"
    resolved = resolve_template("chat", words)
    assert dialogue([], "it", FORM, resolved, words) == "question: it answer:"
    with pytest.raises(UserError, match="cannot write a dialogue of 3 texts"):
        dialogue([("a", "b")], "it", FORM, resolved, words)


# Dialogues.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [PAPER_TEMPLATE, "{image}{prompt} it"])
def test_the_first_turn_is_answer(kind: str, template: str) -> None:
    model = captioner(kind, template)
    answers = [Chat(model, picture(n), ANSWER).ask(" what is it ") for n in range(3)]
    assert answers == [model.answer([picture(n)], ["what is it"])[0] for n in range(3)]
    assert len(set(answers)) > 1, "the picture says nothing"


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_first_turn_is_answer_in_any_frame(template: str) -> None:
    model = captioner("llama", template)
    assert Chat(model, picture(), ANSWER).ask("what is it") == model.answer([picture()], ["what is it"])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_later_turns_stand_behind_earlier_ones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = captioner(kind)
    chat, seen = Chat(model, picture(), SHORT), prompts_of(model, monkeypatch)
    first, second = chat.ask("What is it?"), chat.ask("is it red")
    assert chat.turns == [("What is it?", first), ("is it red", second)]
    assert seen[0] == "question: What is it? answer:"
    assert seen[1] == f"question: What is it? answer: {first}. question: is it red answer:"
    with torch.inference_mode():
        soft = model.model.soft_prompt(images=tiny_pixels(picture()))
        assert [second] == model.model.language.generate(soft, seen[1:2], SHORT)
        alone = model.model.language.generate(soft, ["question: is it red answer:"], SHORT)
    assert [second] != alone, "the earlier turn says nothing"


def tiny_pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def test_the_picture_is_seen_once() -> None:
    model = captioner()
    seen: list[str] = []
    for name in ("vision", "qformer"):
        getattr(model.model, name).register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    chat = Chat(model, picture(), SHORT)
    for question in ("what is it", "is it red", "is it a dog"):
        chat.ask(question)
    assert seen == ["vision", "qformer"]


def test_a_qformer_that_reads_questions_reads_each() -> None:
    model = captioner(reads=True)
    seen: list[str] = []
    for name in ("vision", "qformer"):
        getattr(model.model, name).register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    chat = Chat(model, picture(), ANSWER)
    assert chat.ask("what is it") == model.answer([picture()], ["what is it"])[0]
    del seen[:]
    chat.ask("Is it red?")
    assert seen == ["qformer"]
    with torch.inference_mode():
        soft = [chat._soft_prompt(question) for question in ("Is red.", "is red", "what is it")]
    assert torch.equal(soft[0], soft[1])
    assert not torch.allclose(soft[0], soft[2], atol=1e-3)


# The context limit.


def test_context_is_the_models_or_the_tokenizers() -> None:
    assert context_of(tiny_models.language("gpt2")) == 50
    assert context_of(tiny_models.language("opt")) == 50
    t5 = tiny_models.language("t5")
    assert context_of(t5) is None
    t5.tokenizer.model_max_length = 512
    assert context_of(t5) == 512


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("context", [None, 110])
def test_the_oldest_turns_make_room(template: str, context: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder has a context of 120 tokens, which includes the answer."""
    model = captioner("llama", template)
    language = model.model.language
    language.llm.config.max_position_embeddings = 120
    chat, seen = Chat(model, picture(), SHORT, context=context), prompts_of(model, monkeypatch)
    questions = [f"is it {'a small dog ' * (n % 3)}or a bus {n}" for n in range(12)]
    dropped = []
    for n, question in enumerate(questions):
        chat.ask(question)
        kept = next(m for m in range(n + 1) if seen[n] == chat_text(model, chat.turns[m:n], question))
        assert seen[n].endswith(f"question: {question} answer:")
        assert Q + language.length(seen[n]) + SHORT.max_new_tokens <= (context or 120)
        if kept:
            more = chat_text(model, chat.turns[kept - 1 : n], question)
            assert Q + language.length(more) + SHORT.max_new_tokens > (context or 120)
        dropped.append(kept)
    assert dropped[:2] == [0, 0]
    assert 0 < dropped[-1] < 11
    assert len(chat.turns) == 12


def chat_text(model: Captioner, turns: list[tuple[str, str]], question: str) -> str:
    language = model.model.language
    return dialogue(turns, question, FORM, language.template, language.tokenizer)


def test_an_encoder_decoder_writes_elsewhere() -> None:
    model = captioner("t5")
    model.model.language.tokenizer.model_max_length = Q + 6
    chat = Chat(model, picture(), Decoding(max_new_tokens=20, beams=1))
    chat.ask("what is it")  # 6 tokens, including question:, answer: and the end
    assert chat.prompt("is it red") == "question: is it red answer:"
    with pytest.raises(UserError, match=r"takes 7 tokens .*, but only 6 fit"):
        chat.ask("is it a dog")


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_question_too_long_alone_is_refused(kind: str) -> None:
    model = captioner(kind)  # context 50: 5 for the picture, 6 for the answer, 3 for the tokens around the question
    chat = Chat(model, picture(), SHORT)
    chat.ask(" ".join(["red"] * 36))
    assert chat.prompt("it") == "question: it answer:"
    turns = list(chat.turns)
    with pytest.raises(UserError) as caught:
        chat.ask(" ".join(["red"] * 37))
    (line,) = str(caught.value).splitlines()
    assert "takes 40 tokens" in line
    assert "39 fit" in line
    assert "has a context of 50" in line
    assert chat.turns == turns


def test_what_cannot_be_used_is_refused() -> None:
    with pytest.raises(UserError, match="empty question"):
        Chat(captioner(), picture()).ask(" \n")
    with pytest.raises(UserError, match=r"question 'what': it needs \{\}"):
        Chat(captioner(), picture(), question="what")
    with pytest.raises(UserError, match=r"template 'a\{image\}': it needs \{prompt\}"):
        Chat(captioner(template="a{image}"), picture())
    with pytest.raises(UserError, match="context 51: this language model has a context of 50"):
        Chat(captioner("gpt2"), picture(), context=51)
    with pytest.raises(UserError, match="0 fit"):
        Chat(captioner("gpt2"), picture(), context=4).ask("what")
    with pytest.raises(UserError, match=r"nowhere\.png"):
        Chat(captioner(), "nowhere.png")


# The command.


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def talk(
    model: Captioner, said: TextIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str
) -> tuple[Any, str, str]:
    """Runs the command and returns its exit code, standard output and standard error."""
    monkeypatch.setattr(use, "load_captioner", lambda run: model)
    monkeypatch.setattr(sys, "stdin", said)
    monkeypatch.setattr(sys, "argv", ["openblip2", "chat", "run", "dog.png", *more])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    return end.value.code or 0, out, err


@pytest.fixture
def dog(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Image.Image:
    monkeypatch.chdir(tmp_path)
    picture().save("dog.png")
    return picture()


def test_lines_in_answers_out(
    dog: Image.Image, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = captioner()
    code, out, err = talk(model, StringIO("What is it?\n\n is it red"), monkeypatch, capsys)
    chat = Chat(model, dog, Decoding(max_new_tokens=30, length_penalty=-1.0))
    assert (code, err) == (0, "")
    assert out == "".join(chat.ask(question) + "\n" for question in ("What is it?", "is it red"))
    assert chat.decoding == Chat(model, dog).decoding
    _, out, _ = talk(model, StringIO("a dog"), monkeypatch, capsys, "--question", "{} it", "--tokens", "2")
    assert out == Chat(model, dog, Decoding(max_new_tokens=2, length_penalty=-1.0), "{} it").ask("a dog") + "\n"


def test_what_does_not_fit_ends_a_pipe_and_not_a_terminal(
    dog: Image.Image, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = f"it\n{'red ' * 40}\nit\n"
    code, out, err = talk(captioner("gpt2"), StringIO(lines), monkeypatch, capsys, "--tokens", "6")
    assert code == 2
    assert len(out.splitlines()) == 1
    (line,) = err.splitlines()
    assert "takes 43 tokens" in line
    code, out, err = talk(captioner("gpt2"), Terminal(lines), monkeypatch, capsys, "--tokens", "6")
    assert code == 0
    assert out.count("> ") == 4
    assert out.count("\n") == 2
    assert err == line + "\n"


def test_what_is_no_text_is_refused(
    dog: Image.Image, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = TextIOWrapper(BytesIO(b"caf\xe9\n"), encoding="utf-8")
    lax = TextIOWrapper(BytesIO(b"caf\xe9\n"), encoding="utf-8", errors="surrogateescape")
    for said in (strict, lax):
        code, out, err = talk(captioner(), said, monkeypatch, capsys)
        assert (code, out) == (2, "")
        assert err.startswith("openblip2: standard input is not text: ")
        assert err.count("\n") == 1
