"""Language models behind a soft prompt, against sequences that are spelled out by hand, one at a time."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import tiny_models
from openblip2.errors import UserError
from openblip2.model.language import (
    IGNORED,
    DecoderLM,
    Decoding,
    EncoderDecoderLM,
    LanguageModel,
    load_language,
    resolve_template,
    split_caption,
)
from tiny_models import EOS, NEWLINE, PAD, WORDS, L, W, ids

Q = 5
# Captions so short that an encoder-decoder can split them in one way only.
PROMPTS = ["", "a photo of", "question: what is it answer:"]
CAPTIONS = ["a red dog", "small bird", "tree"]
# What stands behind the soft tokens of a decoder and what it has to write.
DECODER_ROWS = [
    ("<s>", "a| red| dog|</s>"),
    ("<s>|a| photo| of", " small| bird|</s>"),
    ("<s>|question:| what| is| it| answer:", " tree|</s>"),
]
# The same of an encoder-decoder, whose encoder has the first half of the caption.
ENCODER_ROWS = [
    ("a|</s>", "red| dog|</s>"),
    ("a| photo| of| small|</s>", "bird|</s>"),
    ("question:| what| is| it| answer:|</s>", "tree|</s>"),
]
GENERATION_ROWS = {
    "decoder": ["<s>", "<s>|a| photo| of", "<s>|question:| what| is| it| answer:"],
    "encoder": ["</s>", "a| photo| of|</s>", "question:| what| is| it| answer:|</s>"],
}
GREEDY = Decoding(max_new_tokens=8, min_new_tokens=0, beams=1)
PLAIN = torch.tensor([-50.0] * 5 + [0.0] * (W - 5))  # logits: any word, but nothing special


def language(kind: str, llm: PreTrainedModel | None = None, **options: Any) -> LanguageModel:
    llm = tiny_models.MODELS[kind]() if llm is None else llm
    if kind == "t5":
        return EncoderDecoderLM(llm, tiny_models.tokenizer(bos=None), **options)
    return DecoderLM(llm, tiny_models.tokenizer(), **options)


def constant(kind: str, *words: tuple[str, float], **options: Any) -> LanguageModel:
    """One that has the same logits at every position, whatever it reads: those given, and 0 for other words."""
    logits = PLAIN.clone()
    for word, logit in words:
        logits[WORDS.index(word)] = logit
    return language(kind, tiny_models.always(tiny_models.MODELS[kind](), logits), **options)


def soft_prompts(count: int = 3) -> Tensor:
    return 0.5 * torch.randn(count, Q, L, generator=torch.Generator().manual_seed(0))


def embed(llm: PreTrainedModel, words: list[int]) -> Tensor:
    embeddings: Any = llm.get_input_embeddings()
    return embeddings(torch.tensor(words, dtype=torch.long))


def own_loss(llm: Any, before: Tensor, target: list[int]) -> Tensor:
    """The language model's own mean loss of one target behind `before [n, L]`."""
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
    assert_same_loss(lm.loss(soft, PROMPTS, CAPTIONS), weighted_mean(lm.llm, soft, rows), soft)


@pytest.mark.parametrize("kind", tiny_models.MODELS)
def test_right_padding_changes_nothing(kind: str) -> None:
    """A short caption loses the same alone and beside long ones."""
    lm, soft = language(kind), soft_prompts().requires_grad_()
    together = lm.loss(soft, PROMPTS, CAPTIONS)
    tails = [len(ids(row[1])) for row in (ENCODER_ROWS if kind == "t5" else DECODER_ROWS)]
    alone = [lm.loss(soft[n : n + 1], [PROMPTS[n]], [CAPTIONS[n]]) * tails[n] for n in range(3)]
    assert_same_loss(together, torch.stack(alone).sum() / sum(tails), soft)


def test_text_in_front_of_the_image() -> None:
    lm, soft = language("llama", template="{bos}user{image} {prompt}"), soft_prompts(2).requires_grad_()
    rows = [(" a| photo| of", " small| bird|</s>"), (" what| is| it", " tree|</s>")]
    ours = lm.loss(soft, ["a photo of", "what is it"], CAPTIONS[1:])
    assert_same_loss(ours, weighted_mean(lm.llm, soft, rows, heads="<s>|user"), soft)


def test_a_prompt_that_ends_in_space_adds_none() -> None:
    lm, soft = language("gpt2"), soft_prompts(1).requires_grad_()
    ours = lm.loss(soft, ["it\n"], ["a dog"])
    assert_same_loss(ours, weighted_mean(lm.llm, soft, [("<s>|it|\n", "a| dog|</s>")]), soft)


