"""The official annotation files of COCO, Flickr30K, NoCaps, VQAv2, OK-VQA and GQA, read as records.

| kind | file | its split |
|---|---|---|
| coco-karpathy | `dataset_coco.json` | chosen |
| | LAVIS's `coco_karpathy_train.json`, `..._val.json`, `..._test.json` | one |
| flickr30k | `dataset_flickr30k.json` | chosen |
| | LAVIS's `flickr30k_train.json`, `..._val.json`, `..._test.json` | one |
| nocaps | `nocaps_val_4500_captions.json`, `nocaps_test_image_info.json`; any file in COCO's own form | one |
| vqav2 | `v2_mscoco_val2014_annotations.json` with `v2_OpenEnded_mscoco_val2014_questions.json` | one, told |
| | `v2_OpenEnded_mscoco_test-dev2015_questions.json` | one, told |
| okvqa | `mscoco_val2014_annotations.json` with `OpenEnded_mscoco_val2014_questions.json` | one, told |
| gqa | `testdev_balanced_questions.json` | one |

Test splits contain no captions and answers. They are read so that predictions can be submitted: an image then has no
caption, and the answer to a question is "", which is never a real answer.

Ids are those for submitting results: the number of the image for COCO and NoCaps, the file name without its suffix for
Flickr30K and GQA, and the id of the question.
"""

from pathlib import Path
from typing import Any, Literal, get_args

from openblip2.data.official.annotations import Pictures, first_entry, read_json, uncollected
from openblip2.data.official.captions import COCO_NAME, karpathy, listed, nocaps
from openblip2.data.official.questions import gqa, vqa
from openblip2.data.records import Record
from openblip2.errors import UserError

Kind = Literal["coco-karpathy", "flickr30k", "nocaps", "vqav2", "okvqa", "gqa"]
KINDS: tuple[str, ...] = get_args(Kind)

# Kinds with the same format: the user may know better than the file which of the two it is.
_ALIKE = {"flickr30k": "coco-karpathy", "okvqa": "vqav2"}
_EXPECTED = (
    'Karpathy\'s {"images": [{"filename", "split", "sentences"}, ...]}, LAVIS\'s [{"image", "caption"}, ...], '
    'NoCaps\'s {"images": [{"id", "file_name"}, ...], "annotations": [{"image_id", "caption"}, ...]}, VQAv2\'s or '
    'OK-VQA\'s {"annotations": [{"question_id", "answers"}, ...]} or GQA\'s {"1": {"imageId", "question"}, ...}'
)


@uncollected()
def read_official(
    kind: str | None, annotations: Path, images: Path, split: str | None = None, questions: Path | None = None
) -> tuple[list[Record], list[str]]:
    """The records of an official file in its order, and a line "where: what; what would be right" per skipped entry.

    All questions about an image, and all of LAVIS's captions of an image, are one record. Bad captions are left out one
    by one. Images are not opened, but they must exist; captions, questions and answers are not changed.

    NoCaps's domain, one of `captions.DOMAINS`, is `facts["domain"]`; without it, facts are None. `Question.answer` is
    VQAv2's `multiple_choice_answer`, or the most common answer for OK-VQA, which has none. OK-VQA's answers are
    stemmed, and there are ten per question: those of five annotators, each twice.

    Args:
        kind: one of `KINDS`; None = by the content of the file.
        annotations: the file.
        images: the folder that the paths in the file are relative to (for COCO, it contains `train2014`, `val2014` and
            `test2015`), or the folder of the images themselves.
        split: required for Karpathy's files, one of `captions.SPLITS` ("train" includes restval). For VQAv2 and OK-VQA,
            it can be given if it is the split of the files ("val2014" or "val").
        questions: the second file of VQAv2 and OK-VQA; None if `annotations` are the questions of a test split.

    Raises:
        UserError: a file cannot be read, is cut off or has another format; `kind` or `split` is unknown or does not fit
            the file; questions and annotations have different splits; `images` is not a folder; no entry is usable.
    """
    path = Path(annotations)
    if kind is not None and kind not in KINDS:
        raise UserError(f"unknown kind {kind!r} of annotations: it must be one of {', '.join(KINDS)}")
    data = read_json(path)
    found = _recognised(data, path)
    if kind is not None and _ALIKE.get(kind, kind) != _ALIKE.get(found, found):
        raise UserError(f"{path}: is of {found}, not of {kind}: give another file, or choose that kind")
    pictures = Pictures(images)
    skipped: list[str] = []
    if found in ("vqav2", "okvqa"):
        records = vqa(path, data, pictures, skipped, split, None if questions is None else Path(questions))
    elif questions is not None:
        raise UserError(f"{questions}: {found} has no second file: leave the questions out")
    elif isinstance(data, dict) and found in ("coco-karpathy", "flickr30k"):
        records = karpathy(path, data, pictures, skipped, split)
    elif split is not None:
        raise UserError(f"{path}: is of one split, there is no {split!r} to choose: leave the split out")
    elif found == "gqa":
        records = gqa(path, data, pictures, skipped)
    elif found == "nocaps":
        records = nocaps(path, data, pictures, skipped)
    else:
        records = listed(path, data, pictures, skipped)
    if not records:
        what = "no usable entry" + (f" of the split {split!r}" if split else "")
        why = f"{len(skipped)} cannot be used; the first: {skipped[0]}" if skipped else "another split or file"
        raise UserError(f"{path}: holds {what}; {why}")
    return records, skipped


@uncollected()
def official_kind(annotations: Path) -> Kind:
    """The kind of a file by its content.

    Raises:
        UserError: it cannot be read, or is none of `KINDS`.
    """
    return _recognised(read_json(Path(annotations)), Path(annotations))


def _recognised(data: Any, path: Path) -> Kind:
    if isinstance(data, list):
        row = first_entry(data)
        if {"image", "caption"} <= row.keys():
            return "coco-karpathy" if COCO_NAME.search(str(row["image"])) else "flickr30k"
    if isinstance(data, dict):
        image, answered = first_entry(data.get("images")), first_entry(data.get("annotations"))
        if "sentences" in image:
            return "coco-karpathy" if data.get("dataset") == "coco" or "cocoid" in image else "flickr30k"
        if "file_name" in image:
            return "nocaps"
        if {"question_id", "answers"} <= answered.keys():
            return "vqav2" if "multiple_choice_answer" in answered else "okvqa"
        if {"question_id", "question"} <= first_entry(data.get("questions")).keys():
            return "vqav2"
        if {"imageId", "question"} <= first_entry(list(data.values())).keys():
            return "gqa"
    raise UserError(f"{path}: is none of the official annotation files: give {_EXPECTED}")
