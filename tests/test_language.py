"""Language models with a soft prompt, against sequences that are built by hand, one at a time."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import tiny_models
from openblip2.errors import UserError
from openblip2.model import prompt_cache
from openblip2.model.decoding import try_generation
from openblip2.model.language import (
    IGNORED,
    DecoderLM,
    Decoding,
    split_caption,
)
from openblip2.model.load import load_language
from openblip2.model.template import dialogue, resolve_template
from openblip2.model.token_rows import SOFT, _cut, fit_rows, require_room
from openblip2.presets import with_examples
from tiny import Q
from tiny_models import LM_HEADS, NEWLINE, L, W, constant, embed, ids, language, soft_prompts

# These captions are so short that an encoder-decoder can split them in only one way.
PROMPTS = ["", "a photo of", "question: what is it answer:"]
CAPTIONS = ["a red dog", "small bird", "tree"]
# For a decoder: the tokens after the soft prompt, and the target.
DECODER_ROWS = [
    ("<s>", "a| red| dog|</s>"),
    ("<s>|a| photo| of", " small| bird|</s>"),
    ("<s>|question:| what| is| it| answer:", " tree|</s>"),
]
# The same for an encoder-decoder, whose encoder reads the first half of the caption.
ENCODER_ROWS = [
    ("a|</s>", "red| dog|</s>"),
    ("a| photo| of| small|</s>", "bird|</s>"),
    ("question:| what| is| it| answer:|</s>", "tree|</s>"),
]


def own_loss(llm: Any, before: Tensor, target: list[int]) -> Tensor:
    """The language model's own mean loss for one target after `before [n, L]`."""
    if llm.config.is_encoder_decoder:
        return llm(inputs_embeds=before[None], labels=torch.tensor([target])).loss
    embeds = torch.cat([before, embed(llm, target)])[None]
    return llm(inputs_embeds=embeds, labels=torch.tensor([[IGNORED] * len(before) + target])).loss


def weighted_mean(llm: Any, soft: Tensor, rows: list[tuple[str, str]], heads: str = "") -> Tensor:
    total, count = torch.tensor(0.0), 0
    for one, (after, target) in zip(soft, rows, strict=True):
        before = torch.cat([embed(llm, ids(heads)), one, embed(llm, ids(after))])
        total = total + own_loss(llm, before, ids(target)) * len(ids(target))
        count += len(ids(target))
    return total / count


def assert_same_loss(mine: Tensor, naive: Tensor, soft: Tensor) -> None:
    torch.testing.assert_close(mine, naive, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(loss, soft)[0] for loss in (mine, naive)]
    assert gradients[1].abs().amax(dim=(1, 2)).min() > 1e-3
    scale = gradients[1].abs().max()
    torch.testing.assert_close(gradients[0] / scale, gradients[1] / scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", tiny_models.MODELS)
def test_loss_is_the_models_own(kind: str) -> None:
    lm, soft = language(kind), soft_prompts().requires_grad_()
    rows = ENCODER_ROWS if kind == "t5" else DECODER_ROWS
    assert_same_loss(lm.scored(soft, PROMPTS, CAPTIONS)[0], weighted_mean(lm.llm, soft, rows), soft)


@pytest.mark.parametrize("kind", tiny_models.MODELS)
def test_right_padding_changes_nothing(kind: str) -> None:
    """A short caption has the same loss alone and in a batch with long ones."""
    lm, soft = language(kind), soft_prompts().requires_grad_()
    together = lm.scored(soft, PROMPTS, CAPTIONS)[0]
    tails = [len(ids(row[1])) for row in (ENCODER_ROWS if kind == "t5" else DECODER_ROWS)]
    alone = [lm.scored(soft[n : n + 1], [PROMPTS[n]], [CAPTIONS[n]])[0] * tails[n] for n in range(3)]
    assert_same_loss(together, torch.stack(alone).sum() / sum(tails), soft)


@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama", "t5"])
def test_a_text_beyond_what_fits_is_cut_and_counted(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """OPT and GPT-2 have 50 positions; for the others, the rows would have thousands of tokens."""
    _cut.clear()
    model, soft = language(kind), soft_prompts(3)
    long = f"{kind} " + "dog " * 5000
    for prompts, captions in (
        (["", "", "a photo of"], [long, "tree", long]),
        ([long, "", long], ["tree", "tree", long]),
    ):
        for _ in range(2):
            assert torch.isfinite(model.scored(soft, prompts, captions)[0])
    said = [record.getMessage() for record in caplog.records if "cut (" in record.getMessage()]
    assert len(said) == len(set(said)) == 4
    assert all(re.search(f"'(a photo of ?)?{kind} dog", line) for line in said)
    caplog.clear()
    heads, tails = fit_rows(model, ["", long, "a photo of"], ["a red dog", "a red dog", long], Q)
    assert (heads[0], tails[0]) == (model._head("", Q), model._caption("", "a red dog"))
    assert all(tail[-len(model.end) :] == model.end and len(tail) > len(model.end) for tail in tails)
    if kind in ("opt", "gpt2"):
        assert max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True)) == 50
    assert [head.count(SOFT) for head in heads] == [Q] * 3


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
def test_a_prompt_beyond_what_fits_is_refused(kind: str) -> None:
    model = language(kind)
    fits = 50 - Q - 4 - model.length("")
    assert require_room(model, "dog" + " dog" * (fits - 1), Q, 4) == 50 - Q - 4
    model.generate(
        soft_prompts(1), ["dog" + " dog" * (fits - 1)], Decoding(max_new_tokens=4, min_new_tokens=4, beams=1)
    )
    with pytest.raises(
        UserError, match=rf"'dog dog.*takes {51 - Q - 4} tokens .* only {50 - Q - 4} fit .*context of 50"
    ):
        require_room(model, "dog" + " dog" * fits, Q, 4)


