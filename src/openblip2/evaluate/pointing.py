"""The pointing game (Zhang et al., 2016) on drawn scenes, in which the boxes of all objects are known.

For each kind of object, such as "a red cat", it tests whether the most relevant patch is in a box of such an object.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch

from openblip2.data.images import to_pixels
from openblip2.data.records import Record
from openblip2.errors import UserError
from openblip2.evaluate.result import Options, Result
from openblip2.hardware import computing
from openblip2.inference.attend import By, text_relevance
from openblip2.inference.inputs import GROUP
from openblip2.inference.matcher import Matcher
from openblip2.progress import Progress


def score_pointing(matcher: Matcher, records: Sequence[Record], options: Options, progress: Progress) -> Result:
    """How often the centre of the most relevant patch is in a box of the named object, compared with three guessers.

    chance: a random place. centre: always the centre of the image. best fixed place: the patch that is most often
    right in these images, which a guesser could not know in practice.

    Raises:
        UserError: the images have no boxes.
    """
    asked = [
        (record, _name(thing), thing["boxes"])
        for record in records
        for thing in (record.facts or {}).get("objects", [])
        if thing.get("boxes")
    ]
    if not asked:
        raise UserError("none of these pictures has boxes of its objects: give drawn scenes, runs/demo/data/test")
    by = cast(By, options.by or "itc")
    found: list[np.ndarray] = []
    vision = matcher.model.vision
    assert vision is not None
    device = next(matcher.model.parameters()).device
    with (
        progress.steps("pointing", len(asked), unit="texts") as bar,
        computing(matcher.model, matcher.settings.train.precision),
    ):
        for start in range(0, len(asked), GROUP):
            part = asked[start : start + GROUP]
            pixels = to_pixels([record.image for record, _, _ in part], vision.image_size).to(device)
            with torch.no_grad():
                features = vision(pixels)
            found.extend(text_relevance(matcher, features, [text for _, text, _ in part], by))
            bar.advance(count=len(part))
    progress.doing("scoring")
    side = vision.grid
    centres = [round((n + 0.5) / side, 4) for n in range(side)]  # of the patches along a side
    hits = np.array([[_inside(boxes, x, y) for y in centres for x in centres] for _, _, boxes in asked])
    brightest = [int(one.argmax()) for one in found]
    groups = [record.id for record, _, _ in asked]
    result = Result("pointing", len(records), options.seed)
    result.protocol |= {"maps": f"{by}, weight times gradient", "grid": side, "texts": len(asked)}
    result.add("pointing", hits[np.arange(len(asked)), brightest], groups)
    result.add("chance", hits.mean(axis=1), groups)
    result.add("centre", np.array([_inside(boxes, 0.5, 0.5) for _, _, boxes in asked]), groups)
    result.add("best fixed place", hits[:, hits.mean(axis=0).argmax()], groups)
    result.samples += [
        {"image": record.id, "text": text, "x": centres[n % side], "y": centres[n // side]}
        | {"boxes": boxes, "hit": bool(hits[row, n])}
        for row, ((record, text, boxes), n) in enumerate(zip(asked, brightest, strict=True))
    ]
    return result


def _name(thing: dict[str, str]) -> str:
    """The name of an object in the captions of drawn scenes: "a red cat"."""
    article = "an" if thing["colour"][0] in "aeiou" else "a"
    return f"{article} {thing['colour']} {thing['noun']}"


def _inside(boxes: Sequence[Sequence[float]], x: float, y: float) -> bool:
    """Boxes are left, top, right and bottom, in fractions of the image's sides."""
    return any(left <= x < right and top <= y < bottom for left, top, right, bottom in boxes)
