"""Frozen features: what makes a cache of them, how long and large it gets, and the encoder run over pictures.

Shapes: B images, P patch tokens, V encoder width, S image side in px.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openblip2.config import RunSettings
from openblip2.data.cache.features import (
    Features,
    build_cache,
    bytes_of,
    find_records,
    free_bytes,
    require_room,
    require_same,
)
from openblip2.data.cache.folder import Cache
from openblip2.data.cache.shards import STORED, Layout
from openblip2.data.cache.views import BATCH, CROPS, PLAIN, encode_pictures, open_pictures
from openblip2.data.records import Record
from openblip2.errors import UserError
from openblip2.model.precision import DTYPES
from openblip2.model.vision import Vision
from openblip2.progress import Progress
from openblip2.train.hardware import device

# Of the encoder's configuration, what changes features and does not show in the weights.
_SHAPING = ("model_type", "hidden_act", "layer_norm_eps", "num_attention_heads", "patch_size", "rope_theta")


def write_features(
    vision: Vision,
    records: Sequence[Record],
    settings: RunSettings,
    folder: Path,
    precision: str,
    views: int,
    progress: Progress,
    dry_run: bool = False,
) -> dict[str, int | float]:
    """What `openblip2 features` does: says what it will take, then makes the cache, or goes on making it.

    Returns what it takes: pictures, bytes, free bytes, seconds; behind a cache also how many pictures were skipped.

    Args:
        views: 1: the plain picture. More: so many random crops of each picture beside it.

    Raises:
        UserError: see `build_cache`; or an unknown precision.
    """
    if precision not in STORED:
        raise UserError(f"precision {precision!r} is none of {', '.join(STORED)}")
    entries = 1 if views == 1 else views + 1
    layout = layout_of(vision, precision, entries)
    room, size = bytes_of(layout, len(records)), settings.vision.image_size
    entry = f"{layout.tokens} tokens x {layout.width}"
    kinds = "the plain picture" if views == 1 else f"the plain picture and {views} views"
    progress.say(f"{len(records):,} pictures, {kinds} of each: {entry} in {precision}")
    free = free_bytes(folder)
    progress.say(f"{room / 1e9:.3g} GB in {folder}, of {free / 1e9:,.3g} GB free")
    if not folder.exists():  # else some of it may be there; the build counts what is not
        require_room(folder, layout, len(records))
    encode, began = _encode(vision), time.monotonic()
    first = next(open_pictures(records[:BATCH], size, entries - 1, settings.train.seed))
    good = [picture for picture in first if isinstance(picture, Tensor)]
    with torch.no_grad():
        for _ in encode_pictures(encode, good):
            pass
    a_picture = (time.monotonic() - began) / max(1, len(good))
    step = settings.train.batch
    progress.say(
        f"about {_duration(a_picture * len(records))} by the first {len(good)} pictures; the encoder then runs once "
        f"and not once an epoch: a step of {step} pictures reads {step * layout.row_bytes / 1e6:.3g} MB, where it "
        f"encoded for {_duration(a_picture / entries * step)}"
    )
    takes = {"pictures": len(records), "bytes": room, "free_bytes": free, "seconds": a_picture * len(records)}
    if dry_run:
        return takes
    cache = make_cache(vision, records, settings, folder, progress, "all", precision, views)
    for number, problem in enumerate(cache.skipped.values(), 1):
        progress.say(f"skipped ({number} so far): {problem}")
    return takes | {"skipped": len(cache.skipped)}


def make_cache(
    vision: Vision,
    records: Sequence[Record],
    settings: RunSettings,
    folder: Path,
    progress: Progress,
    name: str,
    precision: str = "fp16",
    views: int = 1,
    replace: bool = False,
) -> Cache:
    """The raw features of records (`vision.whitening` is left out), in a cache; see `build_cache`."""
    entries = 1 if views == 1 else views + 1
    made_by = maker(vision, settings) | {
        "precision": precision,
        "views": views,
        "crops": "none" if views == 1 else CROPS,
        "seed": settings.train.seed if views > 1 else 0,
    }
    layout = layout_of(vision, precision, entries)
    with progress.steps(f"features ({name})", len(records)) as bar, torch.no_grad():

        def advance(count: int) -> None:
            bar.advance(count=count)

        encode, size = _encode(vision), settings.vision.image_size
        return build_cache(records, encode, size, folder, made_by, layout, advance, replace)


def open_cache(vision: Vision, settings: RunSettings, folder: Path) -> Cache:
    """A cache that the settings' encoder made, and that has what their training wants.

    Raises:
        UserError: see `Cache`; it is of another encoder, or has no views where `data.augment` wants them.
    """
    cache = Cache(folder)
    way_out = "train with the settings of the cache, or make one with these"
    require_same(folder, cache.made_by, maker(vision, settings), way_out)
    if settings.data.augment and cache.layout.entries == 1:
        raise UserError(
            f"data.augment=true, and {folder} has the plain pictures alone: set data.augment=false, or make a cache "
            "with `openblip2 features --views 4`"
        )
    if settings.data.augment:
        require_same(folder, cache.made_by, {"crops": CROPS}, "make the cache anew")
    return cache


def encode_all(
    vision: Vision,
    records: Sequence[Record],
    settings: RunSettings,
    folder: Path,
    name: str,
    progress: Progress,
) -> tuple[Features, list[str]]:
    """The features of records as the models see them, by a cache in `folder`; and one line for each bad picture."""
    cache = make_cache(vision, records, settings, folder, progress, name, replace=True)
    found, problems = find_records(records, cache, whitened(vision))
    return found.load(), problems


def openable(records: Sequence[Record], size: int) -> tuple[list[Record], list[str]]:
    """The records whose pictures can be opened, and one line for each other."""
    opened = [picture for batch in open_pictures(records, size, 0, 0) for picture in batch]
    good = [record for record, picture in zip(records, opened, strict=True) if isinstance(picture, Tensor)]
    return good, [picture for picture in opened if isinstance(picture, str)]


def encode_now(vision: Vision, records: Sequence[Record]) -> Features:
    """The features of plain pictures that can be opened, as the encoder now is, without a cache."""
    place, found = device(), []
    for batch in open_pictures(records, vision.image_size, 0, 0):
        found.append(vision(torch.cat([picture for picture in batch if isinstance(picture, Tensor)]).to(place)).cpu())
    return Features(list(records), torch.cat(found))


def whitened(vision: Vision) -> Callable[[Tensor], Tensor]:
    """What turns cached features into what the models see: the encoder's whitening, if it has one.

    A cache is raw: it serves runs with any whitening, and whitenings are fitted to it.
    """
    if vision.whitening is None:
        return lambda features: features
    on_cpu = type(vision.whitening)(vision.whitening.mean.cpu(), vision.whitening.matrix.cpu())
    return on_cpu.forward


def maker(vision: Vision, settings: RunSettings) -> dict[str, Any]:
    """What decides about the features of plain pictures, by the names of `data.features.LABELS`."""
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    return {
        "encoder": settings.vision.name,
        "weights": weights_of(vision),
        "layer": vision.layers,
        "image_size": vision.image_size,
        "mean": list(vision.mean),
        "std": list(vision.std),
        "computed_in": dtypes[vision.encoder.dtype],
        "transform": PLAIN,
    }


def weights_of(vision: Vision) -> str:
    """The first 16 digits of the SHA-256 of the encoder's weights and of what else shapes its features.

    All weights: 1.2 GB/s, less than reading them takes; a fine-tuned copy may differ in any layer.
    """
    config: Any = vision.encoder.config
    shaping = {name: value for name, value in config.to_dict().items() if name in _SHAPING}
    digest = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode())
    for name, weight in sorted(vision.encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def layout_of(vision: Vision, precision: str, entries: int) -> Layout:
    """What rows of this encoder look like, by what it makes of one gray picture."""
    side = vision.image_size
    with torch.no_grad():
        _, tokens, width = vision(torch.full((1, 3, side, side), 128, dtype=torch.uint8, device=device())).shape
    return Layout(precision, tokens, width, entries)


def _encode(vision: Vision) -> Callable[[Tensor], Tensor]:
    """The encoder without its whitening."""

    def encode(pixels: Tensor) -> Tensor:
        whitening, vision.whitening = vision.whitening, None
        try:
            return vision(pixels.to(device()))
        finally:
            vision.whitening = whitening

    return encode


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
