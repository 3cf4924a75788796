"""Visual question answering scored as in the paper (4.1 and 4.3): every question answered, held to what people said."""

from collections.abc import Sequence
from typing import Literal

from openblip2.captioner import Captioner
from openblip2.data.records import Question, Record
from openblip2.evaluate.vqa import baselines
from openblip2.evaluate.vqa_metrics import exact_scores, gqa_scores, lemmas, vqa_scores
from openblip2.model.decoding import Decoding
from openblip2.progress import Progress
from openblip2.score.card import decoding_card
from openblip2.score.result import Result
from openblip2.score.resume import Kept

Metric = Literal["vqa", "vqa-lavis", "gqa", "exact"]
METRICS = {
    "vqa": "VQA accuracy, the official normaliser",
    "vqa-lavis": "VQA accuracy, the normaliser of the authors' code (LAVIS)",
    "gqa": "exact match behind the VQA rules, both sides",
    "exact": "exact match, case, articles and punctuation aside",
}
USUAL = {"vqav2": "vqa", "okvqa": "vqa", "gqa": "gqa"}  # by the kind of data; all else: exact
WITHHELD = "the truth of this split is withheld: nothing is scored, the predictions are in the samples"
GROUP = 256  # questions between two looks at the progress


def usual_metric(kind: str, records: Sequence[Record]) -> Metric:
    """What answers to this data are scored by: the official way, or by whether one person or many answered."""
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
    kept: Kept | None = None,
) -> Result:
    """Accuracy over all questions and for each kind of question; intervals over pictures, not over questions.

    Args:
        lemmatised: nouns and verbs of the answers in their dictionary form, as OK-VQA is scored.
        known: training pictures with questions, for the scores of blind guessers; () = those are not measured.
        kept: where answers are kept until they are scored; None = nowhere.

    Raises:
        UserError: VQA accuracy of questions that one person answered; no lemmatiser; a question that cannot be asked.
    """
    asked = [(n, question) for n, record in enumerate(records) for question in record.questions]
    questions = [question for _, question in asked]

    def write(rows: slice) -> list[str]:
        part = asked[rows]
        prompts, read = captioner.read_questions([question.text for _, question in part])
        return captioner.generate([records[n].image for n, _ in part], prompts, decoding, read)

    names = [(str(records[n].image), question.text) for n, question in asked]
    said = (kept or Kept()).texts("answers", "questions", names, GROUP, write, progress, decoding_card(decoding))
    progress.doing("scoring")
    result = Result("vqa", len(records), seed)
    result.protocol |= decoding_card(decoding) | {
        "questions": len(questions),
        "prompt": captioner.settings.language.question,
        "metric": METRICS[metric],
        "lemmatised": lemmatised,
        "question_cleaning": "lower case, most punctuation removed, at most 50 words",
    }
    if not all(question.answer for question in questions):  # a test split: what was said is all there is
        result.warnings.append(WITHHELD)
        result.samples += [
            {"image": records[n].id, "question_id": question.id, "question": question.text, "answer": answer}
            for (n, question), answer in zip(asked, said, strict=True)
        ]
        return result
    judged = lemmas(said) if lemmatised else said
    scores = _scores(judged, questions, metric)
    owners = [n for n, _ in asked]
    result.add("accuracy", scores, groups=owners)
    for kind in sorted({question.kind for question in questions}):
        rows = [n for n, question in enumerate(questions) if question.kind == kind]
        result.add(f"accuracy, {kind}", [scores[n] for n in rows], groups=[owners[n] for n in rows])
    if known:
        read = [question for record in known for question in record.questions]
        result.beside["blind"] = baselines(read, questions)
    result.samples += [
        {"image": records[n].id, "question_id": question.id, "question": question.text, "answer": answer}
        | ({"judged_as": plain} if lemmatised else {})
        | {"given": list(question.given), "kind": question.kind, "score": score}
        for (n, question), answer, plain, score in zip(asked, said, judged, scores, strict=True)
    ]
    return result


def _scores(answers: Sequence[str], questions: Sequence[Question], metric: Metric) -> list[float]:
    if metric in ("vqa", "vqa-lavis"):
        return vqa_scores(answers, questions, "official" if metric == "vqa" else "lavis").tolist()
    return (gqa_scores if metric == "gqa" else exact_scores)(answers, questions).tolist()
