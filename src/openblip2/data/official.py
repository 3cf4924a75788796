"""The official annotation formats: each reader returns the records of an `AnnotationFile` and lists skipped entries."""

import re
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from statistics import mode
from typing import Any

from openblip2.data.annotations import AnnotationFile, brief, identity, text
from openblip2.data.records import Question, Record, kind_of
from openblip2.data.text import clean_caption
from openblip2.errors import UserError
from openblip2.runs import read_json

# Karpathy and Li validate on 5,000 of COCO's validation images and test on 5,000. The other 30,504 are "restval", which
# are usually added to the training images: 113,287 in total.
SPLITS = {"train": ("train", "restval"), "restval": ("restval",), "val": ("val",), "test": ("test",)}
DOMAINS = ("in-domain", "near-domain", "out-domain")
COCO_NAME = re.compile(r"COCO_[a-z]+\d{4}_(\d{12})")

_KARPATHY = '{"filename": "x.jpg", "split": "test", "sentences": [{"raw": "a cat"}, ...]}'
_LISTED = '{"image": "val2014/x.jpg", "caption": "a cat", or a list of them}'
_IMAGE = '{"id": 0, "file_name": "x.jpg"}'
_CAPTION = '{"image_id": 0, "caption": "a cat"}'
_SUBTYPE = re.compile(r"(train|val|test|test-dev)\d{4}")
_KINDS = {"yes/no": "yes/no", "number": "number", "other": "open"}
_QUESTION = '{"question_id": 1, "image_id": 2, "question": "what?"}'
_ANSWERS = '{"question_id": 1, "image_id": 2, "answers": [{"answer": "cat"}, ...]}'
_GQA = '{"imageId": "2", "question": "what?", "answer": "cat"}'


def karpathy(file: AnnotationFile) -> list[Record]:
    """`dataset_coco.json` and `dataset_flickr30k.json`: the split and the sentences of each image.

    Source: https://cs.stanford.edu/people/karpathy/deepimagesent/
    """
    parts = SPLITS.get(file.split or "")
    if parts is None:
        problem = "contains several splits" if file.split is None else f"unknown split {file.split!r}"
        raise UserError(f"{file.path}: {problem}: give one of {', '.join(SPLITS)} (train includes restval)")
    records: dict[str, Record] = {}
    for where, image in file.entries("images", file.data["images"], _KARPATHY):
        with file.skipping(where):
            part = image.get("split")
            if part not in tuple(SPLITS):
                raise UserError(f'"split" is {brief(part)}: it must be one of {", ".join(SPLITS)}')
            if part not in parts:
                continue
            name = text(image.get("filename"), "file name", _KARPATHY)
            if "filepath" in image:  # only in COCO's file
                name = text(image["filepath"], "file path", '"filepath": "val2014"') + "/" + name
            path = file.pictures.find(name)
            number = identity(image["cocoid"], '"cocoid"') if "cocoid" in image else _name_id(path)
            _require_new(number, records)
            sentences = image.get("sentences")
            if not isinstance(sentences, list):
                raise UserError(f'"sentences" is {brief(sentences)}: it must be {_KARPATHY}')
            raw = [sentence.get("raw") if isinstance(sentence, dict) else sentence for sentence in sentences]
            records[number] = Record(number, path, _captions(raw, f"{where}.sentences", file))
    return list(records.values())


def lavis_list(file: AnnotationFile) -> list[Record]:
    """LAVIS's lists: one row per caption for training, and one row per image with all its captions for evaluation.

    The id of an image is taken from its file name, so that it is the same in all lists and in Karpathy's file: their
    `image_id` is "coco_328757", a running number, or missing.

    Source: https://github.com/salesforce/LAVIS, datasets coco and flickr30k
    """
    records: dict[str, Record] = {}
    for where, row in file.entries("", file.data, _LISTED):
        with file.skipping(where):
            path = file.pictures.find(row.get("image"))
            name = _name_id(path)
            record = records.get(name, Record(name, path, ()))
            if record.image != path:
                raise UserError(f"id {name!r} is already used for {record.image}: give each picture its own file name")
            caption = row.get("caption")
            new = _captions(caption if isinstance(caption, list) else [caption], f"{where}.caption", file)
            records[name] = replace(record, captions=record.captions + new)
    return list(records.values())


