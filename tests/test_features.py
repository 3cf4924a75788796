"""The feature cache: what is read is what was written, and whatever is not as it should be is named in one line."""

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny_runs
from openblip2.config import RunSettings, change
from openblip2.data.batches import FeaturePairs
from openblip2.data.cache import features as features_module
from openblip2.data.cache import shards
from openblip2.data.cache.features import StoredFeatures, build_cache, find_records, remove_cache
from openblip2.data.cache.folder import Cache
from openblip2.data.cache.shards import Layout
from openblip2.data.cache.views import CROPS, view_generator
from openblip2.data.images import augment, to_pixels
from openblip2.data.records import Record, read_records
from openblip2.data.samples import Captions
from openblip2.errors import UserError
from openblip2.model.build import build_vision
from openblip2.presets import preset
from openblip2.progress import Progress
from openblip2.train.checkpoint import read_tensors
from openblip2.train.encode import encode_all, maker, open_cache
from openblip2.train.recipes import train_stage
from test_cli import Said, call

P, V, S = 3, 10, 8
MADE_BY = {"encoder": "a", "weights": "w", "image_size": S, "precision": "fp16", "seed": 5}


def encode(pixels: Tensor) -> Tensor:
    """`[n, P, V]`: like a vision transformer's, a wide channel, a shifted one, and each picture its own."""
    flat = pixels.flatten(1).float() / 255
    weights = torch.randn(flat.shape[1], P * V, generator=torch.Generator().manual_seed(0)) / 4
    values = (flat @ weights).unflatten(1, (P, V))
    values[..., 4] *= 40
    values[..., 7] += 9
    return values


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    """21 noisy pictures; number 5 is none."""
    random = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    found: list[Record] = []
    for n in range(21):
        path = tmp_path / "data" / f"{n}.png"
        Image.fromarray(random.integers(0, 255, (43, 31, 3), dtype=np.uint8)).save(path)
        found.append(Record(f"r{n}", path, ("a", "b c")))
    found[5].image.write_bytes(b"no picture")
    return found