def test_opt_ends_captions_with_a_new_line() -> None:
    lm, soft = language("opt", end="\n"), soft_prompts(2).requires_grad_()
    rows = [("<s>", "a| dog|\n"), ("<s>", "tree|\n")]
    assert_same_loss(lm.loss(soft, ["", ""], ["a dog", "tree"]), weighted_mean(lm.llm, soft, rows), soft)
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
    # The caption is a turn of its own: no space in front of it. "[{it}]" is no word of this tokenizer.
    rows = [
        ("a| photo| it|</s>|\n|<s>|turn|<unk>|\n", "tree|</s>"),
        (" it|</s>|\n|<s>|turn|<unk>|\n", "a| dog|</s>"),
    ]
    ours = lm.loss(soft, ["a photo", ""], ["tree", "a dog"])
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
    # "{it}" is no word of this tokenizer, neither in the template nor in a prompt.
    naive = weighted_mean(lm.llm, soft, [("<unk>", " tree|</s>")], heads="<unk>")
    assert_same_loss(lm.loss(soft, ["{it}"], ["tree"]), naive, soft)


def test_chat_without_a_chat_template_is_refused() -> None:
    words = tiny_models.tokenizer()
    with pytest.raises(UserError, match="no chat template"):
        resolve_template("chat", words)
    words.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(UserError, match="chat"):
        resolve_template("chat", words)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(UserError, match=r"no end-of-sequence token: set language\.end"):
        DecoderLM(tiny_models.gpt2(), tiny_models.tokenizer(eos=None))


# Generation.


def next_logits(llm: Any, before: Tensor, written: list[int]) -> Tensor:
    """One full forward pass over one text: `[W]`."""
    if llm.config.is_encoder_decoder:
        return llm(inputs_embeds=before[None], decoder_input_ids=torch.tensor([[PAD, *written]])).logits[0, -1]
    return llm(inputs_embeds=torch.cat([before, embed(llm, written)])[None]).logits[0, -1]


def contexts(lm: LanguageModel, soft: Tensor) -> list[Tensor]:
    rows = GENERATION_ROWS["decoder" if isinstance(lm, DecoderLM) else "encoder"]
    return [torch.cat([one, embed(lm.llm, ids(row))]) for one, row in zip(soft, rows, strict=True)]


def greedy(lm: LanguageModel, before: Tensor, stop: int) -> list[int]:
    written: list[int] = []
    while len(written) < GREEDY.max_new_tokens:
        word = int(next_logits(lm.llm, before, written).argmax())
        if word == stop:
            break
        written.append(word)
    return written


def favour(llm: PreTrainedModel, word: int) -> PreTrainedModel:
    """Makes a word the likeliest one now and then, so that some texts end early."""
    head: Any = llm.get_output_embeddings()
    head.weight.data[word] *= 2
    return llm


@torch.no_grad()
@pytest.mark.parametrize("kind", tiny_models.MODELS)
@pytest.mark.parametrize("end", [None, "\n"])
def test_greedy_is_the_argmax_of_the_forward_pass(kind: str, end: str | None) -> None:
    stop = EOS if end is None or kind == "t5" else NEWLINE
    lm = language(kind, favour(tiny_models.MODELS[kind](), stop), end=None if kind == "t5" else end)
    lengths, texts = set(), []
    for seed in range(4):
        soft = torch.randn(3, Q, L, generator=torch.Generator().manual_seed(seed))
        written = [greedy(lm, before, stop) for before in contexts(lm, soft)]
        expected = [lm.tokenizer.decode(row, skip_special_tokens=True).strip() for row in written]  # pyright: ignore
        assert lm.generate(soft, PROMPTS, GREEDY) == expected
        lengths |= {len(row) for row in written}
        texts += expected
    assert GREEDY.max_new_tokens in lengths
    assert len(lengths) > 1, "no text ended early"
    assert len(set(texts)) > 4, "the soft prompt says nothing"


@torch.no_grad()
@pytest.mark.parametrize("kind", tiny_models.MODELS)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_is_its_single_images(kind: str, beams: int) -> None:
    lm, soft = language(kind), soft_prompts()
    how = Decoding(max_new_tokens=7, beams=beams)
    together = lm.generate(soft, PROMPTS, how)
    assert together == [lm.generate(soft[n : n + 1], PROMPTS[n : n + 1], how)[0] for n in range(3)]
    assert len(set(together)) == 3


@torch.no_grad()
@pytest.mark.parametrize("kind", tiny_models.MODELS)
def test_enough_beams_find_the_best_text(kind: str) -> None:
    """With as many beams as words nothing is pruned in two steps: the best of all 60 x 60 texts."""
    lm, soft = language(kind), soft_prompts()
    found = lm.generate(soft, PROMPTS, Decoding(max_new_tokens=2, min_new_tokens=2, beams=W))
    for text, before in zip(found, contexts(lm, soft), strict=True):
        first = next_logits(lm.llm, before, []).log_softmax(0)
        second = torch.stack([next_logits(lm.llm, before, [word]).log_softmax(0) for word in range(W)])
        scores = first[:, None] + second
        scores[EOS], scores[:, EOS] = -torch.inf, -torch.inf
        best = divmod(int(scores.argmax()), W)
        assert text == lm.tokenizer.decode(best, skip_special_tokens=True).strip()  # pyright: ignore


