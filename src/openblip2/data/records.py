"""Images with captions and questions, in the form that all data sources are converted to.

Four sources are read:

- a folder with `records.jsonl` (what `write_records` writes), or `metadata.jsonl`, `metadata.csv`, `captions.txt`;
- a `.jsonl` file, one object per line: `{"image": "cat.jpg", "caption": "a cat"}`, or `"captions": [...]`, or
  `"question"` with `"answer"` (or `"answers"`, one per annotator), or `"questions": [{"text": ..., "answer": ...,
  "kind": ..., "answers": [...]}]`, and optionally `"id"` and `"facts"`;
- a table (`.csv`, `.tsv`), whose first line has the columns `image` and `caption`, or `image`, `question`, `answer`;
- a folder of images, also in subfolders, each with a `.txt` of the same name, one caption per line.

Columns and keys may also have the names in `rows.SYNONYMS`, as other tools write them. Image paths are relative to the
folder of the file and must be inside it. Rows with the same image, or the same id if there are ids, become one record
with all their captions and questions. Rows that cannot be used are skipped and reported.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mode
from typing import Any, Literal

from openblip2.data.rows import ACCEPTED, RECORDS, read_rows
from openblip2.data.text import clean_caption, is_unicode
from openblip2.errors import UserError, number_of
from openblip2.runs import write_text

QUESTION_KINDS = ("open", "yes/no", "number")
Wanted = Literal["captions", "questions"]
_FOLDERS = ("", "Images", "images", "flickr30k_images")
_WANTED = {"captions": "a caption", "questions": "a question and its answer"}


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one image.

    Attributes:
        text: the question.
        answer: the correct one; with several annotators, their most common answer.
        kind: one of `QUESTION_KINDS`.
        answers: the answers of all annotators, with repetitions; empty if there is only `answer`.
        id: the id in the data set, for submitting results; "" = none.
    """

    text: str
    answer: str
    kind: str
    answers: tuple[str, ...] = ()
    id: str = ""

    @property
    def given(self) -> tuple[str, ...]:
        """All answers, at least one."""
        return self.answers or (self.answer,)


@dataclass(frozen=True, slots=True)
class Record:
    """One image with its texts. `facts` are additional information, such as the content of a drawn scene."""

    id: str
    image: Path
    captions: tuple[str, ...]
    questions: tuple[Question, ...] = ()
    facts: dict[str, Any] | None = None

    @property
    def texts(self) -> list[str]:
        """Its captions, and its questions with all their answers."""
        return [*self.captions, *(text for q in self.questions for text in (q.text, *q.given))]


def read_records(source: Path, wanted: Wanted = "captions") -> tuple[list[Record], list[str]]:
    """The records of a source in its order, and one line "where: what is wrong; what would be right" per skipped row.

    Images are not opened, but they must exist. Captions are not changed.

    Args:
        source: one of the four sources above.
        wanted: what every row must have; the other may be missing.

    Raises:
        UserError: `source` does not exist, is none of the four, or has no usable row.
    """
    source = Path(source)
    root = source if source.is_dir() else source.parent
    records: dict[str, Record] = {}
    skipped: list[str] = []
    try:
        for where, row in read_rows(source):
            try:
                if isinstance(row, UserError):
                    raise row
                _add(_record(row, root, wanted), records)
            except UserError as problem:
                skipped.append(f"{where}: {problem}")
    except OSError as error:
        raise UserError(f"{error.filename or source}: cannot be read ({error.strerror}); give {ACCEPTED}") from error
    if not records:
        rows = number_of(len(skipped), "row")
        why = f"{rows} cannot be used; the first: {skipped[0]}" if skipped else f"give {ACCEPTED}"
        raise UserError(f"{source}: contains no picture with {_WANTED[wanted]}; {why}")
    return list(records.values()), skipped


def write_records(records: Sequence[Record], folder: Path) -> None:
    """Writes `folder/records.jsonl` in one step, with image paths relative to `folder`.

    Raises:
        UserError: an image is outside `folder`, which `read_records` would refuse.
    """
    folder = Path(folder)
    lines = [json.dumps(_row(record, folder), ensure_ascii=False) + "\n" for record in records]
    folder.mkdir(parents=True, exist_ok=True)
    write_text("".join(lines), folder / RECORDS)


def _row(record: Record, folder: Path) -> dict[str, Any]:
    """A record as the JSON object that `read_records` reads."""
    image = Path(os.path.relpath(record.image, folder))
    if image.parts[0] == os.pardir:
        raise UserError(f"{record.image}: is outside {folder}: the pictures of a data folder must be inside it")
    row: dict[str, Any] = {"id": record.id, "image": image.as_posix()}
    if record.captions:
        row["captions"] = list(record.captions)
    if record.questions:
        row["questions"] = [{k: v for k, v in asdict(question).items() if v} for question in record.questions]
    if record.facts is not None:
        row["facts"] = record.facts
    return row


