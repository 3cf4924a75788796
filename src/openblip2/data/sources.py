"""What `--data` may name: the user's images, an official annotation file and, for training, shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from openblip2.data.official import read_official
from openblip2.data.records import Record, Wanted, read_records
from openblip2.data.web.mixture import Part, names_shards, read_parts
from openblip2.errors import UserError


class Source(NamedTuple):
    """What a data source contains.

    Attributes:
        records: none for shards.
        skipped: one line for each entry that was skipped.
        kind: the format, "own" for the user's own.
        shards: not counted yet.
        known: training questions, from which baselines that see no image guess.
    """

    records: list[Record]
    skipped: list[str]
    kind: str
    shards: list[Part] | None = None
    known: Sequence[Record] = ()


def read_source(
    data: str | Path,
    wanted: Wanted = "captions",
    images: Path | None = None,
    split: str | None = None,
    questions: Path | None = None,
    withheld: bool = False,
    shards: bool = False,
) -> Source:
    """The records of `data`: an official `.json` (data/official/) or the user's own images (data/records.py).

    Args:
        wanted: what every record must have.
        images: the folder of an official file's images.
        split: of an official file that contains several.
        questions: VQAv2's and OK-VQA's second file.
        withheld: whether images without captions and questions without answers are accepted, as in an official test
            split, for which predictions are made. Their answer is "".
        shards: whether shards are accepted.

    Raises:
        UserError: `data` cannot be read as any of these, or an argument does not belong to it.
    """
    if "://" in str(data) and str(data).split("?")[0].endswith((".csv", ".tsv", ".json", ".jsonl", ".txt")):
        raise UserError(f"{data}: only shards (.tar) are read from an address; download this file and give its path")
    if names_shards(str(data)):
        if not shards or wanted == "questions":
            raise UserError(f"{data}: shards are for training with captions; give records: a folder, .jsonl or .csv")
        _only_official(str(data), images, split, questions)
        return Source([], [], "shards", read_parts(str(data)))
    path = Path(data)
    if path.suffix.lower() == ".json":
        if images is None:
            raise UserError(f"{path}: give --images, the folder of its images")
        kind, records, skipped = read_official(path, images, split, questions)
        usable = [record for record in records if withheld or _has(record, wanted)]
        if not usable:
            raise UserError(f"{path}: holds no {wanted} (it is {kind}'s)")
        return Source(usable, skipped, kind)
    _only_official(str(path), images, split, questions)
    return Source(*read_records(path, wanted), "own")


def _only_official(data: str, images: Path | None, split: str | None, questions: Path | None) -> None:
    for name, value in (("--images", images), ("--split", split), ("--questions", questions)):
        if value is not None:
            raise UserError(f"{name} belongs to an official .json or to easy-vqa; {data} needs none")


def _has(record: Record, wanted: Wanted) -> bool:
    if wanted == "captions":
        return bool(record.captions)
    return bool(record.questions) and all(question.answer for question in record.questions)
