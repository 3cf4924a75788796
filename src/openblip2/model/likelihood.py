"""How likely a language model finds given texts behind a soft prompt: what multiple-choice benchmarks compare.

Shapes: Q queries, T tokens, L LLM width, N texts, W vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from openblip2.model.language import IGNORED, DecoderLM, LanguageModel, _ids


@torch.no_grad()
def likelihoods(language: LanguageModel, soft: Tensor, prompt: str, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """How likely each of N texts is behind one picture and prompt, its end counted.

    An encoder-decoder writes a text whole: nothing of it stands in the encoder.

    Args:
        soft: `[1, Q, L]`.

    Returns:
        Mean negative log-likelihood of a text's tokens, `[N]`; and whether each is the likeliest at its place, `[N]`
        bool: whether greedy decoding would write this text.
    """
    tails = [_tail(language, prompt, text) for text in texts]
    labels = torch.full((len(tails), max(map(len, tails))), IGNORED)
    for row, tail in enumerate(tails):
        labels[row, : len(tail)] = torch.tensor(tail)
    labels = labels.to(soft.device)
    llm: Any = language.llm
    before, mask = (part.expand(len(tails), *part.shape[1:]) for part in language.embed(soft, [prompt]))
    given: dict[str, Any] = {"use_cache": False}
    if isinstance(language, DecoderLM):
        written = llm.get_input_embeddings()(labels[:, :-1].clamp(min=0))
        given |= {"inputs_embeds": torch.cat([before, written.to(before.dtype)], dim=1)}
        given |= {"attention_mask": F.pad(mask, (0, written.shape[1]), value=1), "logits_to_keep": labels.shape[1]}
    else:
        written = llm.prepare_decoder_input_ids_from_labels(labels=labels)
        given |= {"inputs_embeds": before, "attention_mask": mask, "decoder_input_ids": written}
    with language.own_precision():
        logits = llm(**given).logits.float()
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none").sum(1)
    likeliest = (logits.argmax(2) == labels) | (labels == IGNORED)
    return losses / (labels != IGNORED).sum(1), likeliest.all(1)


def _tail(language: LanguageModel, prompt: str, text: str) -> list[int]:
    if isinstance(language, DecoderLM):
        return language._caption(prompt, text)
    return _ids(language.tokenizer, text) + language.end
