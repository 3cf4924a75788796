"""Which shards a run is trained on: one data set, or a mixture with weights in a .toml file (docs/web-scale.md).

A run counts the samples of each shard once and stores the numbers in RUN/shards.json, so that every process and every
later start uses the same samples in the same order. The number is "successes" in the shard's `_stats.json`, which
img2dataset and `openblip2 prepare` write; without this file, the headers of the shard are read.
"""

import json
import shutil
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from openblip2.data.records import Record, write_records
from openblip2.data.text import clean_caption
from openblip2.data.web import expand, is_url, stated_samples
from openblip2.data.web.tars import Shard, read_tar
from openblip2.errors import UserError, one_line
from openblip2.runs import write_text

FILE = "shards.json"
_FORMAT = 1
_THREADS = 16  # they mostly wait for disks and networks
_RIGHT = 'write each part as [[part]] with shards = "web/{00000..00099}.tar" and weight = 1 (a whole number)'


@dataclass(frozen=True)
class Part:
    """The shards of one data set."""

    name: str  # the text that named the shards
    weight: int  # its share in a mixture, 1 or more
    shards: tuple[str, ...]  # paths and URLs
    counts: tuple[int, ...] = ()  # number of samples in each shard; empty if not counted yet
    held_out: tuple[int, ...] = ()  # number of samples at the beginning of each shard that are not trained on

    @property
    def samples(self) -> int:
        """Number of samples to train on."""
        return sum(self.counts) - sum(self.held_out)


class _Row(BaseModel, extra="forbid", strict=True):
    shards: str
    weight: Annotated[int, Field(ge=1)] = 1


class _Mixture(BaseModel, extra="forbid"):
    part: Annotated[list[_Row], Field(min_length=1)]


def names_shards(data: str) -> bool:
    """Whether `--data` names shards or a mixture, and not records."""
    if "://" in data or "::" in data or data.endswith((".tar", ".toml")):
        return True
    return Path(data).is_dir() and not (Path(data) / "records.jsonl").exists() and any(Path(data).glob("*.tar"))


def read_parts(data: str) -> list[Part]:
    """The parts that `--data` names, not counted yet.

    Raises:
        UserError: the mixture cannot be read or is invalid, or a part has no shards.
    """
    if not data.endswith(".toml"):
        return [Part(data, 1, tuple(expand(data)))]
    path = Path(data)
    try:
        with path.open("rb") as file:
            mixture = _Mixture.model_validate(tomllib.load(file))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {_RIGHT}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; {_RIGHT}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise UserError(f"{path}: not TOML ({one_line(error)}); {_RIGHT}") from error
    parts: list[Part] = []
    for row in mixture.part:
        names = [name if is_url(name) else str(path.parent / name) for name in row.shards.split("::") if name]
        parts.append(Part(row.shards, row.weight, tuple(expand("::".join(names)))))
    return parts


def count_parts(
    parts: Sequence[Part], problem: Callable[[str], object], advance: Callable[[], object] = lambda: None
) -> list[Part]:
    """The parts with the samples of each shard counted. A shard that cannot be opened counts 0 and is reported.

    Args:
        problem: called with a line for each such shard.
        advance: called after each shard.

    Raises:
        UserError: a part has no sample at all.
    """
    counted: list[Part] = []
    problems: list[str] = []
    with ThreadPoolExecutor(_THREADS) as threads:
        for part in parts:
            counts: list[int] = []
            for samples, lines in threads.map(count_samples, part.shards):
                counts.append(samples)
                problems += lines
                for line in lines:
                    problem(line)
                advance()
            if not any(counts):
                why = f"the first problem: {problems[0]}" if problems else "give shards with images"
                raise UserError(f"{part.name}: none of its {len(counts)} shards contains a sample; {why}")
            counted.append(replace(part, counts=tuple(counts), held_out=(0,) * len(counts)))
    return counted


def count_samples(shard: str) -> tuple[int, list[str]]:
    """The number of samples of a shard, and if there are none, the problems with it."""
    stated = stated_samples(shard)
    if stated is not None:
        return stated, []
    problems: list[str] = []
    try:
        opened = Shard(shard, problems.append)
    except UserError as error:
        return 0, [str(error)]
    opened.close()
    return len(opened), [] if len(opened) else problems  # for other shards, training reports them


def hold_out_samples(parts: Sequence[Part], wanted: int) -> list[Part]:
    """The parts, with the first `wanted` samples of the first part held out of training."""
    first, left, held = parts[0], wanted, []
    for count in first.counts:
        held.append(min(count, left))
        left -= held[-1]
    return [replace(first, held_out=tuple(held)), *parts[1:]]


def write_held_out(part: Part, wanted: int, folder: Path, problem: Callable[[str], object]) -> None:
    """The first `wanted` samples of a part as a data folder, without those that have no caption."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    records: list[Record] = []
    for url, held in zip(part.shards, part.held_out, strict=True):
        for sample in read_tar(url, problem, held) if held else ():
            if any(map(clean_caption, sample.captions)):
                path = folder / f"{len(records):06}.{sample.suffix}"
                path.write_bytes(sample.image)
                records.append(Record(f"{Path(url).stem}/{sample.key}", path, sample.captions))
    if len(records) < 2:
        raise UserError(
            f"{wanted} samples are held out, {len(records)} have a caption, but at least 2 must; give --held-out "
            "pictures, or a larger data.held_out"
        )
    write_records(records, folder)


def write_parts(parts: Sequence[Part], run: Path) -> None:
    """Writes `RUN/shards.json` in one step."""
    write_text(json.dumps({"format": _FORMAT, "parts": [asdict(part) for part in parts]}) + "\n", run / FILE)


def kept_parts(run: Path, parts: Sequence[Part]) -> list[Part] | None:
    """The counted parts in `RUN/shards.json`; None if there is no such file.

    Raises:
        UserError: it is damaged, or it has other shards than `parts`.
    """
    path = run / FILE
    if not path.is_file():
        return None
    try:
        kept = TypeAdapter(list[Part]).validate_python(json.loads(path.read_text("utf-8"))["parts"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: is damaged or from another program: give a new --out") from error
    if [replace(part, counts=(), held_out=()) for part in kept] != list(parts):
        raise UserError(f"{path}: the run was started with other shards: give the same --data, or a new --out")
    return kept
