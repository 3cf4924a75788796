"""Which pictures a run was trained on, so that a score on them is never taken for one on unseen ones.

RUN/trained_on.txt has one line for each training picture, by content: a copy under another name is the same picture.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from openblip2.data.records import Record

FILE = "trained_on.txt"
_HEAD = 64 * 2**10  # bytes that are read: with the size they tell pictures apart


def picture_digest(image: Path) -> str | None:
    """16 hexadecimal digits of a picture's size and first 64 KiB; None where it cannot be read."""
    try:
        with image.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return hashlib.blake2b(b"%d " % size + file.read(_HEAD), digest_size=8).hexdigest()
    except OSError:
        return None  # its training has said so


def write_seen(records: Sequence[Record], run: Path) -> None:
    """Writes `RUN/trained_on.txt`, whole or not at all."""
    digests = sorted({digest for record in records if (digest := picture_digest(record.image))})
    fresh = run / (FILE + ".new")
    fresh.write_text("".join(digest + "\n" for digest in digests), encoding="ascii")
    os.replace(fresh, run / FILE)


def seen_before(records: Sequence[Record], runs: Sequence[Path]) -> list[Record] | None:
    """Those of `records` whose pictures one of the runs was trained on; None if no run says what it was trained on."""
    files = [run / FILE for run in runs if (run / FILE).is_file()]
    if not files:
        return None
    known = {line for file in files for line in file.read_text(encoding="ascii").split()}
    return [record for record in records if picture_digest(record.image) in known]
