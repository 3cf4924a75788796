"""How many generated captions of drawn scenes are true."""

from collections.abc import Sequence
from typing import Any

from openblip2.apps.scenes.grammar import judge
from openblip2.data.records import Record


def caption_scores(captions: Sequence[str], records: Sequence[Record]) -> dict[str, Any]:
    """Shares of captions, in [0, 1], that are exactly one of the scene's captions, or have all objects right, all
    attributes right, both, and no wrong relation. None, except for the first, if an image has no facts.
    """
    count = len(records)
    exact = sum(caption in r.captions for caption, r in zip(captions, records, strict=True)) / count
    found: dict[str, Any] = {"n": count, "exact": exact}
    if any("objects" not in (r.facts or {}) for r in records):
        return found | dict.fromkeys(("objects", "attributes", "objects_and_attributes", "relations"))
    judged = [judge(caption, r.facts or {}) for caption, r in zip(captions, records, strict=True)]
    return found | {
        "objects": sum(j.objects for j in judged) / count,
        "attributes": sum(j.attributes for j in judged) / count,
        "objects_and_attributes": sum(j.objects and j.attributes for j in judged) / count,
        "relations": sum(j.relation is not False for j in judged) / count,
    }
