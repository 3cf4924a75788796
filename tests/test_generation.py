"""Generation against loops over full forward passes, and with models whose logits are constant."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import tiny_models
from openblip2.errors import UserError
from openblip2.model.language import DecoderLM, Decoding, LanguageModel
from openblip2.model.likelihood import likelihoods, text_logprobs, token_scores, word_scores
from openblip2.model.load import load_language
from tiny import Q
from tiny_models import EOS, NEWLINE, PAD, WORDS, L, W, constant, embed, ids, language, soft_prompts

PROMPTS = ["", "a photo of", "question: what is it answer:"]
ROWS = {
    "decoder": ["<s>", "<s>|a| photo| of", "<s>|question:| what| is| it| answer:"],
    "encoder": ["</s>", "a| photo| of|</s>", "question:| what| is| it| answer:|</s>"],
}
# Settings that a `generation_config.json` may hold; each of them changes a text.
OWN: dict[str, Any] = {
    "repetition_penalty": 5.0,
    "top_k": 1,
    "temperature": 0.01,
    "no_repeat_ngram_size": 1,
    "min_length": 40,
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 8,
    "suppress_tokens": list(range(10, 30)),
    "begin_suppress_tokens": list(range(30, 40)),
    "bad_words_ids": [[n] for n in range(40, 50)],
    "max_length": 3,
    "early_stopping": True,
    "do_sample": True,
    "cache_implementation": "static",
}
GREEDY = Decoding(max_new_tokens=8, min_new_tokens=0, beams=1)


def next_logits(llm: Any, before: Tensor, written: list[int]) -> Tensor:
    """One full forward pass over one text: `[W]`."""
    if llm.config.is_encoder_decoder:
        return llm(inputs_embeds=before[None], decoder_input_ids=torch.tensor([[PAD, *written]])).logits[0, -1]
    return llm(inputs_embeds=torch.cat([before, embed(llm, written)])[None]).logits[0, -1]


def contexts(lm: LanguageModel, soft: Tensor) -> list[Tensor]:
    rows = ROWS["decoder" if isinstance(lm, DecoderLM) else "encoder"]
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
    """Doubles the output weights of a word, so that it is sometimes the most likely and some texts end early."""
    head: Any = llm.get_output_embeddings()
    head.weight.data[word] *= 2
    return llm


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "end"), [("t5", None), *((kind, end) for kind in tiny_models.DECODERS for end in (None, "\n"))]
)
def test_greedy_is_the_argmax_of_the_forward_pass(kind: str, end: str | None) -> None:
    stop = EOS if end is None else NEWLINE
    lm = language(kind, favour(tiny_models.MODELS[kind](), stop), end=end)
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
    """With as many beams as words, two steps prune nothing: the result is the best of all 60 x 60 texts."""
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
    """The length of the prompt does not count. Without limits, the text would end at once or never."""
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
    for penalty, dogs in ((-1.0, 1), (5.0, 5)):  # the sixth token is the end token
        how = Decoding(max_new_tokens=6, beams=3, length_penalty=penalty)
        assert lm.generate(soft_prompts(1), [""], how) == [" ".join(["dog"] * dogs)]
    # Logits of written words are divided by 1.25: dog 2.0, cat 1.9, then bus 1.7 against dog 1.6, then dog 1.6.
    lm = constant("gpt2", (" dog", 2.0), (" cat", 1.9), (" bus", 1.7))
    how = Decoding(max_new_tokens=4, beams=1, repetition_penalty=1.25)
    assert lm.generate(soft_prompts(1), [""], how) == ["dog cat bus dog"]


def test_the_repetition_penalty_counts_written_words_alone() -> None:
    """Words of the prompt do not count, nor does the start token of an encoder-decoder."""
    for kind in tiny_models.MODELS:
        lm: Any = constant(kind, (" dog", 2.0), (" cat", 1.9), (" bus", 1.7))
        lm.llm.config.decoder_start_token_id = lm.llm.generation_config.decoder_start_token_id = WORDS.index(" dog")
        how = Decoding(max_new_tokens=4, beams=1, repetition_penalty=1.25)
        start = "dog " if kind == "t5" else ""
        assert lm.generate(soft_prompts(1), ["a dog dog"], how) == [f"{start}dog cat bus dog"]


@torch.no_grad()
@pytest.mark.parametrize("kind", tiny_models.MODELS)
def test_a_text_of_a_seed_does_not_depend_on_its_batch(kind: str) -> None:
    lm, soft = language(kind), soft_prompts()
    how = Decoding(max_new_tokens=7, beams=1, sample=True, seed=4)
    together = lm.generate(soft, PROMPTS, how)
    torch.manual_seed(1)  # has no effect
    assert together == [lm.generate(soft[n : n + 1], PROMPTS[n : n + 1], how)[0] for n in range(3)]
    assert together != lm.generate(soft, PROMPTS, replace(how, seed=5))
    assert together != lm.generate(soft, PROMPTS, GREEDY)


@torch.no_grad()
@pytest.mark.parametrize("kind", tiny_models.MODELS)
def test_the_log_probability_of_a_text_is_the_sum_over_its_tokens_and_its_end(kind: str) -> None:
    lm, soft = language(kind), soft_prompts()
    row = ids(" a| dog| cat|</s>" if isinstance(lm, DecoderLM) else "a| dog| cat|</s>")
    before = contexts(lm, soft)[2]
    logs = [next_logits(lm.llm, before, row[:n]).log_softmax(0)[token] for n, token in enumerate(row)]
    found = text_logprobs(lm, soft[2:], PROMPTS[2], ["dog", "a dog cat"])
    torch.testing.assert_close(found[1], torch.stack(logs).sum())


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
    lm = constant("gpt2", (" dog", 7.0), (" cat", 6.0), (" bus", 5.0))  # 0.64, 0.24, 0.09; the rest for other words
    words = sampled(lm, Decoding(max_new_tokens=10, beams=1, sample=True, top_p=0.8))
    assert words.keys() == {"dog", "cat"}
    assert words["dog"] / words["cat"] == pytest.approx(2.718, rel=0.25)
    cold = sampled(lm, Decoding(max_new_tokens=10, beams=1, sample=True, top_p=1.0, temperature=0.1))
    assert cold["dog"] > 990


def test_sampling_has_no_other_limit() -> None:
    """With `top_p` 1, all 56 words can be sampled; the default of transformers keeps only the 50 most likely tokens."""
    spaced = [word for word in WORDS if word.startswith(" ")]
    assert len(spaced) == 28
    lm = constant("gpt2", *((word, -n / 1000) for n, word in enumerate(WORDS[5:])))
    words = sampled(lm, Decoding(max_new_tokens=15, beams=1, sample=True, top_p=1.0))
    written = " ".join(words)
    assert all(word in f" {written}" for word in spaced)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_settings_in_a_language_models_folder_change_nothing(kind: str, tmp_path: Path) -> None:
    """Only `Decoding` counts, and there is no message about the settings that it overrides."""
    texts = {}
    for name in ("plain", "own"):
        tiny_models.MODELS[kind]().save_pretrained(tmp_path / name)
        tiny_models.tokenizer().save_pretrained(tmp_path / name)
        path = tmp_path / name / "generation_config.json"
        if name == "own":
            path.write_text(json.dumps(json.loads(path.read_text()) | OWN))
        written = path.read_bytes()
        lm = load_language(str(tmp_path / name))
        soft = soft_prompts()
        texts[name] = []
        for how in (Decoding(beams=1), Decoding(beams=3), Decoding(beams=1, sample=True, top_p=1.0)):
            torch.manual_seed(0)
            texts[name] += lm.generate(soft, PROMPTS, how)
        assert path.read_bytes() == written
    assert texts["own"] == texts["plain"]


def test_a_text_beyond_the_context_has_no_likelihood() -> None:
    lm, soft = language("opt"), soft_prompts(1)  # 50 positions: <s>, Q soft tokens, the words; the end is no input
    longest = "dog" + " dog" * (50 - 1 - Q - 1)
    assert text_logprobs(lm, soft, "", [longest]).isfinite().all()
    for longer in (f"{longest} dog", "dog " * 200):
        for read in (text_logprobs, likelihoods):
            with pytest.raises(UserError, match=r"text 'dog .* takes \d+ tokens.* only 45 fit.*give a shorter text"):
                read(lm, soft, "", ["dog", longer])
        for read in (word_scores, token_scores):
            with pytest.raises(UserError, match="give a shorter text"):
                read(lm, soft, "", longer)
    with pytest.raises(UserError, match="give a shorter text"):
        text_logprobs(lm, soft, "dog " * 60, ["dog"])