@pytest.fixture(autouse=True, scope="module")
def _small_shards() -> Iterator[None]:
    """21 pictures are six shards, the last of one picture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_PICTURES", 4)
        yield


def build(records: Sequence[Record], folder: Path, precision: str = "fp16", views: int = 0, **options: Any) -> Cache:
    made_by = {**MADE_BY, "precision": precision, **options.pop("made_by", {})}
    layout = Layout(precision, P, V, views + 1)
    run = options.pop("encode", encode)
    return build_cache(records, run, S, folder, made_by, layout, lambda count: None, **options)


def truth(records: Sequence[Record]) -> Tensor:
    """Features of plain pictures in fp32, without a cache."""
    return encode(to_pixels([record.image for record in records if record.id != "r5"], S))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(("precision", "digits"), [("fp16", 11), ("bf16", 8)])
def test_floats_come_back_to_the_last_digit(records: list[Record], tmp_path: Path, precision: str, digits: int) -> None:
    cache, wanted = build(records, tmp_path / "cache", precision), truth(records)
    found = cache.read(list(range(20)))
    assert found.dtype == shards.STORED[precision]
    assert torch.equal(found, wanted.to(found.dtype))
    assert ((found.float() - wanted).abs() <= wanted.abs() * 2.0**-digits).all()
    assert list(cache.rows) == [r.id for r in records if r.id != "r5"]


def test_int8_is_off_by_half_a_step(records: list[Record], tmp_path: Path) -> None:
    cache, wanted = build(records, tmp_path / "cache", "int8"), truth(records)
    found = cache.read(list(range(20))).float()
    for number in range(6):  # as any program reads the file
        stored = load_file(tmp_path / "cache" / f"shard-{number:05}.safetensors")
        part = slice(*[sum(len(cache._shards[n]._checksums) for n in range(m)) for m in (number, number + 1)])
        exact = stored["centre"] + stored["width"] * stored["scales"] * stored["values"].float()
        assert ((exact - wanted[part]).abs() <= stored["scales"] * stored["width"] / 2 * 1.001).all()
        assert ((exact - found[part]).abs() <= exact.abs() * 2.0**-8).all()
        assert int(stored["values"].abs().amax(-1).min()) == 127
    spread = wanted - wanted.mean((0, 1))
    assert (
        0 < ((found - wanted).square().mean((0, 1)) / spread.square().mean((0, 1))).sqrt().max() < 0.03
    )  # of it 0.02 bf16's


def test_int8_of_channels_that_rest_or_are_zero() -> None:
    for features in (torch.zeros(2, P, V), torch.full((2, P, V), 3.0)):
        tables = shards.channel_tables(features)
        assert torch.allclose(shards.dequantise(*shards.quantise(features, *tables), *tables), features)
    tables = shards.channel_tables(torch.zeros(2, P, V))
    later = torch.randn(2, P, V)
    assert torch.allclose(shards.dequantise(*shards.quantise(later, *tables), *tables), later, atol=0.02)


def test_a_value_that_fits_no_fp16_is_named(records: list[Record], tmp_path: Path) -> None:
    def huge(pixels: Tensor) -> Tensor:
        return encode(pixels) * 1e5

    with pytest.raises(UserError, match=r"cannot be kept in fp16; .*--precision bf16"):
        build(records, tmp_path / "cache", encode=huge)
    assert build(records, tmp_path / "bf16", "bf16", encode=huge).read([0]).isfinite().all()
    for precision in ("bf16", "int8"):
        with pytest.raises(UserError, match=r"cannot be kept|not finite"):
            build(records, tmp_path / f"nan-{precision}", precision, encode=lambda pixels: encode(pixels) * torch.nan)


def test_any_rows_in_any_order_are_those_of_the_whole(records: list[Record], tmp_path: Path) -> None:
    for precision in ("fp16", "bf16", "int8"):
        folder = tmp_path / precision
        whole = build(records, folder, precision).read(range(20))
        rows = [19, 0, 7, 7, 12, 3]
        assert torch.equal(Cache(folder).read(rows), whole[rows])
        assert Cache(folder).read([]).shape == (0, P, V)


def test_a_read_touches_its_own_rows_only(records: list[Record], tmp_path: Path) -> None:
    """A neighbour in the same shard is broken, and that does not show until it is read."""
    cache = build(records, tmp_path / "cache")
    spoil(tmp_path / "cache" / "shard-00000.safetensors", shards.HEADER + 2 * P * V + 3)
    cache.read([0, 2, 3])
    with pytest.raises(UserError, match=r"shard-00000\.safetensors: is damaged \(row 1 of 4\)"):
        cache.read([1])


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_an_interrupted_build_goes_on_and_ends_alike(records: list[Record], tmp_path: Path, precision: str) -> None:
    build(records, tmp_path / "whole", precision, views=2)
    calls = 0

    def dies(pixels: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return encode(pixels)

    with pytest.raises(KeyboardInterrupt):
        build(records, tmp_path / "parts", precision, views=2, encode=dies)
    assert [name for name in files(tmp_path / "parts") if "shard" in name] == [
        f"shard-0000{n}.{kind}" for n in (0, 1) for kind in ("json", "safetensors")
    ]
    with pytest.raises(UserError, match=r"is unfinished \(2 of 6 shards are there\)"):
        Cache(tmp_path / "parts")
    calls = 10
    build(records, tmp_path / "parts", precision, views=2, encode=dies)
    assert calls == 14  # two shards were there
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_views_are_random_crops_that_do_not_change(records: list[Record], tmp_path: Path) -> None:
    cache = build(records, tmp_path / "cache", "fp16", views=3)
    stored, problems = find_records(records, cache, lambda features: features)
    assert stored.views == 3
    assert problems == [cache.skipped["r5"]]
    assert str(records[5].image) in problems[0]
    plain = truth(records).half()
    assert torch.equal(stored.take(range(20)), plain)
    numbers, views = [17, 2, 2], [1, 0, 2]
    drawn = [
        augment(stored.records[n].image, S, view_generator(5, stored.records[n].id, v))
        for n, v in zip(numbers, views, strict=True)
    ]
    assert torch.allclose(stored.take(numbers, views).float(), encode(torch.stack(drawn)), rtol=1e-3, atol=1e-3)
    assert len({bytes(pixels.numpy().data) for pixels in drawn}) == 3


def test_a_batch_draws_a_view_of_each_picture_by_its_number(records: list[Record], tmp_path: Path) -> None:
    cache = build(records, tmp_path / "cache", "fp16", views=3)
    stored, _ = find_records(records, cache, lambda features: features)
    owners = {stored.cache.read([row])[0].numpy().tobytes(): divmod(row, 4) for row in range(80)}
    pairs, again = (FeaturePairs(stored, Captions(stored.records), 6, seed=2, drawn=True) for _ in range(2))
    seen = []
    for number in (0, 9, 4):
        batch, same = pairs(number), again(number)
        assert batch.features is not None
        assert same.features is not None
        assert torch.equal(batch.features, same.features)
        found = [owners[row.numpy().tobytes()] for row in batch.features]
        assert [picture for picture, _ in found] == pairs.sampler(number)
        seen += [entry for _, entry in found]
    assert set(seen) == {1, 2, 3}  # never the plain one
    plain = FeaturePairs(stored, Captions(stored.records), 6, seed=2)(4).features
    assert plain is not None
    assert {owners[row.numpy().tobytes()][1] for row in plain} == {0}


def spoil(path: Path, place: int) -> None:
    """Turns one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 16
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


