"""Likelihood of given texts for a language model after a soft prompt: of whole texts, words or tokens.

Shapes: Q queries, T tokens, L LLM width, N texts, W vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from openblip2.errors import UserError
from openblip2.model.language import IGNORED, DecoderLM, LanguageModel, label_rows
from openblip2.model.token_rows import common_text, context_of, embed_rows, require_room


class TokenScore(NamedTuple):
    """A token's text and log-probability in nats, and those of the most likely tokens at its position."""

    text: str
    logprob: float
    best: list[tuple[str, float]]


@torch.no_grad()
def likelihoods(language: LanguageModel, soft: Tensor, prompt: str, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The likelihood of each of N texts, including its end, after a picture and the prompt.

    Args:
        soft: `[1, Q, L]` if all texts are about one picture, or `[N, Q, L]` with one picture for each text.

    Returns:
        Mean negative log-likelihood of each text's tokens, `[N]`; and whether every token is the most likely one at its
        position, `[N]` bool, so that greedy decoding would generate this text.
    """
    logits, labels = _read(language, soft, prompt, texts)
    likeliest = (logits.argmax(2) == labels) | (labels == IGNORED)
    return -_sums(logits, labels) / (labels != IGNORED).sum(1), likeliest.all(1)


@torch.no_grad()
def text_logprobs(language: LanguageModel, soft: Tensor, prompt: str, texts: Sequence[str]) -> Tensor:
    """The log-probability of each of N texts, including its end: `[N]`, in nats; arguments as in `likelihoods`."""
    return _sums(*_read(language, soft, prompt, texts))


def word_scores(language: LanguageModel, soft: Tensor, prompt: str, text: str) -> list[tuple[str, Tensor]]:
    """The words of a text, each with its log-likelihood in nats, a scalar, given everything before it.

    Args:
        soft: `[1, Q, L]`; the scores have gradients with respect to it.
    """
    logits, labels = _read(language, soft, prompt, [text])
    scores = -F.cross_entropy(logits[0], labels[0], reduction="none")
    tokens = labels[0].tolist()
    found: list[tuple[str, Tensor]] = []
    for place in range(len(tokens) - len(language.end)):
        words = str(language.tokenizer.decode(tokens[: place + 1], skip_special_tokens=True)).split()
        if len(words) > len(found):
            found.append((words[-1], scores[place]))
        elif found:  # another token of the same word
            found[-1] = (words[-1], found[-1][1] + scores[place])
    return found


@torch.no_grad()
def token_scores(language: LanguageModel, soft: Tensor, prompt: str, text: str, best: int = 0) -> list[TokenScore]:
    """The tokens of a text, without its end, each scored given the picture, the prompt and the tokens before it.

    The scores are those of the model itself: no temperature, nucleus or repetition penalty is applied.

    Args:
        language: the language model.
        soft: `[1, Q, L]`.
        prompt: the prompt before the text.
        text: the text to score; the texts of the returned tokens joined together are this text.
        best: how many of the most likely tokens to list at each position.
    """
    logits, labels = _read(language, soft, prompt, [text])
    tokens = labels[0].tolist()[: -len(language.end)]  # the end is predicted too, but has no text
    found: list[TokenScore] = []
    before = ""
    # There are more logits than tokens, because those of the end are not scored.
    for n, (token, scores) in enumerate(zip(tokens, logits[0].log_softmax(dim=1), strict=False)):
        # A character may consist of several tokens; it is assigned to the last of them.
        whole = str(language.tokenizer.decode(tokens[: n + 1], skip_special_tokens=True)).lstrip().rstrip("\ufffd")
        top = zip(*(one.tolist() for one in scores.topk(best)), strict=True)
        likely = [(str(language.tokenizer.decode([other])), score) for score, other in top]
        found.append(TokenScore(whole[len(before) :], float(scores[token]), likely))
        before = whole
    return found


def _read(language: LanguageModel, soft: Tensor, prompt: str, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Logits `[N, T, W]` at the positions of N texts, and their token ids `[N, T]`, `IGNORED` on padding.

    An encoder-decoder has the whole text in the decoder and nothing of it in the encoder. A decoder reads the text
    before the pictures only once. Raises a `UserError` if the context is too short.
    """
    length, context = require_room(language, prompt, soft.shape[1], 1) + soft.shape[1], context_of(language)
    tails = [language._caption(prompt, text) for text in texts]
    for text, tail in zip(texts, tails, strict=True):
        # A decoder predicts the last token without reading it; an encoder-decoder reads the prompt in its encoder.
        room = len(tail) if context is None else context - (length - 1 if isinstance(language, DecoderLM) else 0)
        if len(tail) > room:
            raise UserError(
                f"text {text[:40]!r}... takes {len(tail):,} tokens with its end token, but only {room:,} fit after the "
                f"picture and the prompt: the language model has a context of {context:,}; give a shorter text"
            )
    labels = label_rows(tails).to(soft.device)  # [N, T]
    llm: Any = language.llm
    head = language._head(prompt, soft.shape[1])
    # The last token of the head is never in `common`, because its output predicts the first token of each text.
    common = common_text([head])[: len(head) - 1] if isinstance(language, DecoderLM) else []
    parts = embed_rows(llm, [head[len(common) :]] * len(soft), soft, left=False)
    before, mask = (part.expand(len(tails), *part.shape[1:]) for part in parts)
    with language.own_precision():
        if isinstance(language, DecoderLM):
            written = llm.get_input_embeddings()(labels[:, :-1].clamp(min=0))
            given = language._read(common, len(tails)) if common else {"use_cache": False}
            given |= {"inputs_embeds": torch.cat([before, written.to(before.dtype)], dim=1)}
            given |= {"attention_mask": F.pad(mask, (len(common), written.shape[1]), value=1)}
            given |= {"logits_to_keep": labels.shape[1]}  # from the last token of the head on
        else:
            written = llm.prepare_decoder_input_ids_from_labels(labels=labels)
            given = {"inputs_embeds": before, "attention_mask": mask, "decoder_input_ids": written, "use_cache": False}
        return llm(**given).logits.float(), labels


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none").sum(1)
