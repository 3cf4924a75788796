"""The loader of shards compared with plain Pillow, on one core: JPEGs of 256 px, decoded and resized."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from openblip2.apps.bench.measure import NAIVE, OURS, Case
from openblip2.data.web.mixture import count_parts, read_parts
from openblip2.data.web.pairs import ShardPairs
from openblip2.data.web.shard_files import write_stats
from openblip2.data.web.tars import Sample
from openblip2.data.web.write_shards import write_tar

SIDE = 256  # px, as img2dataset stores pictures by default
SIZE = 224  # px, what the paper trains on
PICTURES = 128


def loader_case(folder: Path) -> Case:
    """A batch from a shard in `folder`: ours in one thread; the naive way has the files in memory.

    There is no random crop, because each way would draw another one. A crop takes as much time as it saves by making
    the image smaller.
    """
    files = {f"{n:09}": _jpeg(n) for n in range(PICTURES)}
    shard = folder / "00000.tar"
    with write_tar(shard) as writer:
        for key, file in files.items():
            writer.add(Sample(key, file, "jpg", (f"picture {key}",), {"url": key, "width": SIDE, "height": SIDE}))
    write_stats(shard, writer.count)
    parts = count_parts(read_parts(str(shard)), print)
    loader = ShardPairs(parts, PICTURES, 0, SIZE, 1, print, augmented=False, threads=1)
    order = [name.rpartition(": ")[2].removesuffix(".jpg") for name in loader(0).names or ()]

    def ours() -> Tensor:
        images = loader(0).images
        assert images is not None
        return images

    def naive() -> Tensor:
        return torch.stack([_plain(files[key]) for key in order])

    difference = (ours().float() - naive().float()).abs().max().item() / 255
    return Case("loader", {OURS: ours, NAIVE: naive}, PICTURES, "pictures", difference, 0.0)


def _plain(file: bytes) -> Tensor:
    image = Image.open(io.BytesIO(file)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _jpeg(seed: int) -> bytes:
    """Smooth shapes with a little noise: about as many bytes as a photograph."""
    draw = np.random.default_rng(seed)
    shapes = Image.fromarray(draw.integers(0, 256, (24, 24, 3), np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(shapes).astype(np.int16) + draw.integers(-9, 10, (SIDE, SIDE, 3))
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()
