"""The parts of a joined batch are disjoint and together equal the batch of one process, with the same crops."""

import itertools
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import Tensor

from openblip2.data.batches import FeaturePairs, ImagePairs, PairBatch
from openblip2.data.features import StoredFeatures
from openblip2.data.records import Question, Record
from openblip2.data.samples import Answers, Captions, Instructions
from openblip2.distributed.collectives import part_of

SIDE, VIEWS = 12, 3


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("pictures")
    found = []
    random = torch.Generator().manual_seed(0)
    for n in range(19):
        path = folder / f"{n}.png"
        pixels = torch.randint(256, (16, 20, 3), generator=random, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
        if n in (3, 7):
            path.write_bytes(b"no picture")
        questions = (Question("is it?", "yes", "yes/no", ("yes", "no", "no")), Question("what?", "cat", "open"))
        found.append(Record(f"p{n}", path, (f"a {n}", f"the {n % 4}", "same"), questions))
    return found


class Stored:
    """Features that contain the numbers of their picture and view: `[B, 1, 2]`."""

    views = VIEWS

    def __init__(self, records: list[Record]) -> None:
        self.records = records

    def take(self, numbers: list[int], views: list[int] | None) -> Tensor:
        rows = [[n, view] for n, view in zip(numbers, [0] * len(numbers) if views is None else views, strict=True)]
        return torch.tensor(rows).view(-1, 1, 2)


def make(kind: str, records: list[Record], batch: int, part: tuple[int, int], said: list[str]) -> Any:
    if kind == "images":
        return ImagePairs(records, Captions(records), batch, 5, SIDE, said.append, part=part)
    templated = Instructions(records, ("short:", "an image of"), ("{}", "Q: {} A:"), 0.5)
    samples = {"answers": Answers(records), "instructions": templated}.get(kind, Captions(records))
    return FeaturePairs(cast(StoredFeatures, Stored(records)), samples, batch, 5, augmented=kind == "views", part=part)


def rows_of(batch: PairBatch) -> list[str]:
    """Each pair as one text that contains all its parts."""
    seen = batch.images if batch.images is not None else batch.features
    assert seen is not None
    assert batch.names is not None
    questions = batch.questions or [""] * len(batch.captions)
    columns = (batch.names, batch.captions, questions, batch.ids.tolist(), seen.flatten(1).tolist())
    return [json.dumps(row) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["images", "features", "views", "answers", "instructions"])
def test_the_parts_are_the_batch(records: list[Record], kind: str, world: int) -> None:
    batch = 8 if world == 4 else 7
    said: list[str] = []
    whole = make(kind, records, batch, (0, 1), [])
    parts = [make(kind, records, batch, (place, world), said) for place in range(world)]
    empty = 0
    for number in (0, 1, 5, 2):  # also out of order, because a batch depends only on its number
        expected = rows_of(whole(number))
        found = [rows_of(part(number)) for part in parts]
        assert list(itertools.chain(*found)) == expected
        assert rows_of(parts[-1](number, joined=True)) == expected
        empty += sum(not rows for rows in found)
        if kind != "images":
            assert {len(rows) for rows in found} <= {batch // world, batch // world + 1}
    assert bool(said) == (kind == "images")
    assert (empty > 0) == (world == 8)  # a process may have no rows, and then its batch is empty


def test_a_bad_picture_changes_nothing_for_the_others(records: list[Record], tmp_path: Path) -> None:
    """Their crops and captions do not depend on whether another picture can be opened."""
    mended = list(records)
    for n in (3, 7):
        path = tmp_path / f"{n}.png"
        Image.new("RGB", (20, 16)).save(path)
        mended[n] = Record(f"p{n}", path, records[n].captions, records[n].questions)
    for number in range(4):
        found = rows_of(make("images", records, 8, (0, 1), [])(number))
        all_rows = rows_of(make("images", mended, 8, (0, 1), [])(number))
        bad = [row for row in all_rows if json.loads(row)[0] in ("p3", "p7")]
        assert found == [row for row in all_rows if row not in bad]


@pytest.mark.parametrize(("count", "world"), [(8, 3), (7, 7), (5, 8), (1680, 16), (0, 2)])
def test_part_of(count: int, world: int) -> None:
    parts = [range(count)[part_of(count, place, world)] for place in range(world)]
    assert list(itertools.chain(*parts)) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
