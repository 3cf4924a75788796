"""easy-VQA 1.0: images of one shape in one colour with questions, from the Python package of that name.

`--data easy-vqa` reads it, and the demo's full world is trained and scored on it, too.
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from openblip2.apps.scenes.grammar import Facts, Thing, sentences
from openblip2.data.images import open_picture
from openblip2.data.records import Question, Record
from openblip2.data.sources import Source
from openblip2.errors import UserError, one_line

NAME = "easy-vqa"
# The exact colours of easy-VQA.
_INKS = {
    (0, 0, 0): "black",
    (0, 0, 255): "blue",
    (165, 42, 42): "brown",
    (128, 128, 128): "gray",
    (0, 255, 0): "green",
    (255, 0, 0): "red",
    (0, 128, 128): "teal",
    (255, 255, 0): "yellow",
}


def read_easy_vqa(split: Literal["train", "test"]) -> Source:
    """`easy_vqa_records`, with the training questions for baselines without images."""
    records = easy_vqa_records(split)
    return Source(records, [], NAME, known=records if split == "train" else easy_vqa_records("train"))


def easy_vqa_records(split: Literal["train", "test"]) -> list[Record]:
    """The records of one split: images of 64 x 64 px, and the official questions.

    4,000 images with 38,575 questions for training, 1,000 with 9,673 for testing. The images stay in the
    installed package (MIT licence). It has no captions: they are generated from shape and colour with the grammar
    of the drawn scenes, and so are the facts (without size and place). Shape and colour are read from the pixels,
    because the questions about a tenth of the images do not name both. The kind of a question is "yes/no", or
    "open" if the question asks for a shape or a colour.

    Source: https://github.com/vzhou842/easy-VQA

    Raises:
        UserError: the package is missing or its files are not as published.
    """
    right = "install it: pip install easy-vqa==1.0"
    found = importlib.util.find_spec("easy_vqa")
    if found is None or not found.submodule_search_locations:
        raise UserError(f"easy-VQA: the package easy_vqa is missing; {right}")
    folder = Path(found.submodule_search_locations[0]) / "data" / split
    asked: dict[int, list[Question]] = {}
    try:
        for text, answer, image in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
            kind = "yes/no" if answer in ("yes", "no") else "open"
            asked.setdefault(image, []).append(Question(text, answer, kind))
        return [_easy_vqa_record(folder, split, image, asked[image]) for image in sorted(asked)]
    except UserError as problem:
        raise UserError(f"{problem}; {right}") from problem
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: is not easy-VQA's data ({one_line(error)}); {right}") from error


def _easy_vqa_record(folder: Path, split: str, image: int, asked: Sequence[Question]) -> Record:
    path = folder / "images" / f"{image}.png"
    shape, colour = _shape_and_colour(path)
    thing: Thing = {"noun": shape, "colour": colour, "size": None, "place": None, "number": 1}
    facts: Facts = {"kind": "one", "objects": [thing], "relation": None}
    return Record(f"easy-vqa-{split}-{image}", path, tuple(sentences(facts)), tuple(asked), dict(facts))


def _shape_and_colour(path: Path) -> tuple[str, str]:
    """Shape and colour in an image, from its ink and the share of the bounding box that the ink fills."""
    picture = open_picture(path)
    colours = {colour for _, colour in picture.getcolors(picture.width * picture.height) or []}
    inks = [ink for ink in _INKS if ink in colours]
    if len(inks) != 1:
        raise UserError(f"{path}: has {len(inks)} of easy-VQA's colours instead of one")
    inked = (np.asarray(picture) == inks[0]).all(axis=-1)
    widths = inked.sum(axis=1)[inked.any(axis=1)]
    width = inked.any(axis=0).sum()
    filled = widths.sum() / (len(widths) * width)
    # Large complete rectangles, triangles and circles fill 1, 1/2 and pi/4 of the box. The smallest triangle (8 px)
    # fills 0.68, and so do some circles at the image's edge, but only a triangle's last line is as wide as the box.
    triangle = filled < 0.75 and widths[-1] == width
    return "rectangle" if filled > 0.95 else "triangle" if triangle else "circle", _INKS[inks[0]]
