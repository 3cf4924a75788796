"""How a model that answers questions is doing on held-out pictures, while it trains."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openblip2.data.features import Features
from openblip2.data.records import Question
from openblip2.data.tokens import QFormerTokens
from openblip2.evaluate.effective_rank import effective_rank
from openblip2.evaluate.grounding import GROUP, Grounding
from openblip2.evaluate.vqa import accuracy
from openblip2.model.decoding import Decoding
from openblip2.model.stage2 import Stage2

SHORT = Decoding(max_new_tokens=10, beams=1)


def measure_answers(
    model: Stage2, tokens: QFormerTokens | None, held_out: Features, form: str, seed: int, most: int = 256
) -> dict[str, Any]:
    """Exact match of greedy answers, by kind of question, and the answers' loss with the right and another picture.

    The effective rank is that of the query outputs; where the Q-Former reads questions they depend on those, too.
    One question of each picture, at most `most`: which one depends on the seed alone.
    """
    device = model.projection.weight.device
    draw = torch.Generator().manual_seed(seed)
    asked: list[Question] = []
    for record in held_out.records[:most]:
        asked.append(record.questions[int(torch.randint(len(record.questions), (), generator=draw))])
    answers: list[str] = []
    queries: list[Tensor] = []
    right = shuffled = 0.0
    rows = [part for part in torch.arange(len(asked)).split(GROUP) if len(part) > 1]
    for part in rows:
        features = held_out.values[part].to(device)
        questions = [asked[n] for n in part.tolist()]
        prompts = [form.replace("{}", question.text) for question in questions]
        read = question_tokens(tokens, [question.text for question in questions], device)
        queries.append(model.query_output(features=features, question=read))
        soft = model.projection(queries[-1])
        answers += model.language.generate(soft, prompts, SHORT)
        another = model.soft_prompt(features=features.roll(1, dims=0), question=read)
        targets = [question.answer for question in questions]
        for kind, seen in (("right", soft), ("shuffled", another)):
            loss = float(model.language.scored(seen, prompts, targets)[0]) * len(part)
            right, shuffled = (right + loss, shuffled) if kind == "right" else (right, shuffled + loss)
    count = len(answers)
    found = accuracy(answers, asked[:count])
    kinds = {f"accuracy_{kind}": found[kind]["accuracy"] for kind in found if kind not in ("n", "accuracy")}
    looks = Grounding(right / count, shuffled / count, count, effective_rank(torch.cat(queries)))
    return {"n": count, "accuracy": found["accuracy"], **kinds, **looks.as_log()}


def question_tokens(
    tokens: QFormerTokens | None, questions: Sequence[str] | None, device: torch.device | None = None
) -> tuple[Tensor, Tensor] | None:
    """Questions as the Q-Former reads them, `[B, T]` ids and which are real; None where it reads none."""
    if tokens is None or questions is None:
        return None
    ids, valid = tokens(questions)
    return ids.to(device), valid.to(device)
