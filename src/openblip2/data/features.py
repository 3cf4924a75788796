"""Frozen features of a set of pictures, computed once and reused in every step.

Shapes: N pictures, P patch tokens, V encoder width, S side in px.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from openblip2.data.images import to_pixels
from openblip2.data.records import Record
from openblip2.errors import UserError


@dataclass(frozen=True)
class Features:
    """The features of `records`, row by row: `values [N, P, V]`."""

    records: list[Record]
    values: Tensor

    def __len__(self) -> int:
        return len(self.records)


def compute_features(
    records: Sequence[Record],
    encode: Callable[[Tensor], Tensor],
    size: int,
    path: Path,
    made_by: str,
    advance: Callable[[], object],
    batch: int = 32,
) -> tuple[Features, list[str]]:
    """Runs the frozen encoder over all pictures, into one memory-mapped file; reuses the file if it is the right one.

    Args:
        encode: uint8 pictures `[n, 3, S, S]` -> features `[n, P, V]`. size: S.
        path: the safetensors file. made_by: encoder, layer and size in words; a file made by anything else, or of
            other pictures, is made anew.
        advance: called after each batch.

    Returns:
        The features of all pictures that can be opened, and one line for each that cannot.

    Raises:
        UserError: not one picture can be opened.
    """
    made_by = f"{made_by}; {_fingerprint(records)}"
    kept = _read(records, path, made_by)
    if kept is not None:
        return kept, []
    parts: list[Tensor] = []
    good: list[Record] = []
    problems: list[str] = []
    for start in range(0, len(records), batch):
        opened, pixels, bad = open_all(records[start : start + batch], size)
        problems += bad
        if opened:
            good += opened
            parts.append(encode(pixels).to(torch.bfloat16).cpu())
        advance()
    if not good:
        raise UserError(f"none of the {len(records)} pictures can be opened; the first: {problems[0]}")
    values = torch.cat(parts)
    if not problems:  # a file stands for all its records; with bad ones among them, look again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(path.name + ".new")
        save_file({"values": values}, fresh, metadata={"made_by": made_by})
        os.replace(fresh, path)
    return Features(good, values), problems


def open_all(records: Sequence[Record], size: int) -> tuple[list[Record], Tensor, list[str]]:
    """Opens and resizes pictures `[n, 3, S, S]`; those that cannot be opened are left out and named."""
    good: list[Record] = []
    pixels: list[Tensor] = []
    problems: list[str] = []
    for record in records:
        try:
            pixels.append(to_pixels([record.image], size))
            good.append(record)
        except UserError as error:
            problems.append(str(error))
    return good, torch.cat(pixels) if pixels else torch.empty(0), problems


def _fingerprint(records: Sequence[Record]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for record in records:
        stat = record.image.stat() if record.image.exists() else None
        digest.update(f"{record.image} {stat.st_size if stat else 0} {stat.st_mtime_ns if stat else 0}\n".encode())
    return digest.hexdigest()


def _read(records: Sequence[Record], path: Path, made_by: str) -> Features | None:
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("made_by") != made_by:
            return None
        return Features(list(records), file.get_tensor("values"))
