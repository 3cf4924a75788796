"""Compares our models with transformers' on the same folders: features, scores, losses, gradients, texts.

`openblip2.load` reads a folder that `save_pretrained` wrote; transformers reads it with `from_pretrained`.
Everything is float32, and deviations are relative to the largest entry of the tensor that is compared.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.bert.modeling_bert import BertOnlyMLMHead

import openblip2
import tiny
import tiny_blip2
import tiny_models
from openblip2.data.images import to_pixels
from openblip2.inference.captioner import Captioner
from openblip2.inference.matcher import Matcher
from openblip2.model.blocks import LMHead
from openblip2.model.language import Decoding
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2
from test_qformer import their_name
from tiny import D, E, Q
from tiny_blip2 import END, IMAGE, KINDS, RETRIEVER_WORDS, P, V, pixel_values
from tiny_models import SIDE, L

TOLERANCE = 2e-6
OF_GRADIENTS = 1e-5  # larger, because gradients contain sums that nearly cancel
PICTURES = tiny_models.pictures(6)
B = len(PICTURES)
PROMPTS = ["", "a photo of", "question: what is it answer:", "a photo of", "", "what"]
CAPTIONS = ["a red dog", "two bird", "tree", "the blue bus", "it runs", "yes it is"]
# For T5, which reads the prefix and generates the suffix. The split is random, but up to three words have only one.
SPLITS = {"a red dog": ("a", "red dog"), "two bird": ("two", "bird"), "tree": ("", "tree")}
SPLITS |= {"the blue bus": ("the", "blue bus"), "it runs": ("it", "runs"), "yes it is": ("yes", "it is")}
TEXTS = ["a red dog", "the blue bus is red", "cat", "what colour is the dog", "a cat", "it is a blue cat"]
# The image of each of `TEXTS`: the first and the fourth text belong to one image.
IDS = torch.tensor([5, 3, 8, 5, 2, 7])
# For each image a text, and for each text an image, with another id; -1 = none, in two rows.
NEGATIVES = (torch.tensor([1, 0, 5, -1, 3, 2]), torch.tensor([4, 2, -1, 1, 0, 3]))
TEMPERATURE = 0.2


class Generators(NamedTuple):
    kind: str
    captioner: Captioner
    ours: Stage2
    theirs: Any
    words: Any  # the folder's tokenizer


class Retrievers(NamedTuple):
    matcher: Matcher
    ours: Stage1
    theirs: Any
    tokens: Tensor  # of TEXTS, by the folder's tokenizer
    valid: Tensor  # int64, as the tokenizer returns it


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generators:
    kind: str = request.param
    folder = tiny_blip2.generator(kind, tmp_path_factory.mktemp("parity") / kind)
    captioner = openblip2.load(folder, device="cpu", precision="fp32")
    assert isinstance(captioner, Captioner)
    theirs = hf.Blip2ForConditionalGeneration.from_pretrained(folder)
    return Generators(kind, captioner, captioner.model, theirs, hf.AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def retrieval_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_blip2.retriever(tmp_path_factory.mktemp("parity") / "retriever")


@pytest.fixture(scope="module")
def retrievers(retrieval_folder: Path) -> Retrievers:
    matcher = openblip2.load(retrieval_folder, device="cpu", precision="fp32")
    assert isinstance(matcher, Matcher)
    theirs = hf.Blip2ForImageTextRetrieval.from_pretrained(retrieval_folder)
    texts = hf.AutoTokenizer.from_pretrained(retrieval_folder)(TEXTS, padding=True, return_tensors="pt")
    assert not texts["attention_mask"].all(), "no text is padded"
    return Retrievers(matcher, matcher.model, theirs, texts["input_ids"], texts["attention_mask"])


def deviation(mine: Tensor, theirs: Tensor, scale: Tensor | None = None) -> float:
    """The largest difference relative to the largest entry of `scale`, which is theirs by default."""
    assert mine.shape == theirs.shape
    scale = (theirs if scale is None else scale).detach()
    return float((mine.detach() - theirs.detach()).abs().max() / scale.abs().max())


def close(mine: Tensor, theirs: Tensor) -> None:
    assert deviation(mine, theirs) < TOLERANCE  # a NaN fails too


def parameter_name(name: str) -> str:
    """The name in transformers of one of our trained parameters."""
    name = name.removeprefix("qformer.")
    whole = {
        "queries": "query_tokens",
        "word_embeddings.weight": "embeddings.word_embeddings.weight",
        "positions.weight": "embeddings.position_embeddings.weight",
    }
    heads = {
        "image_norm": "vision_model.post_layernorm",
        "projection": "language_projection",
        "vision_proj": "vision_projection",
        "text_proj": "text_projection",
        "itm_head": "itm_head",
    }
    first, _, rest = name.partition(".")
    if name in whole:
        return whole[name]
    return f"{heads[first]}.{rest}" if first in heads else f"qformer.{their_name(name)}"


def close_gradients(
    loss: Tensor, ours: nn.Module, their_loss: Tensor, theirs: dict[str, Tensor], tolerance: float = OF_GRADIENTS
) -> None:
    """Compares the gradients of all parameters that are trained; `theirs` maps our names to their parameters."""
    mine = tiny.gradients(loss, ours)
    assert mine.keys() == theirs.keys()
    expected = dict(
        zip(
            theirs,
            torch.autograd.grad(
                their_loss, list(theirs.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            ),
            strict=True,
        )
    )
    for name, gradient in mine.items():
        # A key's bias adds the same value to every score of a row, which does not change the softmax. Its gradient
        # is only rounding error, so the scale of the key's weight is used.
        scale = expected[name.replace("key.bias", "key.weight")]
        if scale.any():
            found = deviation(gradient, expected[name], scale)
            assert found < tolerance, f"{name} deviates by {found:.1e}"
        else:
            assert not gradient.any(), f"{name} has a gradient here and none there"


def trained(ours: nn.Module, theirs: nn.Module) -> dict[str, Tensor]:
    """The parameters of transformers' model by our names."""
    names = [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
    return {name: theirs.get_parameter(parameter_name(name)) for name in names}


def test_sizes_all_differ() -> None:
    sizes = [B, P, V, Q, D, E, L, RETRIEVER_WORDS, tiny_blip2.W, tiny.HEADS, tiny.FFN, tiny.LAYERS]
    assert len(set(sizes)) == len(sizes)


# Pictures to soft prompts.
@torch.no_grad()
def test_features_queries_and_soft_prompts(both: Generators) -> None:
    ours, theirs = both.ours, both.theirs
    assert ours.vision is not None
    tower = theirs.vision_model(pixel_values(PICTURES), output_hidden_states=True)
    seen = theirs.get_image_features(pixel_values(PICTURES))
    patches = ours.vision(PICTURES)
    queries = ours.qformer.query_output(patches)
    assert queries is not None
    assert (patches.shape, queries.shape) == ((B, P, V), (B, Q, D))
    close(patches, tower.hidden_states[-1])
    close(ours.qformer.image_norm(patches), tower.last_hidden_state)
    faint = 1e-3 * patches  # so small that the norm's epsilon matters
    close(ours.qformer.image_norm(faint), theirs.vision_model.post_layernorm(faint))
    close(queries, seen.qformer_outputs.last_hidden_state)
    close(ours.soft_prompt(images=PICTURES), seen.pooler_output)
    # Otherwise the next tests could not detect errors in these values.
    assert seen.pooler_output.std(dim=0).mean() > 0.03, "all pictures look alike"
    assert seen.pooler_output.std(dim=1).mean() > 0.03, "all queries look alike"


@torch.no_grad()
def test_pictures_of_any_size(retrievers: Retrievers, retrieval_folder: Path) -> None:
    """Pictures are resized and normalised as by the folder's processor."""
    random = np.random.default_rng(0)
    shapes = ((31, 20), (SIDE, SIDE), (9, 40))
    pictures = [Image.fromarray(random.integers(0, 256, (*shape, 3), np.uint8)) for shape in shapes]
    processor: Any = hf.AutoProcessor.from_pretrained(retrieval_folder)
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    assert retrievers.ours.vision is not None
    mine = retrievers.ours.vision(to_pixels(pictures, SIDE))
    close(mine, retrievers.theirs.vision_model(pixels, output_hidden_states=True).hidden_states[-1])


# Stage 2.
def rows(both: Generators) -> tuple[Tensor, Tensor, Tensor]:
    """`input_ids`, `attention_mask` and `labels` of PROMPTS and CAPTIONS, right-padded, as transformers expects them.

    The folder's tokenizer adds the special tokens before a prompt and after the input of T5.
    """
    inputs, targets = [], []
    for prompt, caption in zip(PROMPTS, CAPTIONS, strict=True):
        if both.kind == "t5":
            prefix, suffix = SPLITS[caption]
            inputs.append([IMAGE] * Q + both.words(f"{prompt} {prefix}".strip())["input_ids"])
            targets.append(both.words(suffix)["input_ids"])
        else:
            head = [IMAGE] * Q + both.words(prompt)["input_ids"]
            end = both.words(END[both.kind], add_special_tokens=False)["input_ids"]
            inputs.append([IMAGE] * Q + both.words(f"{prompt} {caption}".strip())["input_ids"] + end)
            targets.append([-100] * len(head) + inputs[-1][len(head) :])
    ids, mask = padded(inputs, left=False)
    assert not mask.all(), "no row is padded"
    return ids, mask, nn.utils.rnn.pad_sequence(list(map(torch.tensor, targets)), True, padding_value=-100)


def padded(inputs: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
    """Padded ids and their attention mask."""
    pad, side = nn.utils.rnn.pad_sequence, "left" if left else "right"
    ids = list(map(torch.tensor, inputs))
    return pad(ids, True, tiny_models.PAD, side), pad([torch.ones_like(row) for row in ids], True, 0, side)


def test_language_logits_loss_and_gradients(both: Generators) -> None:
    ours, (ids, mask, labels) = both.ours, rows(both)
    seen: list[Tensor] = []
    head: Any = ours.language.llm.get_output_embeddings()
    # Computes logits from the input of the output embedding, because our chunked loss does not return any.
    hook = head.register_forward_pre_hook(lambda module, given: seen.append(F.linear(given[0], head.weight, head.bias)))
    loss = ours.losses(PROMPTS, CAPTIONS, images=PICTURES)["lm"]
    hook.remove()
    theirs = both.theirs(pixel_values(PICTURES), input_ids=ids, attention_mask=mask, labels=labels)
    # A decoder's logits at one position predict the next token. Our logits leave out the last position, and the
    # first positions, which no row scores.
    shift = both.kind != "t5"
    scored = labels[:, shift:] != -100
    logits, their_logits = seen[-1], theirs.logits[:, : theirs.logits.shape[1] - shift]
    last = slice(-logits.shape[1], None)
    assert not scored[:, : scored.shape[1] - logits.shape[1]].any()
    close(logits[scored[:, last]], their_logits[:, last][scored[:, last]])
    close(loss, theirs.loss)
    close_gradients(loss, ours, theirs.loss, trained(ours, both.theirs))


MOST = 8
DECODINGS = [
    Decoding(max_new_tokens=MOST, min_new_tokens=0, beams=1),
    Decoding(max_new_tokens=MOST, min_new_tokens=0, beams=3, length_penalty=1.0),
    Decoding(max_new_tokens=MOST, min_new_tokens=0, beams=3, length_penalty=-1.0),
]


def generate(both: Generators, prompts: list[str] | None, how: Decoding) -> list[list[int]]:
    """The new tokens that transformers generates until it stops by itself; `prompts` None = its own default input."""
    given: dict[str, Any] = {}
    start = 1 if both.kind == "t5" else Q + 1  # the output begins with padding (T5) or the input (decoders)
    if prompts is not None:
        ids, mask = padded([[IMAGE] * Q + both.words(prompt)["input_ids"] for prompt in prompts], left=True)
        given, start = {"input_ids": ids, "attention_mask": mask}, start if both.kind == "t5" else ids.shape[1]
    if how.beams > 1:
        given["length_penalty"] = how.length_penalty
    written = both.theirs.generate(pixel_values(PICTURES), **given, max_new_tokens=MOST, num_beams=how.beams)
    return [[word for word in row if word != tiny_models.PAD] for row in written[:, start:].tolist()]


def test_texts(both: Generators) -> None:
    """Greedy and beam search, with and without prompts, in a batch and with each picture alone."""
    pictures = list(PICTURES.permute(0, 2, 3, 1).numpy())
    found: list[list[list[list[int]]]] = []
    for prompts in (PROMPTS, [""] * B):
        # Without a prompt, transformers starts with the first token from its settings, but the tokenizers and
        # processors of these two models add no first token.
        own_frame = not any(prompts) and both.kind not in ("gpt2", "t5")
        found.append([generate(both, None if own_frame else prompts, how) for how in DECODINGS])
        for how, written in zip(DECODINGS, found[-1], strict=True):
            expected = [text.strip() for text in both.words.batch_decode(written, skip_special_tokens=True)]
            assert both.captioner.generate(pictures, prompts, how) == expected
            alone = [both.captioner.generate([pictures[n]], [prompts[n]], how) for n in range(B)]
            assert alone == [[text] for text in expected]
    # Otherwise this test could not detect errors.
    assert len({len(row) for runs in found for written in runs for row in written}) > 2, "no text ended early"
    for plain, beams, _ in found:
        assert len(set(map(tuple, plain))) > 3, "the pictures say nothing"
        assert plain != beams
    assert any(beams != short for _, beams, short in found), "the length penalty changes nothing"


# Stage 1.
@torch.no_grad()
def test_contrastive_scores(retrievers: Retrievers) -> None:
    matcher, ours, theirs, ids, valid = retrievers
    mine, mine_valid = matcher.tokens(TEXTS)
    assert torch.equal(mine, ids)
    assert torch.equal(mine_valid, valid.bool())
    found = theirs(pixel_values(PICTURES), input_ids=ids, attention_mask=valid, use_image_text_matching_head=False)
    assert ours.vision is not None
    close(ours.image_vectors(ours.qformer.query_output(ours.vision(PICTURES))), found.image_embeds)
    close(ours.text_vectors(mine, mine_valid), found.text_embeds)
    close(matcher.similarity(list(PICTURES.permute(0, 2, 3, 1).numpy()), TEXTS), found.logits_per_image)
    assert found.logits_per_image.std(dim=0).min() > 1e-3, "all pictures look alike"
    assert found.logits_per_image.std(dim=1).min() > 1e-3, "all texts look alike"


@torch.no_grad()
def test_matching_scores(retrievers: Retrievers) -> None:
    matcher, ours, theirs, ids, valid = retrievers
    found = theirs(
        pixel_values(PICTURES), input_ids=ids, attention_mask=valid, use_image_text_matching_head=True
    ).logits_per_image
    assert ours.vision is not None
    close(ours.match(ours.qformer.encode_image(ours.vision(PICTURES)), ids, valid.bool()), found)
    chances = matcher.match(list(PICTURES.permute(0, 2, 3, 1).numpy()), TEXTS)
    close(chances, found.softmax(dim=1)[:, 1])
    assert chances.std() > 1e-2, "all pairs match alike"


def lm_head(theirs: Any) -> Any:
    """BERT's head with new random weights, tied to the word embeddings; transformers has none for BLIP-2."""
    sizes: dict[str, Any] = {"hidden_size": D, "vocab_size": RETRIEVER_WORDS, "num_attention_heads": tiny.HEADS}
    head = tiny.redraw(BertOnlyMLMHead(hf.BertConfig(**sizes)), seed=5).predictions
    head.decoder.weight = theirs.embeddings.word_embeddings.weight
    head.decoder.bias = head.bias
    return head


def oracle(retrievers: Retrievers, head: Any, temperature: Tensor) -> dict[str, Tensor]:
    """The three losses of the paper, computed with transformers' modules, with `NEGATIVES` for ITM."""
    _, _, theirs, ids, valid = retrievers
    pixels, count = pixel_values(PICTURES), ids.shape[1]
    scores = theirs(pixels, input_ids=ids, attention_mask=valid, use_image_text_matching_head=False).logits_per_image
    same = (IDS[:, None] == IDS).float()
    targets = 0.9 * same / same.sum(dim=1, keepdim=True) + 0.1 / B
    itc = (F.cross_entropy(scores / temperature, targets) + F.cross_entropy(scores.T / temperature, targets)) / 2

    pairs = [(n, n, 1) for n in range(B)]
    pairs += [(n, int(m), 0) for n, m in enumerate(NEGATIVES[0]) if m >= 0]
    pairs += [(int(m), n, 0) for n, m in enumerate(NEGATIVES[1]) if m >= 0]
    image, text, label = (torch.tensor(column) for column in zip(*pairs, strict=True))
    logits = theirs(
        pixels[image], input_ids=ids[text], attention_mask=valid[text], use_image_text_matching_head=True
    ).logits_per_image
    itm = F.cross_entropy(logits, label)

    written = ids.clone()
    written[:, 0] = RETRIEVER_WORDS - 1  # [DEC]
    looks = torch.zeros(B, 1, Q + count, Q + count, dtype=torch.bool)
    looks[..., :Q] = True
    for row in range(count):
        looks[:, 0, Q + row, Q : Q + row + 1] = valid[:, : row + 1].bool()
    seen = theirs.qformer(
        query_embeds=theirs.embeddings(input_ids=written, query_embeds=theirs.query_tokens.expand(B, -1, -1)),
        query_length=Q,
        attention_mask=torch.zeros(looks.shape).masked_fill(~looks, torch.finfo(torch.float32).min),
        encoder_hidden_states=theirs.vision_model(pixels).last_hidden_state,
    ).last_hidden_state
    labels = ids[:, 1:].masked_fill(valid[:, 1:] == 0, -100)
    itg = F.cross_entropy(head(seen[:, Q:-1]).transpose(1, 2), labels, label_smoothing=0.1)
    return {"itc": itc, "itm": itm, "itg": itg}


def test_stage1_losses_and_gradients(retrieval_folder: Path, retrievers: Retrievers) -> None:
    loaded = openblip2.load(retrieval_folder, device="cpu", precision="fp32")  # its own copy, because it gets a head
    assert isinstance(loaded, Matcher)
    ours, head = loaded.model, lm_head(retrievers.theirs)
    assert ours.qformer.word_embeddings is not None
    ours.lm_head = LMHead(D, ours.qformer.word_embeddings)
    heads = {
        "lm_head.bias": head.bias,
        "lm_head.dense.weight": head.transform.dense.weight,
        "lm_head.dense.bias": head.transform.dense.bias,
        "lm_head.norm.weight": head.transform.LayerNorm.weight,
        "lm_head.norm.bias": head.transform.LayerNorm.bias,
    }
    ours.lm_head.load_state_dict({name.removeprefix("lm_head."): value for name, value in heads.items()})
    nn.init.constant_(ours.temperature, TEMPERATURE)
    temperature = torch.tensor(TEMPERATURE, requires_grad=True)
    outside = {**heads, "temperature": temperature}
    named = [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
    by_name = {
        name: outside[name] if name in outside else retrievers.theirs.get_parameter(parameter_name(name))
        for name in named
    }
    mine = ours.losses(retrievers.tokens, retrievers.valid.bool(), IDS, images=PICTURES, negatives=NEGATIVES)
    expected = oracle(retrievers, head, temperature)
    assert list(mine) == list(expected)
    for name, loss in expected.items():
        close(mine[name], loss)
        close_gradients(mine[name], ours, loss, by_name)
