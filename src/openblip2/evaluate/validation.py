"""Measurements on held-out images during training: stage 1, captions of stage 2, and answers.

Shapes: N images, Q queries, E shared space.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openblip2.data.batches import pair_ids
from openblip2.data.features import Features
from openblip2.data.records import Question
from openblip2.data.text import BertTokens, question_tokens
from openblip2.evaluate.ranking import recalls, similarities, text_vectors
from openblip2.model.decoding import Decoding
from openblip2.model.objectives import HardNegatives, similarity
from openblip2.model.stage1 import Stage1, itm_pairs
from openblip2.model.stage2 import Stage2

STAGE1_GROUP = 48  # pairs per batch; they are the in-batch negatives of the losses, as in a small training batch
GROUP = 32  # images per batch in stage 2
MOST_CAPTIONS, MOST_ANSWERS = 128, 256  # stage 2: only this many images, from the beginning
MIN_GAP = 0.02  # fraction of the loss; a smaller grounding gap counts as noise
GREEDY = Decoding(max_new_tokens=10, beams=1)
ARTICLES = ("a", "an", "the")


def measure_stage1(model: Stage1, tokens: BertTokens, held_out: Features) -> dict[str, Any]:
    """Held-out losses and accuracies of stage 1, with the first caption of each image.

    Returns:
        The losses itc, itm and itg; ITM accuracy with one true pair and two hard negatives per image, and with one true
        pair and one easy negative (the next image's text; chance is 0.5); recall@1 in both directions; the effective
        number of queries that texts match; and the effective rank of the query outputs.
    """
    device = model.temperature.device
    captions = [record.captions[0] for record in held_out.records]
    texts, valid = (t.to(device) for t in tokens(captions))
    sums = {"itc": 0.0, "itm": 0.0, "itg": 0.0}
    hard: list[Tensor] = []
    easy: list[Tensor] = []
    outputs: list[Tensor] = []
    for rows in torch.arange(len(captions)).split(STAGE1_GROUP):
        features = held_out.values[rows].to(device)
        longest = int(valid[rows].sum(1).max())
        part, real = texts[rows, :longest], valid[rows, :longest]
        ids = pair_ids(rows.tolist(), [captions[row] for row in rows.tolist()]).to(device)
        for name, value in model.losses(part, real, ids, features=features).items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(rows) / len(captions)
        hard.append(hard_hits(model, features, part, real, ids))
        easy.append(easy_hits(model, features, part, real, ids))
        outputs.append(model.connector.query_output(features))
    queries = torch.cat(outputs)
    images, words = model.image_vectors(queries), text_vectors(model, texts, valid)
    scores = torch.cat([similarity(part, words) for part in images.split(STAGE1_GROUP)])
    same = torch.tensor([[a == b for b in captions] for a in captions], device=device)
    return {
        "n": len(captions),
        **sums,
        "itm_accuracy": _share(hard),
        "itm_easy_accuracy": _share(easy),
        **recalls(scores, scores, same, ks=(1,)),
        "queries_used": queries_used(images, words),
        "effective_rank": effective_rank(queries),
    }


def hard_hits(model: Stage1, features: Tensor, tokens: Tensor, valid: Tensor, ids: Tensor) -> Tensor:
    """Which ITM decisions on the true pairs and the hardest negatives are right, bool."""
    scores = similarities(model, features, tokens, valid)
    same = ids[:, None] == ids[None, :]
    hardest, none = scores.masked_fill(same, -torch.inf), same.all(dim=1)
    negatives = HardNegatives(hardest.argmax(1).masked_fill(none, -1), hardest.argmax(0).masked_fill(none, -1))
    pairs = itm_pairs(tokens, valid, negatives)
    memory = model.connector.encode_image(features).take(pairs.images)
    return model.match(memory, pairs.tokens, pairs.valid).argmax(1).bool() == pairs.is_match


def easy_hits(model: Stage1, features: Tensor, tokens: Tensor, valid: Tensor, ids: Tensor) -> Tensor:
    """Like `hard_hits`, but the negatives are each image with the text of the next image."""
    other = torch.arange(len(ids), device=ids.device).roll(-1)
    wrong = ids != ids[other]
    memory = model.connector.encode_image(features)
    own = model.match(memory, tokens, valid).argmax(1).bool()[wrong]
    next_one = model.match(memory, tokens[other], valid[other]).argmax(1).bool()[wrong]
    return torch.cat([own, ~next_one])


def _share(hits: Sequence[Tensor]) -> float:
    right = torch.cat([*hits])
    return int(right.sum()) / max(1, len(right))


def queries_used(images: Tensor, texts: Tensor) -> float:
    """The effective number of queries that texts match in their own images, 1 to Q.

    It is the exponential of the entropy of the distribution of the query that is nearest to the text.

    Args:
        images: `[N, Q, E]`, the queries of N images in the shared space.
        texts: `[N, E]`, their texts.
    """
    cosines = torch.einsum("nqe,ne->nq", images, texts)
    shares = torch.bincount(cosines.argmax(1), minlength=cosines.shape[1]).double() / len(cosines)
    return float(torch.special.entr(shares).sum().exp())


def grounding(model: Stage2, held_out: Features, seed: int, prompt: str) -> dict[str, Any]:
    """Tests whether the language model uses the image, on held-out images with their first caption.

    The loss of the captions is compared with their loss for another image, which should be higher. The other image is
    the previous one of the group. For an encoder-decoder, captions are split at random, equally for both losses.
    """
    captions = [record.captions[0] for record in held_out.records[:MOST_CAPTIONS]]
    parts = []
    for rows, queries, right, other in _groups(model, held_out.values[: len(captions)]):
        texts, prompts = [captions[n] for n in rows], [prompt] * len(rows)
        draws = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        losses = [float(model.language.scored(soft, prompts, texts, draws)[0]) for soft in (right, other)]
        parts.append((queries, losses))
    return _summary(parts)


def measure_answers(
    model: Stage2, tokens: BertTokens | None, held_out: Features, form: str, seed: int, reads_prompts: bool = False
) -> dict[str, Any]:
    """Measures exact match of greedy answers by kind of question, and the loss of the right answers as in `grounding`.

    If the connector reads questions, the effective rank of its outputs also depends on them.

    Args:
        tokens: the connector's tokenizer; None = the connector reads no questions.
        form: the prompt, with {} for the question.
        seed: seed for drawing one question per image.
        reads_prompts: whether the connector reads the whole prompt and not the question alone.
    """
    draw = torch.Generator().manual_seed(seed)
    records = held_out.records[:MOST_ANSWERS]
    asked = [r.questions[int(torch.randint(len(r.questions), (), generator=draw))] for r in records]
    answers: list[str] = []
    parts = []
    every = [form.replace("{}", question.text) for question in asked]
    read = every if reads_prompts else [question.text for question in asked]
    for rows, queries, right, other in _groups(model, held_out.values[: len(asked)], tokens, read):
        prompts = [every[n] for n in rows]
        targets = [asked[n].answer for n in rows]
        answers += model.language.generate(right, prompts, GREEDY)
        parts.append((queries, [float(model.language.scored(soft, prompts, targets)[0]) for soft in (right, other)]))
    found = accuracy(answers, asked[: len(answers)])
    kinds = {f"accuracy_{kind}": found[kind]["accuracy"] for kind in found if kind not in ("n", "accuracy")}
    return {"n": len(answers), "accuracy": found["accuracy"], **kinds, **_summary(parts)}


def _groups(
    model: Stage2, values: Tensor, tokens: BertTokens | None = None, questions: list[str] | None = None
) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """Yields row numbers, query outputs, and soft prompts of the right and of another image, `GROUP` images at a time.

    A last group of one image is skipped, because there is no other image.
    """
    device = model.projection.weight.device
    for rows in torch.arange(len(values)).split(GROUP):
        if len(rows) < 2:
            continue
        features = values[rows].to(device)
        question = None if questions is None else question_tokens(tokens, [questions[n] for n in rows], device)
        queries = model.query_output(features=features, question=question)
        right = model.projection(queries)
        if question is None:
            other = right.roll(1, dims=0)
        else:  # the outputs depend on the question, which stays the same
            # Not `features.roll`, which fails for cached fp16 features if the CPU computes in bf16.
            previous = features[torch.arange(len(rows)).roll(1)]
            other = model.soft_prompt(features=previous, question=question)
        yield rows.tolist(), queries, right, other


def _summary(parts: Sequence[tuple[Tensor, Sequence[float]]]) -> dict[str, Any]:
    """Losses in nats per token with the right image and with another one, the effective rank, and a verdict.

    Args:
        parts: query outputs `[n, Q, D]` and the two losses of each group of n images.
    """
    queries = torch.cat([outputs for outputs, _ in parts])
    right, other = (sum(losses[n] * len(outputs) for outputs, losses in parts) / len(queries) for n in (0, 1))
    gap = other - right
    verdict = f"the model looks at the picture: another one makes captions {gap:.2f} nats per token less likely"
    if gap < MIN_GAP * right:
        verdict = (
            "the model is NOT looking at the picture: captions are as likely with another one (train longer, "
            "start from a stage-1 run, or set warm_start=true)"
        )
    return {
        "n": len(queries),
        "loss_right": right,
        "loss_shuffled": other,
        "effective_rank": effective_rank(queries),
        "verdict": verdict,
    }


def normalise(answer: str) -> str:
    """Lower-cases an answer and removes articles, punctuation and repeated spaces, for the metric "exact"."""
    plain = re.sub(r"[^\w\s]", " ", answer.lower())
    return " ".join(word for word in plain.split() if word not in ARTICLES)


def exact_scores(
    answers: Sequence[str], questions: Sequence[Question], normal: Callable[[str], str] = normalise
) -> np.ndarray:
    """1 if an answer equals the right answer, both after `normal` (`vqa_normal` for GQA), else 0: [n]."""
    hits = [normal(answer) == normal(q.answer) for answer, q in zip(answers, questions, strict=True)]
    return np.array(hits, dtype=np.float64)


def summary(scores: np.ndarray, questions: Sequence[Question]) -> dict[str, Any]:
    """Mean score in [0, 1] over all questions, and for each kind separately: `{"n", "accuracy", kind: {...}}`."""
    assert len(scores) == len(questions)
    kinds = np.array([question.kind for question in questions])
    found: dict[str, Any] = {"n": len(scores), "accuracy": float(np.mean(scores))}
    for kind in sorted(set(kinds.tolist())):
        part = scores[kinds == kind]
        found[kind] = {"n": len(part), "accuracy": float(part.mean())}
    return found


def accuracy(answers: Sequence[str], questions: Sequence[Question]) -> dict[str, Any]:
    """The `summary` of the `exact_scores`."""
    return summary(exact_scores(answers, questions), questions)


def baselines(known: Sequence[Question], asked: Sequence[Question]) -> dict[str, Any]:
    """The accuracy on `asked` of two guessers that see no image and know the training questions `known`.

    majority: always the most common answer. question_only: the most common answer to the same question, or the
    majority's if the question is new.
    """
    usual = Counter(q.answer for q in known).most_common(1)[0][0]
    by_text: dict[str, Counter[str]] = {}
    for question in known:
        by_text.setdefault(question.text, Counter())[question.answer] += 1
    guesses = [by_text[q.text].most_common(1)[0][0] if q.text in by_text else usual for q in asked]
    return {"majority": accuracy([usual] * len(asked), asked), "question_only": accuracy(guesses, asked)}


def effective_rank(queries: Tensor) -> float:
    """The mean of `effective_ranks` over the images."""
    return float(effective_ranks(queries).mean())


def effective_ranks(queries: Tensor) -> Tensor:
    """The effective number of directions that the queries of an image span, 1 to `min(Q, D)`, for each image.

    It is the exponential of the entropy of the normalised squared singular values, after each query's mean over the
    images is subtracted. It is computed in float64 on the CPU. An image whose outputs equal that mean, up to the
    rounding of float32, has rank 1.

    Args:
        queries: `[N, Q, D]`, the query outputs of N images.

    Returns:
        The effective ranks `[N]`; NaN if any output is not finite.

    Raises:
        ValueError: there are fewer than 2 images, so there is no mean to differ from.
    """
    if len(queries) < 2:
        raise ValueError(f"effective rank needs at least 2 pictures, got {len(queries)}")
    if not queries.isfinite().all():  # the eigenvalue solver would raise an error, and stop a training run
        return torch.full((len(queries),), math.nan)
    rows = queries.detach().cpu().double()
    centred = rows - rows.mean(dim=0)
    squares = torch.linalg.eigvalsh(centred @ centred.mT).clamp(min=0)  # [N, Q], the squared singular values
    total = squares.sum(dim=1, keepdim=True)
    rounding = torch.finfo(torch.float32).eps ** 2 * rows.square().sum(dim=(1, 2))[:, None]
    shares = torch.where(total > rounding, squares / total, 0.0)
    return torch.special.entr(shares).sum(dim=1).exp()
