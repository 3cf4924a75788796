"""Captions of COCO, Flickr30K and NoCaps in the formats of Karpathy, LAVIS and COCO."""

import re
from collections.abc import Container
from pathlib import Path
from typing import Any

from openblip2.data.official.annotations import Pictures, each, identity, numbered, shown, text
from openblip2.data.records import Record
from openblip2.data.text import clean_caption
from openblip2.errors import UserError

# Karpathy and Li validate on 5,000 of COCO's validation images and test on 5,000. The other 30,504 are "restval", which
# are usually added to the training images: 113,287 in total.
SPLITS = {"train": ("train", "restval"), "restval": ("restval",), "val": ("val",), "test": ("test",)}
DOMAINS = ("in-domain", "near-domain", "out-domain")
COCO_NAME = re.compile(r"COCO_[a-z]+\d{4}_(\d{12})")

_PARTS = ("train", "restval", "val", "test")
_KARPATHY = '{"filename": "x.jpg", "split": "test", "sentences": [{"raw": "a cat"}, ...]}'
_LISTED = '{"image": "val2014/x.jpg", "caption": "a cat", or a list of them}'
_IMAGE = '{"id": 0, "file_name": "x.jpg"}'
_ANNOTATION = '{"image_id": 0, "caption": "a cat"}'


def karpathy(
    path: Path, data: dict[str, Any], pictures: Pictures, skipped: list[str], split: str | None
) -> list[Record]:
    """`dataset_coco.json` and `dataset_flickr30k.json`: the split and the sentences of each image.

    Args:
        path: of the file.
        data: its content.
        pictures: finds the images.
        skipped: gets a line for each entry that is left out.
        split: one of `SPLITS`.

    Source: https://cs.stanford.edu/people/karpathy/deepimagesent/

    Raises:
        UserError: `split` is unknown, or the file has another format.
    """
    parts = SPLITS.get(split or "")
    if parts is None:
        problem = "holds several splits" if split is None else f"unknown split {split!r}"
        raise UserError(f"{path}: {problem}: it must be one of {', '.join(SPLITS)} (train is with restval)")
    records: dict[str, Record] = {}

    def read(where: str, image: dict[str, Any]) -> None:
        part = image.get("split")
        if part not in _PARTS:
            raise UserError(f'"split" is {shown(part)}: it must be one of {", ".join(_PARTS)}')
        if part not in parts:
            return
        name = text(image.get("filename"), "file name", _KARPATHY)
        if "filepath" in image:  # COCO's alone
            name = text(image["filepath"], "file path", '"filepath": "val2014"') + "/" + name
        file = pictures.find(name)
        number = identity(image["cocoid"], '"cocoid"') if "cocoid" in image else _name_id(file)
        _new(number, records)
        sentences = image.get("sentences")
        if not isinstance(sentences, list):
            raise UserError(f'"sentences" is {shown(sentences)}: it must be {_KARPATHY}')
        raw = [sentence.get("raw") if isinstance(sentence, dict) else sentence for sentence in sentences]
        records[number] = Record(number, file, _captions(raw, f"{where}.sentences", skipped))

    each(numbered(path, "images", data["images"]), _KARPATHY, read, skipped)
    return list(records.values())


def listed(path: Path, data: object, pictures: Pictures, skipped: list[str]) -> list[Record]:
    """LAVIS's lists: one row per caption for training, and one row per image with all its captions for evaluation.

    The id of an image is taken from its file name, so that it is the same in all lists and in Karpathy's file: their
    `image_id` is "coco_328757", a running number, or missing.

    Args:
        path: of the file.
        data: its content.
        pictures: finds the images.
        skipped: gets a line for each entry that is left out.

    Source: https://github.com/salesforce/LAVIS, datasets coco and flickr30k
    """
    files: dict[str, Path] = {}
    captions: dict[str, list[str]] = {}

    def read(where: str, row: dict[str, Any]) -> None:
        file = pictures.find(row.get("image"))
        name = _name_id(file)
        if files.get(name, file) != file:
            raise UserError(f"id {name!r} is already used for {files[name]}: give each picture its own file name")
        given = row.get("caption")
        new = _captions(given if isinstance(given, list) else [given], f"{where}.caption", skipped)
        files[name] = file
        captions.setdefault(name, []).extend(new)

    each(numbered(path, "", data), _LISTED, read, skipped)
    return [Record(name, file, tuple(captions[name])) for name, file in files.items()]


def nocaps(path: Path, data: dict[str, Any], pictures: Pictures, skipped: list[str]) -> list[Record]:
    """NoCaps's file in COCO's format: a list of images and a list of captions, which a test split does not have.

    Args:
        path: of the file.
        data: its content.
        pictures: finds the images.
        skipped: gets a line for each entry that is left out.

    Source: https://nocaps.org/download. The page does not mention "domain", which the images in the file have.

    Raises:
        UserError: the file has another format.
    """
    images = list(numbered(path, "images", data["images"]))
    known = {str(image.get("id")) for _, image in images if isinstance(image, dict)}
    captions: dict[str, list[str]] = {}
    records: dict[str, Record] = {}

    def collect(_: str, annotation: dict[str, Any]) -> None:
        number = identity(annotation.get("image_id"), '"image_id"')
        if number not in known:
            raise UserError(f"a caption of image {number}, which is not among the images: give the id of one of them")
        captions.setdefault(number, []).append(_caption(annotation.get("caption")))

    def read(_: str, image: dict[str, Any]) -> None:
        number = identity(image.get("id"), '"id"')
        _new(number, records)
        file = pictures.find(image.get("file_name"))
        if "annotations" in data and number not in captions:
            raise UserError(f"image {number} has no caption: at least one {_ANNOTATION} is needed")
        domain = image.get("domain")
        if domain is not None and domain not in DOMAINS:
            raise UserError(f"unknown domain {shown(domain)}: it must be one of {', '.join(DOMAINS)}")
        facts = None if domain is None else {"domain": domain}
        records[number] = Record(number, file, tuple(captions.get(number, ())), facts=facts)

    if "annotations" in data:
        each(numbered(path, "annotations", data["annotations"]), _ANNOTATION, collect, skipped)
    each(images, _IMAGE, read, skipped)
    return list(records.values())


def _captions(given: list[Any], where: str, skipped: list[str]) -> tuple[str, ...]:
    """The captions that can be used; the others are skipped."""
    captions: list[str] = []
    for number, caption in enumerate(given):
        try:
            captions.append(_caption(caption))
        except UserError as problem:
            if len(given) == 1:
                raise
            skipped.append(f"{where}[{number}]: {problem}")
    if not captions:
        raise UserError("no usable caption: at least one is needed")
    return tuple(captions)


def _caption(value: object) -> str:
    caption = text(value, "caption", "a text of one word at least")
    if not clean_caption(caption):
        raise UserError(f"the caption {shown(caption)} is empty: at least one word is needed")
    return caption


def _new(name: str, records: Container[str]) -> None:
    if name in records:
        raise UserError(f"id {name!r} appears twice: each picture must appear once")


def _name_id(file: Path) -> str:
    """The number of a COCO image, or the file name of another image without its suffix."""
    found = COCO_NAME.fullmatch(file.stem)
    return str(int(found[1])) if found else file.stem
