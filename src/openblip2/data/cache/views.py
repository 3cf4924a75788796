"""Pictures as a feature cache takes them: the plain one, and random views of it that are always the same ones.

Shapes: E entries a picture has (the plain one and its views), P patch tokens, V encoder width, S side in px.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from openblip2.data.images import CROP_AREA, CROP_RATIO, augment, to_pixels
from openblip2.data.records import Record
from openblip2.errors import UserError

BATCH = 32  # pictures that are opened at once, and that the encoder sees at once
THREADS = min(8, os.cpu_count() or 1)  # that open pictures while the encoder is at those before
PLAIN = "resized to a square, bicubic"
CROPS = f"crops of {CROP_AREA} of the area, ratio {CROP_RATIO[0]:.2f} to {CROP_RATIO[1]:.2f}, half of them mirrored"


def open_pictures(records: Sequence[Record], size: int, views: int, seed: int) -> Iterator[list[Tensor | str]]:
    """Batches of pictures in order, each `[E, 3, S, S]` uint8 (plain, then `views` random ones), or what is wrong.

    The next batch is opened while the caller is busy with this one.
    """
    with ThreadPoolExecutor(THREADS) as threads:
        ahead: deque[list[Future[Tensor]]] = deque()
        for start in range(0, len(records), BATCH):
            part = records[start : start + BATCH]
            ahead.append([threads.submit(_draw, record, size, views, seed) for record in part])
            if len(ahead) > 1:
                yield [_result(future) for future in ahead.popleft()]
        while ahead:
            yield [_result(future) for future in ahead.popleft()]


def encode_pictures(encode: Callable[[Tensor], Tensor], pictures: Sequence[Tensor]) -> Iterator[Tensor]:
    """Features `[n, P, V]` of pictures of E entries each, `BATCH` entries at once."""
    for part in torch.cat(list(pictures)).split(BATCH) if pictures else ():
        yield encode(part)


def view_generator(seed: int, picture: str, view: int) -> torch.Generator:
    """What a view is drawn with: the same however the build went, and for every picture another."""
    digest = hashlib.sha256(f"{seed} {view} {picture}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _draw(record: Record, size: int, views: int, seed: int) -> Tensor:
    plain = to_pixels([record.image], size)
    drawn = [augment(record.image, size, view_generator(seed, record.id, view)) for view in range(views)]
    return torch.cat([plain, torch.stack(drawn)]) if drawn else plain


def _result(future: Future[Tensor]) -> Tensor | str:
    try:
        return future.result()
    except UserError as problem:
        return str(problem)
