"""Visual question answering scored as in the paper (4.1 and 4.3): all questions, against the annotators' answers."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from openblip2.data.records import Question, Record
from openblip2.evaluate.result import WITHHELD, PartialTexts, Result, decoding_card
from openblip2.evaluate.vqa_metrics import baselines, exact_scores, lemmas, normalise, vqa_normal, vqa_scores
from openblip2.inference.captioner import Captioner
from openblip2.model.decoding import Decoding
from openblip2.progress import Progress

Metric = Literal["vqa", "vqa-lavis", "gqa", "exact"]
METRICS = {
    "vqa": "VQA accuracy, the official normaliser",
    "vqa-lavis": "VQA accuracy, the normaliser of the authors' code (LAVIS)",
    "gqa": "exact match after the VQA rules, both sides",
    "exact": "exact match, case, articles and punctuation aside",
}
USUAL = {"vqav2": "vqa", "okvqa": "vqa", "gqa": "gqa"}  # by the kind of data
GROUP = 256  # questions that are answered and kept together


def usual_metric(kind: str, records: Sequence[Record]) -> Metric:
    """The official metric of a data set; of other data VQA accuracy if all questions have many answers, else exact."""
    many = all(len(question.given) > 3 for record in records for question in record.questions)
    return USUAL.get(kind, "vqa" if many else "exact")  # pyright: ignore[reportReturnType]


def score_answers(
    captioner: Captioner,
    records: Sequence[Record],
    decoding: Decoding,
    metric: Metric,
    progress: Progress,
    lemmatised: bool = False,
    known: Sequence[Record] = (),
    seed: int = 0,
    partial_texts: PartialTexts | None = None,
) -> Result:
    """Accuracy over all questions and for each kind of question; intervals over images, not over questions.

    Args:
        records: images with questions; without answers if the split is withheld.
        lemmatised: compare nouns and verbs of the answers in their dictionary form, as OK-VQA does.
        known: training images with questions, for the scores of guessers that see no image; () = not measured.
        partial_texts: where answers are kept until they are scored; None = nowhere.

    Raises:
        UserError: VQA accuracy of questions with one answer; no lemmatiser; a question that cannot be asked.
    """
    asked = [(n, question) for n, record in enumerate(records) for question in record.questions]
    owners, questions = [n for n, _ in asked], [question for _, question in asked]

    def generate(rows: slice) -> list[str]:
        prompts, read = captioner.read_questions([question.text for question in questions[rows]])
        return captioner.generate([records[n].image for n in owners[rows]], prompts, decoding, read)

    names, how = [(str(records[n].image), question.text) for n, question in asked], decoding_card(decoding)
    answers = (partial_texts or PartialTexts()).texts("answers", "questions", names, GROUP, generate, progress, how)
    progress.doing("scoring")
    result = Result("vqa", len(records), seed)
    result.protocol |= decoding_card(decoding) | {
        "questions": len(questions),
        "prompt": captioner.settings.language.question,
        "metric": METRICS[metric],
        "lemmatised": lemmatised,
        "question_cleaning": "none"
        if captioner.settings.reads_prompts
        else "lower case, most punctuation that is not between digits removed, at most 50 words",
    }
    result.samples += [
        {"image": records[n].id, "question_id": question.id, "question": question.text, "answer": answer}
        for (n, question), answer in zip(asked, answers, strict=True)
    ]
    if not all(question.answer for question in questions):
        result.warnings.append(WITHHELD)
        return result
    judged = lemmas(answers) if lemmatised else answers
    scores = _scores(judged, questions, metric)
    result.add("accuracy", scores, groups=owners)
    for kind in sorted({question.kind for question in questions}):
        rows = [n for n, question in enumerate(questions) if question.kind == kind]
        result.add(f"accuracy, {kind}", scores[rows], groups=[owners[n] for n in rows])
    if known:
        result.beside["blind"] = baselines([question for record in known for question in record.questions], questions)
    for row, question, plain, score in zip(result.samples, questions, judged, scores.tolist(), strict=True):
        row |= {"judged_as": plain} if lemmatised else {}
        row |= {"given": list(question.given), "kind": question.kind, "score": score}
    return result


def _scores(answers: Sequence[str], questions: Sequence[Question], metric: Metric) -> np.ndarray:
    if metric in ("vqa", "vqa-lavis"):
        return vqa_scores(answers, questions, "official" if metric == "vqa" else "lavis")
    return exact_scores(answers, questions, vqa_normal if metric == "gqa" else normalise)
