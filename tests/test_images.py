"""Pictures of every kind give the right pixels, and bad ones give one clear line."""

import io
import math
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_runs
from openblip2.data import images
from openblip2.data.batches import ImagePairs
from openblip2.data.images import Picture, augment, open_picture, random_crop, to_pixels
from openblip2.data.records import Question, Record
from openblip2.data.samples import Captions
from openblip2.errors import UserError

WIDTH, HEIGHT, SIDE = 13, 7, 5


@pytest.fixture
def noise() -> Image.Image:
    """An RGB picture in which no two pixels, rows or columns are equal."""
    values = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Image.fromarray(values)


def smooth(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom; blue is 128."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, np.full_like(down, 128)], axis=2).round().astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image)


# --- accepted pictures


def test_path_image_and_array_are_the_same_picture(noise: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "noise.png"
    noise.save(path)
    whole = pixels(noise)
    for picture in (
        path,
        str(path),
        noise,
        Image.open(path),
        whole,
        whole / 255,
        (whole / 255).astype(np.float32),
    ):
        opened = open_picture(picture)
        assert opened.mode == "RGB"
        assert np.array_equal(pixels(opened), whole)


def test_an_image_handed_in_is_left_as_it_is(noise: Image.Image) -> None:
    noise.info["comment"] = "mine"
    open_picture(noise).paste("red", (0, 0, WIDTH, HEIGHT))
    assert noise.info == {"comment": "mine"}
    assert len(noise.getcolors() or []) == WIDTH * HEIGHT


@pytest.mark.parametrize("kind", [np.uint8, np.float16, np.float32, np.float64])
def test_gray_arrays(kind: type) -> None:
    gray = np.array([[0, 51], [102, 255]])
    array = (gray / 255).astype(kind) if np.issubdtype(kind, np.floating) else gray.astype(kind)
    wanted = np.repeat(gray[:, :, None], 3, axis=2)
    assert np.array_equal(pixels(open_picture(array)), wanted)
    assert np.array_equal(pixels(open_picture(array[:, :, None])), wanted)


def test_arrays_in_any_memory_order(noise: Image.Image) -> None:
    turned = pixels(noise)[::-1, ::2]
    assert np.array_equal(pixels(open_picture(turned)), turned)
    assert np.array_equal(pixels(open_picture(np.asfortranarray(turned))), turned)


ALPHA = np.array([[0, 51, 255]], dtype=np.uint8)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa"])
def test_alpha_is_composited_on_white(mode: str) -> None:
    # On white, a black picture with this alpha has the value 255 - alpha.
    image = Image.merge("LA", [Image.new("L", (3, 1), 0), Image.fromarray(ALPHA)])
    if mode != "LA":
        image = image.convert("RGBA").convert(mode)
    assert image.mode == mode
    assert np.array_equal(pixels(open_picture(image)), np.repeat(255 - ALPHA[:, :, None], 3, axis=2))


def test_alpha_of_an_array() -> None:
    array = np.concatenate([np.zeros((1, 3, 3), np.uint8), ALPHA[:, :, None]], axis=2)
    wanted = np.repeat(255 - ALPHA[:, :, None], 3, axis=2)
    assert np.array_equal(pixels(open_picture(array)), wanted)
    assert np.array_equal(pixels(open_picture(array / 255)), wanted)


@pytest.mark.parametrize(
    ("mode", "colours", "key"),
    [
        ("P", [(200, 10, 10), (0, 0, 0)], 1),
        ("L", [80, 3], 3),
        ("RGB", [(9, 9, 90), (1, 2, 3)], (1, 2, 3)),
        ("1", [255, 0], 0),
    ],
)
def test_a_colour_declared_transparent_becomes_white(mode: str, colours: Any, key: Any, tmp_path: Path) -> None:
    image = Image.new("RGB" if mode == "P" else mode, (2, 1), colours[0])
    image.putpixel((1, 0), colours[1])
    if mode == "P":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
        key = image.getpixel((1, 0))
    image.save(tmp_path / "a.png", transparency=key)
    opened = open_picture(tmp_path / "a.png")
    solid = colours[0] if isinstance(colours[0], tuple) else (colours[0],) * 3
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [solid, (255, 255, 255)]


@pytest.mark.parametrize("name", ["gray.png", "gray.tif", "gray.ppm"])
def test_sixteen_bits_are_scaled_not_cut(name: str, tmp_path: Path) -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    assert np.array_equal(pixels(open_picture(tmp_path / name))[0, :, 1], [0, 1, 128, 255])


def test_cmyk_palette_and_bilevel_become_rgb(tmp_path: Path) -> None:
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    red.convert("P").save(tmp_path / "palette.gif")
    for picture in (
        tmp_path / "cmyk.jpg",
        tmp_path / "palette.gif",
        red.convert("YCbCr"),
        red.convert("CMYK"),
    ):
        opened = open_picture(picture)
        assert opened.mode == "RGB"
        assert np.abs(pixels(opened).astype(int) - [255, 0, 0]).max() <= 4
    Image.new("1", (2, 2), 1).save(tmp_path / "one.png")
    assert pixels(open_picture(tmp_path / "one.png")).min() == 255


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_the_first_frame_of_an_animation(suffix: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    with Image.open(tmp_path / f"a.{suffix}") as image:
        assert getattr(image, "n_frames", 1) == 3
    assert open_picture(tmp_path / f"a.{suffix}").getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, suffix: str, noise: Image.Image, tmp_path: Path) -> None:
    # The sides of the upright picture where EXIF 2.3 places the stored first row and first column.
    row, column = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    noise.save(tmp_path / f"a.{suffix}", exif=exif, **options)
    opened = open_picture(tmp_path / f"a.{suffix}")
    upright, stored = pixels(opened), pixels(noise)
    assert upright.shape == (stored.shape if row in ("top", "bottom") else (WIDTH, HEIGHT, 3))

    def corner(first: str, second: str) -> np.ndarray[Any, Any]:
        edges = {first, second}
        return upright[-1 if "bottom" in edges else 0, -1 if "right" in edges else 0]

    opposite = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}
    assert np.array_equal(corner(row, column), stored[0, 0])
    assert np.array_equal(corner(row, opposite[column]), stored[0, -1])
    assert np.array_equal(corner(opposite[row], column), stored[-1, 0])
    again = open_picture(opened)
    assert np.array_equal(pixels(again), upright), "turned once, not at every look"


def test_metadata_that_is_broken_does_not_cost_the_picture(noise: Image.Image, tmp_path: Path) -> None:
    noise.save(tmp_path / "a.png", exif=b"Exif\0\0garbage")
    with Image.open(tmp_path / "a.png") as image, pytest.raises(SyntaxError):
        image.getexif()
    assert np.array_equal(pixels(open_picture(tmp_path / "a.png")), pixels(noise))


# --- refused pictures


def refused(picture: Any, what: str) -> str:
    """The error message, which is the same for one picture, for a batch and for training."""
    messages = set()
    for look in (open_picture, lambda p: to_pixels([p], SIDE), lambda p: augment(p, SIDE, torch.Generator())):
        with pytest.raises(UserError) as caught:
            look(picture)
        messages.add(str(caught.value))
    (message,) = messages
    assert what in message
    assert tiny_runs.REMEDY.search(message), "says what would be right"
    assert "\n" not in message
    return message


def png(width: int, height: int, data: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("empty.jpg", b"", "is empty (0 bytes)"),
        ("text.png", b"I am a text file\n" * 50, "is not a picture"),
        ("page.jpg", b"<!DOCTYPE html><html>404</html>", "is not a picture"),
        ("zeros.jpg", bytes(4096), "is not a picture"),
        ("header.jpg", b"\xff\xd8\xff\xe0", "is not a picture"),
        (
            "script.eps",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
            "is not a picture",
        ),
        ("short.png", png(64, 64, b"\0" * 100), "is incomplete or damaged"),
        ("bomb.png", png(60_000, 60_000, b""), "too many pixels"),
        ("large.png", png(9_000, 8_000, b""), "9000 x 8000 pixels"),
    ],
)
def test_files_that_are_no_picture(name: str, content: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert refused(tmp_path / name, what).startswith(f"{tmp_path / name}: ")


def test_paths_without_a_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "gone.jpg", "does not exist").startswith(f"{tmp_path / 'gone.jpg'}: ")
    refused(str(tmp_path), "is not a file")
    refused("", "is not a file")
    refused("x" * 5000, "cannot be read (File name too long)")
    refused("a\0b.png", "does not exist")


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif", "webp", "tif", "ppm"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.9])
def test_truncated_files(suffix: str, share: float, tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = tmp_path / f"whole.{suffix}"
    image.save(path)
    open_picture(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert refused(path, "").startswith(f"{path}: ")


def test_a_bomb_is_found_before_it_is_unfolded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(png(100, 100, bytes(100 * 301)))

    def unfolded(_: Image.Image) -> None:
        raise AssertionError("decoded")

    open_picture(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 9_999)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", unfolded)
    refused(tmp_path / "a.png", "100 x 100 pixels: give a picture of 1 to 9,999 pixels")
    refused(Image.new("RGB", (100, 100)), "a PIL image: has 100 x 100 pixels")
    refused(np.zeros((100, 100, 3), np.uint8), "has 100 x 100 pixels")


def test_a_file_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: Image.Image) -> None:
    noise.save(tmp_path / "a.bmp")
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    refused(tmp_path / "a.bmp", "bytes: give a picture file of at most 100")


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (
            np.zeros((3, 8, 9), np.uint8),
            "[3, 8, 9]: is not a picture: give [H, W] or [H, W, 3], the channels last",
        ),
        (np.zeros((2, 8, 9, 3), np.uint8), "is not a picture"),
        (np.zeros((8, 9, 2), np.uint8), "is not a picture"),
        (np.zeros(8, np.uint8), "is not a picture"),
        (np.zeros((0, 9, 3), np.uint8), "is not a picture"),
        (np.zeros((8, 9, 3), np.int64), "array of int64, [8, 9, 3]: has an unsupported data type"),
        (np.zeros((8, 9, 3), bool), "has an unsupported data type"),
        (np.zeros((8, 9, 3), np.complex64), "has an unsupported data type"),
        (np.full((8, 9, 3), 255.0), "values outside [0, 1]"),
        (np.full((8, 9, 3), -0.01), "values outside [0, 1]"),
        (np.full((8, 9), np.nan), "values outside [0, 1]"),
        (np.array([["a", "b"]]), "has an unsupported data type"),
    ],
)
def test_arrays_that_are_no_picture(array: np.ndarray[Any, Any], what: str) -> None:
    refused(array, what)


