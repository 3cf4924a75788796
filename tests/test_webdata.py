import io
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from openblip2.data.batches import PairBatch
from openblip2.data.web.mixture import (
    Part,
    count_parts,
    hold_out_samples,
    kept_parts,
    names_shards,
    read_parts,
    write_parts,
)
from openblip2.data.web.pairs import ShardPairs
from openblip2.data.web.tars import read_tar
from openblip2.errors import UserError
from tiny_shards import jpeg, sample, write_shard, write_shards

SIDE = 10


def pairs(
    data: str | Path,
    batch: int = 4,
    lanes: int = 2,
    problems: list[str] | None = None,
    held: int = 0,
    augmented: bool = True,
    part: tuple[int, int] = (0, 1),
) -> ShardPairs:
    told: list[str] = [] if problems is None else problems
    parts = hold_out_samples(count_parts(read_parts(str(data)), told.append), held)
    return ShardPairs(parts, batch, seed=5, size=SIDE, lanes=lanes, problem=told.append, augmented=augmented, part=part)


def walk(loader: ShardPairs, batches: int, start: int = 0) -> list[PairBatch]:
    return [loader(number) for number in range(start, start + batches)]


def same(first: PairBatch, second: PairBatch) -> bool:
    assert first.images is not None
    assert second.images is not None
    return (
        first.captions == second.captions
        and first.names == second.names
        and torch.equal(first.images, second.images)
        and torch.equal(first.ids, second.ids)
    )


def seen(batches: list[PairBatch]) -> Counter[str]:
    return Counter(caption for batch in batches for caption in batch.captions)


def every(counts: list[int]) -> Counter[str]:
    return Counter(f"shard {shard} picture {n}" for shard, count in enumerate(counts) for n in range(count))


def test_a_sample_whose_captions_say_left_is_not_mirrored(tmp_path: Path) -> None:
    ramp = Image.new("RGB", (64, 64))
    ramp.putdata([(4 * (n % 64), 0, 0) for n in range(64 * 64)])
    file = io.BytesIO()
    ramp.save(file, "PNG")
    texts = [("a dog left of a cat", "a dog"), ("a dog", "a cat")]
    write_shard(tmp_path / "0.tar", [sample(0, n, *two, image=file.getvalue()) for n, two in enumerate(texts)])
    mirrored = {"000000000": 0, "000000001": 0}
    for batch in walk(pairs(tmp_path, batch=2, lanes=1), 20):
        assert batch.images is not None
        assert batch.names is not None
        for name, image in zip(batch.names, batch.images, strict=True):
            mirrored[name.split(": ")[1].split(".")[0]] += int(image[0, 5, 0]) > int(image[0, 5, -1])
    assert mirrored["000000000"] == 0
    assert 3 < mirrored["000000001"] < 17


def test_every_sample_once_an_epoch_with_its_own_picture(tmp_path: Path) -> None:
    counts = [7, 4, 9, 4]
    write_shards(tmp_path, counts)
    batches = walk(pairs(tmp_path, augmented=False), 12)
    assert seen(batches[:6]) == seen(batches[6:]) == every(counts)
    assert [batch.captions for batch in batches[:6]] != [batch.captions for batch in batches[6:]]
    for batch in batches:
        assert batch.images is not None
        assert (batch.images.dtype, list(batch.images.shape)) == (torch.uint8, [4, 3, SIDE, SIDE])
        for caption, image in zip(batch.captions, batch.images, strict=True):
            _, shard, _, n = caption.split()
            expected = torch.tensor([int(shard) * 12, int(n) * 12, 128.0])
            torch.testing.assert_close(image.float().mean(dim=(1, 2)), expected, atol=6.0, rtol=0)


def test_a_batch_needs_no_predecessor(tmp_path: Path) -> None:
    write_shards(tmp_path, [7, 4, 9, 4])
    walked = walk(pairs(tmp_path), 15)
    for number in (14, 3, 9):
        assert same(pairs(tmp_path)(number), walked[number])


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_share_out_the_joined_batch(tmp_path: Path, world: int) -> None:
    write_shards(tmp_path, [8] * 8, stats=False)
    joined = walk(pairs(tmp_path, batch=8, lanes=4), 9)
    for number, batch in enumerate(joined):
        found: list[PairBatch] = []
        for rank in range(world):
            found.append(pairs(tmp_path, batch=8, lanes=4, part=(rank, world))(number))
        assert [name for part in found for name in part.names or ()] == batch.names
        images = torch.cat([part.images for part in found if part.images is not None])
        assert batch.images is not None
        assert torch.equal(images, batch.images)


