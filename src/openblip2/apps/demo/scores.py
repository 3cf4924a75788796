"""Scores of the demo's two runs on pictures that neither has seen, and examples for the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openblip2.apps.demo.plan import Corpus, DemoPlan
from openblip2.apps.scenes.grammar import judge, named
from openblip2.data.features import Features
from openblip2.data.records import Question, Record
from openblip2.evaluate.pointing import score_pointing
from openblip2.evaluate.ranking import recalls, rerank, similarities
from openblip2.evaluate.result import Options
from openblip2.evaluate.validation import baselines, exact_scores, grounding, summary
from openblip2.evaluate.vqa import vqa_normal
from openblip2.hardware import computing, device
from openblip2.inference.attend import look, overlay
from openblip2.inference.captioner import ANSWER, CAPTION, Captioner, greedy
from openblip2.inference.matcher import Matcher
from openblip2.model.language import Decoding
from openblip2.progress import Progress
from openblip2.runs import make_folder

SHOWN = 24  # held-out pictures in the report: the first ones, not selected


def score(
    matcher: Matcher,
    captioner: Captioner,
    test: Features,
    asked: Mapping[str, Features],
    corpus: Corpus,
    plan: DemoPlan,
    maps: Path,
    progress: Progress,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Computes the figures of `metrics.json`, and examples for the report.

    Args:
        test: the held-out pictures.
        asked: for each data set, pictures with one question each.
        maps: the folder in which maps are saved.
    """
    examples: dict[str, Any] = {}
    metrics: dict[str, Any] = {
        "retrieval": _retrieval(matcher, test, plan, examples, progress),
        "caption": _captions(captioner, test, examples, progress),
        "vqa": {
            name: _vqa(captioner, asked[name], known, plan, name, examples, progress)
            for name, (known, _) in corpus.questions.items()
        },
        "grounding": _grounding(captioner, test, plan, progress),
        "pointing": _pointing(matcher, corpus.test, plan, progress),
    }
    examples["maps"] = _maps(matcher, corpus.test[: plan.looked], maps)
    return metrics, examples


