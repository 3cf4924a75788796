"""Pictures that are nearly equal belong together: groups of them, and splits that tear none apart.

N pictures; a thumbnail has 2 x 16 x 16 values.
"""

import hashlib
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from PIL import Image, ImageOps

# Two pictures are one if, as gray thumbnails of this side, they correlate this much or more, and so do their
# insides, where not both are of one shade: the first alone takes all flags, and a coin and an apple, for copies.
# Chosen by looking at the pairs: above them are recoloured, mirrored and retouched copies.
_THUMBNAIL = 16
_ALIKE = 0.95
_INSIDE = 0.75
_PAPER = 8  # gray levels from white that still count as paper
_SHADE = 10  # gray levels of spread (a standard deviation) that still count as one shade
_ROWS = 512  # thumbnails that are compared with all others at once: bounds the memory


def thumbnail(picture: Image.Image) -> np.ndarray:
    """`[512]`: gray values of what is not paper, padded to a square, and again those that lie wholly inside.

    Either half is of mean 0 and length 1; the second is 0 where the inside is of one shade.
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
    """The pairs i < j of thumbnails `[N, 512]` that are nearly equal, one of them perhaps mirrored."""
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
    """0..N-1 in groups: together is what shares a key or is a pair, directly or through others."""
    parent = list(range(len(keys)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[Hashable, int] = {}
    shared = [(first.setdefault(key, i), i) for i, own in enumerate(keys) for key in own]
    for pair in [*shared, *pairs]:
        low, high = sorted(root(i) for i in pair)
        parent[high] = low
    groups: dict[int, list[int]] = {}
    for i in range(len(keys)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def drawn(groups: Sequence[Sequence[str]], share: float, seed: int) -> set[str]:
    """The ids of groups drawn at random up to `share` of all ids; a group too large is passed over."""
    room = round(share * sum(len(group) for group in groups))
    taken: set[str] = set()
    for group in sorted(groups, key=lambda ids: _lot(seed, ids[0])):
        if len(taken) + len(group) <= room:
            taken.update(group)
    return taken


def folds(names: Sequence[str], k: int, seed: int) -> list[int]:
    """For pictures whose groups are called `names`: the fold 0..k-1 of each, one and the same for a whole group.

    Drawn from `seed`, large groups first, each into the fold that is smallest so far: where no group is very
    large, the folds' sizes differ by one.
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
    """A random order that is the same on every machine and little changed where pictures are added."""
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()
