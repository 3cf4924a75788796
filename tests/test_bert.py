"""Starting from BERT: the text stream and the word head are BERT's own, up to rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from openblip2.errors import UserError
from openblip2.model.bert import bert_sizes, start_from_bert
from openblip2.model.blocks import LMHead
from openblip2.model.qformer import QFormer, unimodal_mask
from tiny import LAYERS, POSITIONS, WORDS, B, D, Q, T, V

SIZES: dict[str, Any] = {
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": tiny.HEADS,
    "intermediate_size": tiny.FFN,
    "vocab_size": WORDS - 1,  # the Q-Former's last word is [DEC], which BERT does not have
    "max_position_embeddings": POSITIONS,
}


def bert(head: bool = True) -> Any:
    """A BERT with random weights and without token types, which the Q-Former does not have."""
    from transformers import BertConfig, BertForMaskedLM, BertModel

    config = BertConfig(**SIZES)
    model: Any = tiny.redraw((BertForMaskedLM if head else BertModel)(config))
    (model.bert if head else model).embeddings.token_type_embeddings.weight.data.zero_()
    return model


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    bert().save_pretrained(folder)
    return str(folder)


def fresh(vocabulary: int = WORDS) -> tuple[QFormer, LMHead | None]:
    torch.manual_seed(0)
    model = QFormer(D, LAYERS, tiny.HEADS, tiny.FFN, Q, V, vocabulary, POSITIONS).eval()
    return model, LMHead(D, model.word_embeddings) if model.word_embeddings is not None else None


def text_rows(model: QFormer, tokens: Tensor, valid: Tensor) -> Tensor:
    text = model(tokens=tokens, mask=unimodal_mask(0, valid)).text
    assert text is not None
    return text


def test_sizes_are_read_with_room_for_dec(start: str) -> None:
    sizes = bert_sizes(start)
    expected = {"width": D, "layers": LAYERS, "heads": tiny.HEADS, "ffn": tiny.FFN}
    assert sizes == {**expected, "vocabulary": WORDS, "positions": POSITIONS}
    assert QFormer(**sizes, queries=Q, image_width=V).sizes == sizes


@torch.no_grad()
def test_the_text_stream_is_bert(start: str) -> None:
    model, _ = fresh()
    tokens, valid = tiny.texts()
    before = text_rows(model, tokens, valid)
    start_from_bert(model, start)
    after = text_rows(model, tokens, valid)
    expected = bert().bert(input_ids=tokens, attention_mask=valid.long()).last_hidden_state
    torch.testing.assert_close(after[valid], expected[valid], rtol=1e-5, atol=1e-5)
    assert (before - after)[valid].abs().mean() > 0.1


@torch.no_grad()
def test_the_lm_head_is_berts(start: str) -> None:
    model, head = fresh()
    assert head is not None
    assert model.word_embeddings is not None
    start_from_bert(model, start, head)
    tokens, valid = tiny.texts()
    logits = head(text_rows(model, tokens, valid), model.word_embeddings)
    expected = bert()(input_ids=tokens, attention_mask=valid.long()).logits
    assert logits.shape == (B, T, WORDS)
    torch.testing.assert_close(logits[valid][:, : WORDS - 1], expected[valid], rtol=1e-5, atol=1e-5)
    assert head.bias[WORDS - 1] == 0


def test_what_bert_has_not_keeps_its_random_start(start: str) -> None:
    model, head = fresh()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start_from_bert(model, start, head)
    after = model.state_dict()
    kept = [name for name in after if torch.equal(before[name], after[name])]
    assert sorted(kept) == sorted(n for n in after if ".cross." in n or n == "queries" or "image_norm" in n)
    assert model.word_embeddings is not None
    assert torch.equal(model.word_embeddings.weight[-1], before["word_embeddings.weight"][-1])


def test_the_query_ffn_starts_as_berts(start: str) -> None:
    model, _ = fresh()
    start_from_bert(model, start)
    for name, value in model.state_dict().items():
        if ".text_ffn." in name:
            copy = model.state_dict()[name.replace("text_ffn", "query_ffn")]
            assert torch.equal(value, copy)
            assert value.data_ptr() != copy.data_ptr(), "a copy, not the same weights"


def test_stage_2_starts_without_a_text_path(start: str) -> None:
    whole, _ = fresh()
    lean, _ = fresh(vocabulary=0)
    start_from_bert(whole, start)
    start_from_bert(lean, start)
    expected = whole.state_dict()
    for name, value in lean.state_dict().items():
        if ".cross." not in name and name != "queries":
            assert torch.equal(value, expected[name])


def test_a_sentence_encoder_has_no_lm_head(tmp_path: Path) -> None:
    source = bert(head=False)
    source.save_pretrained(tmp_path)
    model, head = fresh()
    assert head is not None
    before = {name: value.clone() for name, value in head.state_dict().items()}
    start_from_bert(model, str(tmp_path), head)
    tokens, valid = tiny.texts()
    with torch.no_grad():
        expected = source(input_ids=tokens, attention_mask=valid.long()).last_hidden_state
        found = text_rows(model, tokens, valid)
    torch.testing.assert_close(found[valid], expected[valid], rtol=1e-5, atol=1e-5)
    for name, value in head.state_dict().items():
        assert torch.equal(value, before[name])


def refusal(start: str, sizes: bool = True) -> str:
    """The one-line error message for a checkpoint that is not a usable BERT."""
    model, head = fresh()
    with pytest.raises(UserError) as caught:
        bert_sizes(start) if sizes else start_from_bert(model, start, head)
    message = str(caught.value)
    assert "\n" not in message
    assert f"qformer.start {start!r}" in message
    return message


def test_what_is_no_bert_is_refused_in_one_line(tmp_path: Path) -> None:
    from transformers import RobertaConfig

    RobertaConfig(**SIZES).save_pretrained(tmp_path / "roberta")
    assert "is a 'roberta' model" in refusal(str(tmp_path / "roberta"))
    (tmp_path / "empty").mkdir()
    assert "cannot be loaded" in refusal(str(tmp_path / "empty"))
    assert "cannot be loaded" in refusal(str(tmp_path / "nowhere"))
    assert "cannot be loaded" in refusal("no/such-model")
    assert "cannot be loaded" in refusal(str(tmp_path / "nowhere"), sizes=False)


def test_a_damaged_checkpoint_is_refused_in_one_line(start: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(Path(start, "model.safetensors"))
    for name in ("damaged", "partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(Path(start, "config.json").read_text())
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"not weights")
    assert "cannot be loaded" in refusal(str(tmp_path / "damaged"), sizes=False)
    # Missing weights must not be drawn at random without an error.
    weights = {n: tensor for n, tensor in weights.items() if ".layer.1.output." not in n}
    save_file(weights, tmp_path / "partial" / "model.safetensors", {"format": "pt"})
    message = refusal(str(tmp_path / "partial"), sizes=False)
    assert "4 weights of BERT are missing, for example bert.encoder.layer.1.output." in message
