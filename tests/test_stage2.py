"""Stage 2: trained and frozen parameters, the soft prompt, and learning with both kinds of language model."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import tiny
import tiny_models
from openblip2.model.build import parts_table
from openblip2.model.language import DecoderLM, Decoding, EncoderDecoderLM
from openblip2.model.qformer import QFormer
from openblip2.model.stage2 import SHARPNESS, Stage2
from openblip2.model.token_rows import template_ids
from openblip2.model.vision import HFVision
from tiny import B, D, Q
from tiny_models import L

# A caption of three words can only be split after the first word, so the random split is always the same.
CAPTIONS = ["a red dog", "the blue bus", "two small cat", "a bird sits", "it runs left", "no tree is", "yes it is"]
CAPTIONS += ["what is it"]
PROMPTS = ["", "a photo of"] * 4


def stage2(kind: str = "llama", vision: HFVision | None = None, dropout: float = 0.1) -> Stage2:
    """Returns a model with random weights, without the Q-Former's text path, in eval mode."""
    model = Stage2(tiny.qformer(vocabulary=0, dropout=dropout), tiny_models.language(kind), vision)
    tiny.redraw(model.projection)
    return model.eval()


def test_the_soft_prompt_is_the_projection_of_the_queries() -> None:
    model, patches = stage2(), tiny.features()
    queries = model.qformer.query_output(patches)
    assert queries is not None
    soft = model.soft_prompt(features=patches)
    assert soft.shape == (B, Q, L)
    expected = queries @ model.projection.weight.T + model.projection.bias
    torch.testing.assert_close(soft, expected, rtol=1e-5, atol=1e-5)
    assert model.projection.weight.shape == (L, D)


@pytest.mark.parametrize("kind", tiny_models.MODELS)
def test_losses_and_texts_are_those_of_the_language_model(kind: str) -> None:
    model, patches = stage2(kind), tiny.features()
    soft, how = model.soft_prompt(features=patches), Decoding(max_new_tokens=5, beams=2)
    losses = model.losses(PROMPTS, CAPTIONS, features=patches)
    assert list(losses) == ["lm"]
    assert torch.equal(losses["lm"], model.language.scored(soft, PROMPTS, CAPTIONS)[0])
    texts = model.generate(PROMPTS, how, features=patches)
    assert texts == model.language.generate(soft, PROMPTS, how)
    assert len(texts) == B


@pytest.mark.parametrize("kind", tiny_models.MODELS)
def test_the_language_model_can_read_the_first_visual_tokens_only(kind: str) -> None:
    model, patches = stage2(kind), tiny.features()
    soft, how = model.soft_prompt(features=patches), Decoding(max_new_tokens=5, beams=2)
    assert model.tokens == Q
    model.first = 2
    assert model.tokens == 2
    torch.testing.assert_close(model.soft_prompt(features=patches), soft[:, :2])
    expected = model.language.scored(soft[:, :2], PROMPTS, CAPTIONS)[0]
    torch.testing.assert_close(model.losses(PROMPTS, CAPTIONS, features=patches)["lm"], expected)
    assert model.generate(PROMPTS, how, features=patches) == model.language.generate(soft[:, :2], PROMPTS, how)
    table = model.word_table(CAPTIONS)
    assert torch.isfinite(model.losses(PROMPTS, CAPTIONS, features=patches, words=table)["alignment"])