SHARD = "shard-00002.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda f: cut_off(f / SHARD), rf"{SHARD}: has [\d,]+ bytes and not [\d,]+, it is cut short"),
    "gone": (lambda f: (f / SHARD).unlink(), rf"{SHARD}: has 0 bytes"),
    "values": (lambda f: spoil(f / SHARD, shards.HEADER + 8 * V + 5), rf"{SHARD}: is damaged \(row 0 of 4\)"),
    "scales": (lambda f: spoil(f / SHARD, -3), rf"{SHARD}: is damaged \(row 3 of 4\)"),
    "widths": (lambda f: spoil(f / SHARD, shards.HEADER + 4 * V + 2), rf"{SHARD}: is damaged \(row 0 of 4\)"),
    "names": (lambda f: spoil(f / "shard-00002.json", 20), r"shard-00002\.json: is damaged"),
    "index": (lambda f: cut_off(f / "cache.json"), r"cache\.json: is damaged or another program's"),
    "version": (
        lambda f: (f / "cache.json").write_text((f / "cache.json").read_text().replace('"version": 1', '"version": 7')),
        r"cache\.json: is of version 7, this program reads 1",
    ),
    "no cache": (lambda f: (f / "cache.json").unlink(), "is no feature cache"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_and_mended(what: str, records: list[Record], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    build(records, folder, "int8")
    whole = files(folder)
    change, said = DAMAGE[what]
    change(folder)
    with pytest.raises(UserError, match=said) as caught:
        Cache(folder).read(range(20))
    assert "\n" not in str(caught.value)
    build(records, folder, "int8", replace=what in ("index", "version"))
    assert files(folder) == whole


def test_a_disk_that_fills_up_ends_in_one_line(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    whole = files(build(records, tmp_path / "whole").folder)
    add, written = shards.ShardWriter.add, 0

    def full(self: shards.ShardWriter, features: Tensor) -> None:
        nonlocal written
        written += 1
        if written == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, features)

    with monkeypatch.context() as broken:
        broken.setattr(shards.ShardWriter, "add", full)
        with pytest.raises(UserError, match=r"the disk is full; whole shards are kept: make room"):
            build(records, folder)
    there = files(folder)
    assert len(there) == 1 + 2 * 3  # cache.json and three shards, nothing half
    assert all(whole[name] == data for name, data in there.items())
    close = shards.os.fsync

    def late(descriptor: int) -> None:
        nonlocal written
        written += 1
        if written == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        close(descriptor)

    with monkeypatch.context() as broken:
        broken.setattr(shards.os, "fsync", late)
        with pytest.raises(UserError, match="the disk is full"):
            build(records, folder)
    assert not [name for name in files(folder) if name.endswith(".new")]
    build(records, folder)
    assert files(folder) == whole


def test_too_little_room_is_said_before_anything_is_computed(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "free_bytes", lambda folder: 1000)

    def never(pixels: Tensor) -> Tensor:
        raise AssertionError

    with pytest.raises(UserError, match=r"GB are needed and 0\.0 GB are free"):
        build(records, tmp_path / "cache", encode=never)
    assert files(tmp_path / "cache") == {}


def test_the_plan_is_the_size_on_the_disk(records: list[Record], tmp_path: Path) -> None:
    records.pop(5)
    for precision in ("fp16", "int8"):
        build(records, tmp_path / precision, precision, views=2)
        size = sum(path.stat().st_size for path in (tmp_path / precision).glob("*.safetensors"))
        assert features_module.bytes_of(Layout(precision, P, V, 3), 20) == size


def test_a_cache_of_something_else_is_not_gone_on_with(records: list[Record], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    build(records, folder)
    before = files(folder)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"made_by": {"weights": "v"}}, "weights of the image encoder w there, v here; give another"),
        ({"made_by": {"image_size": 16}}, "image size 8 there, 16 here"),
        ({"precision": "bf16"}, "precision fp16 there, bf16 here"),
        ({"made_by": {"seed": 6}}, "seed of the views 5 there, 6 here"),
    ]
    for other, said in cases:
        with pytest.raises(UserError, match=said):
            build(records, folder, **other)
    with pytest.raises(UserError, match="is of 21 pictures, here are 20"):
        build(records[1:], folder)
    with pytest.raises(UserError, match=r"the picture 'other' is another one"):
        build([Record("other", records[0].image, ("a",)), *records[1:]], folder)
    with pytest.raises(UserError, match="two pictures have one id"):
        build([*records[:3], records[0]], tmp_path / "twice")
    assert files(folder) == before
    replaced = build(records[8:], folder, replace=True)
    assert torch.equal(replaced.read(range(13)), truth(records[8:]).half())
    remove_cache(folder)
    assert files(folder) == {}