def _retrieval(
    matcher: Matcher, test: Features, plan: DemoPlan, examples: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    model, place = matcher.model, device()
    captions = [record.captions[0] for record in test.records]
    tokens, valid = (t.to(place) for t in matcher.tokens(captions))
    correct = torch.tensor([[a == b for b in captions] for a in captions], device=place)
    features = test.values.to(place)
    with torch.inference_mode(), computing(model, matcher.settings.train.precision):
        scores = similarities(model, features, tokens, valid)
        with progress.steps("re-ranking", len(captions)) as bar:
            by_image, by_text = rerank(model, features, tokens, valid, scores, plan.reranked, bar.advance)
    # The authors' code adds the ITC score to the ITM score; as log-odds, the two are comparable. Candidates stay first,
    # because none of the others has a higher ITC score.
    itc_logits = scores / model.temperature.detach()
    examples["retrieval"] = _retrieval_examples(test.records, captions, by_image, by_text)
    return {
        "n": len(captions),
        "chance": 1 / len(captions),
        "itc": recalls(scores, scores, correct),
        "itm": recalls(by_image, by_text, correct) | {"reranked": plan.reranked},
        "itm+itc": recalls(by_image + itc_logits, by_text + itc_logits, correct) | {"reranked": plan.reranked},
    }


def _retrieval_examples(
    records: Sequence[Record], captions: Sequence[str], by_image: Tensor, by_text: Tensor
) -> dict[str, Any]:
    best_texts = by_image[:SHOWN].topk(3, dim=1).indices.tolist()
    best_images = by_text.T[:SHOWN].topk(3, dim=1).indices.tolist()
    return {
        "image_to_text": [
            {"image": str(records[n].image), "reference": captions[n], "found": [captions[m] for m in row]}
            for n, row in enumerate(best_texts)
        ],
        "text_to_image": [
            {
                "text": captions[n],
                "image": str(records[n].image),
                "found": [str(records[m].image) for m in row],
                "captions": [captions[m] for m in row],
            }
            for n, row in enumerate(best_images)
        ],
    }


def _captions(captioner: Captioner, test: Features, examples: dict[str, Any], progress: Progress) -> dict[str, Any]:
    prompts = [captioner.settings.language.prompts[0]] * len(test)
    written = write_for_features(captioner, test.values, prompts, greedy(CAPTION), "captions", progress)
    examples["captions"] = [
        {"image": str(r.image), "caption": caption, "references": list(r.captions), "facts": r.facts}
        for r, caption in list(zip(test.records, written, strict=True))[:SHOWN]
    ]
    # The same captions on other pictures: how much of them is right by chance.
    others = [*test.records[1:], *test.records[:1]]
    return _right_shares(written, test.records) | {"chance": _right_shares(written, others)}


def _right_shares(captions: Sequence[str], records: Sequence[Record]) -> dict[str, Any]:
    """Fractions of captions, in [0, 1]: equal to one of the scene's own; every object right; every attribute right;
    both; no wrong relation.
    """
    count = len(records)
    judged = [judge(caption, r.facts or {}) for caption, r in zip(captions, records, strict=True)]
    return {
        "n": count,
        "exact": sum(caption in r.captions for caption, r in zip(captions, records, strict=True)) / count,
        "objects": sum(j.objects for j in judged) / count,
        "attributes": sum(j.attributes for j in judged) / count,
        "objects_and_attributes": sum(j.objects and j.attributes for j in judged) / count,
        "relations": sum(j.relation is not False for j in judged) / count,
    }


def _vqa(
    captioner: Captioner,
    asked: Features,
    known: Sequence[Record],
    plan: DemoPlan,
    name: str,
    examples: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    questions: list[Question] = [record.questions[0] for record in asked.records]
    form = captioner.settings.language.question
    prompts = [form.replace("{}", question.text) for question in questions]
    answers = write_for_features(captioner, asked.values, prompts, greedy(ANSWER), f"answers ({name})", progress)
    examples.setdefault("answers", {})[name] = [
        {"image": str(r.image), "question": q.text, "answer": answer, "reference": q.answer}
        for r, q, answer in list(zip(asked.records, questions, answers, strict=True))[:SHOWN]
    ]
    blind = baselines([question for record in known for question in record.questions], questions)
    found = summary(exact_scores(answers, questions, vqa_normal), questions)  # "3" equals "three"
    return found | {"zero_shot": True, "prompt": form, "baselines": blind}


def write_for_features(
    captioner: Captioner,
    values: Tensor,
    prompts: Sequence[str],
    decoding: Decoding,
    what: str,
    progress: Progress,
) -> list[str]:
    """Generates text for N pictures, given by their features `[N, P, V]`, and N prompts."""
    found: list[str] = []
    with (
        torch.inference_mode(),
        computing(captioner.model, captioner.settings.train.precision),
        progress.steps(what, len(values)) as bar,
    ):
        for features in values.split(25):  # batches of 50 take a sixth less time and 0.4 GB more
            part = prompts[len(found) : len(found) + len(features)]
            found += captioner.model.generate(part, decoding, features=features.to(device()))
            bar.advance(count=len(features))
    return found


def _grounding(captioner: Captioner, test: Features, plan: DemoPlan, progress: Progress) -> dict[str, Any]:
    progress.doing("grounding")
    model = captioner.model
    with torch.inference_mode(), computing(model, captioner.settings.train.precision):
        return grounding(model, test, plan.seed, captioner.settings.language.prompts[0])


def _pointing(matcher: Matcher, test: Sequence[Record], plan: DemoPlan, progress: Progress) -> dict[str, Any]:
    found = score_pointing(matcher, test[: plan.pointed], Options(seed=plan.seed), progress)
    return {"n": found.pictures, "texts": found.protocol["texts"]} | {k: v.score for k, v in found.scores.items()}


def _maps(matcher: Matcher, records: Sequence[Record], folder: Path) -> list[dict[str, str]]:
    """Draws the relevance map of a text and the attention map of each picture into a folder."""
    make_folder(folder)
    examples: list[dict[str, str]] = []
    for record in records:
        assert record.facts is not None
        text = named(record.facts["objects"][0])
        found = look(matcher, record.image, text)
        example = {"image": str(record.image), "text": text}
        for kind, drawn in (("relevance", found.words[0][1]), ("attention", found.average)):
            path = folder / f"{record.image.stem}-{kind}.png"
            overlay(record.image, drawn).save(path)
            example[kind] = str(path)
        examples.append(example)
    return examples
