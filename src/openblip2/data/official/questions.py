"""Questions of VQAv2, OK-VQA and GQA in their official files."""

import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from openblip2.data.official.annotations import (
    Pictures,
    each,
    identity,
    numbered,
    read_json,
    repeated_keys,
    shown,
    text,
)
from openblip2.data.records import Question, Record, kind_of
from openblip2.errors import UserError

_SUBTYPE = re.compile(r"(train|val|test|test-dev)\d{4}")
_KINDS = {"yes/no": "yes/no", "number": "number", "other": "open"}
_QUESTION = '{"question_id": 1, "image_id": 2, "question": "what?"}'
_ANNOTATION = '{"question_id": 1, "image_id": 2, "answers": [{"answer": "cat"}, ...]}'
_GQA = '{"imageId": "2", "question": "what?", "answer": "cat"}'


class _Answered(NamedTuple):
    """What an annotation says of its question, and where in the file; `image` is the id as the file gives it."""

    where: str
    image: object
    answer: str
    kind: str
    answers: tuple[str, ...]


def vqa(
    path: Path, data: dict[str, Any], pictures: Pictures, skipped: list[str], split: str | None, questions: Path | None
) -> list[Record]:
    """VQAv2's and OK-VQA's annotations and questions, joined by the id of the question.

    Args:
        path: of the annotations, or of the questions of a test split.
        data: its content.
        pictures: finds the images.
        skipped: gets a line for each entry that is left out.
        split: of the files, "val2014" or "val", or None.
        questions: the file of questions, or None if `path` is that file.

    Source: https://visualqa.org/download.html, https://okvqa.allenai.org/download.html

    Raises:
        UserError: a file cannot be read or has another format; the two have different splits, or not `split`; or the
            answers are missing and it is not a test split.
    """
    asked_path, asked = _questions(path, data, questions)
    subtype = _subtype(asked_path, asked)
    if asked is not data and _subtype(path, data) != subtype:
        raise UserError(f"{path}: is of {_subtype(path, data)}, {asked_path} of {subtype}: give files of one split")
    if split not in (None, subtype, subtype[:-4]):
        raise UserError(f"{path}: unknown split {split!r}: this is the file of {subtype}")
    if asked is data and not subtype.startswith("test"):
        raise UserError(
            f"{path}: questions of {subtype} without their answers: give the annotations, and this file as questions"
        )
    answers = None if asked is data else _answers(path, data, skipped)
    return _asked(asked_path, asked, answers, subtype, pictures, skipped)


def gqa(path: Path, data: dict[str, Any], pictures: Pictures, skipped: list[str]) -> list[Record]:
    """GQA's questions by their ids. If the file contains no answers at all, it is a test split.

    Args:
        path: of the file.
        data: its content.
        pictures: finds the images.
        skipped: gets a line for each entry that is left out.

    Source: https://cs.stanford.edu/people/dorarad/gqa/download.html
    """
    rows = [row for row in data.values() if isinstance(row, dict)]
    if path.read_bytes().count(b'"imageId"') > sum("imageId" in row for row in rows):
        for key in sorted(repeated_keys(path)):
            skipped.append(f"{path}: question {shown(key)}: appears more than once; the last one is used")
    withheld = not any("answer" in row for row in rows)
    gathered: _Gathered = {}

    def read(_: str, row: dict[str, Any]) -> None:
        image = identity(row.get("imageId"), '"imageId"')
        words = text(row.get("question"), "question", _GQA)
        answer = "" if withheld else text(row.get("answer"), "answer", _GQA)
        file = pictures.find(f"{image}.jpg")
        _gather(gathered, image, file, Question(words, answer, kind_of(answer), id=row["question_id"]))

    named = ((name, row | {"question_id": name} if isinstance(row, dict) else row) for name, row in data.items())
    each(((f"{path}: question {shown(name)}", row) for name, row in named), _GQA, read, skipped)
    return _records(gathered)


def _questions(path: Path, data: dict[str, Any], questions: Path | None) -> tuple[Path, dict[str, Any]]:
    """The file of questions and its content, which is `data` if `path` is that file."""
    if questions is None:
        if "annotations" in data:
            raise UserError(f"{path}: answers without their questions: give {_name(path)} as questions")
        return path, data
    if "annotations" not in data:
        raise UserError(f"{path}: holds questions and no annotations: give the annotations, and this file as questions")
    asked = read_json(questions)
    if not isinstance(asked, dict) or not isinstance(asked.get("questions"), list):
        raise UserError(f'{questions}: no questions: it must be {{"data_subtype": ..., "questions": [{_QUESTION}]}}')
    return questions, asked