@pytest.mark.parametrize("kind", tiny_models.MODELS)
@pytest.mark.parametrize("beams", [1, 4])
def test_lengths_count_new_tokens_only(kind: str, beams: int) -> None:
    """However long the prompt is. The text would end at once, or never, if it were free to."""
    ends, goes_on = constant(kind, ("</s>", 30.0), (" dog", 15.0)), constant(kind, (" dog", 30.0))
    prompts, soft = ["", "a photo of a small bird on the grass left of the tree"], soft_prompts(2)
    for least in (1, 4):
        how = Decoding(max_new_tokens=9, min_new_tokens=least, beams=beams, length_penalty=0.0)
        assert ends.generate(soft, prompts, how) == [" ".join(["dog"] * least)] * 2
    for most in (1, 6):
        how = Decoding(max_new_tokens=most, beams=beams)
        assert goes_on.generate(soft, prompts, how) == [" ".join(["dog"] * most)] * 2


def test_penalties_reach_the_model() -> None:
    lm = constant("gpt2", ("</s>", 20.1), (" dog", 20.0))
    for penalty, dogs in ((-1.0, 1), (5.0, 5)):  # the sixth token is the end
        how = Decoding(max_new_tokens=6, beams=3, length_penalty=penalty)
        assert lm.generate(soft_prompts(1), [""], how) == [" ".join(["dog"] * dogs)]
    # Divided by 1.25 when written before: dog 2.0, cat 1.9, then dog 1.6 against bus 1.7, then dog 1.6.
    lm = constant("gpt2", (" dog", 2.0), (" cat", 1.9), (" bus", 1.7))
    how = Decoding(max_new_tokens=4, beams=1, repetition_penalty=1.25)
    assert lm.generate(soft_prompts(1), [""], how) == ["dog cat bus dog"]


def test_sampling_is_reproducible() -> None:
    lm, soft = language("llama"), soft_prompts()
    how = Decoding(max_new_tokens=6, beams=1, sample=True)
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(lm.generate(soft, PROMPTS, how))
    assert texts[0] == texts[1] != texts[2]


def sampled(lm: LanguageModel, how: Decoding) -> Counter[str]:
    torch.manual_seed(0)
    texts = lm.generate(soft_prompts(100), [""] * 100, how)
    return Counter(word for text in texts for word in text.split())


def test_the_nucleus_is_sampled_and_nothing_else() -> None:
    lm = constant("gpt2", (" dog", 7.0), (" cat", 6.0), (" bus", 5.0))  # 0.64, 0.24, 0.09, and the rest
    words = sampled(lm, Decoding(max_new_tokens=10, beams=1, sample=True, top_p=0.8))
    assert words.keys() == {"dog", "cat"}
    assert words["dog"] / words["cat"] == pytest.approx(2.718, rel=0.25)
    cold = sampled(lm, Decoding(max_new_tokens=10, beams=1, sample=True, top_p=1.0, temperature=0.1))
    assert cold["dog"] > 990


def test_sampling_has_no_other_limit() -> None:
    """With `top_p` 1 all 56 words have their chance; transformers by itself cuts to the 50 likeliest."""
    spaced = [word for word in WORDS if word.startswith(" ")]
    assert len(spaced) == 28
    lm = constant("gpt2", *((word, -n / 1000) for n, word in enumerate(WORDS[5:])))
    words = sampled(lm, Decoding(max_new_tokens=15, beams=1, sample=True, top_p=1.0))
    written = " ".join(words)
    assert all(word in f" {written}" for word in spaced)


# Frozen, loaded, split.


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
    assert torch.equal(loaded.loss(soft, PROMPTS, CAPTIONS), lm.loss(soft, PROMPTS, CAPTIONS))
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


def test_captions_are_split_from_the_first_word_to_the_middle() -> None:
    torch.manual_seed(0)
    for words in (2, 3, 6, 9):
        caption = " ".join(str(n) for n in range(words))
        draws = 3000
        lengths = Counter()
        for _ in range(draws):
            prefix, suffix = split_caption(caption)
            assert f"{prefix} {suffix}" == caption
            lengths[len(prefix.split())] += 1
        assert sorted(lengths) == list(range(1, words // 2 + 1))
        even = draws / (words // 2)
        assert all(abs(count - even) < 5 * even**0.5 for count in lengths.values())


def test_a_word_alone_is_not_split() -> None:
    assert split_caption("dog") == ("", "dog")
    assert split_caption("a  dog ") == ("a", "dog")
