"""The pointing game (Zhang et al., 2016) on drawn scenes, whose objects' boxes are known.

For each kind of object in a picture, "a red cat", the place that the text's score depends on most: is it in a box?
"""

from collections.abc import Sequence

import numpy as np
import torch

from openblip2.attend import By, text_relevance
from openblip2.data.images import to_pixels
from openblip2.data.records import Record
from openblip2.errors import UserError
from openblip2.hardware import computing
from openblip2.inputs import GROUP
from openblip2.matcher import Matcher
from openblip2.progress import Progress
from openblip2.score.result import Result

Boxes = Sequence[Sequence[float]]  # left, top, right, bottom as shares of the picture's sides


def score_pointing(matcher: Matcher, records: Sequence[Record], by: By, progress: Progress, seed: int = 0) -> Result:
    """How often the brightest patch's middle lies in a box of what the text names, beside guessers without eyes.

    chance: any place at random. centre: the picture's middle, each time. best fixed place: the one patch that would
    have been right most often in these very pictures, which nobody could know.

    Raises:
        UserError: pictures of which no boxes are known.
    """
    asked = [(record, _text(thing), thing["boxes"]) for record in records for thing in _things(record)]
    if not asked:
        raise UserError("none of these pictures has boxes of its objects: give drawn scenes, runs/demo/data/test")
    found: list[np.ndarray] = []
    vision = matcher.model.vision
    assert vision is not None
    place = next(matcher.model.parameters()).device
    with (
        progress.steps("pointing", len(asked), unit="texts") as bar,
        computing(matcher.model, matcher.settings.train.precision),
    ):
        for start in range(0, len(asked), GROUP):
            part = asked[start : start + GROUP]
            pixels = to_pixels([record.image for record, _, _ in part], vision.image_size).to(place)
            with torch.no_grad():
                features = vision(pixels)
            found.extend(text_relevance(matcher, features, [text for _, text, _ in part], by))
            bar.advance(count=len(part))
    progress.doing("scoring")
    side = vision.grid
    hits = np.array([[_inside(boxes, x, y) for y in _middles(side) for x in _middles(side)] for _, _, boxes in asked])
    places = [int(one.argmax()) for one in found]
    groups = [record.id for record, _, _ in asked]
    result = Result("pointing", len(records), seed)
    result.protocol |= {"maps": f"{by}, weight times gradient", "grid": side, "texts": len(asked)}
    result.add("pointing", hits[np.arange(len(asked)), places], groups)
    result.add("chance", hits.mean(axis=1), groups)
    result.add("centre", np.array([_inside(boxes, 0.5, 0.5) for _, _, boxes in asked]), groups)
    result.add("best fixed place", hits[:, hits.mean(axis=0).argmax()], groups)
    result.samples += [
        {"image": record.id, "text": text, "x": _middles(side)[n % side], "y": _middles(side)[n // side]}
        | {"boxes": boxes, "hit": bool(hits[row, n])}
        for row, ((record, text, boxes), n) in enumerate(zip(asked, places, strict=True))
    ]
    return result


def _text(thing: dict[str, str]) -> str:
    """What an object is called in the captions of drawn scenes: "a red cat"."""
    article = "an" if thing["colour"][0] in "aeiou" else "a"
    return f"{article} {thing['colour']} {thing['noun']}"


def _things(record: Record) -> list:
    return [thing for thing in (record.facts or {}).get("objects", []) if thing.get("boxes")]


def _inside(boxes: Boxes, x: float, y: float) -> bool:
    return any(left <= x < right and top <= y < bottom for left, top, right, bottom in boxes)


def _middles(side: int) -> list[float]:
    return [round((n + 0.5) / side, 4) for n in range(side)]