@pytest.mark.parametrize("thing", [None, 3, b"bytes", [[0, 1]], torch.zeros(3, 8, 9)])
def test_things_that_are_no_picture(thing: Any) -> None:
    refused(thing, f"a {type(thing).__name__} is not a picture: give a path, a PIL image or a NumPy array [H, W, 3]")


def test_images_that_cannot_be_decoded(noise: Image.Image, tmp_path: Path) -> None:
    stream = io.BytesIO()
    noise.save(stream, "PNG")
    closed = Image.open(stream)
    stream.close()
    refused(closed, "is incomplete or damaged")
    refused(Image.new("RGB", (0, 3)), "has 0 x 3 pixels")
    refused(Image.new("I", (2, 2), 70_000), "gray values outside 0..65535")
    refused(Image.new("F", (2, 2), 7.5), "values outside [0, 1]")


def test_a_tiff_of_32_bits_is_never_black_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "scan.tif"
    Image.new("I", (4, 4), 200).save(path)
    refused(path, "has 32-bit gray values up to 200, so it may have 8 bits: save it with 8 bits")
    Image.new("I", (4, 4), 257 * 200).save(path)
    assert open_picture(path).getpixel((0, 0)) == (200, 200, 200)


# --- pixels


def test_pixels_are_a_bicubic_resize_of_each_picture(noise: Image.Image, tmp_path: Path) -> None:
    noise.save(tmp_path / "a.png")
    tall = Image.fromarray(pixels(noise).transpose(1, 0, 2).copy())
    batch: list[Picture] = [tmp_path / "a.png", tall]
    found = to_pixels(batch, SIDE)
    assert found.dtype == torch.uint8
    assert found.shape == (2, 3, SIDE, SIDE)
    assert found.is_contiguous()
    for row, image in zip(found, (noise, tall), strict=True):
        wanted = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        assert np.array_equal(row.permute(1, 2, 0).numpy(), wanted)
    assert torch.equal(to_pixels([tall], SIDE)[0], found[1]), "whoever else is in the batch"