def nocaps(file: AnnotationFile) -> list[Record]:
    """NoCaps's file in COCO's format: a list of images and a list of captions, which a test split does not have.

    Source: https://nocaps.org/download. The page does not mention "domain", which the images in the file have.
    """
    images = list(file.entries("images", file.data["images"], _IMAGE))
    known = {str(image.get("id")) for _, image in images}
    captions: dict[str, list[str]] = {}
    withheld = "annotations" not in file.data
    for where, annotation in file.entries("annotations", [] if withheld else file.data["annotations"], _CAPTION):
        with file.skipping(where):
            number = identity(annotation.get("image_id"), '"image_id"')
            if number not in known:
                problem = f"a caption of image {number}, which is not among the images"
                raise UserError(f"{problem}: give the id of one of them")
            captions.setdefault(number, []).append(_caption(annotation.get("caption")))
    records: dict[str, Record] = {}
    for where, image in images:
        with file.skipping(where):
            number = identity(image.get("id"), '"id"')
            _require_new(number, records)
            path = file.pictures.find(image.get("file_name"))
            if not withheld and number not in captions:
                raise UserError(f"image {number} has no caption: at least one {_CAPTION} is needed")
            domain = image.get("domain")
            if domain is not None and domain not in DOMAINS:
                raise UserError(f"unknown domain {brief(domain)}: it must be one of {', '.join(DOMAINS)}")
            facts = None if domain is None else {"domain": domain}
            records[number] = Record(number, path, tuple(captions.get(number, ())), facts=facts)
    return list(records.values())


def vqa(file: AnnotationFile) -> list[Record]:
    """VQAv2's and OK-VQA's annotations and questions, joined by the id of the question.

    `file` contains the annotations, or the questions of a test split.

    Source: https://visualqa.org/download.html, https://okvqa.allenai.org/download.html
    """
    asked = _questions_of(file)
    subtype = _subtype(asked)
    withheld = asked is file
    if _subtype(file) != subtype:
        raise UserError(f"{file.path}: is of {_subtype(file)}, but {asked.path} of {subtype}: give files of one split")
    if file.split not in (None, subtype, subtype[:-4]):
        raise UserError(f"{file.path}: unknown split {file.split!r}: leave it out, this file is of {subtype}")
    if withheld and not subtype.startswith("test"):
        problem = f"contains questions of {subtype} without their answers"
        raise UserError(f"{file.path}: {problem}: give the annotations, and this file as --questions")
    answers = {} if withheld else _answers(file)
    folder = subtype.replace("test-dev", "test")  # test-dev is a part of the test images
    seen: set[str] = set()
    by_image: dict[str, tuple[Path, list[Question]]] = {}
    for where, row in asked.entries("questions", asked.data["questions"], _QUESTION):
        with asked.skipping(where):
            name = identity(row.get("question_id"), '"question_id"')
            if name in seen:
                raise UserError(f"question {name} appears twice: each id must appear once")
            seen.add(name)
            question = Question(text(row.get("question"), "question", _QUESTION), "", "open", id=name)
            image = row.get("image_id")
            if not isinstance(image, int) or isinstance(image, bool):
                raise UserError(f'"image_id" is {brief(image)}: it must be a whole number')
            if not withheld:
                if name not in answers:
                    raise UserError(f"question {name} has no annotation: add one with this id")
                answered = answers[name]
                if answered is None:
                    continue  # its annotation was skipped
                _, its_image, with_answers = answered
                if its_image != image:
                    problem = f"image {image} here, but {brief(its_image)} in its annotation"
                    raise UserError(f"{problem}: they must be equal")
                question = replace(with_answers, text=question.text)
            path = file.pictures.find(f"{folder}/COCO_{folder}_{image:012d}.jpg")
            by_image.setdefault(str(image), (path, []))[1].append(question)
    for name, answered in answers.items():
        if answered is not None and name not in seen:
            file.skipped.append(f"{answered[0]}: question {name} is not among the questions: remove it")
    return [Record(image, path, (), tuple(questions)) for image, (path, questions) in by_image.items()]


