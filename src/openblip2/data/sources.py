"""What `--data` may name: the user's images, an official annotation file and, for training, shards.

docs/evaluation.md lists the official files: Karpathy's and LAVIS's of COCO and Flickr30K, and those of NoCaps, VQAv2,
OK-VQA and GQA. Test splits contain no captions and answers. They are read so that predictions can be submitted: an
image then has no caption, and the answer to a question is "", which is never a real answer.

Ids are those for submitting results: the number of the image for COCO and NoCaps, the file name without its suffix for
Flickr30K and GQA, and the id of the question.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from openblip2.data.annotations import AnnotationFile, Pictures, first_entry, uncollected
from openblip2.data.official import COCO_NAME, gqa, karpathy, lavis_list, nocaps, vqa
from openblip2.data.records import Record, Wanted, read_records
from openblip2.data.web.mixture import Part, names_shards, read_parts
from openblip2.errors import UserError
from openblip2.runs import read_json

_EXPECTED = (
    'Karpathy\'s {"images": [{"filename", "split", "sentences"}, ...]}, LAVIS\'s [{"image", "caption"}, ...], '
    'NoCaps\'s {"images": [{"id", "file_name"}, ...], "annotations": [{"image_id", "caption"}, ...]}, VQAv2\'s or '
    'OK-VQA\'s {"annotations": [{"question_id", "answers"}, ...]} or GQA\'s {"1": {"imageId", "question"}, ...}'
)


class Source(NamedTuple):
    """What a data source contains."""

    records: list[Record]  # empty for shards
    skipped: list[str]  # one line for each entry that was skipped
    kind: str  # the format, "own" for the user's own
    shards: list[Part] | None = None  # the parts of a source of shards, not counted yet
    known: Sequence[Record] = ()  # training questions, from which baselines guess answers without the image


def read_source(
    data: str | Path,
    wanted: Wanted = "captions",
    images: Path | None = None,
    split: str | None = None,
    questions: Path | None = None,
    withheld: bool = False,
    shards: bool = False,
) -> Source:
    """The records of `data`: an official `.json` or the user's own images (data/records.py).

    Args:
        wanted: what every record must have.
        images: the folder of an official file's images; see `read_official` for the next two arguments, too.
        withheld: whether the images without captions and the questions without answers of a test split are accepted.
        shards: whether shards are accepted.

    Raises:
        UserError: `data` cannot be read as any of these, or an argument does not belong to it.
    """
    if "://" in str(data) and str(data).split("?")[0].endswith((".csv", ".tsv", ".json", ".jsonl", ".txt")):
        raise UserError(f"{data}: only shards (.tar) are read from a URL; download this file and give its path")
    path, from_shards = Path(data), names_shards(str(data))
    official = path.suffix.lower() == ".json" and not from_shards
    for name, value in (("--images", images), ("--split", split), ("--questions", questions)):
        if value is not None and not official:
            raise UserError(f"{name} is only for an official .json or easy-vqa; leave it out for {data}")
    if from_shards:
        if not shards or wanted == "questions":
            raise UserError(f"{data}: shards are only for training with captions; give a folder, .jsonl or .csv")
        return Source([], [], "shards", read_parts(str(data)))
    if not official:
        return Source(*read_records(path, wanted), "own")
    if images is None:
        raise UserError(f"{path}: give --images, the folder of its images")
    kind, records, skipped = read_official(path, images, split, questions)
    usable = [record for record in records if withheld or _has(record, wanted)]
    if not usable:
        raise UserError(f"{path}: contains no {wanted} (its format is {kind}); give another file")
    return Source(usable, skipped, kind)


def _has(record: Record, wanted: Wanted) -> bool:
    texts = record.captions if wanted == "captions" else [question.answer for question in record.questions]
    return bool(texts) and all(texts)


@uncollected()
def read_official(
    annotations: Path, images: Path, split: str | None = None, questions: Path | None = None
) -> tuple[str, list[Record], list[str]]:
    """The kind of an official file, by its content, its records in its order, and a line for each skipped entry.

    All questions about an image, and all of LAVIS's captions of an image, are one record. Unusable captions are skipped
    one by one. Images are not opened, but they must exist; texts are not changed.

    NoCaps's domain, one of `official.DOMAINS`, is `facts["domain"]`. `Question.answer` is VQAv2's
    `multiple_choice_answer`, or the most common answer for OK-VQA, which has none. OK-VQA's answers are stemmed, and
    there are ten per question: those of five annotators, each twice.

    Args:
        annotations: the file.
        images: the folder that the paths in the file are relative to (for COCO, it contains `train2014`, `val2014` and
            `test2015`), or the folder of the images themselves.
        split: required for Karpathy's files, one of `official.SPLITS` ("train" includes restval). VQAv2 and OK-VQA
            accept the split of the files ("val2014" or "val").
        questions: the second file of VQAv2 and OK-VQA; None if `annotations` are the questions of a test split.

    Raises:
        UserError: a file cannot be read or has another format; the arguments do not fit each other; `images` is not a
            folder; no entry is usable.
    """
    path, data = Path(annotations), read_json(Path(annotations))
    kind, read = _recognised(data, path)
    if questions is not None and read is not vqa:
        raise UserError(f"{questions}: {kind} has no second file: leave out --questions")
    if split is not None and read not in (karpathy, vqa):
        raise UserError(f"{path}: contains only one split, so {split!r} cannot be chosen: leave out --split")
    file = AnnotationFile(path, data, Pictures(images), split, questions)
    records = read(file)
    if not records:
        what = "no usable entry" + (f" of the split {split!r}" if split else "")
        count = len(file.skipped)
        why = f"{count} cannot be used; the first: {file.skipped[0]}" if count else "give another split or file"
        raise UserError(f"{path}: contains {what}; {why}")
    return kind, records, file.skipped


def _recognised(data: Any, path: Path) -> tuple[str, Callable[[AnnotationFile], list[Record]]]:
    """The kind of a file and the reader of its format."""
    if isinstance(data, list):
        row = first_entry(data)
        if {"image", "caption"} <= row.keys():
            return "coco-karpathy" if COCO_NAME.search(str(row["image"])) else "flickr30k", lavis_list
    if isinstance(data, dict):
        image, answered = first_entry(data.get("images")), first_entry(data.get("annotations"))
        if "sentences" in image:
            return "coco-karpathy" if data.get("dataset") == "coco" or "cocoid" in image else "flickr30k", karpathy
        if "file_name" in image:
            return "nocaps", nocaps
        if {"question_id", "answers"} <= answered.keys():
            return "vqav2" if "multiple_choice_answer" in answered else "okvqa", vqa
        if {"question_id", "question"} <= first_entry(data.get("questions")).keys():
            return "vqav2", vqa
        if {"imageId", "question"} <= first_entry(list(data.values())).keys():
            return "gqa", gqa
    raise UserError(f"{path}: is none of the official annotation files: give {_EXPECTED}")
