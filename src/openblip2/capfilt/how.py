"""The settings of CapFilt, and `OUT/capfilt.json`, which records the settings and models that OUT was made with."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from openblip2.data.web.mixture import find_reader
from openblip2.errors import UserError
from openblip2.runs import atomic_write, make_folder, read_json

FILE = "capfilt.json"
_FORMAT = 1  # raise it when the same settings give other captions


@dataclass(frozen=True)
class How:
    """Settings; the defaults are the paper's.

    Attributes:
        captions: number of captions to sample for each image; 0 = none, only rank.
        top_p: probability mass for nucleus sampling, in (0, 1].
        keep: number of captions to keep for each image, the best ones.
        filter: "similarity" ranks captions by their similarity to the image; "itm", as in BLIP, by the probability of
            a match, and drops those below `threshold`.
        threshold: in [0, 1].
        seed: of the sampled captions.
        reader: of the shards (data/web/mixture.py).

    Raises:
        UserError: a number is out of its range, or the filter or reader is unknown.
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
            raise UserError(f"--top-p {self.top_p}: it must be above 0 and at most 1, for example 0.9")
        if not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold {self.threshold}: it must be a probability, from 0 to 1")
        if self.filter not in ("similarity", "itm"):
            raise UserError(f"--filter {self.filter}: it must be similarity or itm")
        find_reader(self.reader)


def settings_of(how: How, captioner: str | None, ranker: str) -> dict[str, Any]:
    """Everything that captions depend on besides the shard, with digests of the weights of both models."""
    values = asdict(how) if how.filter == "itm" else {k: v for k, v in asdict(how).items() if k != "threshold"}
    return {"format": _FORMAT, **values, "captioner": captioner, "ranker": ranker}


def digest(values: Any) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Creates OUT with `OUT/capfilt.json`, or checks that OUT was made with the same settings.

    Raises:
        UserError: OUT cannot be created, was made with other settings, or contains shards of another program.
    """
    make_folder(out)
    path = out / FILE
    if not path.exists():
        if others := sorted(found.name for found in out.glob("*.tar")):
            raise UserError(f"{out} holds other shards ({others[0]}): give a new folder for the captioned ones")
        with atomic_write(path, concurrent=True) as draft:  # the parts of a job array start at once
            draft.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    told = read_json(path)
    if told != settings:
        names = settings if not isinstance(told, dict) else [k for k in settings if told.get(k) != settings[k]]
        raise UserError(f"{out} was made with another {', '.join(names) or 'program'}: give the same, or a new --out")