@pytest.mark.parametrize("kind", tiny_models.MODELS)
def test_a_soft_prompt_of_the_captions_own_words_is_aligned(kind: str) -> None:
    model = stage2(kind)
    table = model.word_table(CAPTIONS)
    embed: Any = model.language.llm.get_input_embeddings()
    for word, number in table.numbers.items():
        if word:
            tokens = template_ids(model.language.tokenizer, f" {word}")
            torch.testing.assert_close(table.embeddings[number], embed(torch.tensor(tokens)).mean(0))
    numbers = [[table.numbers[word] for word in model.first_words(caption)] for caption in CAPTIONS]
    own = table.embeddings[torch.tensor(numbers)]
    right, count = model.alignment(own, CAPTIONS, table)
    assert count == B * Q
    # The distance of each word to itself is 0, so only the cross-entropy remains.
    centred = (table.embeddings - table.embeddings.mean(0)).double()
    scale, expected = centred.square().sum(1).mean(), 0.0
    for number in torch.tensor(numbers).flatten().tolist():
        logits = -SHARPNESS * (centred[number] - centred).square().sum(1) / scale
        expected -= float(logits.log_softmax(0)[number]) / count
    assert float(right) == pytest.approx(expected, rel=1e-4)
    assert float(model.alignment(own.roll(1, dims=1), CAPTIONS, table)[0]) > float(right) + 0.5
    assert float(model.alignment(own + 0.1, CAPTIONS, table)[0]) > float(right)


def test_captions_are_cut_and_filled_with_what_follows_the_picture() -> None:
    model = stage2()
    assert model.first_words("a  red dog") == ["a", "red", "dog", *[""] * (Q - 3)]
    assert model.first_words("dog " * 99) == ["dog"] * Q
    embed: Any = model.language.llm.get_input_embeddings()
    for template, filler in (
        ("{image} it {prompt}", template_ids(model.language.tokenizer, " it")),
        ("{prompt}{image}", []),
    ):
        model.language = tiny_models.language("llama", template=template)
        table = model.word_table(["a red dog"])
        assert list(table.numbers) == ["", "a", "dog", "red"]
        expected = embed(torch.tensor((filler or model.language.end)[0]))
        torch.testing.assert_close(table.embeddings[0], expected)
    assert list(model.word_table([]).numbers) == [""]


def test_a_word_without_tokens_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stage2()
    monkeypatch.setattr("openblip2.model.stage2.text_ids", lambda _, text: [] if "red" in text else [7])
    table = model.word_table(["a red dog"])
    assert list(table.numbers) == ["", "a", "dog"]
    assert model.alignment(torch.zeros(1, Q, L), ["a red dog"], table)[0].isfinite()


