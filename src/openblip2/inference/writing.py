"""Generates texts about pictures in batches; each picture is encoded once for all texts about it."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from openblip2.data.images import Picture
from openblip2.data.text import BertTokens, question_tokens
from openblip2.hardware import computing
from openblip2.inference.inputs import features_of, group_of
from openblip2.model.language import Decoding
from openblip2.model.likelihood import text_logprobs
from openblip2.model.stage2 import Stage2
from openblip2.model.token_rows import require_room


class Written(NamedTuple):
    """A text and its log-probability in nats, summed over its tokens and the end token; NaN if not requested."""

    text: str
    logprob: float


def write_texts(
    model: Stage2,
    precision: str,
    images: Sequence[Picture],
    prompts: Sequence[str],
    decodings: Sequence[Decoding],
    tokens: BertTokens | None = None,
    questions: Sequence[str] | None = None,
    at_once: int | None = None,
    score: bool = False,
) -> list[list[Written]]:
    """Generates a text for each picture and prompt with each decoding. Prompts of similar length share a batch.

    Args:
        images: a repeated picture (the same path, or the same object in a list) passes through the encoder and the
            connector once. If the text before it is also the same, the language model reads it once per batch.
        tokens: the connector's tokenizer, if the connector reads questions or prompts.
        questions: one for each picture, if the connector reads questions. A repeated picture then passes through the
            encoder once per batch, and through the connector once per question.
        at_once: number of texts that are generated together; None = `inputs.group_of`.
        score: also compute the log-probabilities; all prompts must then be equal.

    Raises:
        UserError: a picture cannot be opened, or a prompt is too long for the language model.
    """
    lasting = isinstance(images, list | tuple)  # other sequences may create a new object at every access
    names = [
        str(image) if isinstance(image, str | Path) else id(image) if lasting else n for n, image in enumerate(images)
    ]
    left, language = Counter(names), model.language
    queries, new = model.tokens, max((one.max_new_tokens for one in decodings), default=0)
    lengths = {prompt: require_room(language, prompt, queries, new) for prompt in set(prompts)}
    first = {name: n for n, name in reversed(list(enumerate(names)))}
    # Prompts about one picture stay together, because sharing the picture saves more than padding costs.
    order = sorted(
        range(len(names)),
        key=lambda n: (first[names[n]] if left[names[n]] > 1 else len(names), lengths[prompts[n]]),
    )
    found, soft = [list[Written]() for _ in names], dict[str | int, Tensor]()
    with torch.inference_mode(), computing(model, precision):
        at_once = group_of(model) if at_once is None else at_once
        for start in range(0, len(order), at_once):
            rows = order[start : start + at_once]
            here = {names[n]: n for n in rows}
            about = [list(here).index(names[n]) for n in rows]
            if questions is None:
                unseen = [n for name, n in here.items() if name not in soft]
                parts = features_of(model, [images[n] for n in unseen])
                prompted = (one for part in parts for one in model.soft_prompt(features=part))
                soft |= zip((names[n] for n in unseen), prompted, strict=True)
                given = torch.stack([soft[name] for name in here])
            else:
                features = torch.cat(list(features_of(model, [images[n] for n in here.values()])))
                read = question_tokens(tokens, [questions[n] for n in rows], features.device)
                given, about = model.soft_prompt(features=features[about], question=read), list(range(len(rows)))
            for decoding in decodings:
                texts = language.generate(given, [prompts[n] for n in rows], decoding, about)
                scores = [math.nan] * len(rows)
                if score:
                    scores = text_logprobs(language, given[about], prompts[rows[0]], texts).tolist()
                for n, text, logprob in zip(rows, texts, scores, strict=True):
                    found[n].append(Written(text, logprob))
            left.subtract(names[n] for n in rows)
            soft = {name: one for name, one in soft.items() if left[name]}
    return found