def _name(path: Path) -> str:
    """The official name of the file of questions for the annotations `path`."""
    return path.name.replace("mscoco_", "OpenEnded_mscoco_").replace("_annotations", "_questions")


def _subtype(path: Path, data: dict[str, Any]) -> str:
    """The "data_subtype" of a file: "val2014" or "test-dev2015", for example."""
    subtype = data.get("data_subtype")
    if not isinstance(subtype, str) or not _SUBTYPE.fullmatch(subtype):
        raise UserError(f'{path}: "data_subtype" is {shown(subtype)}: it must be train2014, val2014 or test2015')
    return subtype


def _answers(path: Path, data: dict[str, Any], skipped: list[str]) -> dict[str, _Answered | None]:
    """The annotations by the ids of their questions; None for one that is skipped."""
    answers: dict[str, _Answered | None] = {}

    def read(where: str, annotation: dict[str, Any]) -> None:
        name = identity(annotation.get("question_id"), '"question_id"')
        if name in answers:
            raise UserError(f"question {name} has two annotations: each question must have one")
        answers[name] = None
        given = annotation.get("answers")
        if not isinstance(given, list) or not given:
            raise UserError(f"question {name} has no answers; {_ANNOTATION}")
        each_answer = (row.get("answer") if isinstance(row, dict) else row for row in given)
        all_answers = tuple(text(answer, f"answer to question {name}", _ANNOTATION) for answer in each_answer)
        answer = annotation.get("multiple_choice_answer")
        if answer is None:  # OK-VQA
            answer = Counter(all_answers).most_common(1)[0][0]
        answer = text(answer, f"answer to question {name}", _ANNOTATION)
        kind = _KINDS.get(str(annotation.get("answer_type"))) or kind_of(answer)
        answers[name] = _Answered(where, annotation.get("image_id"), answer, kind, all_answers)

    each(numbered(path, "annotations", data["annotations"]), _ANNOTATION, read, skipped)
    return answers


def _asked(
    path: Path,
    data: dict[str, Any],
    answers: dict[str, _Answered | None] | None,
    subtype: str,
    pictures: Pictures,
    skipped: list[str],
) -> list[Record]:
    """The questions by image, with their answers. `answers` are by question; None for a test split."""
    folder = subtype.replace("test-dev", "test")  # test-dev is a part of the test images
    seen: set[str] = set()
    gathered: _Gathered = {}

    def read(_: str, row: dict[str, Any]) -> None:
        name = identity(row.get("question_id"), '"question_id"')
        if name in seen:
            raise UserError(f"question {name} appears twice: each id must appear once")
        seen.add(name)
        words = text(row.get("question"), "question", _QUESTION)
        image = row.get("image_id")
        if not isinstance(image, int) or isinstance(image, bool):
            raise UserError(f'"image_id" is {shown(image)}: it must be a whole number')
        question = Question(words, "", "open", id=name)
        if answers is not None:
            if name not in answers:
                raise UserError(f"question {name} has no annotation: give one with its id")
            answered = answers[name]
            if answered is None:
                return  # its annotation was skipped
            if answered.image != image:
                raise UserError(f"image {image} here, {shown(answered.image)} in its annotation: they must be equal")
            question = Question(words, answered.answer, answered.kind, answered.answers, name)
        file = pictures.find(f"{folder}/COCO_{folder}_{image:012d}.jpg")
        _gather(gathered, str(image), file, question)

    each(numbered(path, "questions", data["questions"]), _QUESTION, read, skipped)
    for name, answered in (answers or {}).items():
        if answered is not None and name not in seen:
            skipped.append(f"{answered.where}: question {name} is not among the questions: remove it")
    return _records(gathered)


# The file and the questions of each image, by its id.
_Gathered = dict[str, tuple[Path, list[Question]]]


def _gather(gathered: _Gathered, image: str, file: Path, question: Question) -> None:
    gathered.setdefault(image, (file, []))[1].append(question)


def _records(gathered: _Gathered) -> list[Record]:
    return [Record(image, file, (), tuple(asked)) for image, (file, asked) in gathered.items()]