def test_records_are_found_by_their_ids(records: list[Record], tmp_path: Path) -> None:
    cache = build(records, tmp_path / "cache")
    part = [records[n] for n in (20, 3, 5, 8)]
    found, problems = find_records(part, cache, lambda features: features * 2)
    assert [record.id for record in found.records] == ["r20", "r3", "r8"]
    assert len(problems) == 1
    assert torch.equal(found.load().values, truth([part[0], part[1], part[3]]).half() * 2)
    shutil.rmtree(tmp_path / "data")  # no picture is needed any more
    assert len(find_records(part, cache, lambda features: features)[0]) == 3
    stranger = Record("new", tmp_path / "new.png", ("a",))
    with pytest.raises(UserError, match=r"^1 of 2 pictures are not in .*cache, the first is .*new\.png \(id 'new'\)"):
        find_records([records[0], stranger], cache, lambda features: features)
    (tmp_path / "data").mkdir()
    records[3].image.write_bytes(b"another")
    with pytest.raises(UserError, match=r"3\.png: has 7 bytes, and had [\d,]+ when .*cache was made"):
        find_records(part, cache, lambda features: features)


def test_not_one_good_picture_is_one_line(tmp_path: Path) -> None:
    bad = [Record(str(n), tmp_path / f"{n}.png", ("a",)) for n in range(3)]
    with pytest.raises(UserError, match=r"none of the 3 pictures can be opened; the first: .*0\.png"):
        build(bad, tmp_path / "cache")


