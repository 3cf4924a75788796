"""What `--data` may name: pictures of one's own, an official annotation file, easy-VQA; to train on, shards too."""

from pathlib import Path
from typing import NamedTuple

from openblip2.data.corpora import easy_vqa_records, stamps_records
from openblip2.data.official.read import official_kind, read_official
from openblip2.data.records import Record, Wanted, read_records
from openblip2.data.web.mixture import Part, names_shards, read_parts
from openblip2.errors import UserError

EASY_VQA = "easy-vqa"
STAMPS = "stamps"


class Source(NamedTuple):
    """Records, one line for each entry that was skipped, and whose form the data is in ("own" for one's own).

    `shards`: what there is in place of records, not counted yet.
    """

    records: list[Record]
    skipped: list[str]
    kind: str
    shards: list[Part] | None = None


def read_source(
    data: str | Path,
    wanted: Wanted = "captions",
    images: Path | None = None,
    split: str | None = None,
    questions: Path | None = None,
    withheld: bool = False,
    shards: bool = False,
) -> Source:
    """The records of `data`: "easy-vqa", an official `.json` (data/official/read.py), or one's own (data/records.py).

    Args:
        wanted: what every record must have.
        images: the folder of an official file's pictures.
        split: of an official file or of easy-VQA ("train", "test").
        questions: VQAv2's and OK-VQA's second file.
        withheld: pictures without captions and questions without answers are welcome: an official test split, of
            which predictions are made. An answer is "" there.
        shards: are welcome.

    Raises:
        UserError: `data` cannot be read as any of these, or an argument does not belong to it.
    """
    if str(data) == EASY_VQA:
        if split not in ("train", "test"):
            raise UserError(f"--data {EASY_VQA}: give --split train or --split test")
        return Source(easy_vqa_records(split), [], EASY_VQA)
    if names_shards(str(data)):
        if not shards or wanted == "questions":
            raise UserError(f"{data}: shards are for training with captions; give records: a folder, .jsonl or .csv")
        _only_official(str(data), images, split, questions)
        return Source([], [], "shards", read_parts(str(data)))
    path = Path(data)
    if path.suffix.lower() == ".json":
        if images is None:
            raise UserError(f"{path}: give --images, the folder in which its pictures lie")
        kind = official_kind(path)
        records, skipped = read_official(None, path, images, split, questions)
        usable = [record for record in records if withheld or _has(record, wanted)]
        if not usable:
            raise UserError(f"{path}: holds no {wanted} (it is {kind}'s)")
        return Source(usable, skipped, kind)
    _only_official(str(path), images, split, questions)
    return Source(*read_records(path, wanted), "own")


def read_corpus(data: str, images: Path | None = None, split: str | None = None) -> Source:
    """What `read_source` reads of pictures with captions, and "stamps": Tux Paint's, if they are installed.

    Raises:
        UserError: as `read_source`, or the stamps are missing.
    """
    if data != STAMPS:
        return read_source(data, images=images, split=split)
    if split not in ("train", "test") or images is not None:
        raise UserError(f"{STAMPS}: give --split train or --split test, and nothing else")
    found = stamps_records()
    return Source(found.train if split == "train" else found.test, found.skipped, STAMPS)


def _only_official(data: str, images: Path | None, split: str | None, questions: Path | None) -> None:
    for name, value in (("--images", images), ("--split", split), ("--questions", questions)):
        if value is not None:
            raise UserError(f"{name} belongs to an official .json or to easy-vqa; {data} needs none")


def _has(record: Record, wanted: Wanted) -> bool:
    if wanted == "captions":
        return bool(record.captions)
    return bool(record.questions) and all(question.answer for question in record.questions)
