"""Runs the frozen image encoder on pictures and stores the features in a cache (`data/features.py`) or in memory.

Shapes: E entries of a picture (the plain one, then random crops of it), P patch tokens, V encoder width, B images,
S image side in px.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openblip2.config import RunSettings
from openblip2.data.features import CACHE_DTYPES, FeatureCache, Features, picture_bytes, require_same_cache, writing
from openblip2.data.images import CROP_AREA, CROP_RATIO, THREADS, augment, to_pixels
from openblip2.data.records import Record
from openblip2.errors import UserError, number_of
from openblip2.hardware import device
from openblip2.model.precision import DTYPES
from openblip2.model.vision import FrozenVision
from openblip2.progress import Progress

BATCH = 32  # pictures that are opened together, and entries in one batch of the encoder
PLAIN = "resized to a square, bicubic"
CROPS = f"crops of {CROP_AREA} of the area, ratio {CROP_RATIO[0]:.2f} to {CROP_RATIO[1]:.2f}, every second one mirrored"


def make_cache(
    vision: FrozenVision,
    records: Sequence[Record],
    settings: RunSettings,
    folder: Path,
    progress: Progress,
    name: str,
    precision: str = "fp16",
    crops: int = 0,
    replace: bool = False,
) -> FeatureCache:
    """Encodes the pictures that a cache does not have yet, unwhitened, so that the cache works with any whitening.

    Pictures that cannot be opened are skipped and listed in the cache.

    Args:
        settings: The settings of `vision`, and the seed of the crops.
        folder: The cache, which is created if it does not exist.
        name: The name of the pictures in the progress bar.
        precision: fp16 or bf16.
        crops: Number of random crops of each picture that are encoded in addition to the plain picture.
        replace: Whether to replace a cache that was made with another encoder or settings, or has none of the pictures.

    Raises:
        UserError: The cache was made with another encoder or settings, or is damaged; no picture can be opened; the
            disk is full or too small.
    """
    if len({record.id for record in records}) < len(records):
        raise UserError(f"{folder}: two pictures have the same id; give each its own (`id` in records.jsonl)")
    seed = settings.train.seed if crops else 0
    # The cache records seed and crops, because the features of a picture depend on them.
    drawn = {"precision": precision, "views": crops or 1, "crops": CROPS if crops else "none", "seed": seed}
    made_by = maker(vision, settings) | drawn
    shape = (1 + crops, vision.patches, vision.width)
    with (
        writing(folder, made_by, shape, progress.say, records, replace) as writer,
        progress.steps(f"features ({name})", len(records)) as bar,
    ):
        # Only missing pictures are encoded, so an interrupted command can continue and pictures can be added.
        missing = [record for record in records if not writer.cache.has(record)]
        bar.advance(count=len(records) - len(missing))
        needed, free = len(missing) * picture_bytes(writer.cache.shape), free_bytes(folder)
        if needed > free:
            raise UserError(
                f"{folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; use another disk or "
                "fewer views"
            )
        for part, opened in open_batches(missing, vision.image_size, crops, seed):
            problems = [picture if isinstance(picture, str) else None for picture in opened]
            writer.add(part, problems, encode_raw(vision, opened, shape))
            bar.advance(count=len(part))
    cache = FeatureCache(folder)
    if all(cache.pictures[record.id].problem for record in records):
        problem = cache.pictures[records[0].id].problem
        raise UserError(f"none of the {len(records)} pictures can be opened; the first: {problem}")
    return cache


def open_cache(vision: FrozenVision, settings: RunSettings, folder: Path) -> FeatureCache:
    """Opens the cache that the user named; a `UserError` says if the settings require another encoder or crops."""
    cache, ours = FeatureCache(folder), maker(vision, settings)
    if settings.data.augment and cache.shape[0] == 1:
        raise UserError(
            f"data.augment=true, but {folder} contains only the plain pictures: set data.augment=false, or make a "
            "cache with `openblip2 features --views 4`"
        )
    # Without augmentation the crops are not read, so they need not match.
    ours |= {"crops": CROPS} if settings.data.augment else {}
    require_same_cache(cache, ours, "use the settings of the cache, or make one with these settings")
    return cache


def write_features(
    vision: FrozenVision,
    records: Sequence[Record],
    settings: RunSettings,
    folder: Path,
    precision: str,
    views: int,
    progress: Progress,
) -> dict[str, int]:
    """Reports how large a cache will be, makes it, and returns the numbers of pictures, bytes and skipped pictures.

    Args:
        views: 1 = the plain pictures only; more = as many random crops of each picture in addition.
    """
    if precision not in CACHE_DTYPES:
        raise UserError(f"precision {precision!r} is unknown: it must be one of {', '.join(CACHE_DTYPES)}")
    crops = 0 if views == 1 else views
    shape = (1 + crops, vision.patches, vision.width)
    size, free = len(records) * picture_bytes(shape), free_bytes(folder)
    kinds = "the plain picture" if not crops else f"the plain picture and {crops} views"
    count = number_of(len(records), "picture")
    progress.say(f"{count}, {kinds} of each: {shape[1]} tokens x {shape[2]} in {precision}")
    progress.say(f"{size / 1e9:.3g} GB in {folder}, of {free / 1e9:,.3g} GB free")
    cache = make_cache(vision, records, settings, folder, progress, "all", precision, crops)
    problems = [problem for record in records if (problem := cache.pictures[record.id].problem)]
    for number, problem in enumerate(problems, 1):
        progress.say(f"skipped ({number} so far): {problem}")
    return {"pictures": len(records), "bytes": size, "skipped": len(problems)}


def open_batches(
    records: Sequence[Record], size: int, crops: int = 0, seed: int = 0
) -> Iterator[tuple[Sequence[Record], list[Tensor | str]]]:
    """Opens pictures batch by batch: `[E, 3, S, S]` uint8 each, or one line with the reason if one cannot be opened.

    The next batch is opened while the caller works on this one.
    """
    open_one = partial(_open, size=size, crops=crops, seed=seed)
    # Two batches at most, because opened pictures take much memory, and more would not make the encoder faster.
    with ThreadPoolExecutor(THREADS) as threads:
        following = threads.map(open_one, records[:BATCH])
        for start in range(0, len(records), BATCH):
            opened, end = following, start + BATCH
            following = threads.map(open_one, records[end : end + BATCH])
            yield records[start:end], list(opened)


def _open(record: Record, size: int, crops: int, seed: int) -> Tensor | str:
    try:
        # Only every second crop is mirrored, because texts that say left or right need crops that are not mirrored.
        random_crops = [
            augment(record.image, size, crop_generator(seed, record.id, n), bool(n % 2))[None] for n in range(crops)
        ]
        return torch.cat([to_pixels([record.image], size), *random_crops])
    except UserError as problem:
        return str(problem)


def crop_generator(seed: int, picture: str, number: int) -> torch.Generator:
    """The random generator for a crop of a picture, which depends only on the seed, the picture's id and the number."""
    # By id and not by position, so that pictures can be added. 7 bytes, because torch's seeds are signed 64-bit.
    digest = hashlib.sha256(f"{seed} {number} {picture}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def encode_raw(vision: FrozenVision, opened: Sequence[Tensor | str], shape: tuple[int, int, int]) -> Tensor:
    """Features `[n, E, P, V]`, not whitened, of the n pictures that could be opened."""
    pixels = [picture for picture in opened if isinstance(picture, Tensor)]
    if not pixels:
        return torch.empty(0, *shape)
    # Whitening is applied when features are read (`whitened`), because it may be fitted to these features.
    whitening, vision.whitening = vision.whitening, None
    try:
        with torch.no_grad():
            features = [vision(part.to(device())) for part in torch.cat(pixels).split(BATCH)]
            return torch.cat(features).unflatten(0, (-1, shape[0]))
    finally:
        vision.whitening = whitening


def openable(
    records: Sequence[Record], size: int, advance: Callable[[int], object] = lambda count: None
) -> tuple[list[Record], list[str]]:
    """The records whose pictures can be opened, and one line with the reason for each of the others.

    Args:
        size: side in px to which pictures are resized, because only decoding shows whether a file is a picture.
        advance: called with the number of pictures that were just opened.
    """
    good: list[Record] = []
    problems: list[str] = []
    for part, opened in open_batches(records, size):
        problems += [picture for picture in opened if isinstance(picture, str)]
        good += [record for record, picture in zip(part, opened, strict=True) if isinstance(picture, Tensor)]
        advance(len(part))
    return good, problems


def encode_now(vision: FrozenVision, records: Sequence[Record]) -> Features:
    """Encodes plain pictures that can be opened, with the encoder's current weights and without a cache."""
    features = [
        vision(torch.cat([picture for picture in opened if isinstance(picture, Tensor)]).to(device())).cpu()
        for _, opened in open_batches(records, vision.image_size)
    ]
    return Features(list(records), torch.cat(features))


def whitened(vision: FrozenVision) -> Callable[[Tensor], Tensor]:
    """Returns the function that turns cached features into model inputs: the encoder's whitening, if it has one."""
    if vision.whitening is None:
        return lambda features: features
    # On the CPU, because the thread that makes batches reads the caches there.
    on_cpu = type(vision.whitening)(vision.whitening.mean.cpu(), vision.whitening.matrix.cpu())
    return on_cpu.forward


def maker(vision: FrozenVision, settings: RunSettings) -> dict[str, Any]:
    """The values that determine the features of plain pictures."""
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    return {
        "encoder": settings.vision.name,
        "image_size": vision.image_size,
        "encoder_layers": vision.layers,  # before the weights, because layers and precision change their digest
        "encoder_precision": dtypes.get(vision.dtype, str(vision.dtype)),
        "encoder_weights": weights_of(vision),
        "mean": list(vision.mean),
        "std": list(vision.std),
        "transform": PLAIN,
    }


def weights_of(vision: FrozenVision) -> str:
    """The first 16 digits of the SHA-256 of the encoder's weights and of the settings that affect its features."""
    # The weights and not the name, because a folder may be renamed and a hub name may refer to new weights.
    digest = hashlib.sha256(json.dumps(vision.shaping, sort_keys=True).encode())
    for name, weight in sorted(vision.encoder.state_dict().items()):
        digest.update(name.encode())  # so that equal tensors with different names give different digests
        digest.update(weight.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]  # 64 bits are enough to tell encoders apart


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
