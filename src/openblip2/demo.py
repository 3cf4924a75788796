"""The main job, whole: two frozen models learn to talk to each other, and are scored on what they have never seen.

pictures -> frozen features -> stage 1 -> stage 2 -> metrics.json and report.html
"""

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor

from openblip2.attend import look, overlay
from openblip2.captioner import ANSWER, CAPTION, Captioner, greedy
from openblip2.config import RunSettings, change
from openblip2.data.cache.features import Features
from openblip2.data.corpora import easy_vqa_records, stamps_records
from openblip2.data.records import Question, Record
from openblip2.data.scenes.draw import draw_scenes
from openblip2.data.scenes.grammar import named
from openblip2.data.text import clean_caption
from openblip2.evaluate.captions import caption_scores
from openblip2.evaluate.grounding import grounding
from openblip2.evaluate.retrieval import recalls, rerank, similarities
from openblip2.evaluate.vqa import accuracy, baselines
from openblip2.inference import load
from openblip2.matcher import Matcher
from openblip2.model.build import build_vision
from openblip2.model.language import Decoding
from openblip2.presets import preset
from openblip2.progress import Progress
from openblip2.report import write_report
from openblip2.score.pointing import score_pointing
from openblip2.train.checkpoint import make_folder, write_json
from openblip2.train.encode import encode_all
from openblip2.train.hardware import compute_dtype, computing, device, keep_freed_memory
from openblip2.train.prepare import prepare
from openblip2.train.recipes import train_stage

SHOWN = 24  # held-out pictures in the report: the first ones, not chosen


# The stamps are 667 pictures to train on: the scenes' steps would show each of them dozens of times.
STAMPS = {
    "stage1": {
        "train.steps": 60,
        "stage1.matching_from": 20,
        "train.validate_every": 20,
        "optim.lr": 2e-4,
        "qformer.dropout": 0.1,
    },
    "stage2": {"train.steps": 60, "train.validate_every": 20, "qformer.dropout": 0.1},
}


@dataclass(frozen=True)
class Plan:
    """How much of everything. The defaults are the laptop's."""

    corpus: Literal["scenes", "stamps"] = "scenes"
    seed: int = 0
    train_scenes: int = 4000
    test_scenes: int = 500
    train_easy_vqa: int = 400  # of its 4,000 training pictures, as captions; its questions are never trained on
    asked: int = 400  # questions of each data set, drawn from its test part
    reranked: int = 16  # ITM looks at this many candidates
    pointed: int = 100  # test pictures of the pointing game
    looked: int = 9  # pictures whose maps are drawn
    stage1: RunSettings = field(default_factory=lambda: preset("stage1", "laptop"))
    stage2: RunSettings = field(default_factory=lambda: preset("stage2", "laptop"))


@dataclass(frozen=True)
class Corpus:
    """What is trained on; what is scored; questions by data set with those that a blind guesser may read."""

    train: list[Record]
    test: list[Record]
    questions: dict[str, tuple[list[Record], list[Record]]]  # data set -> (training pictures, test pictures)
    skipped: list[str]