class Home(NamedTuple):
    """Tiny models and pictures, and caches that the command made of them."""

    root: Path
    options: list[str]
    said: list[Said]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("features")
    tiny_runs.home(root, count=16)
    for n in range(16):  # no longer plain: a crop is then another picture
        own = np.random.default_rng(n).integers(0, 255, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(own).save(root / "data" / f"{n}.png")
    (root / "data" / "5.png").write_bytes(b"")
    home = Home(root, tiny_runs.options(root), [])
    home.said.append(make_cache(home, "plain"))
    home.said.append(make_cache(home, "crops", "--views", 2, "--precision", "int8"))
    return home


def make_cache(home: Home, out: str, *more: object) -> Said:
    own = [word for word in home.options if word.startswith("vision.") or word == "train.precision=fp32"]
    sets = [word for pair in own for word in ("--set", pair)]
    return call("features", home.root / "data", "--out", home.root / out, *sets, *more)


def train(home: Home, stage: str, out: Path, *more: object) -> Said:
    return call("train", stage, "--data", home.root / "data", "--out", out, *home.options, *more)


def test_the_command_says_what_it_will_take(home: Home, tmp_path: Path) -> None:
    plain, crops = home.said
    assert (plain.code, plain.out) == (0, f"{home.root / 'plain'}\n"), plain.err
    assert (crops.code, crops.out) == (0, f"{home.root / 'crops'}\n"), crops.err
    assert "16 pictures, the plain picture of each: 10 tokens x 24 in fp16" in plain.err
    assert "16 pictures, the plain picture and 2 views of each: 10 tokens x 24 in int8" in crops.err
    for words in ("GB free", "by the first 15 pictures", "once and not once an epoch", "5.png"):
        assert words in plain.err
    said = call(
        *("features", home.root / "data", "--out", tmp_path / "dry", "--dry-run"),
        *("--set", f"vision.name={home.root / 'vision'}", "--set", "vision.image_size=12", "--set", "vision.layer=-2"),
    )
    assert said.code == 0, said.err
    assert "by the first 15 pictures" in said.err
    assert not (tmp_path / "dry").exists()
    before = files(home.root / "plain")
    assert make_cache(home, "plain").code == 0  # all of it is there
    assert files(home.root / "plain") == before


@pytest.mark.parametrize("whiten", ["true", "false"])
def test_training_from_a_cache_is_training_without(home: Home, tmp_path: Path, whiten: str) -> None:
    white = ("--set", f"vision.whiten={whiten}")
    for stage, start in (("stage1", ()), ("stage2", ("--start", tmp_path / "stage1"))):
        without = train(home, stage, tmp_path / stage, *start, *white)
        cached = train(home, stage, tmp_path / f"{stage}-cached", *start, *white, "--features", home.root / "plain")
        assert (without.code, cached.code) == (0, 0), without.err + cached.err
        assert not (tmp_path / f"{stage}-cached" / "features").exists()
        one, two = (read_tensors(tmp_path / name / "model.safetensors") for name in (stage, f"{stage}-cached"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        skipped = [(tmp_path / name / "skipped.jsonl").read_text() for name in (stage, f"{stage}-cached")]
        assert skipped[0] == skipped[1]
        assert "5.png" in skipped[0]


def test_training_with_views_reads_them(home: Home, tmp_path: Path) -> None:
    cache = ("--features", home.root / "crops")
    losses = []
    for name, augmented in (("plain", "false"), ("crops", "true"), ("again", "true")):
        said = train(home, "stage1", tmp_path / name, *cache, "--set", f"data.augment={augmented}")
        assert said.code == 0, said.err
        losses.append(read_tensors(tmp_path / name / "model.safetensors")["qformer.queries"])
    assert torch.equal(losses[1], losses[2])
    assert not torch.equal(losses[0], losses[1])
    said = train(home, "stage1", tmp_path / "no", "--features", home.root / "plain", "--set", "data.augment=true")
    assert said.code == 2
    assert "data.augment=true" in said.err
    assert "set data.augment=false" in said.err
    assert "--views 4" in said.err


def settings(home: Home, **changes: Any) -> RunSettings:
    values = dict(word.split("=", 1) for word in home.options[1::2]) | {"data.source": str(home.root / "data")}
    return change(preset("stage1", "laptop"), values | {name.replace("__", "."): v for name, v in changes.items()})


def test_a_cache_of_another_encoder_is_named(home: Home, tmp_path: Path) -> None:
    folder = home.root / "plain"
    shutil.copytree(home.root / "vision", tmp_path / "tuned")
    weights = load_file(home.root / "vision" / "model.safetensors")
    name = next(name for name in weights if "layer.0" in name)
    weights[name] = weights[name] + 0.001
    save_file(weights, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    published = json.loads((home.root / "vision" / "preprocessor_config.json").read_text())
    shutil.copytree(home.root / "vision", tmp_path / "darker")
    (tmp_path / "darker" / "preprocessor_config.json").write_text(
        json.dumps(published | {"image_mean": [0.4, 0.5, 0.5]})
    )
    for changes, said in (
        (
            {"vision__name": str(tmp_path / "tuned")},
            r"weights of the image encoder \w+ there, \w+ here \(enc.*tuned here\)",
        ),
        ({"vision__name": str(tmp_path / "darker")}, r"mean of the pixels \[0\.5, 0\.5, 0\.5\] there, \[0\.4"),
        ({"vision__image_size": 16}, "image size 12 there, 16 here"),
        ({"vision__layer": -3}, "layers of the image encoder 2 there, 1 here; train"),
        ({"vision__weights": "bf16"}, r"vision\.weights\) fp32 there, bf16 here"),
    ):
        other = settings(home, **changes)
        with pytest.raises(UserError, match=said) as caught:
            open_cache(build_vision(other), other, folder)
        assert str(folder) in str(caught.value)
        assert "train with the settings of the cache, or make one with these" in str(caught.value)
    vision = build_vision(settings(home))
    theirs = maker(vision, settings(home))
    head = json.loads((folder / "cache.json").read_text())
    assert theirs.items() <= head["made_by"].items()
    crops = json.loads((home.root / "crops" / "cache.json").read_text())
    assert crops["made_by"]["crops"] == CROPS
    shutil.copytree(home.root / "crops", tmp_path / "old")
    crops["made_by"]["crops"] = "crops of another kind"
    (tmp_path / "old" / "cache.json").write_text(json.dumps(crops))
    wants = settings(home, data__augment="true")
    with pytest.raises(UserError, match="transform of the views crops of another kind there"):
        open_cache(vision, wants, tmp_path / "old")


def test_a_renamed_encoder_is_the_same(home: Home, tmp_path: Path) -> None:
    shutil.copytree(home.root / "vision", tmp_path / "elsewhere")
    moved = settings(home, vision__name=str(tmp_path / "elsewhere"))
    assert open_cache(build_vision(moved), moved, home.root / "plain").layout.tokens == 10


def test_features_are_what_the_encoder_gives(home: Home, tmp_path: Path) -> None:
    """Whitened or not: the cache is raw, and what is read from it is what the models would see."""
    from openblip2.model.whitening import Whitening

    records = [record for record in read_records(home.root / "data")[0] if record.image.name != "5.png"]
    vision = build_vision(settings(home))
    for whitening in (None, Whitening(torch.randn(24), torch.randn(24, 24))):
        vision.whitening = whitening
        found, problems = encode_all(vision, records, settings(home), tmp_path / "c", "x", Progress(quiet=True))
        assert problems == []
        wanted = vision(to_pixels([record.image for record in records], 12))
        assert torch.allclose(found.values.float(), wanted, atol=0.01 if whitening is None else 0.1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--precision", "fp8"], "'fp8' is none of fp16, bf16, int8"),
        (["--set", "optim.lr=1"], "optim.lr: features depend on vision.*"),
        (["--preset", "lapdog"], "preset 'lapdog'"),
        (["--precision", "bf16"], "precision fp16 there, bf16 here; give another --out"),
        (["--views", "3"], "views 1 there, 3 here"),
    ],
)
def test_what_the_command_cannot_use_is_one_line(home: Home, words: list[str], said: str) -> None:
    found = make_cache(home, "plain", *words)
    assert found.code == 2
    assert said in found.err
    assert found.err.splitlines()[-1].startswith("openblip2: ")


def test_train_names_a_picture_that_the_cache_has_not(home: Home, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(home.root / "data", data)
    Image.new("RGB", (9, 9)).save(data / "more.png")
    with (data / "records.jsonl").open("a") as file:
        file.write('{"image": "more.png", "caption": "a red cat"}\n')
    said = call(
        "train", "stage1", "--data", data, "--out", tmp_path / "run", *home.options, "--features", home.root / "plain"
    )
    assert said.code == 2
    assert "more.png" in said.err
    assert "are not in" in said.err


def test_a_run_makes_its_own_cache_once(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second stage finds the first one's features; another picture makes them anew."""
    records, _ = read_records(home.root / "data")
    quiet = Progress(quiet=True)
    train_stage(settings(home), records, tmp_path / "one", quiet, features=tmp_path / "shared")
    encoded: list[int] = []
    real = features_module.encode_pictures

    def counted(encode: Callable[[Tensor], Tensor], pictures: Sequence[Tensor]) -> Any:
        encoded.append(len(pictures))
        return real(encode, pictures)

    monkeypatch.setattr(features_module, "encode_pictures", counted)
    train_stage(settings(home), records, tmp_path / "two", quiet, features=tmp_path / "shared")
    assert encoded == []
    train_stage(settings(home), records[1:], tmp_path / "three", quiet, features=tmp_path / "shared")
    assert sum(encoded) == 14


def test_stored_features_are_no_tensors_in_memory(records: list[Record], tmp_path: Path) -> None:
    stored, _ = find_records(records, build(records, tmp_path / "cache"), lambda features: features)
    assert isinstance(stored, StoredFeatures)
    assert not any(isinstance(value, Tensor) for value in vars(stored).values())
    assert not any(isinstance(value, Tensor) for value in vars(stored.cache).values())
    assert all(shard._map is None for shard in stored.cache._shards)
    stored.take([0])
    assert [shard._map is not None for shard in stored.cache._shards] == [True] + 5 * [False]