def test_processes_open_no_shard_twice(tmp_path: Path) -> None:
    write_shards(tmp_path, [8] * 8)
    shards: list[set[str]] = []
    for rank in range(2):
        batches = walk(pairs(tmp_path, batch=8, lanes=4, part=(rank, 2)), 8)
        shards.append({name.split(": ")[0] for batch in batches for name in batch.names or ()})
    assert [len(mine) for mine in shards] == [4, 4]
    assert not shards[0] & shards[1]


def test_few_shards_are_open_at_once(tmp_path: Path) -> None:
    write_shards(tmp_path, [5] * 20)
    loader = pairs(tmp_path, batch=3, lanes=3)
    most = 0
    for number in range(60):
        loader(number)
        most = max(most, len(loader.shards._open))
    assert most <= 9  # the current and the next shards of three lanes


def test_a_remote_set_reads_as_a_local_one(tmp_path: Path) -> None:
    import fsspec

    for path in write_shards(tmp_path, [5, 6, 4]):
        for file in (path, path.with_name(path.stem + "_stats.json")):
            with fsspec.open(f"memory://set/{file.name}", "wb") as copy:
                copy.write(file.read_bytes())  # pyright: ignore[reportAttributeAccessIssue]
    remote, local = pairs("memory://set/{00000..00002}.tar"), pairs(f"{tmp_path}/{{00000..00002}}.tar")
    # Another name gives another shuffle seed, but an epoch still has the same samples.
    assert seen(walk(remote, 15)) == seen(walk(local, 15)) == Counter({k: 4 for k in every([5, 6, 4])})


def png_of(width: int, height: int) -> bytes:
    """Returns a PNG of less than a kilobyte whose header declares a picture that would decode to gigabytes."""
    chunks = b"\x89PNG\r\n\x1a\n"
    for kind, content in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(1000))),
        (b"IEND", b""),
    ):
        chunks += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return chunks


def test_bad_samples_are_named_once_and_stood_in_for(tmp_path: Path) -> None:
    bad = {1: b"no picture", 4: png_of(30_000, 30_000), 6: jpeg((9, 9, 9))[:-200]}
    write_shard(tmp_path / "0.tar", [sample(0, n, image=bad.get(n)) for n in range(8)])
    silent = sample(1, 3)._replace(captions=())
    mute = sample(1, 5, "...!")  # only punctuation, so it is empty after cleaning
    write_shard(tmp_path / "1.tar", [silent if n == 3 else mute if n == 5 else sample(1, n) for n in range(8)])
    problems: list[str] = []
    batches = walk(pairs(tmp_path, problems=problems), 8)
    assert all(len(batch.captions) == 4 for batch in batches)
    good = every([8, 8])
    for shard, n in ((0, 1), (0, 4), (0, 6), (1, 3), (1, 5)):
        del good[f"shard {shard} picture {n}"]
    for epoch in (seen(batches[:4]), seen(batches[4:])):
        assert epoch.keys() == good.keys()
        assert epoch.total() == 16
    assert len(problems) == 5
    assert sum("too many pixels" in line for line in problems) == 1
    assert sum("has no caption" in line for line in problems) == 2
    for number in range(8):
        assert same(pairs(tmp_path)(number), batches[number])