def test_text_in_front_of_the_image() -> None:
    lm, soft = language("llama", template="{bos}user{image} {prompt}"), soft_prompts(2).requires_grad_()
    rows = [(" a| photo| of", " small| bird|</s>"), (" what| is| it", " tree|</s>")]
    ours = lm.scored(soft, ["a photo of", "what is it"], CAPTIONS[1:])[0]
    assert_same_loss(ours, weighted_mean(lm.llm, soft, rows, heads="<s>|user"), soft)


@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama"])
@pytest.mark.parametrize("prompts", [["", ""], ["it", "it red"]])
def test_text_that_all_rows_begin_with_is_read_once(
    kind: str, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, captions = language(kind, template="a cat on it {image}{prompt} a"), ["cat", "a red mat"]
    losses, gradients, texts = [], [], []
    for shared in (True, False):
        if not shared:
            monkeypatch.setattr("openblip2.model.language.common_text", lambda heads: [])
        soft = soft_prompts(2).requires_grad_()
        losses.append(lm.scored(soft, prompts, captions)[0])
        gradients.append(torch.autograd.grad(losses[-1], soft)[0])
        texts.append([lm.generate(soft, prompts, Decoding(max_new_tokens=8, beams=beams)) for beams in (1, 3)])
    assert texts[0] == texts[1]
    assert torch.allclose(losses[0], losses[1], atol=1e-5)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)