def _add(record: Record, records: dict[str, Record]) -> None:
    """Adds a record, or joins it to the one with the same id."""
    known = records.get(record.id)
    if known is None:
        records[record.id] = record
        return
    if known.image != record.image:
        raise UserError(f"id {record.id!r} is already used for {known.image}: give each image its own id")
    if record.facts is not None and known.facts not in (None, record.facts):
        raise UserError(f'"facts" differs from an earlier row of id {record.id!r}: repeat it, or leave it out')
    captions, questions = known.captions + record.captions, known.questions + record.questions
    facts = record.facts if known.facts is None else known.facts
    records[record.id] = replace(known, captions=captions, questions=questions, facts=facts)


def _record(row: dict[str, Any], root: Path, wanted: Wanted) -> Record:
    image = _image(row.get("image"), root)
    name = row.get("id")
    if name is None:
        name = Path(os.path.relpath(image, root)).as_posix()
    elif isinstance(name, bool) or not isinstance(name, str | int) or not _says_something(str(name)):
        raise UserError('"id" is neither text nor a whole number: leave it out, or give each image its own')
    facts = row.get("facts")
    if facts is not None and not isinstance(facts, dict):
        raise UserError('"facts" is not an object: write {"name": value, ...}')
    captions = _captions(row) if wanted == "captions" or {"caption", "captions"} & row.keys() else ()
    questions = _questions(row)
    if wanted == "questions" and not questions:
        raise UserError(f"no question; {_QUESTION}")
    return Record(str(name), image, captions, questions, facts)


def _image(name: object, root: Path) -> Path:
    if not _says_something(name):
        raise UserError(f'no "image": give the path of a picture, relative to {root}')
    # Links are not followed, because the images may be links to other folders.
    image = Path(os.path.normpath(root / str(name)))
    if not Path(os.path.abspath(image)).is_relative_to(os.path.abspath(root)):
        raise UserError(f"image {name!r} is outside the data folder: give a path inside {root}")
    # The tables of Flickr8k and Flickr30k are next to the folder of their images and do not name this folder.
    for folder in _FOLDERS:
        path = os.path.normpath(root / folder / str(name))
        if os.path.isfile(path):  # for impossible names, this is False, but Path.is_file raises
            return Path(path)
    shown = f"image {str(name)[:200]!r} is missing"
    if "://" in str(name):
        raise UserError(f"{shown}: it is a URL, and pictures are not downloaded: give shards made by img2dataset")
    if "\\" in str(name):
        raise UserError(f"{shown}: it has a backslash: write / between folder and file")
    raise UserError(f"{shown}: give the path of a picture, relative to {root}")


def _captions(row: dict[str, Any]) -> tuple[str, ...]:
    right = 'write "caption": "text", or "captions": ["text", ...]'
    if "caption" in row and "captions" in row:
        raise UserError(f'both "caption" and "captions"; {right}')
    captions = row.get("captions", row.get("caption", []))
    captions = captions if isinstance(captions, list) else [captions]
    if not captions:
        raise UserError(f"no caption; {right}")
    for caption in captions:
        if not isinstance(caption, str) or not is_unicode(caption):
            raise UserError(f"a caption is not text: {ascii(caption)[:40]}; {right}")
        if not clean_caption(caption):
            raise UserError(f"the caption {caption[:40]!r} is empty: at least one word is needed")
        if caption.strip().lower() == "nan":
            raise UserError(f"the caption {caption!r} is how pandas writes a missing value: leave the row out")
    return tuple(captions)


_QUESTION = 'write "question": "text" and "answer": "text", or "answers": ["text", ...], one per annotator'


def _questions(row: dict[str, Any]) -> tuple[Question, ...]:
    if "questions" in row and "question" in row:
        raise UserError(f'both "question" and "questions"; {_QUESTION}')
    if row.get("question") is not None:
        return (_question({**row, "text": row["question"], "id": row.get("question_id")}, _QUESTION),)
    questions = row.get("questions")
    if questions is None:
        return ()
    right = f'write "questions": [{{"text": ..., "answer": ..., "kind": one of {", ".join(QUESTION_KINDS)}}}, ...]'
    if not isinstance(questions, list):
        raise UserError(f'"questions" is not a list; {right}')
    return tuple(_question(question, right) for question in questions)


def _question(question: object, right: str) -> Question:
    if not isinstance(question, dict) or not _says_something(question.get("text")):
        raise UserError(f"a question without text; {right}")
    answers = question.get("answers", [])
    if not isinstance(answers, list) or not all(_says_something(answer) for answer in answers):
        raise UserError(f'"answers" is not a list of texts; {right}')
    answer = question.get("answer")
    if answer is None and answers:
        answer = mode(answers)
    if not _says_something(answer):
        raise UserError(f"the question {question['text'][:40]!r} has no answer; {right}")
    kind = kind_of(str(answer)) if question.get("kind") is None else question["kind"]
    if kind not in QUESTION_KINDS:
        raise UserError(f"unknown kind of question {str(kind)[:40]!r}; {right}")
    name = question.get("id")
    return Question(question["text"], str(answer), kind, tuple(answers), "" if name is None else str(name))


def kind_of(answer: str) -> str:
    """The kind of a question by its answer, one of `QUESTION_KINDS`."""
    plain = answer.strip().lower()
    return "yes/no" if plain in ("yes", "no") else "number" if plain.isdecimal() else "open"


def _says_something(value: object) -> bool:
    return isinstance(value, str) and is_unicode(value) and bool(value.strip())