def gqa(file: AnnotationFile) -> list[Record]:
    """GQA's questions by their ids. If the file contains no answers at all, it is a test split.

    Source: https://cs.stanford.edu/people/dorarad/gqa/download.html
    """
    withheld = not any("answer" in row for row in file.data.values() if isinstance(row, dict))
    by_image: dict[str, tuple[Path, list[Question]]] = {}
    for key, row in file.data.items():
        with file.skipping(f"{file.path}: question {brief(key)}"):
            if not isinstance(row, dict):
                raise UserError(f"{brief(row)} is not an object; expected {_GQA}")
            image = identity(row.get("imageId"), '"imageId"')
            asked = text(row.get("question"), "question", _GQA)
            answer = "" if withheld else text(row.get("answer"), "answer", _GQA)
            path = file.pictures.find(f"{image}.jpg")
            by_image.setdefault(image, (path, []))[1].append(Question(asked, answer, kind_of(answer), id=key))
    return [Record(image, path, (), tuple(questions)) for image, (path, questions) in by_image.items()]


# The position of an annotation in its file, the id of its image as written there, and the question without its text.
_Answered = tuple[str, object, Question]


def _answers(file: AnnotationFile) -> dict[str, _Answered | None]:
    """The annotations by the ids of their questions; None for one that is skipped."""
    answers: dict[str, _Answered | None] = {}
    for where, annotation in file.entries("annotations", file.data["annotations"], _ANSWERS):
        with file.skipping(where):
            name = identity(annotation.get("question_id"), '"question_id"')
            if name in answers:
                raise UserError(f"question {name} has two annotations: each question must have one")
            answers[name] = None
            rows = annotation.get("answers")
            if not isinstance(rows, list) or not rows:
                raise UserError(f"question {name} has no answers; expected {_ANSWERS}")
            what = f"answer to question {name}"
            raw = [row.get("answer") if isinstance(row, dict) else row for row in rows]
            given = tuple(text(answer, what, _ANSWERS) for answer in raw)
            answer = annotation.get("multiple_choice_answer")
            if answer is None:  # OK-VQA
                answer = mode(given)
            answer = text(answer, what, _ANSWERS)
            kind = _KINDS.get(str(annotation.get("answer_type"))) or kind_of(answer)
            answers[name] = where, annotation.get("image_id"), Question("", answer, kind, given, name)
    return answers


def _questions_of(file: AnnotationFile) -> AnnotationFile:
    """The file of questions, which is `file` itself for a test split."""
    path = file.path
    if file.questions is None:
        if "annotations" in file.data:
            name = path.name.replace("mscoco_", "OpenEnded_mscoco_").replace("_annotations", "_questions")
            raise UserError(f"{path}: contains answers without their questions: give {name} as --questions")
        return file
    if "annotations" not in file.data:
        raise UserError(f"{path}: contains no annotations: give the annotations, and this file as --questions")
    asked = replace(file, path=file.questions, data=read_json(file.questions))  # with the same list of skipped entries
    if not isinstance(asked.data, dict) or not isinstance(asked.data.get("questions"), list):
        right = f'{{"data_subtype": ..., "questions": [{_QUESTION}]}}'
        raise UserError(f"{asked.path}: no questions: it must be {right}")
    return asked


def _subtype(file: AnnotationFile) -> str:
    """The "data_subtype" of a file: "val2014" or "test-dev2015", for example."""
    subtype = file.data.get("data_subtype")
    if not isinstance(subtype, str) or not _SUBTYPE.fullmatch(subtype):
        raise UserError(f'{file.path}: "data_subtype" is {brief(subtype)}: it must be train2014, val2014 or test2015')
    return subtype


def _captions(values: list[Any], where: str, file: AnnotationFile) -> tuple[str, ...]:
    """The captions that can be used; the others are skipped."""
    if len(values) == 1:
        return (_caption(values[0]),)
    captions: list[str] = []
    for number, value in enumerate(values):
        with file.skipping(f"{where}[{number}]"):
            captions.append(_caption(value))
    if not captions:
        raise UserError("no usable caption: at least one is needed")
    return tuple(captions)


def _caption(value: object) -> str:
    caption = text(value, "caption", "a text of at least one word")
    if not clean_caption(caption):
        raise UserError(f"the caption {brief(caption)} is empty: at least one word is needed")
    return caption


def _require_new(name: str, records: Container[str]) -> None:
    if name in records:
        raise UserError(f"id {name!r} appears twice: each picture must appear once")


def _name_id(file: Path) -> str:
    """The number of a COCO image, or the file name of another image without its suffix."""
    found = COCO_NAME.fullmatch(file.stem)
    return str(int(found[1])) if found else file.stem
