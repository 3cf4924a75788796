"""How shards are captioned and filtered, and what OUT was made by: `OUT/capfilt.json`."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from openblip2.data.web.readers import reader
from openblip2.errors import UserError
from openblip2.runs import atomic_write, make_folder, read_json

FILE = "capfilt.json"
_FORMAT = 1  # raise it when the same settings give other captions


@dataclass(frozen=True)
class How:
    """The defaults are the paper's.

    Attributes:
        captions: sampled for each picture; 0 = none, the ranker alone.
        top_p: of the nucleus, in (0, 1].
        keep: captions of a picture that are kept, the best ones.
        filter: "similarity", by which captions are ranked; or "itm", BLIP's older form: by the probability of a
            match, and what is below `threshold` is dropped.
        seed: of the captions.
        reader: of the shards (data/web/readers.py).

    Raises:
        UserError: a number out of its range, an unknown filter or reader.
    """

    captions: int = 10
    top_p: float = 0.9
    keep: int = 2
    filter: Literal["similarity", "itm"] = "similarity"
    threshold: float = 0.5
    seed: int = 0
    reader: str = "web"

    def __post_init__(self) -> None:
        for name, value, least in (("captions", self.captions, 0), ("keep", self.keep, 1), ("seed", self.seed, 0)):
            if value < least:
                raise UserError(f"--{name} {value}: a whole number, {least} or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: above 0 and at most 1, 0.9 for one")
        if not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold {self.threshold}: a probability, from 0 to 1")
        if self.filter not in ("similarity", "itm"):
            raise UserError(f"--filter {self.filter}: similarity or itm")
        reader(self.reader)


def settings_of(how: How, captioner: str | None, ranker: str) -> dict[str, Any]:
    """All that captions depend on besides the shard; `captioner`, `ranker`: digests of their weights."""
    told = asdict(how) if how.filter == "itm" else {k: v for k, v in asdict(how).items() if k != "threshold"}
    return {"format": _FORMAT, **told, "captioner": captioner, "ranker": ranker}


def digest(values: Any) -> str:
    """Of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Makes OUT and writes into it what it is made by; or sees that it is made by the same.

    Raises:
        UserError: OUT cannot be made, is made by something else, or holds shards of another program.
    """
    make_folder(out)
    path = out / FILE
    if not path.exists():
        if others := sorted(found.name for found in out.glob("*.tar")):
            raise UserError(f"{out} holds other shards ({others[0]}): give a new folder for the captioned ones")
        with atomic_write(path, concurrent=True) as draft:  # the parts of a job array begin at once
            draft.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    told = read_json(path)
    if told != settings:
        names = settings if not isinstance(told, dict) else [k for k in settings if told.get(k) != settings[k]]
        raise UserError(f"{out} was made with another {', '.join(names) or 'program'}: give the same, or a new --out")