def run_demo(out: Path, plan: Plan, progress: Progress) -> dict[str, Any]:
    """Runs it all into `out` and returns what `out/metrics.json` holds.

    Raises:
        UserError: a package that the corpus or the models need is missing; the message says how to get it.
    """
    make_folder(out)
    keep_freed_memory()
    seconds: dict[str, float] = {}
    stage1, stage2 = settings_of(plan, out)
    with _timed(seconds, "data"):
        corpus = gather_corpus(plan, out / "data")
        for line in corpus.skipped:
            progress.say(f"skipped: {line}")
        progress.say(f"{len(corpus.train)} pictures to train on, {len(corpus.test)} held out")
    with _timed(seconds, "features"):
        vision = build_vision(stage1, compute_dtype(device(), stage1.train.precision)).to(device())
        prepare(stage1, corpus.train, vision, out / "stage1", out / "features", progress)
        test = _cleaned(_encode(vision, corpus.test, stage1, out, "test", progress))
        asked = {
            name: (_encode(vision, _asked_pictures(records, plan), stage1, out, f"asked-{name}", progress))
            for name, (_, records) in corpus.questions.items()
        }
        del vision
    with _timed(seconds, "stage1"):
        train_stage(stage1, corpus.train, out / "stage1", progress, features=out / "features")
    with _timed(seconds, "stage2"):
        train_stage(stage2, corpus.train, out / "stage2", progress, features=out / "features")
    examples: dict[str, Any] = {}
    with _timed(seconds, "evaluation"):
        progress.say("scoring on held-out pictures")
        matcher, captioner = load(out / "stage1"), load(out / "stage2")
        assert isinstance(matcher, Matcher)
        assert isinstance(captioner, Captioner)
        metrics: dict[str, Any] = {
            "corpus": plan.corpus,
            "pictures": {"train": len(corpus.train), "test": len(test)},
            "retrieval": _retrieval(matcher, test, plan, examples, progress),
            "caption": _captions(captioner, test, examples, progress),
            "vqa": {
                name: _vqa(captioner, asked[name], known, plan, name, examples, progress)
                for name, (known, _) in corpus.questions.items()
            },
            "grounding": _grounding(captioner, test, plan, progress),
            "pointing": _pointing(matcher, corpus.test, plan, progress),
        }
        examples["maps"] = _maps(matcher, corpus.test[: plan.looked], out / "maps")
    metrics["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    metrics["seconds"]["total"] = round(sum(seconds.values()), 1)
    metrics["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    write_json(metrics, out / "metrics.json")
    write_report(out / "report.html", metrics, examples, out / "stage1" / "log.jsonl", out / "stage2" / "log.jsonl")
    return metrics


def settings_of(plan: Plan, out: Path) -> tuple[RunSettings, RunSettings]:
    """The settings of both stages, bound to this demo's folders and seed."""
    common = {"data.source": str(out / "data"), "train.seed": plan.seed}
    own = STAMPS if plan.corpus == "stamps" else {"stage1": {}, "stage2": {}}
    return (
        change(plan.stage1, {**common, **own["stage1"]}),
        change(plan.stage2, {**common, **own["stage2"], "start": str(out / "stage1")}),
    )


def gather_corpus(plan: Plan, folder: Path) -> Corpus:
    """Draws or finds the pictures: training and test never share a noun with a colour, or a group of look-alikes."""
    if plan.corpus == "stamps":
        stamps = stamps_records(seed=plan.seed)
        return Corpus(stamps.train, stamps.test, {}, stamps.skipped)
    scenes = draw_scenes(folder / "train", plan.train_scenes, "train", plan.seed)
    test = draw_scenes(folder / "test", plan.test_scenes, "test", plan.seed)
    easy, easy_test = easy_vqa_records("train"), easy_vqa_records("test")
    captioned = Random(plan.seed).sample(easy, min(plan.train_easy_vqa, len(easy)))
    questions = {"scenes": (scenes, test), "easy-vqa": (easy, easy_test)}
    return Corpus(scenes + captioned, test, questions, [])


def _encode(vision, records: list[Record], settings: RunSettings, out: Path, name: str, progress: Progress) -> Features:
    found, problems = encode_all(vision, records, settings, out / "features" / name, name, progress)
    for line in problems:
        progress.say(f"skipped: {line}")
    return found


def _cleaned(features: Features) -> Features:
    """Captions as the models are given them."""
    records = [replace(r, captions=tuple(clean_caption(c) for c in r.captions)) for r in features.records]
    return Features(records, features.values)


def _asked_pictures(records: Sequence[Record], plan: Plan) -> list[Record]:
    """Pictures with one question each, enough for `plan.asked` questions."""
    random = Random(plan.seed)
    chosen = random.sample(list(records), min(plan.asked, len(records)))
    return [replace(record, questions=(random.choice(record.questions),)) for record in chosen]


def _retrieval(
    matcher: Matcher, test: Features, plan: Plan, examples: dict[str, Any], progress: Progress
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
    # The authors' code adds ITC's score to ITM's; as log-odds the two are of one kind. Candidates stay in front, for
    # none of the others has a higher ITC score.
    likeness = scores / model.temperature.detach()
    examples["retrieval"] = _retrieval_examples(test.records, captions, by_image, by_text)
    return {
        "n": len(captions),
        "chance": 1 / len(captions),
        "itc": recalls(scores, scores, correct),
        "itm": recalls(by_image, by_text, correct) | {"reranked": plan.reranked},
        "itm+itc": recalls(by_image + likeness, by_text + likeness, correct) | {"reranked": plan.reranked},
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
    written = _generate(captioner, test.values, prompts, greedy(CAPTION), "captions", progress)
    examples["captions"] = [
        {"image": str(r.image), "caption": caption, "references": list(r.captions), "facts": r.facts}
        for r, caption in list(zip(test.records, written, strict=True))[:SHOWN]
    ]
    # What the same captions are worth on other pictures: what is right of them by chance.
    others = [*test.records[1:], *test.records[:1]]
    return caption_scores(written, test.records) | {"chance": caption_scores(written, others)}


def _vqa(
    captioner: Captioner,
    asked: Features,
    known: Sequence[Record],
    plan: Plan,
    name: str,
    examples: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    questions: list[Question] = [record.questions[0] for record in asked.records]
    form = captioner.settings.language.question
    prompts = [form.replace("{}", question.text) for question in questions]
    answers = _generate(captioner, asked.values, prompts, greedy(ANSWER), f"answers ({name})", progress)
    examples.setdefault("answers", {})[name] = [
        {"image": str(r.image), "question": q.text, "answer": answer, "reference": q.answer}
        for r, q, answer in list(zip(asked.records, questions, answers, strict=True))[:SHOWN]
    ]
    blind = baselines([question for record in known for question in record.questions], questions)
    return accuracy(answers, questions) | {"zero_shot": True, "prompt": form, "baselines": blind}


def _generate(
    captioner: Captioner,
    values: Tensor,
    prompts: Sequence[str],
    decoding: Decoding,
    what: str,
    progress: Progress,
) -> list[str]:
    found: list[str] = []
    with (
        torch.inference_mode(),
        computing(captioner.model, captioner.settings.train.precision),
        progress.steps(what, len(values)) as bar,
    ):
        for features in values.split(50):
            part = prompts[len(found) : len(found) + len(features)]
            found += captioner.model.generate(part, decoding, features=features.to(device()))
            bar.advance(count=len(features))
    return found


def _grounding(captioner: Captioner, test: Features, plan: Plan, progress: Progress) -> dict[str, Any]:
    progress.doing("grounding")
    model = captioner.model
    with torch.inference_mode(), computing(model, captioner.settings.train.precision):
        return grounding(model, test, plan.seed, captioner.settings.language.prompts[0]).as_log()


def _pointing(matcher: Matcher, test: Sequence[Record], plan: Plan, progress: Progress) -> dict[str, Any] | None:
    if plan.corpus != "scenes":  # nobody has said where things are
        return None
    found = score_pointing(matcher, test[: plan.pointed], "itc", progress, plan.seed)
    return {"n": found.pictures, "texts": found.protocol["texts"]} | {k: v.score for k, v in found.scores.items()}


def _maps(matcher: Matcher, records: Sequence[Record], folder: Path) -> list[dict[str, str]]:
    """What a text of each picture depends on, and where the queries look, drawn into a folder."""
    make_folder(folder)
    examples: list[dict[str, str]] = []
    for record in records:
        text = named(record.facts["objects"][0]) if record.facts else clean_caption(record.captions[0])
        found = look(matcher, record.image, text)
        example = {"image": str(record.image), "text": text}
        for kind, drawn in (("relevance", found.words[0][1]), ("attention", found.average)):
            path = folder / f"{record.image.stem}-{kind}.png"
            overlay(record.image, drawn).save(path)
            example[kind] = str(path)
        examples.append(example)
    return examples


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - began
