"""The report's pictures: captions, answers, retrieval; right ones and wrong ones in the order they come."""

import base64
from collections.abc import Mapping, Sequence
from functools import lru_cache
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from openblip2.data.images import open_picture
from openblip2.data.scenes.grammar import judge
from openblip2.evaluate.vqa import normalise

FIRST = 9  # shown at once; the others unfold
SIDE, SMALL = 160, 112  # px: longer side of a thumbnail

Example = Mapping[str, Any]


def shown_captions(examples: Sequence[Example]) -> str:
    """Picture, caption, the fullest reference, and what of the caption is true, where that is known."""
    verdicts = [_verdict(example) for example in examples]
    told = "Only sentences are known of these pictures: compare for yourself. "
    if all(example["facts"] is not None for example in examples):
        right = sum(all(mark for _, mark in verdict) for verdict in verdicts)
        told = f"{right} of these {len(examples)} are right in everything. "
    items = [
        _shot(
            example["image"],
            example["references"][0],
            f'<p class="said">{_said(example["caption"])}</p>'
            f'<p class="small soft">Reference: {escape(example["references"][0])}</p>'
            f'<ul class="tags">{"".join(_tag(*mark) for mark in verdict)}</ul>',
        )
        for example, verdict in zip(examples, verdicts, strict=True)
    ]
    return _unchosen(len(examples), told) + _shots(items)


def shown_answers(examples: Sequence[Example]) -> str:
    """Picture, question, answer, reference, right or wrong."""
    marks = [normalise(example["answer"]) == normalise(example["reference"]) for example in examples]
    items = [
        _shot(
            example["image"],
            f"what is asked about: {example['question']}",
            f'<p>{escape(example["question"])}</p><p class="said">{_said(example["answer"])}</p>'
            f'<p class="small soft">Reference: {escape(example["reference"])}</p>'
            f'<ul class="tags">{_tag("right" if mark else "wrong", mark)}</ul>',
        )
        for example, mark in zip(examples, marks, strict=True)
    ]
    return _unchosen(len(examples), f"{sum(marks)} of these {len(examples)} are right. ") + _shots(items)


def shown_retrieval(examples: Mapping[str, Sequence[Example]]) -> str:
    """The three best captions of each picture, and pictures of each caption, after re-ranking."""
    captions = [_found_captions(example) for example in examples["image_to_text"]]
    pictures = [_found_pictures(example) for example in examples["text_to_image"]]
    return (
        f"<h3>From picture to caption</h3>{_unchosen(len(captions), 'The three best captions of all. ')}"
        f"{_shots(captions)}"
        f"<h3>From caption to picture</h3>{_unchosen(len(pictures), 'The three best pictures of all. ')}"
        f"{_shots(pictures)}"
    )


def shown_maps(examples: Sequence[Example]) -> str:
    """Pictures, what the score of a text depends on in each, and where the queries look."""
    told = "Brighter is more: what the text's score depends on, and where all queries look on average. "
    items = [
        f'<li class="tall"><p class="said">{escape(example["text"])}</p><div class="row">'
        + "".join(
            _ranked(example[kind], f"{example['text']}, {label}", "", label)
            for kind, label in (("image", "picture"), ("relevance", "for the text"), ("attention", "all queries"))
        )
        + "</div></li>"
        for example in examples
    ]
    return _unchosen(len(items), told) + _shots(items)


def _found_captions(example: Example) -> str:
    right, hit = example["reference"], ' <span class="tag good">✓ right</span>'
    found = "".join(f"<li>{escape(text)}{hit if text == right else ''}</li>" for text in example["found"])
    text = f'<ol class="found">{found}</ol>'
    if right not in example["found"]:
        text += f'<p class="small"><span class="tag bad">✗ not among them</span> {escape(right)}</p>'
    return _shot(example["image"], right, text)


def _found_pictures(example: Example) -> str:
    text = example["text"]
    figures = [
        _ranked(image, caption, *(("good", f"✓ {place}. right") if caption == text else ("", f"{place}.")))
        for place, (image, caption) in enumerate(zip(example["found"], example["captions"], strict=True), 1)
    ]
    if text not in example["captions"]:
        figures.append(_ranked(example["image"], text, "bad", "✗ missed"))
    return f'<li class="tall"><p class="said">{escape(text)}</p><div class="row">{"".join(figures)}</div></li>'


def _ranked(image: str, caption: str, kind: str, label: str) -> str:
    return f'<figure class="{kind}">{_img(image, caption, SMALL)}<figcaption>{label}</figcaption></figure>'


def _verdict(example: Example) -> list[tuple[str, bool]]:
    """What to say of a caption, and whether it is right."""
    exact = [("one of its own captions", True)] if example["caption"] in example["references"] else []
    if example["facts"] is None:
        return exact
    judged = judge(example["caption"], example["facts"])
    relation = [] if judged.relation is None else [("relation", judged.relation)]
    return [*exact, ("objects", judged.objects), ("attributes", judged.attributes), *relation]


def _tag(text: str, right: bool) -> str:
    kind, mark = ("good", "✓ ") if right else ("bad", "✗ ")
    return f'<li class="{kind}">{mark}{escape(text)}</li>'


def _said(text: str) -> str:
    return f"\u201c{escape(text)}\u201d" if text.strip() else '<span class="soft">(nothing)</span>'


def _unchosen(count: int, told: str) -> str:
    return f'<p class="soft">{told}The first {count} in their order, not chosen.</p>'


def _shots(items: Sequence[str]) -> str:
    first, more = items[:FIRST], items[FIRST:]
    shown = f'<ul class="shots">{"".join(first)}</ul>'
    if not more:
        return shown
    return f'{shown}<details><summary>{len(more)} more</summary><ul class="shots">{"".join(more)}</ul></details>'


def _shot(image: str, alt: str, text: str) -> str:
    return f'<li>{_img(image, alt, SIDE)}<div class="text">{text}</div></li>'


def _img(image: str, alt: str, side: int) -> str:
    url, width, height = _thumbnail(image, side)
    return f'<img src="{url}" width="{width}" height="{height}" loading="lazy" alt="Picture: {escape(alt)}">'


@lru_cache(maxsize=512)
def _thumbnail(image: str, side: int) -> tuple[str, int, int]:
    """A data URL, as PNG or JPEG, whichever is smaller; width and height in px."""
    picture = open_picture(Path(image))
    picture.thumbnail((side, side))
    forms = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85, "optimize": True})):
        stream = BytesIO()
        picture.save(stream, kind, **options)
        forms.append((len(stream.getvalue()), kind, stream.getvalue()))
    _, kind, data = min(forms)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", picture.width, picture.height
