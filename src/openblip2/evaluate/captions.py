"""Generated captions of drawn scenes, held to what the scenes truly show."""

from collections.abc import Sequence
from typing import Any

from openblip2.data.records import Record
from openblip2.data.scenes.grammar import judge


def caption_scores(captions: Sequence[str], records: Sequence[Record]) -> dict[str, Any]:
    """Shares of captions, in [0, 1]: exactly one of the scene's own, every object right, every attribute right,
    both, and no relation stated wrongly. None where a picture comes without facts to hold a caption to.
    """
    count = len(records)
    exact = sum(caption in r.captions for caption, r in zip(captions, records, strict=True)) / count
    found: dict[str, Any] = {"n": count, "exact": exact}
    if any("objects" not in (r.facts or {}) for r in records):
        return found | {
            "objects": None,
            "attributes": None,
            "objects_and_attributes": None,
            "relations": None,
        }
    judged = [judge(caption, r.facts or {}) for caption, r in zip(captions, records, strict=True)]
    return found | {
        "objects": sum(j.objects for j in judged) / count,
        "attributes": sum(j.attributes for j in judged) / count,
        "objects_and_attributes": sum(j.objects and j.attributes for j in judged) / count,
        "relations": sum(j.relation is not False for j in judged) / count,
    }
