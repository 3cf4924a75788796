"""Prompts, pictures and image keys are computed once and shared, without changing a result."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image
from torch import Tensor, nn

import openblip2
import tiny
import tiny_blip2
import tiny_models
from openblip2.apps.bench.naive import naive_rerank
from openblip2.errors import UserError
from openblip2.evaluate.ranking import rerank
from openblip2.inference.captioner import Captioner
from openblip2.inference.matcher import Matcher
from openblip2.model.language import DecoderLM, Decoding, LanguageModel
from openblip2.model.prompt_cache import Growing, can_pad
from tiny import Q
from tiny_models import BOS, EOS, INNER, LM_HEADS, PAD, SHARED, L, language, soft_prompts

SIZES: dict[str, Any] = {"hidden_size": L, "num_hidden_layers": 2, "intermediate_size": INNER}
HEADS: dict[str, Any] = SIZES | {"num_attention_heads": LM_HEADS, "num_key_value_heads": 1, "head_dim": 4}
WINDOW = 6  # shorter than any prompt
TEMPLATE = "a photo{image} question: {prompt} answer:"
PROMPTS = ["is it a dog", "what", "what is it", "is it red and small", ""]
BEAMS = Decoding(max_new_tokens=7, min_new_tokens=0, beams=3)
GREEDY = Decoding(max_new_tokens=7, min_new_tokens=0, beams=1)


def mistral() -> Any:
    return hf.MistralForCausalLM(hf.MistralConfig(**SHARED, **HEADS, sliding_window=WINDOW))


def gemma2() -> Any:
    """One layer with a window and one without."""
    kinds = ["sliding_attention", "full_attention"]
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**SHARED, **HEADS, sliding_window=WINDOW, layer_types=kinds))


def gemma3() -> Any:
    kinds = ["sliding_attention", "full_attention"]
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SHARED, **HEADS, sliding_window=WINDOW, layer_types=kinds))


def bloom() -> Any:
    """Encodes positions as distances (ALiBi)."""
    return hf.BloomForCausalLM(hf.BloomConfig(**SHARED, hidden_size=L, n_layer=2, n_head=LM_HEADS))


def mpt() -> Any:
    """Encodes positions as distances (ALiBi), including padding."""
    config = hf.MptConfig(vocab_size=tiny_models.W, d_model=L, n_layers=2, n_heads=LM_HEADS, max_seq_len=64)
    return hf.MptForCausalLM(config)


def mamba() -> Any:
    """Has no keys and values."""
    return hf.MambaForCausalLM(hf.MambaConfig(**SHARED, hidden_size=L, num_hidden_layers=2, state_size=4))


def recurrent_gemma() -> Any:
    """Has a window of keys and values, and a recurrent state."""
    types = ["recurrent", "attention"]
    config = hf.RecurrentGemmaConfig(**SHARED, **HEADS, attention_window_size=64, block_types=types, lru_width=L)
    return hf.RecurrentGemmaForCausalLM(config)


def bart() -> Any:
    """Counts positions itself, including padding."""
    sizes: dict[str, Any] = {"d_model": L, "decoder_layers": 2, "decoder_ffn_dim": INNER}
    config = hf.BartConfig(**SHARED, **sizes, decoder_attention_heads=LM_HEADS, max_position_embeddings=50)
    return hf.BartForCausalLM(config)


OTHERS = {kind.__name__: kind for kind in (mistral, gemma2, gemma3, bloom, mpt, mamba, recurrent_gemma, bart)}
DECODERS = {**tiny_models.DECODERS, **OTHERS}
READ_AGAIN = ("mamba", "recurrent_gemma")  # their recurrent states cannot be reused
NO_GAPS = ("mistral", "gemma2", "gemma3", "bloom", "mpt", "bart")
NO_PADDING = ("bloom", "mpt", "mamba", "recurrent_gemma", "bart")  # prompts of different lengths are run singly


def decoder(kind: str, template: str = TEMPLATE) -> DecoderLM:
    llm = tiny_models.DECODERS[kind]() if kind in tiny_models.DECODERS else tiny.redraw(OTHERS[kind](), std=0.3)
    head: Any = llm.get_output_embeddings()
    head.weight.data[EOS] *= 1.5  # some texts end early
    return DecoderLM(llm, tiny_models.tokenizer(), template)


def plain(lm: DecoderLM, soft: Tensor, prompt: str, how: Decoding) -> str:
    """The output of transformers' own `generate` for one whole prompt, without reuse: `soft [Q, L]`."""
    before, after = lm.template.split("{image}")
    words: Any = lm.tokenizer
    ids = [words(part.format(prompt=prompt), add_special_tokens=False)["input_ids"] for part in (before, after)]
    row = torch.cat([tiny_models.embed(lm.llm, ids[0]), soft, tiny_models.embed(lm.llm, ids[1])])
    llm: Any = lm.llm
    found = llm.generate(
        inputs_embeds=row[None],
        attention_mask=torch.ones(1, len(row), dtype=torch.long),
        max_new_tokens=how.max_new_tokens,
        num_beams=how.beams,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=PAD,
        bos_token_id=BOS,
    )
    return words.batch_decode(found, skip_special_tokens=True)[0].strip()


