"""Opens images of any kind with limits, turns them upright, puts them on white, and resizes or crops them.

S  image side in px      B  images
"""

from __future__ import annotations

import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, features

from openblip2.errors import UserError, number_of, refuse_lfs_pointer

if TYPE_CHECKING:
    import torch


class PictureFile(NamedTuple):
    """The content of an image file, and its name in error messages."""

    content: bytes
    name: str


RESIZE = "to a square, bicubic (Pillow, reducing_gap=2), without keeping the aspect"  # see `_resized`
Picture = str | Path | PictureFile | Image.Image | np.ndarray[Any, Any]

# Checked with the header, before anything is decoded: a few kilobytes can decode to gigabytes.
MAX_PIXELS = 64 * 2**20
MAX_BYTES = 64 * 2**20

THREADS = min(8, os.cpu_count() or 1)  # number of threads that open images in parallel

# Pillow reads more formats (documents, PostScript with an external program), which are not safe for files from the web.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

# By suffix: files of these formats, and pictures that have to be converted first.
PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".jfi", ".pjpeg", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp"}
    | {".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif"}
)
UNREADABLE = frozenset(
    {".heic", ".heif", ".hif", ".jxl", ".jp2", ".psd", ".svg", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf"}
    | {".orf", ".rw2", ".pef", ".srw"}
)
if not features.check("avif"):
    PICTURE_SUFFIXES, UNREADABLE = PICTURE_SUFFIXES - {".avif"}, UNREADABLE | {".avif"}

# The training transform of the paper: torchvision's RandomResizedCrop(scale=(0.5, 1)), otherwise with its defaults.
CROP_AREA = (0.5, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
CROP_TRIES = 10


def left_out(names: Iterable[str]) -> list[str]:
    """One line for each image format among the files that has to be converted before it can be read."""
    counts = Counter(suffix for name in names if (suffix := os.path.splitext(name)[1].lower()) in UNREADABLE)
    return [
        f"{number_of(count, f'{suffix} file', 'is')} left out; convert {'it' if count == 1 else 'them'} to JPEG"
        for suffix, count in sorted(counts.items())
    ]


def open_picture(picture: Picture, at_least: int | None = None) -> Image.Image:
    """An upright RGB image with 8 bits per channel.

    Transparent images are put on white, the EXIF orientation is applied, and 16 bits are scaled to 8. The first frame
    of an animation is used.

    Args:
        picture: a path, a `PictureFile`, a PIL image (which is not changed), or an array: `[H, W]` gray, `[H, W, 1]`,
            `[H, W, 3]` RGB or `[H, W, 4]` RGBA, of uint8 in 0..255 or floats in [0, 1].
        at_least: None = the original size. With a number of px, a JPEG may be decoded at a fraction of its size that
            leaves as many in both directions, which is faster.

    Raises:
        UserError: the file is missing, empty, larger than `MAX_BYTES`, truncated or not an image; it has more than
            `MAX_PIXELS` pixels; the array has another shape or type.
    """
    if isinstance(picture, str | Path):
        return _from_file(Path(picture), at_least)
    if isinstance(picture, PictureFile):
        return _from_bytes(picture.content, picture.name, at_least)
    if isinstance(picture, Image.Image):
        name = str(picture.filename) if isinstance(picture, ImageFile.ImageFile) else "a PIL image"
        _check_pixels(picture.width, picture.height, name)
        return _decoded(picture, name)
    if isinstance(picture, np.ndarray):
        return _from_array(picture)
    raise UserError(f"a {type(picture).__name__} is not a picture: give a path, a PIL image or a NumPy array [H, W, 3]")


def to_pixels(pictures: Sequence[Picture], size: int) -> torch.Tensor:
    """The images for an encoder, uint8 `[B, 3, S, S]` in 0..255.

    Each is resized to S x S px, bicubic, without keeping the aspect ratio, as in the paper's evaluation. A JPEG is
    decoded at a fraction of its size if that leaves at least 2S px in both directions.

    Raises:
        UserError: as `open_picture`.
    """
    import torch

    arrays = [_resized(open_picture(picture, 2 * size), size) for picture in pictures]
    stacked = np.stack(arrays) if arrays else np.zeros((0, size, size, 3), np.uint8)
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()


def augment(picture: Picture, size: int, generator: torch.Generator, mirror: bool | None = None) -> torch.Tensor:
    """The training transform of the paper for one image, uint8 `[3, S, S]` in 0..255.

    A random crop with 0.5 to 1.0 of the area and an aspect ratio of 3/4 to 4/3, resized to S x S px (bicubic), and
    flipped horizontally with probability 0.5. The same state of `generator` gives the same pixels.

    Args:
        size: S.
        mirror: whether to flip it; None = at random, as in the paper.

    Raises:
        UserError: as `open_picture`.
    """
    import torch

    image = open_picture(picture, 3 * size)
    image = image.crop(random_crop(image.width, image.height, generator))
    flipped = torch.rand((), generator=generator).item() < 0.5
    if flipped if mirror is None else mirror:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(_resized(image, size)).permute(2, 0, 1).contiguous()


def random_crop(width: int, height: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """A random box (left, top, right, bottom) in px with `CROP_AREA` of the image's area and aspect ratio `CROP_RATIO`.

    If none of ten boxes fits (a very long image), it is the largest central box with an allowed ratio.
    Source: torchvision's `RandomResizedCrop.get_params`.
    """
    import torch

    for _ in range(CROP_TRIES):
        area, ratio, across, down = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        area = width * height * (CROP_AREA[0] + area * (CROP_AREA[1] - CROP_AREA[0]))
        ratio = CROP_RATIO[0] * (CROP_RATIO[1] / CROP_RATIO[0]) ** ratio  # uniform in its logarithm
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < CROP_RATIO[0]:
        h = round(width / CROP_RATIO[0])
    elif width / height > CROP_RATIO[1]:
        w = round(height * CROP_RATIO[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _resized(image: Image.Image, size: int) -> np.ndarray[Any, Any]:
    """uint8 `[S, S, 3]`."""
    # reducing_gap: an image of more than 4S px is first averaged over blocks, which is much faster.
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=2.0))


def _from_file(path: Path, at_least: int | None) -> Image.Image:
    if re.match("https?:/", str(path)):
        raise UserError(f"{path}: is a URL, and pictures are not downloaded; give the path of a downloaded file")
    try:
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise UserError(f"{path}: {what}: give the path of a picture")
        bytes_ = path.stat().st_size
        if bytes_ == 0:
            raise UserError(f"{path}: is empty (0 bytes): give a picture file")
        if bytes_ > MAX_BYTES:
            raise UserError(f"{path}: has {bytes_:,} bytes: give a picture file of at most {MAX_BYTES:,}")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): give a readable picture") from error
    return _from_bytes(content, str(path), at_least)


def _from_bytes(content: bytes, name: str, at_least: int | None) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{name}: has too many pixels: give a picture of at most {MAX_PIXELS:,}") from error
    except Exception as error:  # Pillow's parsers raise exceptions of any type
        refuse_lfs_pointer(name, content[:64])
        if left_out([name]):
            raise UserError(f"{name}: this picture format is not supported; convert it to JPEG") from error
        raise UserError(f"{name}: is not a picture in a known format: give {', '.join(FORMATS)}") from error
    _check_pixels(image.width, image.height, name)
    if at_least is not None:
        image.draft(None, (at_least, at_least))
    return _decoded(image, name)


def _check_pixels(width: int, height: int, name: str) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise UserError(f"{name}: has {width} x {height} pixels: give a picture of 1 to {MAX_PIXELS:,} pixels")


def _decoded(image: Image.Image, name: str) -> Image.Image:
    """A new upright image of mode RGB, without metadata that could be applied a second time."""
    try:
        image.load()
        orientation = 1
        with suppress(Exception):  # of any type: an image with broken metadata is not rotated
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        image = _rgb(image, name)
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise exceptions of any type
        raise UserError(f"{name}: is incomplete or damaged ({error}): give the complete file") from error
    image.info.clear()
    # Only the orientation is given back, because `exif_transpose` fails for other metadata that are broken.
    image.getexif()[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray, in Pillow's modes with 16 or 32 bits
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{name}: has gray values outside 0..65535: save it with 8 or 16 bits")
        if image.mode == "I" and 0 < values.max() < 256:  # as 16 bits it would be black
            raise UserError(
                f"{name}: has 32-bit gray values up to {values.max()}, so it may have 8 bits: save it with 8 bits"
            )
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    elif image.mode == "F":
        image = Image.fromarray(_to_bytes(np.asarray(image), name))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    name = f"an array of {array.dtype}, {list(array.shape)}"
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise UserError(f"{name}: is not a picture: give [H, W] or [H, W, 3], the channels last")
    _check_pixels(array.shape[1], array.shape[0], name)
    if np.issubdtype(array.dtype, np.floating):
        array = _to_bytes(array, name)
    elif array.dtype != np.uint8:
        raise UserError(f"{name}: has an unsupported data type: give uint8 in 0..255 or floats in [0, 1]")
    return _rgb(Image.fromarray(np.ascontiguousarray(array)), name)


def _to_bytes(values: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    if not (values.min() >= 0 and values.max() <= 1):  # written so that NaN is refused, too
        raise UserError(f"{name}: has values outside [0, 1]: give floats in [0, 1], or uint8 in 0..255")
    return np.rint(values.astype(np.float32) * 255).astype(np.uint8)