@pytest.mark.parametrize("kind", tiny_models.MODELS)
def test_alignment_trains_without_running_the_language_model(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, patches = stage2(kind, dropout=0.0).train(), tiny.features()
    monkeypatch.setattr(model.language, "scored", lambda *_: pytest.fail("the language model ran"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    found, table = [], model.word_table(CAPTIONS)
    for _ in range(30):
        losses = model.losses(PROMPTS, CAPTIONS, features=patches, words=table)
        assert list(losses) == ["alignment"]
        losses["alignment"].backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(losses["alignment"].detach()))
    assert found[-1] < found[0] / 2


def test_images_are_seen_as_their_features() -> None:
    model, pictures = stage2(vision=tiny_models.vision()), tiny_models.pictures()
    assert model.vision is not None
    patches = model.vision(pictures)
    assert torch.equal(model.soft_prompt(images=pictures), model.soft_prompt(features=patches))
    ours = model.losses(PROMPTS, CAPTIONS, images=pictures)["lm"]
    assert torch.equal(ours, model.losses(PROMPTS, CAPTIONS, features=patches)["lm"])
    how = Decoding(max_new_tokens=4, beams=1)
    assert model.generate(PROMPTS, how, images=pictures) == model.generate(PROMPTS, how, features=patches)
    with pytest.raises(ValueError, match="either images or features"):
        model.losses(PROMPTS, CAPTIONS)
    with pytest.raises(ValueError, match="without an image encoder"):
        stage2().generate(PROMPTS, how, images=pictures)


@pytest.mark.parametrize("kind", tiny_models.MODELS)
def test_frozen_stays_and_trained_moves(kind: str) -> None:
    model = stage2(kind, tiny_models.vision())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"qformer", "projection"}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    model.train()
    model.losses(PROMPTS, CAPTIONS, images=tiny_models.pictures())["lm"].backward()
    for name, parameter in trained.items():
        assert parameter.grad is not None
        # A key's bias adds a constant to all scores of a row. Softmax ignores it, so its gradient is 0.
        assert name.endswith("key.bias") or parameter.grad.abs().max() > 1e-8, name
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != (name in trained), name
    assert model.vision is not None
    for part in (model.vision, model.language.llm):
        assert all(p.grad is None for p in part.parameters())
        assert not any(module.training for module in part.modules())
    assert all(module.training for module in model.qformer.modules())


def test_the_frozen_part_adds_no_noise() -> None:
    """The language model's dropout is off, so training mode changes nothing if the Q-Former's dropout is 0."""
    model, patches = stage2("gpt2", dropout=0.0), tiny.features()
    config: Any = model.language.llm.config
    assert config.resid_pdrop > 0
    quiet = model.losses(PROMPTS, CAPTIONS, features=patches)["lm"]
    assert torch.equal(model.train().losses(PROMPTS, CAPTIONS, features=patches)["lm"], quiet)


def train(model: Stage2, patches: Tensor, captions: list[str], steps: int, lr: float) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    trace = []
    for _ in range(steps):
        loss = model.losses([""] * len(captions), captions, features=patches)["lm"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trace.append(loss.item())
    return trace


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_it_learns_to_look(kind: str) -> None:
    """The loss falls, and it is lower with the right image than with another one (the grounding gap)."""
    torch.manual_seed(0)
    model, patches, captions = stage2(kind, dropout=0.0), tiny.features(2), CAPTIONS[:2]
    trace = train(model, patches, captions, steps=160, lr=3e-3)
    with torch.no_grad():
        right = model.losses(["", ""], captions, features=patches)["lm"].item()
        other = model.losses(["", ""], captions, features=patches.flip(0))["lm"].item()
    assert right < trace[0] - 1.2
    assert right < other - 0.5


def test_parts_table() -> None:
    model = stage2("gpt2", tiny_models.vision())
    table = {part: (count, state) for part, count, state in parts_table(model)}
    assert model.vision is not None
    expected = {"vision": model.vision, "qformer": model.qformer}
    expected |= {"language": model.language, "projection": model.projection}
    states = {"vision": "frozen", "qformer": "trained", "language": "frozen", "projection": "trained"}
    assert table == {name: (sum(p.numel() for p in part.parameters()), states[name]) for name, part in expected.items()}
    temperature = ("temperature", 1, "trained")
    assert parts_table(tiny.stage1())[-1] == temperature
    next(model.qformer.parameters()).requires_grad_(False)
    with pytest.raises(AssertionError, match="qformer is frozen in part"):
        parts_table(model)


def trained_with(llm: hf.PreTrainedModel) -> int:
    kind = EncoderDecoderLM if llm.config.is_encoder_decoder else DecoderLM
    model = Stage2(QFormer(vocabulary=0), kind(llm, tiny_models.tokenizer()))
    assert isinstance(model.projection, nn.Linear)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("family", "width", "count"),
    [
        ("opt", 2560, 107_133_696),  # OPT-2.7B
        ("opt", 4096, 108_314_880),  # OPT-6.7B
        ("t5", 2048, 106_739_968),  # FlanT5-XL
        ("t5", 4096, 108_314_880),  # FlanT5-XXL
    ],
)
def test_parameter_counts_of_the_paper(family: str, width: int, count: int) -> None:
    """The exact counts of METHOD section 2; they do not depend on the depth of the frozen language model."""
    config: Any = hf.OPTConfig(hidden_size=width, word_embed_proj_dim=width, num_attention_heads=2, vocab_size=9)
    if family == "t5":
        config = hf.T5Config(d_model=width, num_layers=1, num_heads=2, vocab_size=9)
    with torch.device("meta"):
        assert trained_with((hf.T5ForConditionalGeneration if family == "t5" else hf.OPTForCausalLM)(config)) == count