def test_no_pictures_are_an_empty_batch() -> None:
    assert to_pixels([], SIDE).shape == (0, 3, SIDE, SIDE)
    assert to_pixels([], SIDE).dtype == torch.uint8


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path: Path) -> None:
    picture, path = smooth(1600, 1200), tmp_path / "large.jpg"
    picture.save(path, quality=95)
    assert open_picture(path, at_least=60).size == (200, 150)
    assert open_picture(path, at_least=5000).size == (1600, 1200)
    assert open_picture(path).size == (1600, 1200)
    plain = np.asarray(picture.resize((30, 30), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(to_pixels([path], 30)[0].permute(1, 2, 0).numpy() - plain).max() <= 3


def test_orientation_holds_for_a_jpeg_decoded_small(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth(1600, 1200).save(tmp_path / "a.jpg", exif=exif)
    found = to_pixels([tmp_path / "a.jpg"], 30)[0].int()
    assert found[0, 2, 15] < 40 < 215 < found[0, 27, 15], "stored left to right is upright top to bottom"
    assert found[1, 15, 2] > 215 > 40 > found[1, 15, 27], "stored top to bottom is upright right to left"


# --- the training transform


def seen_box(found: torch.Tensor, width: int, height: int) -> tuple[float, float, float, float, bool]:
    """Left, right, top, bottom of the visible part of `smooth(width, height)` as fractions; whether mirrored."""
    values = found.double().numpy() / 255
    size = values.shape[1]
    middle = slice(size // 4, 3 * size // 4)  # the edges are blurred by the resize
    centres = (np.arange(size) + 0.5)[middle] / size
    slope_x, start_x = np.polyfit(centres, values[0].mean(axis=0)[middle], 1)
    slope_y, start_y = np.polyfit(centres, values[1].mean(axis=1)[middle], 1)
    left, right = sorted((start_x, start_x + slope_x))
    return left, right, start_y, start_y + slope_y, slope_x < 0


def test_crops_are_of_the_papers_area_and_ratio_and_half_are_mirrored() -> None:
    width, height = 320, 240
    picture, generator = smooth(width, height), torch.Generator().manual_seed(3)
    boxes = [seen_box(augment(picture, 48, generator), width, height) for _ in range(300)]
    areas = [(right - left) * (bottom - top) for left, right, top, bottom, _ in boxes]
    ratios = [(right - left) / (bottom - top) * width / height for left, right, top, bottom, _ in boxes]
    assert min(areas) > 0.48
    assert max(areas) < 1.02
    assert min(ratios) > 0.73
    assert max(ratios) < 1.37
    # the whole range is used
    assert min(areas) < 0.54
    assert max(areas) > 0.93
    assert min(ratios) < 0.9
    assert max(ratios) > 1.25
    # the whole area is used: crops reach, or nearly reach, all four sides
    assert min(box[0] for box in boxes) < 0.02
    assert max(box[1] for box in boxes) > 0.98
    assert min(box[2] for box in boxes) < 0.02
    assert max(box[3] for box in boxes) > 0.98
    assert 0.42 < np.mean([box[4] for box in boxes]) < 0.58


TEXTS = {
    "caption": Record("r", Path("r.png"), ("a dog", "a dog, right of a cat")),
    "question": Record("r", Path("r.png"), ("a dog",), (Question("what is on the LEFT?", "cat", "open"),)),
    "answer": Record(
        "r", Path("r.png"), ("a dog",), (Question("where?", "at home", "open", ("at home", "left-hand")),)
    ),
    "none": Record("r", Path("r.png"), ("an upright cleft", "bright copyright")),
}


@pytest.mark.parametrize("where", TEXTS)
def test_a_picture_whose_texts_say_left_or_right_is_not_mirrored(where: str, tmp_path: Path) -> None:
    smooth(320, 240).save(tmp_path / "r.png")
    record = replace(TEXTS[where], image=tmp_path / "r.png")
    pairs = ImagePairs([record], Captions([record]), 1, 0, 48, pytest.fail)
    images = [pairs(number).images for number in range(30)]
    mirrored = [seen_box(image[0], 320, 240)[4] for image in images if image is not None]
    assert len(mirrored) == 30
    assert (sum(mirrored) > 5) == (where == "none")
    assert any(mirrored) == (where == "none")


def test_the_generator_decides() -> None:
    picture = smooth(40, 30)
    first, again = (augment(picture, SIDE, torch.Generator().manual_seed(5)) for _ in range(2))
    assert first.shape == (3, SIDE, SIDE)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(1)  # the global generator has no effect
    drawn = [augment(picture, SIDE, generator) for _ in range(6)]
    assert torch.equal(drawn[0], first)
    assert len({tuple(each.flatten().tolist()) for each in drawn}) > 1


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 50), (50, 1), (2, 3), (200, 10), (10, 200), (64, 64)])
def test_boxes_lie_in_the_picture_whatever_its_shape(width: int, height: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        left, top, right, bottom = random_crop(width, height, generator)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def test_a_long_picture_gives_its_middle() -> None:
    assert random_crop(300, 30, torch.Generator()) == (130, 0, 170, 30)
    assert random_crop(30, 300, torch.Generator()) == (0, 130, 30, 170)


def test_areas_and_ratios_are_drawn_as_torchvision_draws_them() -> None:
    # In a square, the first draw whose sides both fit is accepted; area and log-ratio are drawn uniformly.
    generator = torch.Generator().manual_seed(0)
    boxes = [random_crop(1000, 1000, generator) for _ in range(4000)]
    found = np.array([((r - x) * (b - y) / 1e6, math.log((r - x) / (b - y))) for x, y, r, b in boxes])
    random = np.random.default_rng(0)
    area = random.uniform(0.5, 1.0, 40_000)
    ratio = random.uniform(math.log(3 / 4), math.log(4 / 3), 40_000)
    fits = np.maximum(area * np.exp(ratio), area / np.exp(ratio)) <= 1
    for column, wanted in ((0, area[fits]), (1, ratio[fits])):
        quantiles = np.linspace(0.05, 0.95, 19)
        assert np.abs(np.quantile(found[:, column], quantiles) - np.quantile(wanted, quantiles)).max() < 0.02