@contextmanager
def reading(lm: LanguageModel) -> Iterator[list[int]]:
    """Records rows times tokens of every forward pass of the language model."""
    read: list[int] = []

    def count(module: nn.Module, given: tuple, named: dict) -> None:
        known = named.get("inputs_embeds")
        read.append((named["input_ids"] if known is None else known[..., 0]).numel())

    hook = lm.llm.register_forward_pre_hook(count, with_kwargs=True)
    yield read
    hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("how", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_texts_are_those_of_transformers_alone(kind: str, how: Decoding) -> None:
    """With prompts of different and of equal lengths, and with pictures that are copied or shared between prompts."""
    lm, soft = decoder(kind), soft_prompts(3)
    texts = set()
    for prompts in (PROMPTS, ["what is it", "is it red", "left of it", "what is it", "a blue bus"]):
        for about in ([0, 1, 2, 1, 0], [2, 2, 2, 2, 2]):
            expected = [plain(lm, soft[n], prompt, how) for n, prompt in zip(about, prompts, strict=True)]
            assert lm.generate(soft, prompts, how, about) == expected
            assert lm.generate(soft[about], prompts, how) == expected
            texts |= set(expected)
    assert len(texts) > 4, "neither prompts nor pictures say anything"


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in DECODERS if kind not in NO_PADDING])
def test_padding_changes_nothing_where_prompts_are_padded(kind: str) -> None:
    """Compares logits, because texts can be equal by chance. `test_who_is_not_padded` tests the other models."""
    assert padding_changes(decoder(kind)) < 1e-4


def padding_changes(lm: DecoderLM) -> float:
    """The largest change of the first token's logits in a batch with a longer prompt, in their standard deviations."""
    llm: Any = lm.llm

    def logits(prompts: list[str]) -> Tensor:
        embeds, mask = lm.embed(soft_prompts(1).repeat(len(prompts), 1, 1), prompts)
        how: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": PAD}
        found = llm.generate(
            inputs_embeds=embeds, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **how
        )
        return found.logits[0][0]

    alone = logits(["what"])
    return float((logits(["what", "is it red and small"]) - alone).abs().max() / alone.std())


@torch.no_grad()
def test_who_is_not_padded() -> None:
    assert [kind for kind in DECODERS if not can_pad(decoder(kind).llm)] == list(NO_PADDING)
    assert all(padding_changes(decoder(kind)) > 0.01 for kind in ("recurrent_gemma", "bart"))


def test_what_is_reused_of_whom(caplog: pytest.LogCaptureFixture) -> None:
    for kind in DECODERS:
        caplog.clear()
        reuse = decoder(kind).reuse
        assert reuse[:2] == (kind not in READ_AGAIN, kind not in (*READ_AGAIN, *NO_GAPS)), kind
        said = [record.getMessage() for record in caplog.records if "prompt reuse is off" in record.getMessage()]
        assert len(said) == (kind in READ_AGAIN), kind
        assert all("recurrent states" in line for line in said)


