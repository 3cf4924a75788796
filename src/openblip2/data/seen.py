"""Which pictures a run was trained on, so that a score on them is never taken for one on unseen ones.

RUN/trained_on.txt has one line for each training picture, by content: a copy under another name is the same picture.
A run on shards has none: RUN/shards.json names the shards, and whether a picture is in them is not known.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from openblip2.data.records import Record
from openblip2.data.web.mixture import FILE as SHARDS
from openblip2.runs import write_text

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


def data_digest(*parts: Sequence[Record]) -> str:
    """The number of pictures and a digest of ids and texts of what a run is trained and validated on, in order.

    Held-out pictures and batches are drawn by number, so one picture more or less changes all of them.
    """
    rows = [[(r.id, r.captions, [(q.text, q.given) for q in r.questions]) for r in records] for records in parts]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return f"{sum(map(len, parts)):,} pictures, digest {digest[:16]}"


def write_seen(records: Sequence[Record] | None, run: Path) -> None:
    """Writes `RUN/trained_on.txt`, whole or not at all; of shards (None), there is none."""
    if records is None:
        (run / FILE).unlink(missing_ok=True)
        return
    (run / SHARDS).unlink(missing_ok=True)
    digests = sorted({digest for record in records if (digest := picture_digest(record.image))})
    write_text("".join(digest + "\n" for digest in digests), run / FILE)


def seen_before(records: Sequence[Record], runs: Sequence[Path]) -> list[Record] | None:
    """Those of `records` whose pictures one of the runs was trained on.

    None if no run says what it was trained on, or if there is none among them and a run was trained on shards.
    """
    files = [run / FILE for run in runs if (run / FILE).is_file()]
    if not files:
        return None
    known = {line for file in files for line in file.read_text(encoding="ascii").split()}
    found = [record for record in records if picture_digest(record.image) in known]
    return found or (None if any((run / SHARDS).is_file() for run in runs) else found)
