"""What `--data` may name: pictures of one's own, an official annotation file, or easy-VQA."""

from pathlib import Path
from typing import NamedTuple

from openblip2.data.corpora import easy_vqa_records
from openblip2.data.official import official_kind, read_official
from openblip2.data.records import Record, Wanted, read_records
from openblip2.errors import UserError

EASY_VQA = "easy-vqa"


class Source(NamedTuple):
    """Records, one line for each entry that was skipped, and whose form the data is in ("own" for one's own)."""

    records: list[Record]
    skipped: list[str]
    kind: str


def read_source(
    data: str | Path,
    wanted: Wanted = "captions",
    images: Path | None = None,
    split: str | None = None,
    questions: Path | None = None,
    withheld: bool = False,
) -> Source:
    """The records of `data`: "easy-vqa", an official `.json` (`data/official.py`), or one's own (`data/records.py`).

    Args:
        wanted: what every record must have. images: the folder of an official file's pictures.
        split: of an official file or of easy-VQA ("train", "test"). questions: VQAv2's and OK-VQA's second file.
        withheld: pictures without captions and questions without answers are welcome: an official test split, of
            which predictions are made. An answer is "" there.

    Raises:
        UserError: `data` cannot be read as any of these, or an argument does not belong to it.
    """
    if str(data) == EASY_VQA:
        if split not in ("train", "test"):
            raise UserError(f"--data {EASY_VQA}: give --split train or --split test")
        return Source(easy_vqa_records(split), [], EASY_VQA)
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
    for name, value in (("--images", images), ("--split", split), ("--questions", questions)):
        if value is not None:
            raise UserError(f"{name} belongs to an official .json or to easy-vqa; {path} needs none")
    return Source(*read_records(path, wanted), "own")


def _has(record: Record, wanted: Wanted) -> bool:
    if wanted == "captions":
        return bool(record.captions)
    return bool(record.questions) and all(question.answer for question in record.questions)