def test_one_reading_of_the_text_in_front_serves_validation_and_training(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, captions = language("llama", template="a cat on {prompt}{image}"), ["cat", "a red mat"]
    read: list[list[int]] = []
    read_text = prompt_cache.read_text
    monkeypatch.setattr(prompt_cache, "read_text", lambda llm, text: read.append(text) or read_text(llm, text))
    with torch.inference_mode():
        validated = lm.scored(soft_prompts(2), ["it", "it"], captions)[0]
    trained = []
    for _ in range(2):  # the second step must not see what the first appended to the cache
        soft = soft_prompts(2).requires_grad_()
        trained.append(lm.scored(soft, ["it", "it"], captions)[0])
        assert torch.autograd.grad(trained[-1], soft)[0].abs().max() > 1e-3
    assert torch.equal(trained[0], trained[1])
    torch.testing.assert_close(trained[0], validated)  # without gradients, attention has another kernel
    assert len(read) == 1
    lm.scored(soft_prompts(2), ["red", "red"], captions)
    assert len(read) == 2
    assert read[0] != read[1]
    lm.llm.load_state_dict(lm.llm.state_dict())
    lm.scored(soft_prompts(2), ["red", "red"], captions)
    assert read[1] == read[2]


def test_examples_stand_in_front_of_the_template() -> None:
    template = with_examples("U {image}{prompt} A ", [("cat {red}", "", "a cat"), ("mat", " Q", "no")], ".")
    assert template == "U cat {{red}} A a cat.U mat Q A no.U {image}{prompt} A "
    assert resolve_template(template, tiny_models.tokenizer()) == template


def test_a_prompt_that_ends_in_space_adds_none() -> None:
    lm, soft = language("gpt2"), soft_prompts(1).requires_grad_()
    ours = lm.scored(soft, ["it\n"], ["a dog"])[0]
    assert_same_loss(ours, weighted_mean(lm.llm, soft, [("<s>|it|\n", "a| dog|</s>")]), soft)


def test_opt_ends_captions_with_a_new_line() -> None:
    lm, soft = language("opt", end="\n"), soft_prompts(2).requires_grad_()
    rows = [("<s>", "a| dog|\n"), ("<s>", "tree|\n")]
    assert_same_loss(lm.scored(soft, ["", ""], ["a dog", "tree"])[0], weighted_mean(lm.llm, soft, rows), soft)
    stops = constant("opt", ("\n", 9.0), (" dog", 5.0), ("</s>", 7.0), end="\n")
    assert stops.generate(soft, ["", "a photo of"], Decoding(beams=1, min_new_tokens=0)) == ["", ""]
    stops = constant("opt", ("\n", 9.0), (" dog", 5.0), end="\n")
    assert stops.generate(soft, ["", "it"], Decoding(beams=1, min_new_tokens=2)) == ["dog dog"] * 2


CHAT = """{% for turn in messages %}<s>{{ turn['role'] }} {{ turn['content'] }}</s>
{% endfor %}{% if add_generation_prompt %}<s>turn [{it}]
{% endif %}"""


def test_chat_template() -> None:
    words = tiny_models.tokenizer()
    words.chat_template = CHAT
    assert resolve_template("chat", words) == "<s>user {image}{prompt}</s>\n<s>turn [{{it}}]\n"
    words.chat_template = CHAT.replace("{{ turn['content'] }}", " {{ turn['content'] }} it")
    lm, soft = DecoderLM(tiny_models.llama(), words, "chat"), soft_prompts(2).requires_grad_()
    # The caption is a turn of its own, so no space precedes it. "[{it}]" is not a word of this tokenizer.
    rows = [
        ("a| photo| it|</s>|\n|<s>|turn|<unk>|\n", "tree|</s>"),
        (" it|</s>|\n|<s>|turn|<unk>|\n", "a| dog|</s>"),
    ]
    ours = lm.scored(soft, ["a photo", ""], ["tree", "a dog"])[0]
    naive = weighted_mean(lm.llm, soft, rows, heads="<s>|user|<unk>")
    assert_same_loss(ours, naive, soft)


NO_SLOT = ("", "{prompt}", "{image}{image}", "{{image}}", "{{image}}{image}")
BAD_SLOT = ("{picture}{image}", "{image}{}", "{0}{image}", "{image", "{image}}", "{image.x}", "{image!r}")
BAD_FORMAT = ("{image}{prompt[0]}", "{image}{prompt:>5}")


@pytest.mark.parametrize("template", [*NO_SLOT, *BAD_SLOT, *BAD_FORMAT])
def test_bad_templates_are_refused(template: str) -> None:
    with pytest.raises(UserError, match=r"template .*\{image\}") as caught:
        resolve_template(template, tiny_models.tokenizer())
    assert "\n" not in str(caught.value)
    assert repr(template) in str(caught.value)


def test_braces_may_stand_in_a_template() -> None:
    lm, soft = language("gpt2", template="{{it}}{image}{prompt}"), soft_prompts(1).requires_grad_()
    assert resolve_template("{{it}} {image}{bos}", lm.tokenizer) == "{{it}} {image}<s>"
    # "{it}" is not a word of this tokenizer, neither in the template nor in a prompt.
    naive = weighted_mean(lm.llm, soft, [("<unk>", " tree|</s>")], heads="<unk>")
    assert_same_loss(lm.scored(soft, ["{it}"], ["tree"])[0], naive, soft)


def test_chat_without_a_chat_template_is_refused() -> None:
    words = tiny_models.tokenizer()
    with pytest.raises(UserError, match="no chat template"):
        resolve_template("chat", words)
    words.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(UserError, match="chat"):
        resolve_template("chat", words)


@pytest.mark.parametrize(
    ("opens", "wanted"),
    [
        ("{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}", ""),  # as SmolLM3
        ("{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}", "<think>\n\n</think>\n\n"),  # Qwen3
        ("{% if thinking %}<think>{% else %}</think>{% endif %}", "</think>"),  # as DeepSeek-V3.1
        ("<think>\n", "<think>\n\n</think>\n\n"),  # as DeepSeek-R1, which has no switch
    ],
)
def test_a_chat_template_does_not_think(opens: str, wanted: str) -> None:
    words = tiny_models.tokenizer()
    words.chat_template = (
        "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}it "
        + opens
        + "{% endif %}"
    )
    resolved = resolve_template("chat", words)
    assert resolved == "<s>{image}{prompt}</s>it " + wanted
    turns = dialogue([("what", "red")], "where", "{}", resolved, words)
    assert turns == "what</s><s>red</s><s>where", "the chat template's own turns, too"


@pytest.mark.parametrize(
    "says", ["{{ raise_exception('a system message first') }}", "{{ nothing.in_it }}", "{% if %}", "{{ 1 / 0 }}"]
)
def test_a_chat_template_that_raises_is_one_line(says: str) -> None:
    words = tiny_models.tokenizer()
    words.chat_template = says
    with pytest.raises(
        UserError, match=r"chat template fails on a dialogue of length 1 .*language\.template"
    ) as caught:
        resolve_template("chat", words)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(UserError, match=r"no end-of-sequence token: set language\.end"):
        DecoderLM(tiny_models.gpt2(), tiny_models.tokenizer(eos=None))


def test_an_end_that_the_tokenizer_drops_is_refused() -> None:
    # SentencePiece tokenizers drop line breaks; without an end token, generation would run to the length limit.
    with pytest.raises(
        UserError, match=r"language\.end='\\u2028' is not a token .* set language\.end to another text, or to null"
    ):
        DecoderLM(tiny_models.MODELS["gpt2"](), tiny_models.tokenizer(), end="\u2028")


@pytest.mark.parametrize("kind", tiny_models.MODELS)
def test_it_is_frozen_and_in_eval_mode(kind: str) -> None:
    llm = tiny_models.MODELS[kind]().train().requires_grad_(True)
    lm = language(kind, llm)
    assert lm.width == L
    for _ in range(2):
        assert not any(p.requires_grad for p in lm.parameters())
        assert not any(module.training for module in lm.llm.modules())
        lm.train()


@pytest.mark.parametrize("kind", tiny_models.MODELS)
def test_load_language(kind: str, tmp_path: Path) -> None:
    lm, soft = language(kind), soft_prompts()
    lm.llm.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    loaded = load_language(str(tmp_path))
    assert type(loaded) is type(lm)
    assert torch.equal(loaded.scored(soft, PROMPTS, CAPTIONS)[0], lm.scored(soft, PROMPTS, CAPTIONS)[0])
    half = load_language(str(tmp_path), "{image}{prompt}", "\n", torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert (half.template, half.end) == ("{image}{prompt}", [NEWLINE])


def test_what_is_no_language_model_is_refused_in_one_line(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    names = ["empty", "vision", "damaged", "partial", "no-tokenizer"]
    for name in names[2:]:
        tiny_models.gpt2().save_pretrained(tmp_path / name)
        if name != "no-tokenizer":
            tiny_models.tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "empty").mkdir()
    tiny_models.vision().encoder.save_pretrained(tmp_path / "vision")
    tiny_models.tokenizer().save_pretrained(tmp_path / "vision")
    weights = load_file(tmp_path / "partial" / "model.safetensors")
    save_file(
        {n: tensor for n, tensor in weights.items() if "h.1.mlp" not in n},
        tmp_path / "partial" / "model.safetensors",
        {"format": "pt"},
    )
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"not weights")
    for name in (*(str(tmp_path / name) for name in [*names, "nowhere"]), "no/such-model"):
        with pytest.raises(UserError, match="cannot be loaded") as caught:
            load_language(name)
        assert repr(name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused(tmp_path: Path) -> None:
    words = tiny_models.tokenizer()
    words.add_tokens(["zebra"])
    tiny_models.gpt2().save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"{W + 1} tokens, but its embedding has {W} rows: .*resize_token_embeddings"):
        load_language(str(tmp_path))


@pytest.mark.parametrize("kind", tiny_models.MODELS)
def test_models_that_generate_from_embeddings_pass_the_trial(kind: str) -> None:
    try_generation(language(kind), Q, PROMPTS[0])


def test_a_model_that_cannot_generate_from_embeddings_is_refused() -> None:
    config = hf.OpenAIGPTConfig(**tiny_models.SHARED, n_embd=L, n_layer=2, n_head=LM_HEADS, n_positions=50)
    lm = DecoderLM(hf.OpenAIGPTLMHeadModel(config), tiny_models.tokenizer())
    assert lm.scored(soft_prompts(), PROMPTS, CAPTIONS)[0] > 0, "it can be trained with"
    with pytest.raises(UserError, match=r"OpenAIGPTLMHeadModel cannot generate .*language\.name") as caught:
        try_generation(lm, Q, PROMPTS[0])
    assert "\n" not in str(caught.value)


def test_captions_are_split_from_the_first_word_to_the_middle() -> None:
    torch.manual_seed(0)
    for words in (2, 3, 6, 9):
        caption = " ".join(str(n) for n in range(words))
        draws = 3000
        lengths = Counter()
        for _ in range(draws):
            prefix, suffix = split_caption(caption, torch.rand(()).item())
            assert f"{prefix} {suffix}" == caption
            lengths[len(prefix.split())] += 1
        assert sorted(lengths) == list(range(1, words // 2 + 1))
        even = draws / (words // 2)
        assert all(abs(count - even) < 5 * even**0.5 for count in lengths.values())


def test_a_word_alone_is_not_split() -> None:
    assert split_caption("dog", 0.9) == ("", "dog")
    assert split_caption("a  dog ", 0.9) == ("a", "dog")


def test_exact_gelu_is_the_authors_flant5(tmp_path: Path) -> None:
    tiny_models.t5().save_pretrained(tmp_path / "t5")
    tiny_models.tokenizer(bos=None).save_pretrained(tmp_path / "t5")
    plain, exact = (load_language(str(tmp_path / "t5"), exact_gelu=exact) for exact in (False, True))
    activations = [
        type(part.act) for lm in (plain, exact) for part in lm.llm.modules() if "GatedAct" in type(part).__name__
    ]
    half = len(activations) // 2
    assert {kind.__name__ for kind in activations[:half]} == {"NewGELUActivation"}
    assert {kind.__name__ for kind in activations[half:]} == {"GELUActivation"}
    exact.llm.save_pretrained(tmp_path / "again")
    tiny_models.tokenizer(bos=None).save_pretrained(tmp_path / "again")
    assert load_language(str(tmp_path / "again")).llm.config.dense_act_fn == "gelu"  # pyright: ignore
    tiny_models.llama().save_pretrained(tmp_path / "llama")
    tiny_models.tokenizer().save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="exact_gelu is for T5 models"):
        load_language(str(tmp_path / "llama"), exact_gelu=True)


def test_the_output_embedding_reads_rows_that_lie_side_by_side() -> None:
    """For a non-contiguous slice, a CPU would copy the embedding matrix for each row."""
    language = tiny_models.language("opt")
    head: Any = language.llm.get_output_embeddings()
    seen: list[tuple[bool, int]] = []
    head.register_forward_pre_hook(lambda module, given: seen.append((given[0].is_contiguous(), given[0].shape[1])))
    language.generate(tiny_models.soft_prompts(3), ["what is it"] * 3, Decoding(max_new_tokens=3, beams=2))
    assert seen
    assert all(contiguous and rows == 1 for contiguous, rows in seen)
