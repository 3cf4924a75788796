"""Which images a run was trained on, so that a score on them is not mistaken for one on unseen images.

RUN/trained_on.txt has a digest of each training image, so a copy under another name is recognised. A run on shards has
no such file: RUN/shards.json names the shards, and whether an image is in them is not known.
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
_HEAD = 64 * 2**10  # bytes that are read; together with the size they identify an image


def picture_digest(image: Path) -> str | None:
    """16 hexadecimal digits from an image's size and first 64 KiB; None if it cannot be read."""
    try:
        with image.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return hashlib.blake2b(b"%d " % size + file.read(_HEAD), digest_size=8).hexdigest()
    except OSError:
        return None  # which training has reported


def data_digest(*parts: Sequence[Record]) -> str:
    """The number of images that a run is trained and validated on, and a digest of their ids and texts, in order.

    Held-out images and batches are drawn by number, so one image more or less changes all of them.
    """
    rows = [[(r.id, r.captions, [(q.text, q.given) for q in r.questions]) for r in records] for records in parts]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return f"{sum(map(len, parts)):,} pictures, digest {digest[:16]}"


def write_trained_on(records: Sequence[Record] | None, run: Path) -> None:
    """Writes `RUN/trained_on.txt` in one step, or deletes it for a run on shards (None)."""
    if records is None:
        (run / FILE).unlink(missing_ok=True)
        return
    (run / SHARDS).unlink(missing_ok=True)
    digests = sorted({digest for record in records if (digest := picture_digest(record.image))})
    write_text("".join(digest + "\n" for digest in digests), run / FILE)


def pictures_trained_on(records: Sequence[Record], runs: Sequence[Path]) -> list[Record] | None:
    """The records with images that one of the runs was trained on.

    None if this is not known: no run has a list, or no image is in a list and a run was trained on shards.
    """
    files = [run / FILE for run in runs if (run / FILE).is_file()]
    if not files:
        return None
    known = {line for file in files for line in file.read_text(encoding="ascii").split()}
    found = [record for record in records if picture_digest(record.image) in known]
    return found or (None if any((run / SHARDS).is_file() for run in runs) else found)
