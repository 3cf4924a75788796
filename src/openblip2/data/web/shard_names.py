"""Which shards a text names: braces, globs, folders and lists spelt out."""

import glob
import itertools
import re
from pathlib import Path

from openblip2.data.web.shard_file import is_url
from openblip2.errors import UserError

MOST_SHARDS = 1_000_000
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_BRACES = re.compile(r"\{([^{}]*)\}")


def expand(shards: str) -> list[str]:
    """The shards that `shards` names, in order.

    "a.tar::b.tar" is a list. Each part may have braces ("{00000..00099}", "{train,val}"), be a glob, a folder of
    .tar files, or one file, which need not be there. URLs ("s3://...") may have braces and are else taken as they are.

    Raises:
        UserError: no shard, a shard twice, more than `MOST_SHARDS`, a folder or glob without any.
    """
    found = [shard for part in shards.split("::") if part for name in _spelt_out(part) for shard in _files(name)]
    if not found:
        raise UserError(f"{shards!r} names no shard; a folder of .tar files, 'web/{{00000..00099}}.tar', or a URL")
    if len(set(found)) < len(found):
        twice = next(shard for n, shard in enumerate(found) if shard in found[:n])
        raise UserError(f"{shards!r} names {twice} twice; each shard once")
    return found


def _spelt_out(part: str) -> list[str]:
    pieces = _BRACES.split(part)  # text, inside of braces, text, ...
    choices = [_choices(piece, part) if n % 2 else [piece] for n, piece in enumerate(pieces)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > MOST_SHARDS:
        raise UserError(f"{part!r} names {count:,} shards; at most {MOST_SHARDS:,}")
    return ["".join(one) for one in itertools.product(*choices)]


def _choices(inside: str, part: str) -> list[str]:
    if match := _RANGE.fullmatch(inside):
        first, last = int(match[1]), int(match[2])
        if not first <= last < first + MOST_SHARDS:
            raise UserError(f"{part!r}: the range {{{inside}}} must go up, to at most {MOST_SHARDS:,} shards")
        width = len(match[1]) if match[1].startswith("0") or len(match[1]) == len(match[2]) else 0
        return [f"{n:0{width}}" for n in range(first, last + 1)]
    return inside.split(",")


def _files(name: str) -> list[str]:
    if is_url(name):
        return [name]
    if Path(name).is_dir():
        inside = sorted(str(path) for path in Path(name).glob("*.tar") if not path.name.startswith("."))
        if not inside:
            raise UserError(f"{name}: holds no .tar file; a folder of shards")
        return inside
    if glob.has_magic(name) and not Path(name).exists():
        matching = sorted(glob.glob(name))
        if not matching:
            raise UserError(f"{name}: matches no file; a folder of .tar files, or a pattern such as 'web/*.tar'")
        return matching
    return [name]
