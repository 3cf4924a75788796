"""Which shards a run is trained on: one set, or a mixture with weights that a .toml file names.

    [[part]]
    shards = "coco/{00000..00056}.tar"   # as `expand` takes it; relative to the .toml's folder
    reader = "coco"                      # one of data/web/readers.py; else "web"
    weight = 3

    [[part]]
    shards = "s3://bucket/laion/{00000..11499}.tar"
    reader = "laion"
    weight = 60

A run counts the samples of each shard once and keeps the counts in RUN/shards.json, by which every process and every
later start finds the same samples in the same order. A count is the "successes" of the shard's `_stats.json`, as
img2dataset and `openblip2 prepare` write it; where there is none, the shard's headers are read.
"""

import json
import shutil
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from openblip2.data.records import Record, write_records
from openblip2.data.text import clean_caption
from openblip2.data.web.readers import captions, reader
from openblip2.data.web.shard_file import is_url, told_samples
from openblip2.data.web.shard_names import expand
from openblip2.data.web.tars import Shard
from openblip2.errors import UserError, one_line
from openblip2.runs import write_text

FILE = "shards.json"
_FORMAT = 1
_KEYS = {"shards", "reader", "weight"}
_THREADS = 16  # they wait for disks and networks
_RIGHT = '[[part]] with shards = "web/{00000..00099}.tar", reader = "web", weight = 1'


@dataclass(frozen=True)
class Part:
    """Shards of one data set.

    Attributes:
        name: as the shards were named.
        reader: one of `READERS`.
        weight: its share of a mixture, 1 and more.
        shards: paths and URLs.
        counts: samples of each; empty = not counted yet.
        held_out: of each shard, how many samples at its beginning are not trained on.
    """

    name: str
    reader: str
    weight: int
    shards: tuple[str, ...]
    counts: tuple[int, ...] = ()
    held_out: tuple[int, ...] = ()

    @property
    def samples(self) -> int:
        """To train on."""
        return sum(self.counts) - sum(self.held_out)


def names_shards(data: str) -> bool:
    """Whether `--data` names shards or a mixture, rather than records."""
    if "://" in data or "::" in data or data.endswith((".tar", ".toml")):
        return True
    return Path(data).is_dir() and not (Path(data) / "records.jsonl").exists() and any(Path(data).glob("*.tar"))


def read_parts(data: str) -> list[Part]:
    """The parts that `--data` names, not counted yet.

    Raises:
        UserError: no mixture can be read, or it names no shards, an unknown reader, a weight that is no whole number.
    """
    if not data.endswith(".toml"):
        return [Part(data, "web", 1, tuple(expand(data)))]
    path = Path(data)
    try:
        with path.open("rb") as file:
            told = tomllib.load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); a mixture, {_RIGHT}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise UserError(f"{path}: not TOML ({one_line(error)}); {_RIGHT}") from error
    rows = told.get("part")
    if told.keys() != {"part"} or not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: holds {', '.join(sorted(told)) or 'nothing'}, and no mixture is of that; {_RIGHT}")
    return [_part(row, f"{path}: part {n}", path.parent) for n, row in enumerate(rows, start=1)]


def count_parts(
    parts: Sequence[Part], problem: Callable[[str], object], advance: Callable[[], object] = lambda: None
) -> list[Part]:
    """The parts with the samples of each shard counted. A shard that cannot be opened counts 0 and is named.

    `advance` is called behind each shard.

    Raises:
        UserError: a part has no sample at all.
    """
    counted: list[Part] = []
    with ThreadPoolExecutor(_THREADS) as threads:
        for part in parts:
            counts: list[int] = []
            for samples in threads.map(lambda shard: count(shard, problem), part.shards):
                counts.append(samples)
                advance()
            if not any(counts):
                raise UserError(
                    f"{part.name}: not one of its {len(counts)} shards holds a sample; shards with pictures"
                )
            counted.append(replace(part, counts=tuple(counts), held_out=(0,) * len(counts)))
    return counted


def count(shard: str, problem: Callable[[str], object]) -> int:
    """How many samples a shard has."""
    told = told_samples(shard)
    if told is not None:
        return told
    try:
        opened = Shard(shard, lambda line: None)  # what is wrong in it is said when it is read
    except UserError as error:
        problem(str(error))
        return 0
    opened.close()
    return len(opened)


def hold_out(parts: Sequence[Part], wanted: int) -> list[Part]:
    """The parts with the first `wanted` samples of the first part not to be trained on."""
    first, left, held = parts[0], wanted, []
    for count in first.counts:
        held.append(min(count, left))
        left -= held[-1]
    return [replace(first, held_out=tuple(held)), *parts[1:]]


def write_held_out(part: Part, wanted: int, folder: Path, problem: Callable[[str], object]) -> None:
    """The first `wanted` samples of a part as a data folder, without those that have no caption."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    how, records = reader(part.reader), list[Record]()
    for url, held in zip(part.shards, part.held_out, strict=True):
        if not held:
            continue
        shard = Shard(url, problem)
        for number in range(min(held, len(shard))):
            sample = shard.read(number)
            texts = captions(sample, how) if sample else ()
            if sample and any(map(clean_caption, texts)):
                path = folder / f"{len(records):06}.{sample.suffix}"
                path.write_bytes(sample.image)
                records.append(Record(f"{Path(url).stem}/{sample.key}", path, texts))
        shard.close()
    if len(records) < 2:
        raise UserError(
            f"{wanted} samples are held out, {len(records)} of them with a caption: at least 2; give --held-out "
            "pictures, or a larger data.held_out"
        )
    write_records(records, folder)


def write_parts(parts: Sequence[Part], run: Path) -> None:
    """Writes `RUN/shards.json`, whole or not at all."""
    write_text(json.dumps({"format": _FORMAT, "parts": [asdict(part) for part in parts]}) + "\n", run / FILE)


def kept_parts(run: Path, parts: Sequence[Part]) -> list[Part] | None:
    """What `RUN/shards.json` holds, if it is of these parts; None where there is none.

    Raises:
        UserError: it is damaged, or of other shards.
    """
    path = run / FILE
    if not path.is_file():
        return None
    try:
        told: dict[str, Any] = json.loads(path.read_text("utf-8"))
        kept = [_kept(row) for row in told["parts"]]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: is damaged or another program's; give a new --out") from error
    if [replace(part, counts=(), held_out=()) for part in kept] != list(parts):
        raise UserError(f"{path}: the run was begun on other shards; the same --data, or a new --out")
    return kept


def _kept(row: dict[str, Any]) -> Part:
    lists = {name: tuple(row[name]) for name in ("shards", "counts", "held_out")}
    return Part(**{**row, **lists})


def _part(row: Any, where: str, folder: Path) -> Part:
    if not isinstance(row, dict) or not row.keys() <= _KEYS or not isinstance(row.get("shards"), str):
        raise UserError(f"{where}: {ascii(row)[:80]} is none; {_RIGHT}")
    weight, how = row.get("weight", 1), row.get("reader", "web")
    if type(weight) is not int or weight < 1:
        raise UserError(f"{where}: weight {weight!r}; a whole number from 1 on")
    reader(str(how))
    names = [name if is_url(name) else str(folder / name) for name in row["shards"].split("::") if name]
    return Part(row["shards"], str(how), weight, tuple(expand("::".join(names))))
