"""The scores and costs of one run of a study: retrieval by stage 1, captions and answers by stage 2."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from openblip2.apps.demo.scores import write_for_features
from openblip2.apps.scenes.grammar import judge
from openblip2.apps.studies.study import ASKED, BOTH, DIRECTIONS, GAP, LOSS, OTHER, RANK, RIGHT, SCORES, Values
from openblip2.data.features import FeatureCache, Features, find_records
from openblip2.data.records import Record
from openblip2.evaluate.result import Options
from openblip2.evaluate.retrieval import score_retrieval
from openblip2.evaluate.validation import GROUP, effective_ranks, exact_scores
from openblip2.evaluate.vqa import vqa_normal
from openblip2.hardware import computing, device
from openblip2.inference.captioner import ANSWER, CAPTION, Captioner, greedy
from openblip2.inference.matcher import Matcher
from openblip2.model.likelihood import likelihoods
from openblip2.progress import Progress
from openblip2.train.encode import whitened


def retrieval_values(matcher: Matcher, test: Sequence[Record], reranked: int, store: Path, says: Progress) -> Values:
    """For each figure and test image: 1 if the image, or its caption, has its partner among the first k, else 0.

    `reranked` is the number of candidates that ITM scores; 0 = ITC alone.
    """
    rows = score_retrieval(matcher, test, Options(rerank=reranked, features=store), says).samples
    values: Values = {}
    for score, named in SCORES.items() if reranked else [("itc", SCORES["itc"])]:
        for k in (1, 5):
            for way, words in DIRECTIONS.items():
                values[f"recall@{k}, {words}, {named}"] = hits(rows, way, score, k)
        sides = (values[f"recall@1, {words}, {named}"] for words in DIRECTIONS.values())
        values[BOTH.format(named)] = [sum(pair) / 2 for pair in zip(*sides, strict=True)]
    return values


def hits(rows: Sequence[Mapping[str, Any]], way: str, score: str, k: int = 1) -> list[float]:
    """1 for each image ("tr") or text ("ir") of retrieval samples with a partner among the first k, else 0."""
    ranks = [row[f"{score} first right"] for row in rows if ("caption" in row) == (way == "ir")]
    return [float(rank is not None and rank <= k) for rank in ranks]


def caption_values(
    captioner: Captioner, test: Sequence[Record], stored: Features, progress: Progress
) -> tuple[Values, float]:
    """Figures of captions, by name, for each test image; and the CPU seconds to write one.

    Loss of the caption in nats per token; how much another image (the previous one) adds; the effective rank of the
    visual tokens; 1 if the written caption has every object and attribute right, else 0; and the same for the answer to
    the image's first question. Unlike in `validation.grounding`, each image has the same weight.
    """
    model, values, wording = captioner.model, stored.values, captioner.settings.language
    prompt = wording.prompts[0]
    with torch.inference_mode(), computing(model, captioner.settings.train.precision):
        outputs = torch.cat([model.query_output(features=part.to(device())) for part in values.split(GROUP)])
        soft = model.projection(outputs)
        found: Values = {LOSS: [], OTHER: []}
        for losses, prompts in ((found[LOSS], soft), (found[OTHER], soft.roll(1, dims=0))):
            for rows in torch.arange(len(test)).split(GROUP):
                captions = [test[n].captions[0] for n in rows.tolist()]
                losses += likelihoods(model.language, prompts[rows.to(device())], prompt, captions)[0].tolist()
    found[GAP] = [other - right for right, other in zip(found[LOSS], found[OTHER], strict=True)]
    found[RANK] = effective_ranks(outputs.float()).tolist()
    began = time.process_time()  # not the time of day, because other programs may run
    written = write_for_features(captioner, values, [prompt] * len(test), greedy(CAPTION), "captions", progress)
    seconds = (time.process_time() - began) / len(test)
    found[RIGHT] = [float(judge(text, one.facts or {}).attributes) for text, one in zip(written, test, strict=True)]
    questions = [record.questions[0] for record in test]
    asked = [wording.question.replace("{}", question.text) for question in questions]
    answers = write_for_features(captioner, values, asked, greedy(ANSWER), "answers", progress)
    found[ASKED] = exact_scores(answers, questions, vqa_normal).tolist()
    return found, seconds


def stored_features(run: Captioner | Matcher, test: Sequence[Record], folder: Path) -> Features:
    """The stored features of the test images."""
    assert run.model.vision is not None
    found, problems = find_records(test, FeatureCache(folder), whitened(run.model.vision))
    assert not problems, problems
    return found.load()


def training_flops(run: Captioner | Matcher, stored: Features) -> float:
    """Floating-point operations of all training steps of a run, given features; a multiply-add is two.

    They are counted in one step of each kind, with the first test images and their first captions as the batch. The
    closed-form start is not counted.
    """
    settings, steps = run.settings, run.settings.train.steps
    captions = [record.captions[0] for record in stored.records[: settings.train.batch]]
    features = stored.values[: len(captions)].to(device())

    def count(*texts: Any, **options: Any) -> float:
        with FlopCounterMode(display=False) as counter, computing(run.model, settings.train.precision):
            losses = run.model.losses(*texts, features=features, **options)
            torch.stack([*losses.values()]).sum().backward()
        run.model.zero_grad(set_to_none=True)
        return counter.get_total_flops()

    if isinstance(run, Matcher):
        texts, objectives = [part.to(device()) for part in run.tokens(captions)], settings.stage1.objectives
        first = min(settings.stage1.itm_start_step, steps) if "itm" in objectives else 0
        without = count(*texts, objectives=[name for name in objectives if name != "itm"]) if first else 0.0
        return first * without + (steps - first) * count(*texts, objectives=objectives)
    first, prompts = settings.stage2.lm_start_step, [settings.language.prompts[0]] * len(captions)
    aligned = count(prompts, captions, words=run.model.word_table(captions)) if first else 0.0
    return steps * aligned + (steps - first) * count(prompts, captions)  # the alignment goes on with the language model
