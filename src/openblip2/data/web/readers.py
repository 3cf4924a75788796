"""Data sets as shards: which fields of a sample's .json say which picture it is, and what is written about it.

img2dataset writes the caption to .txt and "caption", the address to "url", and every column it was told to keep under
the column's own name. Which picture it is matters where one stands in a set many times (COCO has five captions a
picture, Visual Genome's pictures are COCO's in part): two samples of one picture are no negatives of each other.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from openblip2.data.web.tars import Sample
from openblip2.errors import UserError


class Reader(NamedTuple):
    """How the samples of one data set are read.

    Attributes:
        captions: fields that hold a caption where the sample has none in the usual places (`data/web/tars.py`).
        pictures: fields that say which picture it is, each with the collection whose numbers they are.
        address: what finds that number in a picture's url, and the collection.
        urls: fields with the picture's address.
    """

    captions: tuple[str, ...] = ()
    pictures: tuple[tuple[str, str], ...] = ()
    address: tuple[re.Pattern[str], str] | None = None
    urls: tuple[str, ...] = ("url",)


_COCO = re.compile(r"(?:train|val|test)20\d\d/(?:COCO_\w+?_)?0*(\d+)\.jpg")
_VG = re.compile(r"VG_100K(?:_2)?/(\d+)\.jpg")

# The upper-case names and the plural ones are those of the sets' own tables, for shards that kept them: COCO's and
# LAION's of links and SBU's. CC3M and CC12M have two columns without names.
READERS: Mapping[str, Reader] = {
    "web": Reader(),
    "coco": Reader(
        captions=("TEXT",),
        pictures=(("cocoid", "coco"), ("coco_id", "coco"), ("image_id", "coco")),
        address=(_COCO, "coco"),
        urls=("url", "URL", "coco_url"),
    ),
    "vg": Reader(
        captions=("phrase",),
        pictures=(("coco_id", "coco"), ("image_id", "vg")),
        address=(_VG, "vg"),
    ),
    "cc3m": Reader(),
    "cc12m": Reader(),
    "sbu": Reader(urls=("url", "image_url", "image_urls")),
    "laion": Reader(captions=("TEXT",), urls=("url", "URL")),
}


def reader(name: str) -> Reader:
    """The reader of that name.

    Raises:
        UserError: there is none.
    """
    if name not in READERS:
        raise UserError(f"unknown reader {name!r} of shards: it must be one of {', '.join(READERS)}")
    return READERS[name]


def captions(sample: Sample, how: Reader) -> tuple[str, ...]:
    """The captions of a sample; may be none."""
    if sample.captions:
        return sample.captions
    found = (sample.about.get(field) for field in how.captions)
    return next(((text,) for text in found if isinstance(text, str) and text.strip()), ())


def picture(sample: Sample, how: Reader, shard: str) -> str:
    """Which picture it is: "coco:139", or else its url, or else its shard and key."""
    for field, collection in how.pictures:
        number = sample.about.get(field)
        if isinstance(number, int | str) and not isinstance(number, bool) and str(number).strip():
            return f"{collection}:{str(number).lstrip('0') or 0}"
    urls = (sample.about.get(field) for field in how.urls)
    url = next((url for url in urls if isinstance(url, str) and url), None)
    if url is None:
        return f"{shard}:{sample.key}"
    match = how.address[0].search(url) if how.address else None
    return f"{how.address[1]}:{match[1]}" if match and how.address else url