def test_a_fast_path_that_is_off_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Gemma 2 caps its logits, so the chunked loss cannot compute them with the output embedding alone."""
    soft = soft_prompts(2)
    assert decoder("opt").slow_paths() == []
    lm = decoder("gemma2")
    assert len(lm.slow_paths()) == 1
    caplog.clear()
    lm.scored(soft, ["", ""], ["a dog", "it is red"])[0]
    lm.scored(soft, ["", ""], ["a dog", "it is red"])[0]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"openblip2: {lm.slow_paths()[0]}"
    assert line.startswith("openblip2: chunked loss is off: Gemma2ForCausalLM ")
    assert [line.split(":")[0] for line in decoder("mamba").slow_paths()] == ["prompt reuse is off"]


@pytest.mark.parametrize("kind", ["opt", "llama", "gemma2"])
def test_a_prompt_is_read_once_for_all_beams(kind: str) -> None:
    lm, soft = decoder(kind), soft_prompts(2)
    one = Decoding(max_new_tokens=1, beams=3)
    with reading(lm) as read:
        lm.generate(soft, ["what is it"] * 2, one)
    # Reads "a photo" once, the soft tokens and " question: what is it" for both pictures, " answer:" for every beam.
    assert read == [2, 2 * (Q + 4), 2 * 3]


@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama"])
def test_a_picture_is_read_once_for_all_its_prompts(kind: str) -> None:
    lm, soft = decoder(kind), soft_prompts(2)
    with reading(lm) as read:
        lm.generate(soft, PROMPTS, Decoding(max_new_tokens=1, beams=1), [0, 1, 0, 0, 1])
    # The longest prompt is "is it red and small", followed by " answer:".
    assert read == [2, 2 * (Q + 1), 5 * 6]
    with reading(lm) as read:
        lm.generate(soft, PROMPTS, Decoding(max_new_tokens=1, beams=3), [0, 1, 0, 0, 1])
    assert read == [2 * (Q + 1), 5 * 5, 5 * 3]  # the text before all pictures is kept from the call before


def test_a_recurrent_model_reads_every_prompt_whole() -> None:
    lm, soft = decoder("mamba"), soft_prompts(2)
    with reading(lm) as read:
        lm.generate(soft, ["what is it"] * 2, Decoding(max_new_tokens=1, beams=1))
    assert read == [2 * (2 + Q + 5)]


@torch.no_grad()
@pytest.mark.parametrize("template", ["{image}{prompt}", "{prompt}{image}", "{image}", "a photo{image}"])
@pytest.mark.parametrize("how", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_wherever_the_picture_stands(template: str, how: Decoding) -> None:
    lm, soft = decoder("llama", template), soft_prompts(3)
    prompts, about = ["a dog", "a dog", "what is it", "a"], [1, 1, 0, 1]
    expected = [plain(lm, soft[n], prompt, how) for n, prompt in zip(about, prompts, strict=True)]
    assert lm.generate(soft, prompts, how, about) == expected


@torch.no_grad()
def test_an_encoder_decoder_with_beams() -> None:
    """Compares the texts with our preallocated cache and with transformers' own cache."""
    lm, soft = language("t5"), soft_prompts(3)
    own: Any = lm.llm
    found = lm.generate(soft, PROMPTS, BEAMS, [0, 1, 2, 1, 0])
    embeds, mask = lm.embed(soft[[0, 1, 2, 1, 0]], PROMPTS)
    theirs = own.generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=BEAMS.max_new_tokens, num_beams=3, eos_token_id=EOS
    )
    words: Any = lm.tokenizer
    assert found == [text.strip() for text in words.batch_decode(theirs, skip_special_tokens=True)]
    assert len(set(found)) > 2


def test_the_cache_is_transformers_own() -> None:
    """Compares it with transformers' copying layer: beams, reordering in a row, more tokens than there is room for."""
    random = torch.Generator().manual_seed(0)
    theirs = hf.cache_utils.DynamicLayer()
    read = [torch.randn(2, 3, 4, 5, generator=random) for _ in range(2)]
    theirs.update(*read)
    ours = Growing(2, theirs, 3)
    theirs.batch_repeat_interleave(3)
    for step in range(5):
        new = [torch.randn(6, 3, 1, 5, generator=random) for _ in range(2)]
        for mine, other in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(mine, other)
        order = torch.tensor([[0, 1, 2, 3, 4, 5], [2, 0, 0, 3, 5, 4], [1, 1, 1, 4, 4, 3]][step % 3])
        ours.reorder_cache(order)
        theirs.reorder_cache(order)  # pyright: ignore
        assert theirs.keys is not None
        assert torch.equal(ours.keys, theirs.keys)
        assert ours.get_seq_length() == theirs.get_seq_length() == 5 + step


