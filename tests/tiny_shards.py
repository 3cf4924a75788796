"""Small shards for tests: real picture files of one colour each, with captions that identify them."""

import io
from pathlib import Path
from typing import Any

from PIL import Image

from openblip2.data.web import write_stats
from openblip2.data.web.tars import Sample
from openblip2.data.web.write_shards import write_tar


def jpeg(colour: tuple[int, int, int], width: int = 20, height: int = 12) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "JPEG", quality=95)
    return file.getvalue()


def sample(shard: int, n: int, *captions: str, image: bytes | None = None, **about: Any) -> Sample:
    """Sample `n` of a shard, with a unique caption and a unique colour."""
    picture = jpeg((shard * 12 % 256, n * 12 % 256, 128)) if image is None else image
    return Sample(f"{shard:03}{n:06}", picture, "jpg", captions or (f"shard {shard} picture {n}",), about)


def write_shard(path: Path, samples: list[Sample], stats: bool = True) -> Path:
    with write_tar(path) as writer:
        for one in samples:
            writer.add(one)
    if stats:
        write_stats(path, len(samples))
    return path


def write_shards(folder: Path, counts: list[int], stats: bool = True) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return [
        write_shard(folder / f"{shard:05}.tar", [sample(shard, n) for n in range(count)], stats)
        for shard, count in enumerate(counts)
    ]
