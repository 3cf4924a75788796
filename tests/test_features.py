"""The feature cache: it returns what was encoded, encodes nothing twice and reads no incomplete entry."""

import errno
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny_runs
from openblip2.apps.scenes.draw import draw_scenes
from openblip2.config import RunSettings, change
from openblip2.data.batches import FeaturePairs
from openblip2.data.features import FeatureCache, StoredFeatures, find_records, picture_bytes, writing
from openblip2.data.images import augment, to_pixels
from openblip2.data.records import Record, read_records
from openblip2.data.samples import Captions
from openblip2.errors import UserError
from openblip2.model.build import build_vision
from openblip2.presets import preset
from openblip2.progress import Progress
from openblip2.runs import read_tensors
from openblip2.train import encode
from openblip2.train.encode import CROPS, crop_generator, maker, open_cache, whitened
from openblip2.train.recipes import train_stage
from test_cli import Said, call

P, V, S = 3, 10, 8
SETTINGS = change(preset("stage1", "laptop"), {"train.seed": 5})


def features_of(pixels: Tensor) -> Tensor:
    """`[n, P, V]`, similar to a vision transformer's: one channel is wide, one is shifted; each picture differs."""
    flat = pixels.flatten(1).float() / 255
    weights = torch.randn(flat.shape[1], P * V, generator=torch.Generator().manual_seed(0)) / 4
    values = (flat @ weights).unflatten(1, (P, V))
    values[..., 4] *= 40
    values[..., 7] += 9
    return values


class Encoder:
    """An image encoder that counts the entries it encodes; `factor` scales its features; batch `dies` interrupts it."""

    image_size, layers, mean, std, whitening = S, 2, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), None
    patches, width = P, V

    def __init__(self, factor: float = 1, dies: int = -1, weight: float = 0) -> None:
        self.factor, self.dies, self.batches, self.encoded = factor, dies, 0, 0
        weights = {"weight": torch.tensor([weight])}
        self.encoder = SimpleNamespace(state_dict=lambda: weights)
        self.dtype, self.shaping = torch.float32, {}

    def __call__(self, pixels: Tensor) -> Tensor:
        self.batches += 1
        if self.batches == self.dies:
            raise KeyboardInterrupt
        self.encoded += len(pixels)
        return features_of(pixels) * self.factor


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    """21 noisy pictures; file number 5 is not a picture."""
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
def _small_batches() -> Iterator[None]:
    """Makes 21 pictures six batches, the last with one picture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "BATCH", 4)
        yield


class Told(Progress):
    """Keeps the lines that `say` receives."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def build(
    records: Sequence[Record],
    folder: Path,
    precision: str = "fp16",
    crops: int = 0,
    vision: Any = None,
    told: Progress | None = None,
    settings: RunSettings = SETTINGS,
    replace: bool = False,
) -> FeatureCache:
    vision, told = vision or Encoder(), told or Told()
    return encode.make_cache(vision, records, settings, folder, told, "x", precision, crops, replace)


def ids(records: Sequence[Record]) -> list[str]:
    return [record.id for record in records if record.id != "r5"]


def truth(records: Sequence[Record]) -> Tensor:
    """Features of plain pictures in fp32, without a cache."""
    return features_of(to_pixels([record.image for record in records if record.id != "r5"], S))


def assert_same_features(kept: Tensor, wanted: Tensor) -> None:
    """Compares in fp16, because the last bit of an encoder's output depends on the batch size."""
    torch.testing.assert_close(kept, wanted.half(), rtol=2e-3, atol=1e-3)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_is_read_is_what_was_encoded(records: list[Record], tmp_path: Path, precision: str) -> None:
    cache, wanted = build(records, tmp_path / "cache", precision), truth(records)
    found = cache.read(ids(records))
    assert found.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert torch.equal(found, wanted.to(found.dtype))
    rows = [19, 0, 7, 7, 12, 3]
    assert torch.equal(FeatureCache(tmp_path / "cache").read([ids(records)[n] for n in rows]), found[rows])
    assert cache.read([]).shape == (0, P, V)
    assert cache.path.stat().st_size == 20 * picture_bytes((1, P, V))