# The captioner.
@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Captioner:
    folder = tiny_blip2.generator("llama", tmp_path_factory.mktemp("reuse") / "llama")
    found = openblip2.load(folder, device="cpu", precision="fp32")
    assert isinstance(found, Captioner)
    return found


@contextmanager
def seeing(model: nn.Module) -> Iterator[list[int]]:
    """Records the number of pictures in every forward pass of the image encoder."""
    seen: list[int] = []
    vision: Any = model.vision
    hook = vision.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    yield seen
    hook.remove()


def arrays(count: int) -> list[Any]:
    return list(tiny_models.pictures(count).permute(0, 2, 3, 1).numpy())


QUESTIONS = ["what is it", "is it red", "what", "is it a dog left of the tree", "two", "is it on the grass"]


@pytest.mark.parametrize("how", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_many_questions_about_one_picture(captioner: Captioner, how: Decoding) -> None:
    picture = arrays(3)[2]
    with seeing(captioner.model) as seen, reading(captioner.model.language) as read:
        found = captioner.ask(picture, QUESTIONS, how)
    assert seen == [1]
    assert read[0] == Q + 2  # the picture, "<s>" and "question:", in one row
    assert found == [captioner.answer([picture], [question], how)[0] for question in QUESTIONS]
    assert len(set(found)) > 2, "the questions say nothing"


@pytest.mark.parametrize("how", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_in_bf16_on_a_cpu_texts_do_not_depend_on_the_batch(captioner: Captioner, tmp_path: Path, how: Decoding) -> None:
    captioner.save_pretrained(tmp_path / "run", merge=True)
    half: Any = openblip2.load(tmp_path / "run", device="cpu", precision="bf16")
    pictures, questions = arrays(24), QUESTIONS * 4
    soft = torch.cat([half.soft_prompt([picture]) for picture in pictures])
    alone = [half.answer([picture], [asked], how)[0] for picture, asked in zip(pictures, questions, strict=True)]
    assert len(set(alone)) > 4, "neither pictures nor questions say anything"
    for size in (2, 7, 24):
        parts = [slice(start, start + size) for start in range(0, len(pictures), size)]
        assert torch.equal(torch.cat([half.soft_prompt(pictures[part]) for part in parts]), soft)
        assert [text for part in parts for text in half.answer(pictures[part], questions[part], how)] == alone
    for model, expected in ((half, [1, 1, 1]), (captioner, [3])):
        with seeing(model.model) as seen:
            model.caption(pictures[:3], decoding=how)
        assert seen == expected


def test_repeated_pictures_are_seen_once(captioner: Captioner, tmp_path: Path) -> None:
    first, second, third = arrays(3)
    path = tmp_path / "a.png"
    Image.fromarray(third).save(path)
    pictures = [first, second, str(path), first, path, second, first]
    questions = [*QUESTIONS, "what"]
    with seeing(captioner.model) as seen:
        found = captioner.answer(pictures, questions, GREEDY)
    assert sum(seen) == 3
    assert found == [captioner.answer([p], [q], GREEDY)[0] for p, q in zip(pictures, questions, strict=True)]


def test_pictures_made_at_every_look_are_not_taken_for_one(captioner: Captioner) -> None:
    class Made:  # the items of a data set are freed at once, and their addresses are used again
        def __len__(self) -> int:
            return 6

        def __getitem__(self, place: Any) -> Any:
            return [array.copy() for array in arrays(6)][place]

    made: Any = Made()
    with seeing(captioner.model) as seen:
        found = captioner.generate(made, ["what is it"] * 6, GREEDY)
    assert sum(seen) == 6
    assert found == captioner.generate(arrays(6), ["what is it"] * 6, GREEDY)


def test_groups_are_of_like_length_and_the_order_is_kept(captioner: Captioner) -> None:
    """There are two groups, and prompts are not in order of length, so texts must be returned to their pictures."""
    pictures = arrays(40)
    words = ["what", "is", "it", "a", "dog", "left", "of", "the", "tree"]
    prompts = [" ".join(words[: 1 + 7 * n % 8]) for n in range(40)]
    with reading(captioner.model.language) as read:
        found = captioner.generate(pictures, prompts, Decoding(max_new_tokens=1, beams=1))
    assert read == [32 * (Q + 1 + 7), 8 * (Q + 1 + 8)]
    one = Decoding(max_new_tokens=1, beams=1)
    assert found == [captioner.generate([p], [q], one)[0] for p, q in zip(pictures, prompts, strict=True)]


def test_the_language_model_in_another_precision(captioner: Captioner, tmp_path: Path) -> None:
    folder = tiny_blip2.generator("gpt2", tmp_path / "gpt2")
    half = openblip2.load(folder, device="cpu", precision="fp32", language_dtype="bf16")
    assert isinstance(half, Captioner)
    assert {p.dtype for p in half.model.language.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.model.qformer.parameters()} == {torch.float32}
    assert half.settings.language.dtype == "bf16"
    with pytest.raises(UserError, match="dtype"):
        openblip2.load(folder, device="cpu", language_dtype="int5")
    with pytest.raises(UserError, match="language_dtype has no effect, because no language model is loaded"):
        openblip2.load(folder, device="cpu", language=language("gpt2"), language_dtype="bf16")
    with pytest.raises(UserError, match="language_dtype"):
        openblip2.load(tiny_blip2.retriever(tmp_path / "itm"), device="cpu", language_dtype="bf16")


# Matching.
@torch.no_grad()
@pytest.mark.parametrize("best", [1, 4, 50])
def test_reranking_is_the_plain_way(best: int) -> None:
    model, features = tiny.stage1(), tiny.features(5)
    tokens, valid = tiny.texts(11)
    scores = torch.randn(5, 11, generator=torch.Generator().manual_seed(3))
    looked: list[int] = []
    cross: Any = model.qformer.layers[0]
    hook = cross.cross.key.register_forward_pre_hook(lambda module, given: looked.append(len(given[0])))
    found = rerank(model, features, tokens, valid, scores, best)
    hook.remove()
    assert looked == [1] * 5
    for mine, naive in zip(found, naive_rerank(model, features, tokens, valid, scores, best), strict=True):
        judged = naive > -500
        assert judged.sum() >= best
        torch.testing.assert_close(mine[judged], naive[judged], rtol=1e-5, atol=1e-5)
        assert mine[judged].std() > 1e-3, "all pairs match alike"
        if not judged.all():
            assert mine[~judged].max() < mine[judged].min()
    # Candidates that were not scored by ITM keep their order.
    rest = naive_rerank(model, features, tokens, valid, scores, best)[0] < -500
    for row, kept, old in zip(found[0], rest, scores, strict=True):
        assert torch.equal(row[kept].argsort(), old[kept].argsort())


@torch.no_grad()
def test_texts_of_one_image_share_its_memory() -> None:
    """Compares one memory per image, shared by several texts in a row, with a copy for each text."""
    model, features = tiny.stage1(), tiny.features(2)
    tokens, valid = tiny.texts(6)
    memory = model.qformer.encode_image(features)
    copied = memory.take(torch.tensor([0, 0, 0, 1, 1, 1]))
    torch.testing.assert_close(model.match(memory, tokens, valid), model.match(copied, tokens, valid))
    assert not torch.allclose(model.match(memory, tokens, valid)[:3], model.match(memory, tokens, valid)[3:], atol=1e-3)


def test_matcher_reranks(tmp_path: Path) -> None:
    matcher = openblip2.load(tiny_blip2.retriever(tmp_path / "itm"), device="cpu", precision="fp32")
    assert isinstance(matcher, Matcher)
    pictures, texts = arrays(4), ["a red dog", "the blue bus is red", "cat"]
    odds, by_text = matcher.rerank(pictures, texts, best=3)
    chances = torch.stack([matcher.match([picture] * 3, texts) for picture in pictures])
    torch.testing.assert_close(odds.sigmoid(), chances)
    # For each text, the best three of four pictures are scored by ITM, and the fourth is ranked last.
    best = matcher.similarity(pictures, texts).topk(3, dim=0).indices
    for column in range(3):
        torch.testing.assert_close(by_text[best[:, column], column], odds[best[:, column], column])
        assert by_text[:, column].argmin() not in best[:, column]
