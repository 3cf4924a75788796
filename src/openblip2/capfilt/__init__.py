"""CapFilt for all shards, in one process or in several processes of a job array, with the same captions."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from openblip2.capfilt.models import digest, digests, open_models
from openblip2.capfilt.shard import How, Made, Maker
from openblip2.data.web import expand, is_url, read_stats
from openblip2.data.web.mixture import count_samples
from openblip2.errors import UserError
from openblip2.progress import Progress
from openblip2.runs import atomic_write, make_folder, read_json

FILE = "capfilt.json"  # the settings and models that OUT was made with
_FORMAT = 2  # to be increased when the same settings give other captions


class Finished(NamedTuple):
    """The finished shards: their number, the sum of their counts, and a line for each that cannot be read."""

    shards: int
    counts: Counter[str]
    dead: list[str]


def capfilt(
    shards: str, captioner: str, ranker: str, out: Path, how: How, progress: Progress, part: tuple[int, int] = (1, 1)
) -> Finished:
    """Captions and filters shards into `out`. An interrupted run continues with the shards that are not finished.

    Args:
        shards: as in `expand`.
        captioner: a stage-2 run that writes captions.
        ranker: a stage-1 run, or a CLIP of transformers.
        out: the folder of the new shards.
        part: (K, N): every Nth shard, starting with the Kth. N such runs, in any order or at the same time, give the
            same result as one run over all shards.

    Raises:
        UserError: no shards, two with the same name, models of the wrong kind, an `out` that has other settings or
            contains the shards themselves, or no shard that can be read.
    """
    names = _named_shards(expand(shards), out)
    itm, values = how.filter == "itm", asdict(how)
    if not itm:
        del values["threshold"]  # it has no effect
    # Everything that captions depend on besides the shard.
    settings = {"format": _FORMAT, **values, **digests(captioner, ranker, itm)}
    _claim(out, settings)
    if others := sorted({path.stem for path in out.glob("*.tar") if path.name[0] != "."} - {name for name, _ in names}):
        raise UserError(f"{out} contains other shards ({others[0]}.tar): give another --out, or remove them")
    mine = names[part[0] - 1 :: part[1]]
    if not mine:
        raise UserError(f"--part {part[0]}/{part[1]}: this part of {len(names)} shards is empty: use fewer parts")
    done: list[Made] = []
    left: list[tuple[str, Path]] = []
    for name, url in mine:
        path = out.resolve() / f"{name}.tar"
        if stats := read_stats(path, "settings", digest(settings)):
            done.append(Made(name, stats["counts"]))
        else:
            left.append((url, path))
    if done:
        progress.say(f"{len(done):,} of {len(mine):,} shards are done")
    if left:
        began = time.perf_counter()
        total = 0
        with progress.steps("counting pictures", len(left), unit="shards") as bar, ThreadPoolExecutor() as threads:
            for count, _ in threads.map(count_samples, [url for url, _ in left]):
                total += count
                bar.advance()
        with progress.steps("captions for pictures", total) as bar:
            models = open_models(captioner, ranker, itm)
            maker = Maker(*models, how, digest(settings), lambda count: bar.advance(count=count))
            for url, path in left:
                done.append(maker(url, path))
                progress.say(_line(done[-1], len(done), len(mine), time.perf_counter() - began))
    dead = [made.dead for made in done if made.dead]
    if len(dead) == len(mine):
        raise UserError(f"none of the {len(mine)} shards can be read; the first: {dead[0]}")
    counts = sum((Counter(made.counts) for made in done), Counter[str]())
    return Finished(len(done) - len(dead), counts, dead)


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Creates OUT with `OUT/capfilt.json`, or checks that OUT was made with the same settings."""
    make_folder(out)
    path = out / FILE
    if not path.exists():
        if others := sorted(path.name for path in out.glob("*.tar")):
            raise UserError(f"{out} contains other shards ({others[0]}): give a new folder for the captioned ones")
        with atomic_write(path, concurrent=True) as draft:  # the parts of a job array start at the same time
            draft.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    before = read_json(path)
    if before != settings:
        names = settings if not isinstance(before, dict) else [k for k in settings if before.get(k) != settings[k]]
        raise UserError(f"{out} was made with another {', '.join(names) or 'program'}: give the same, or a new --out")


def _named_shards(shards: Sequence[str], out: Path) -> list[tuple[str, str]]:
    """The name of each shard, which the new shard gets too, and its path or URL."""
    found: dict[str, str] = {}
    for url in shards:
        file = url.split("?", 1)[0].rsplit("/", 1)[-1] if is_url(url) else Path(url).name
        name = file.removesuffix(".tar")
        if name in ("", file) or name.startswith("."):
            raise UserError(f"{url}: not the name of a shard: it must end in .tar")
        if name in found:
            raise UserError(
                f"{found[name]} and {url}: they have the same name: give one folder at a time, each with its own --out"
            )
        if not is_url(url) and Path(url).resolve().parent == out.resolve():
            raise UserError(f"{url} is in --out, where the new shard would replace it: give another folder")
        found[name] = url if is_url(url) else str(Path(url).resolve())
    return list(found.items())


def _line(made: Made, number: int, total: int, seconds: float) -> str:
    if made.dead:
        return f"skipped: {made.dead}"
    pictures, kept = made.counts["pictures"], made.counts["captions"]
    left_out = ", ".join(
        f"{made.counts[name]:,} {name}" for name in ("broken", "without captions") if made.counts[name]
    )
    return (
        f"{number}/{total} {made.name}: {pictures:,} pictures, {made.counts['captions by the captioner']:,} of "
        f"{kept:,} captions are the captioner's{f', left out: {left_out}' if left_out else ''} ({seconds:.0f} s so far)"
    )