def test_shards_that_are_cut_off_or_gone_later(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [6, 6, 6, 6])
    parts = count_parts(read_parts(str(tmp_path)), pytest.fail)
    shards[1].unlink()
    whole = shards[2].read_bytes()
    shards[2].write_bytes(whole[: len(whole) // 2])
    left = {s.captions[0] for s in read_tar(str(shards[2]), lambda line: None)}
    assert 0 < len(left) < 6
    problems: list[str] = []

    def loader() -> ShardPairs:
        return ShardPairs(parts, 4, seed=1, size=SIDE, lanes=2, problem=problems.append)

    batches = walk(loader(), 12)
    assert all(len(batch.captions) == 4 for batch in batches)
    for epoch in (batches[:6], batches[6:]):
        assert seen(epoch).keys() == every([6, 0, 0, 6]).keys() - every([0, 6]).keys() | left | every([6]).keys()
    assert sum("cannot be opened" in line and "6 samples are skipped" in line for line in problems) == 1
    assert sum("cut off" in line for line in problems) == 1
    for number in (3, 7, 11):
        assert same(loader()(number), batches[number])
    for path in shards:
        path.unlink(missing_ok=True)
    with pytest.raises(UserError, match="no usable sample is left"):
        loader()(0)


def test_one_caption_is_drawn_each_time(tmp_path: Path) -> None:
    scored = [{"text": "A good one.", "score": 0.9}, {"text": "a fair one", "score": 0.8}]
    two = [sample(0, n, "A good one.", "a fair one", captions=scored) for n in range(8)]
    write_shard(tmp_path / "0.tar", two)
    drawn = seen(walk(pairs(tmp_path), 40))
    assert drawn.keys() == {"a good one", "a fair one"}
    assert 50 < drawn["a good one"] < 110


def test_a_mixture_by_weights_from_a_file(tmp_path: Path) -> None:
    for name, count in (("coco", 5), ("web", 50)):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "0.tar", [sample(0, n, f"{name} {n}") for n in range(count)])
    file = tmp_path / "mix.toml"
    file.write_text('[[part]]\nshards = "coco/{0..0}.tar"\nweight = 1\n[[part]]\nshards = "web"\nweight = 3\n')
    assert names_shards(str(file))
    drawn = seen(walk(pairs(file, batch=8, lanes=4), 20))
    share = Counter(caption.split()[0] for caption in drawn.elements())
    assert share == {"coco": 40, "web": 120}
    assert {count for caption, count in drawn.items() if caption.startswith("coco")} == {8}  # all samples equally often


def test_a_picture_that_stands_in_two_sets_is_one(tmp_path: Path) -> None:
    address = "images/train2014/COCO_train2014_000000000139.jpg"
    told: list[tuple[str, dict[str, Any]]] = [("coco", {"URL": address}), ("vg", {"image_id": 7, "coco_id": 139})]
    for name, about in told:
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "0.tar", [sample(0, 0, f"a {name} caption", **about)])
    write_shard(tmp_path / "0.tar", [sample(0, 0, "another", url="elsewhere/1.jpg")])
    file = tmp_path / "mix.toml"
    rows = [f'[[part]]\nshards = "{name}/0.tar"\n' for name in ("coco", "vg")]
    file.write_text("".join(rows) + '[[part]]\nshards = "0.tar"\n')
    batch = pairs(file, batch=3, lanes=1)(0)
    ids = dict(zip(batch.captions, batch.ids.tolist(), strict=True))
    assert ids["a coco caption"] == ids["a vg caption"] != ids["another"]


def test_the_first_samples_are_held_out(tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 7, 6])
    drawn = seen(walk(pairs(tmp_path, batch=11, held=5), 2))
    assert set(every([3, 7, 6])) - set(drawn) == {*every([3]), "shard 1 picture 0", "shard 1 picture 1"}
    assert set(drawn.values()) == {2}


def test_counts_are_kept_with_the_run(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "set", [3, 4], stats=False)
    parts = read_parts(str(tmp_path / "set"))
    counted = hold_out_samples(count_parts(parts, pytest.fail), 2)
    assert (counted[0].counts, counted[0].held_out, counted[0].samples) == ((3, 4), (2, 0), 5)
    assert kept_parts(tmp_path, parts) is None
    write_parts(counted, tmp_path)
    shards[0].unlink()  # a shard that disappears later does not change the order
    assert kept_parts(tmp_path, parts) == counted
    with pytest.raises(UserError, match="other shards"):
        kept_parts(tmp_path, [Part("x", 1, ("x.tar",))])
    (tmp_path / "shards.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        kept_parts(tmp_path, parts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mixture"),
        ("part = 3", "mixture"),
        ("[[part]]\nshards = 3", r"part\.0\.shards: .*string"),
        ('[[part]]\nshards = "a.tar"\nweights = 3', r"part\.0\.weights: .*not permitted"),
        ('[[part]]\nshards = "a.tar"\nweight = 0.5', "whole number"),
        ("[[part", "not TOML"),
    ],
)
def test_mixtures_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mix.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_parts(str(tmp_path / "mix.toml"))


def test_shards_without_a_sample(tmp_path: Path) -> None:
    problems: list[str] = []
    with pytest.raises(UserError, match="none of its 1 shards"):
        count_parts(read_parts(str(tmp_path / "none.tar")), problems.append)
    assert "cannot be opened" in problems[0]
