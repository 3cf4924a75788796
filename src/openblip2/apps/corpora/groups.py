"""Groups of images that are nearly equal, and splits that do not divide a group.

N images; a thumbnail has 2 x 16 x 16 values.
"""

import hashlib
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from PIL import Image, ImageOps

from openblip2.data.batches import group_rows

# Two images are copies if their gray thumbnails correlate at least so much, and so do their insides unless both are of
# one shade. Without the second condition, all flags would be copies, and a coin and an apple. The limits were chosen by
# looking at pairs: above them are recoloured, mirrored and retouched copies.
_THUMBNAIL = 16
_ALIKE = 0.95
_INSIDE = 0.75
_PAPER = 8  # gray levels from white that still count as background
_SHADE = 10  # standard deviation in gray levels that still counts as one shade
_ROWS = 512  # thumbnails that are compared with all others at once; limits the memory


def thumbnail(picture: Image.Image) -> np.ndarray:
    """`[512]`: gray values of the image without margins, padded to a square, and then those inside its outline.

    Each half has mean 0 and length 1; the second half is 0 if the inside is of one shade.
    """
    gray = ImageOps.invert(picture.convert("L"))
    ink = gray.point([255 * (level > _PAPER) for level in range(256)])
    values, inked = (_square(each.crop(ink.getbbox())) for each in (gray, ink))
    inside = inked > 200
    spread = values[inside].std() if inside.any() else 0.0
    shades = np.where(inside, values - values[inside].mean(), 0.0) if spread > _SHADE else np.zeros_like(values)
    return np.concatenate([_unit(values - values.mean()), _unit(shades)])


def _square(content: Image.Image) -> np.ndarray:
    side = max(content.size)
    square = ImageOps.pad(content, (side, side), color=0)
    return np.asarray(square.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX), dtype=np.float64).ravel()


def _unit(values: np.ndarray) -> np.ndarray:
    return values / max(float(np.linalg.norm(values)), 1e-9)


def alike(thumbnails: np.ndarray) -> list[tuple[int, int]]:
    """The pairs i < j of thumbnails `[N, 512]` that are nearly equal, also if one is mirrored."""
    count = len(thumbnails)
    halves = thumbnails.reshape(count, 2, _THUMBNAIL, _THUMBNAIL)
    plain = np.abs(halves[:, 1]).sum(axis=(1, 2)) == 0  # of one shade
    pairs: list[tuple[int, int]] = []
    for first in range(0, count, _ROWS):
        rows = slice(first, first + _ROWS)
        found = np.zeros((len(halves[rows]), count), dtype=bool)
        for others in (halves, halves[:, :, :, ::-1]):
            whole, inside = (halves[rows, i].reshape(-1, 256) @ others[:, i].reshape(-1, 256).T for i in (0, 1))
            found |= (whole >= _ALIKE) & ((inside >= _INSIDE) | (plain[rows][:, None] & plain))
        pairs += [(first + int(i), int(j)) for i, j in np.argwhere(np.triu(found, k=first + 1))]
    return pairs


def joined(keys: Sequence[Iterable[Hashable]], pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """0..N-1 in groups: those that share a key or are a pair, directly or through others."""
    linked: list[list[Hashable]] = [list(own) for own in keys]
    for pair in pairs:
        for i in pair:
            linked[i].append(("pair", *pair))
    groups: dict[int, list[int]] = {}
    for i, first in enumerate(group_rows(linked)):
        groups.setdefault(first, []).append(i)
    return list(groups.values())


def drawn(groups: Sequence[Sequence[str]], share: float, seed: int) -> set[str]:
    """The ids of random groups, up to `share` of all ids. A group that is too large is left out."""
    room = round(share * sum(len(group) for group in groups))
    taken: set[str] = set()
    for group in sorted(groups, key=lambda ids: _lot(seed, ids[0])):
        if len(taken) + len(group) <= room:
            taken.update(group)
    return taken


def folds(names: Sequence[str], k: int, seed: int) -> list[int]:
    """The fold 0..k-1 of each image from the name of its group; a group is in one fold.

    Groups are assigned at random, large ones first, each to the smallest fold so far. If no group is very large, the
    sizes of the folds differ by one at most.
    """
    sizes = {name: 0 for name in names}
    for name in names:
        sizes[name] += 1
    filled = [0] * k
    fold: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], _lot(seed, name))):
        fold[name] = filled.index(min(filled))
        filled[fold[name]] += sizes[name]
    return [fold[name] for name in names]


def _lot(seed: int, name: str) -> bytes:
    """A random order that is the same on every machine and changes little if images are added."""
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()