def test_only_the_rows_asked_for_are_read(records: list[Record], tmp_path: Path) -> None:
    stored, _ = find_records(records, build(records, tmp_path / "cache"), lambda features: features)
    assert isinstance(stored, StoredFeatures)
    assert isinstance(stored.cache._values, np.memmap)
    taken = stored.take([3, 4])
    assert not np.shares_memory(taken.numpy(), stored.cache._values)
    assert taken.untyped_storage().nbytes() == 2 * picture_bytes((1, P, V))
    held = (*vars(stored).values(), *vars(stored.cache).values())
    assert not any(isinstance(value, Tensor) for value in held)


def test_a_value_that_fits_no_fp16_is_named(records: list[Record], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not fit in fp16; .*--precision bf16"):
        build(records, tmp_path / "cache", vision=Encoder(1e5))
    assert build(records, tmp_path / "bf16", "bf16", vision=Encoder(1e5)).read(["r0"]).isfinite().all()
    with pytest.raises(UserError, match="does not fit"):
        build(records, tmp_path / "nan", "bf16", vision=Encoder(torch.nan))


def test_an_interrupted_build_goes_on_and_ends_alike(records: list[Record], tmp_path: Path) -> None:
    whole = build(records, tmp_path / "whole", crops=2)
    with pytest.raises(KeyboardInterrupt):
        build(records, tmp_path / "parts", crops=2, vision=Encoder(dies=8))  # in the third batch of pictures
    before = FeatureCache(tmp_path / "parts")
    assert list(before.pictures) == [record.id for record in records[:8]]
    with pytest.raises(UserError, match="13 of 21 pictures are not in"):
        find_records(records, before, lambda features: features)
    again = Encoder()
    parts = build(records, tmp_path / "parts", crops=2, vision=again)
    assert again.encoded == 13 * 3
    assert parts.pictures == whole.pictures
    assert parts.path.read_bytes() == whole.path.read_bytes()


def test_nothing_half_written_is_read(records: list[Record], tmp_path: Path) -> None:
    """Tries every point of a kill: features are written first, then the lines that name them."""
    records = records[4:11]
    whole = files(build(records, tmp_path / "whole").folder)
    (values,) = [name for name in whole if name.startswith("features-")]
    lines = whole["features.jsonl"].splitlines(keepends=True)
    size = picture_bytes((1, P, V))
    for cut in range(0, len(whole["features.jsonl"]), 29):
        folder = tmp_path / f"cut-{cut}"
        folder.mkdir()
        index = whole["features.jsonl"][:cut]
        (folder / "features.jsonl").write_bytes(index)
        complete = index.count(b"\n")
        named = [line for line in lines[1 : max(1, complete)] if b"r5" not in line]
        for torn in (0, 11):  # 11 bytes of the next features
            kept = size * len(named) + torn
            (folder / values).write_bytes(whole[values][:kept])
            if complete:
                cache = FeatureCache(folder)
                assert len(cache.pictures) == complete - 1
                found = [record for record in records if record.id in cache.pictures and record.id != "r5"]
                if found:
                    assert_same_features(cache.read(ids(found)), truth(found))
        cache = build(records, folder)
        assert_same_features(cache.read(ids(records)), truth(records))
        assert len(list(folder.iterdir())) == 2


def test_views_are_random_crops_that_do_not_change(records: list[Record], tmp_path: Path) -> None:
    cache = build(records, tmp_path / "cache", crops=3)
    stored, problems = find_records(records, cache, lambda features: features)
    assert stored.views == 3
    assert problems == [cache.pictures["r5"].problem]
    assert str(records[5].image) in problems[0]
    plain = truth(records).half()
    assert torch.equal(stored.take(range(20)), plain)
    numbers, views = [17, 2, 2], [1, 0, 2]
    drawn = [
        augment(stored.records[n].image, S, crop_generator(5, stored.records[n].id, v), mirror=v == 1)
        for n, v in zip(numbers, views, strict=True)
    ]
    assert torch.allclose(stored.take(numbers, views).float(), features_of(torch.stack(drawn)), rtol=1e-3, atol=1e-3)
    assert len({bytes(pixels.numpy().data) for pixels in drawn}) == 3


def test_a_batch_draws_a_view_of_each_picture_by_its_number(records: list[Record], tmp_path: Path) -> None:
    cache = build(records, tmp_path / "cache", crops=3)
    stored, _ = find_records(records, cache, lambda features: features)
    owners = {}
    for entry in range(4):
        values = stored.take(range(20), [entry - 1] * 20 if entry else None)
        owners |= {row.numpy().tobytes(): (picture, entry) for picture, row in enumerate(values)}
    pairs, again = (FeaturePairs(stored, Captions(stored.records), 6, seed=2, augmented=True) for _ in range(2))
    seen = []
    for number in (0, 9, 4):
        batch, same = pairs(number), again(number)
        assert batch.features is not None
        assert same.features is not None
        assert torch.equal(batch.features, same.features)
        found = [owners[row.numpy().tobytes()] for row in batch.features]
        assert [picture for picture, _ in found] == pairs.sampler(number)
        seen += [entry for _, entry in found]
    assert set(seen) == {1, 2, 3}  # never the plain picture
    plain = FeaturePairs(stored, Captions(stored.records), 6, seed=2, augmented=False)(4).features
    assert plain is not None
    assert {owners[row.numpy().tobytes()][1] for row in plain} == {0}


def test_texts_with_left_or_right_get_views_that_are_not_mirrored(records: list[Record], tmp_path: Path) -> None:
    records = [
        replace(r, captions=("a dog to the Left of a cat", "a dog")) if n % 2 else r for n, r in enumerate(records)
    ]
    stored, _ = find_records(records, build(records, tmp_path / "cache", crops=4), lambda features: features)
    owners = {}
    for view in range(4):
        values = stored.take(range(20), [view] * 20)
        owners |= {row.numpy().tobytes(): (picture, view) for picture, row in enumerate(values)}
    pairs = FeaturePairs(stored, Captions(stored.records), 6, seed=2, augmented=True)
    drawn: dict[bool, set[int]] = {True: set(), False: set()}
    for number in range(12):
        features = pairs(number).features
        assert features is not None
        for picture, view in (owners[row.numpy().tobytes()] for row in features):
            drawn["Left" in stored.records[picture].captions[0]].add(view)
    assert drawn == {True: {0, 2}, False: {0, 1, 2, 3}}


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def edit(folder: Path, old: str, new: str) -> None:
    path = folder / "features.jsonl"
    path.write_text(path.read_text().replace(old, new, 1))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda f: shorten(next(f.glob("*.bin"))), r"\.bin has 1,199 bytes instead of 1,200: remove"),
    "gone": (lambda f: next(f.glob("*.bin")).unlink(), r"\.bin has 0 bytes"),
    "index": (lambda f: edit(f, '"r3", ', '"r3", , '), r"features\.jsonl is damaged: remove"),
    "version": (lambda f: edit(f, '"version": 2', '"version": 7'), "has version 7, but this program reads 2"),
    "no cache": (lambda f: (f / "features.jsonl").unlink(), "is not a feature cache"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(what: str, records: list[Record], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    build(records, folder)
    change, said = DAMAGE[what]
    change(folder)
    with pytest.raises(UserError, match=said) as caught:
        FeatureCache(folder)
    assert "\n" not in str(caught.value)


def test_a_disk_that_fills_up_ends_in_one_line(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal written
        written += 1
        if written == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"the disk is full; free space and run the same again: finished"):
            build(records, tmp_path / "cache")
    again = Encoder()
    cache = build(records, tmp_path / "cache", vision=again)
    assert again.encoded == 20 - 7  # two batches were kept; one contains number 5
    assert torch.equal(cache.read(ids(records)), truth(records).half())


def test_too_little_room_is_said_before_anything_is_encoded(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "free_bytes", lambda folder: 1000)
    vision = Encoder()
    with pytest.raises(UserError, match=r"GB are needed and 0\.0 GB are free"):
        build(records, tmp_path / "cache", vision=vision)
    assert vision.encoded == 0


def test_what_is_there_is_not_encoded_again(records: list[Record], tmp_path: Path) -> None:
    folder, told = tmp_path / "cache", Told()

    def encoded(records: Sequence[Record]) -> int:
        vision = Encoder()
        cache = build(records, folder, vision=vision, told=told, replace=True)
        assert torch.equal(cache.read(ids(records)), truth(records).half())
        return vision.encoded

    assert encoded(records[:10]) == 9
    assert encoded(records[2:9]) == 0  # some pictures are left out
    assert encoded([*records[12:], *records[:2]]) == 9  # and some are added
    for record in records:  # drawing the demo's scenes again rewrites the same files, too
        content = record.image.read_bytes()
        record.image.unlink()
        record.image.write_bytes(content)
        os.utime(record.image, ns=(1, 1))
    assert encoded(records) == 2
    shutil.copy(records[0].image, records[1].image)
    assert encoded(records) == 1
    shutil.copy(records[0].image, records[5].image)
    assert encoded([replace(record, id=f"s{record.id}") for record in records]) == 21  # none has these ids
    assert len(FeatureCache(folder).pictures) == 21
    assert told.lines == []


def test_scenes_that_are_drawn_again_are_not_encoded_again(tmp_path: Path) -> None:
    for expected in (6, 0):
        vision = Encoder()
        build(draw_scenes(tmp_path / "scenes", 6, "train", 0), tmp_path / "cache", vision=vision, replace=True)
        assert vision.encoded == expected


def test_a_cache_of_something_else_is_refused_or_replaced(records: list[Record], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    build(records, folder, crops=1)
    before = files(folder)
    larger = Encoder()
    larger.image_size = 16
    cases: list[tuple[dict[str, Any], str]] = [
        ({"vision": Encoder(weight=1)}, r"encoder weights \w+ in the cache, \w+ now; give another"),
        ({"vision": larger}, "image size 8 in the cache, 16 now"),
        ({"precision": "bf16"}, "precision fp16 in the cache, bf16 now"),
        ({"crops": 2}, "views 1 in the cache, 2 now"),
        ({"settings": change(SETTINGS, {"train.seed": 6})}, "seed 5 in the cache, 6 now"),
    ]
    for other, said in cases:
        with pytest.raises(UserError, match=said):
            build(records, folder, **{"crops": 1, **other})
    with pytest.raises(UserError, match="two pictures have the same id"):
        build([*records[:3], records[0]], tmp_path / "twice")
    assert files(folder) == before
    told = Told()
    cache = build(records, folder, vision=Encoder(2, weight=1), told=told, replace=True)
    assert len(told.lines) == 1
    assert told.lines[0].endswith("its features are computed again")
    assert torch.equal(cache.read(ids(records)), (truth(records) * 2).half())
    assert len(files(folder)) == 2


def test_two_processes_write_one_after_the_other(records: list[Record], tmp_path: Path) -> None:
    vision = Encoder()
    made_by = maker(vision, SETTINGS) | {"precision": "fp16", "views": 1, "crops": "none", "seed": 0}  # pyright: ignore
    first = writing(tmp_path / "cache", made_by, (1, P, V), print)
    writer = first.__enter__()
    writer.add(records[:3], [None] * 3, truth(records[:3])[:, None])
    waited: list[str] = []

    class Waits(Told):
        def say(self, text: str) -> None:
            waited.append(text)
            writer.add(records[3:4], [None], truth(records[3:4])[:, None])
            first.__exit__(None, None, None)

    cache = build(records, tmp_path / "cache", vision=vision, told=Waits())
    holder = f"process {os.getpid()} on {platform.node()}"
    assert waited == [f"{tmp_path / 'cache'} is being written by {holder}: waiting until it is done"]
    assert vision.encoded == 16
    assert torch.equal(cache.read(ids(records)), truth(records).half())


def test_a_reader_keeps_what_is_replaced(records: list[Record], tmp_path: Path) -> None:
    old = build(records, tmp_path / "cache")
    wanted = old.read(["r1"])
    late = FeatureCache(tmp_path / "cache")  # reads nothing before the cache is replaced
    build(records, tmp_path / "cache", vision=Encoder(2, weight=1), replace=True)
    assert torch.equal(old.read(["r1"]), wanted)
    assert torch.equal(late.read(["r1"]), wanted)


def test_records_are_found_by_their_ids(records: list[Record], tmp_path: Path) -> None:
    cache = build(records, tmp_path / "cache")
    part = [records[n] for n in (20, 3, 5, 8)]
    found, problems = find_records(part, cache, lambda features: features * 2)
    assert [record.id for record in found.records] == ["r20", "r3", "r8"]
    assert len(problems) == 1
    assert torch.equal(found.load().values, truth([part[0], part[1], part[3]]).half() * 2)
    shutil.rmtree(tmp_path / "data")  # the pictures are no longer needed
    assert len(find_records(part, cache, lambda features: features)[0].records) == 3
    stranger = Record("new", tmp_path / "new.png", ("a",))
    with pytest.raises(UserError, match=r"^1 of 2 pictures are not in .*cache; the first is .*new\.png \(id 'new'\)"):
        find_records([records[0], stranger], cache, lambda features: features)
    (tmp_path / "data").mkdir()
    records[3].image.write_bytes(b"another")
    with pytest.raises(UserError, match=r"3\.png has 7 bytes, but had [\d,]+ when .*cache was made"):
        find_records(part, cache, lambda features: features)


def test_not_one_good_picture_is_one_line(tmp_path: Path) -> None:
    bad = [Record(str(n), tmp_path / f"{n}.png", ("a",)) for n in range(3)]
    with pytest.raises(UserError, match=r"none of the 3 pictures can be opened; the first: .*0\.png"):
        build(bad, tmp_path / "cache")


class Home(NamedTuple):
    """Tiny models and pictures, and the caches that the command made from them."""

    root: Path
    options: list[str]
    said: list[Said]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("features")
    tiny_runs.home(root, count=16)
    for n in range(16):  # not of one colour, so that a crop differs from the picture
        own = np.random.default_rng(n).integers(0, 255, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(own).save(root / "data" / f"{n}.png")
    (root / "data" / "5.png").write_bytes(b"")
    home = Home(root, tiny_runs.options(root), [])
    home.said.append(make_cache(home, "plain"))
    home.said.append(make_cache(home, "crops", "--views", 2, "--precision", "bf16"))
    return home


def make_cache(home: Home, out: str, *more: object) -> Said:
    own = [word for word in home.options if word.startswith("vision.") or word == "train.precision=fp32"]
    sets = [word for pair in own for word in ("--set", pair)]
    return call("features", home.root / "data", "--out", home.root / out, *sets, *more)


def train(home: Home, stage: str, out: Path, *more: object) -> Said:
    return call("train", stage, "--data", home.root / "data", "--out", out, *home.options, *more)


def test_the_command_says_what_it_will_take(home: Home) -> None:
    plain, crops = home.said
    assert (plain.code, plain.out) == (0, f"{home.root / 'plain'}\n"), plain.err
    assert (crops.code, crops.out) == (0, f"{home.root / 'crops'}\n"), crops.err
    assert "16 pictures, the plain picture of each: 10 tokens x 24 in fp16" in plain.err
    assert "16 pictures, the plain picture and 2 views of each: 10 tokens x 24 in bf16" in crops.err
    for words in ("GB free", "5.png"):
        assert words in plain.err
    before = files(home.root / "plain")
    assert make_cache(home, "plain").code == 0  # all features are there already
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
            r"encoder weights \w+ in the cache, \w+ now \(encoder .*tuned now\)",
        ),
        ({"vision__name": str(tmp_path / "darker")}, r"mean \[0\.5, 0\.5, 0\.5\] in the cache, \[0\.4"),
        ({"vision__image_size": 16}, "image size 12 in the cache, 16 now"),
        ({"vision__layer": -3}, "encoder layers 2 in the cache, 1 now; use the settings"),
        ({"vision__dtype": "bf16"}, "encoder precision fp32 in the cache, bf16 now"),
    ):
        other = settings(home, **changes)
        with pytest.raises(UserError, match=said) as caught:
            open_cache(build_vision(other), other, folder)
        assert str(folder) in str(caught.value)
        assert "use the settings of the cache, or make one with these settings" in str(caught.value)
    vision = build_vision(settings(home))
    theirs = maker(vision, settings(home))
    assert theirs.items() <= FeatureCache(folder).made_by.items()
    assert FeatureCache(home.root / "crops").made_by["crops"] == CROPS
    shutil.copytree(home.root / "crops", tmp_path / "old")
    edit(tmp_path / "old", CROPS, "crops of another kind")
    wants = settings(home, data__augment="true")
    with pytest.raises(UserError, match="crops crops of another kind in the cache"):
        open_cache(vision, wants, tmp_path / "old")


def test_a_renamed_encoder_is_the_same(home: Home, tmp_path: Path) -> None:
    shutil.copytree(home.root / "vision", tmp_path / "elsewhere")
    moved = settings(home, vision__name=str(tmp_path / "elsewhere"))
    assert open_cache(build_vision(moved), moved, home.root / "plain").shape == (1, 10, 24)


def test_features_are_what_the_encoder_gives(home: Home, tmp_path: Path) -> None:
    """Checks with and without whitening: the cache holds raw features, and reading whitens them as the model would."""
    from openblip2.model.vision import Whitening

    records = [record for record in read_records(home.root / "data")[0] if record.image.name != "5.png"]
    vision = build_vision(settings(home))
    for whitening in (None, Whitening(torch.randn(24), torch.randn(24, 24))):
        vision.whitening = whitening
        cache = build(records, tmp_path / "c", vision=vision, settings=settings(home))
        stored, problems = find_records(records, cache, whitened(vision))
        found = stored.load()
        assert problems == []
        wanted = vision(to_pixels([record.image for record in records], 12))
        assert torch.allclose(found.values.float(), wanted, atol=0.01 if whitening is None else 0.1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--precision", "int8"], "'int8' is unknown: it must be one of fp16, bf16"),
        (["--set", "optim.lr=1"], "optim.lr: only vision.*"),
        (["--preset", "lapdog"], "preset 'lapdog'"),
        (["--precision", "bf16"], "precision fp16 in the cache, bf16 now; give another --out"),
        (["--views", "3"], "views 1 in the cache, 3 now"),
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
    """A second run finds the features of the first; omitted pictures cost nothing, and only a new one is encoded."""
    records, _ = read_records(home.root / "data")
    quiet = Progress(quiet=True)
    train_stage(settings(home), records, tmp_path / "one", quiet, features=tmp_path / "shared")
    encoded: list[int] = []
    real = encode.encode_raw

    def counted(vision: Any, opened: Sequence[Any], shape: tuple[int, int, int]) -> Tensor:
        encoded.append(len(opened))
        return real(vision, opened, shape)

    monkeypatch.setattr(encode, "encode_raw", counted)
    train_stage(settings(home), records, tmp_path / "two", quiet, features=tmp_path / "shared")
    train_stage(settings(home), records[1:], tmp_path / "three", quiet, features=tmp_path / "shared")
    assert encoded == []
    Image.new("RGB", (9, 9)).save(tmp_path / "more.png")
    more = [*records, Record("more", tmp_path / "more.png", ("a red cat",))]
    train_stage(settings(home), more, tmp_path / "four", quiet, features=tmp_path / "shared")
    assert sum(encoded) == 1
