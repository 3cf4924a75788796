"""CapFilt in one process: the pool, the ranking, the shards; its output does not depend on how it is divided."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
import transformers as hf

import tiny_capfilt
import tiny_runs
from openblip2.capfilt import capfilt
from openblip2.capfilt import shard as shard_module
from openblip2.capfilt.models import ClipRanker, RunRanker, digests, open_models
from openblip2.capfilt.shard import How, best, pool
from openblip2.data.images import PictureFile, open_picture
from openblip2.data.text import clean_caption
from openblip2.data.web.mixture import count_parts, read_parts
from openblip2.data.web.pairs import ShardPairs
from openblip2.data.web.tars import Sample, read_tar
from openblip2.errors import UserError
from openblip2.inference.load import load
from openblip2.inference.matcher import Matcher
from openblip2.progress import Progress
from test_cli import call
from tiny_capfilt import HOW, content, run
from tiny_shards import sample, write_shard

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_capfilt.build(tmp_path_factory.mktemp("capfilt"))


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    """The set, written by one uninterrupted run."""
    written = run(home, home / "whole")
    assert (written.shards, written.counts["pictures"], written.dead) == (3, 52, [])
    return home / "whole"


def samples_of(folder: Path) -> dict[str, Sample]:
    return {one.key: one for path in sorted(folder.glob("*.tar")) for one in read_tar(str(path), pytest.fail)}


def test_the_pool_holds_each_caption_once_and_the_webs_first() -> None:
    found = pool(["A Dog.", "...", "a  dog"], ["a dog!", "the cat", "", "THE CAT", "a bus"])
    assert list(found.items()) == [("a dog", "web"), ("the cat", "captioner"), ("a bus", "captioner")]
    assert pool([], []) == {}


def test_the_best_are_kept() -> None:
    assert best([0.1, 0.5, 0.3, 0.5], 2) == [1, 3], "of equal ones the earlier"
    assert best([0.1, 0.5, 0.3, 0.5], 3, threshold=0.3) == [1, 3, 2]
    assert best([0.1], 2, threshold=0.3) == []
    with pytest.raises(UserError, match="not numbers"):
        best([0.1, float("nan")], 2)


@pytest.mark.parametrize(("ranker", "how"), [("stage1", HOW), ("stage1", How(captions=1, filter="itm")), ("clip", HOW)])
def test_each_picture_keeps_the_best_of_its_own_pool(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranker: str, how: How
) -> None:
    """The reference scores one picture and one text at a time; the pools are recorded during the run."""
    pools: list[dict[str, str]] = []
    monkeypatch.setattr(shard_module, "pool", lambda web, written: pools.append(pool(web, written)) or pools[-1])
    written = run(home, tmp_path / "out", how, ranker)
    given = samples_of(home / "set")
    found = samples_of(tmp_path / "out")
    naive = _naive(home / ranker, how.filter == "itm")
    assert len(pools) == len(given)
    kept, matched = Counter[str](), 0
    for (key, one), texts in zip(given.items(), pools, strict=True):
        assert next(iter(texts.items())) == (clean_caption(one.captions[0]), "web")
        assert 1 <= len(texts) <= 1 + how.captions
        scores = [naive(one.image, text) for text in texts]
        order = sorted(range(len(scores)), key=lambda n: -scores[n])
        if how.filter == "itm":
            order = [n for n in order if scores[n] >= 0.5]
        if not order:
            assert key not in found
            continue
        matched += 1
        listed = found[key].about["captions"]
        assert len(listed) == min(2, len(order))
        assert [entry["score"] for entry in listed] == pytest.approx([scores[n] for n in order[:2]], abs=2e-5)
        for entry in listed:
            assert texts[entry["text"]] == entry["from"]
            assert entry["score"] == pytest.approx(naive(one.image, entry["text"]), abs=2e-5)
            kept[entry["from"]] += 1
        assert found[key].image == one.image
        assert {name: value for name, value in found[key].about.items() if name != "captions"} == one.about
    assert len(found) == matched == written.counts["pictures"]
    assert kept["captioner"] == written.counts["captions by the captioner"] > 0
    assert written.counts["captions"] == kept.total()
    assert written.counts["without captions"] == len(given) - matched


def _naive(model: Path, itm: bool):
    if model.name == "clip":
        clip = hf.CLIPModel.from_pretrained(model)
        tokenizer = hf.AutoTokenizer.from_pretrained(model)

        def of_clip(image: bytes, text: str) -> float:
            picture = open_picture(PictureFile(image, "")).resize((13, 8), 3).crop((2, 0, 10, 8))  # from 20 x 12 px
            pixels = torch.tensor(np.array(picture)).permute(2, 0, 1)[None] / 255
            mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.3, 0.2, 0.25])
            pixels = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
            with torch.no_grad():
                found = clip(pixel_values=pixels, **tokenizer([_cut(text)], return_tensors="pt"))
                return float(found.logits_per_image / clip.logit_scale.exp())

        return of_clip
    matcher = load(model)
    assert isinstance(matcher, Matcher)
    if itm:
        return lambda image, text: matcher.match([PictureFile(image, "")], [_cut(text)]).item()
    return lambda image, text: matcher.similarity([PictureFile(image, "")], [_cut(text)]).item()


def _cut(text: str) -> str:
    """The text, cut to the maximum length: here a word is one token, and two tokens are special."""
    return " ".join(text.split()[: tiny_capfilt.TOKENS - 2])


def test_other_seeds_and_shards_draw_other_captions(home: Path, whole: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "other", How(captions=3, seed=1))
    texts = [{n: one.captions for n, one in samples_of(folder).items()} for folder in (whole, tmp_path / "other")]
    assert texts[0] != texts[1]
    # The same pictures in a shard with another name.
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "00009.tar").write_bytes((home / "set" / "00000.tar").read_bytes())
    capfilt(str(tmp_path / "set"), *tiny_capfilt.models(home), tmp_path / "renamed", HOW, QUIET)
    renamed = {n: one.captions for n, one in samples_of(tmp_path / "renamed").items()}
    assert renamed != {n: one for n, one in texts[0].items() if n in renamed}


def test_parts_in_any_order_and_again_make_the_same_bytes(home: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(home, out, part=(2, 2)).shards == 1
    assert not (out / "00000.tar").exists()
    assert run(home, out, part=(1, 2)).shards == 2
    assert content(out) == content(whole)
    before = (out / "00000.tar").stat().st_mtime_ns
    again = run(home, out)
    assert (again.shards, again.counts["pictures"]) == (3, 52)
    assert (out / "00000.tar").stat().st_mtime_ns == before
    torch.manual_seed(77)  # torch's own random state must have no effect
    (out / "00001.tar").unlink()  # as if the process had been killed before the shard got its name
    run(home, out)
    assert content(out) == content(whole)


def test_what_was_made_otherwise_is_not_mixed_in(home: Path, whole: Path, tmp_path: Path) -> None:
    for how, ranker, name in ((How(captions=4), "stage1", "captions"), (HOW, "clip", "ranker")):
        with pytest.raises(UserError, match=f"was made with another {name}: give the same"):
            run(home, whole, how, ranker)
    stats = json.loads((whole / "00001_stats.json").read_text())
    out = tmp_path / "out"
    run(home, out)
    (out / "00001_stats.json").write_text(json.dumps(stats | {"settings": "others"}))
    with pytest.raises(UserError, match=r"00001.tar: was made by another program or with other settings"):
        run(home, out)
    (out / "00001_stats.json").unlink()
    (out / "00077.tar").touch()
    with pytest.raises(UserError, match=r"contains other shards \(00077.tar\)"):
        run(home, out)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "1.tar").touch()
    with pytest.raises(UserError, match="contains other shards"):
        run(home, tmp_path / "strange")


def test_weights_are_known_by_what_they_are_and_not_by_their_names(home: Path, tmp_path: Path) -> None:
    told = digests(*tiny_capfilt.models(home, "clip"), False)
    copytree(home / "stage2", tmp_path / "moved")
    copytree(home / "clip", tmp_path / "clip")
    moved = str(tmp_path / "moved"), str(tmp_path / "clip")
    assert digests(*moved, False) == told
    copytree(home / "stage1", tmp_path / "other")
    tensors = bytearray((tmp_path / "moved" / "model.safetensors").read_bytes())
    tensors[-1] ^= 1
    (tmp_path / "moved" / "model.safetensors").write_bytes(tensors)
    assert digests(*moved, False)["captioner"] != told["captioner"]
    (tmp_path / "clip" / "preprocessor_config.json").write_text("{}")
    assert digests(*moved, False)["ranker"] != told["ranker"]


def test_what_is_bad_is_left_out_counted_and_named(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    samples = [sample(0, n, "a dog", url=f"u{n}") for n in range(5)]
    samples[1] = samples[1]._replace(image=b"no picture")
    samples[2] = samples[2]._replace(captions=())
    write_shard(folder / "00000.tar", samples)
    with tarfile.open(folder / "00000.tar", "a") as tar:

        def add(name: str, body: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))

        add("odd.jpg", samples[0].image)
        add("odd.json", b"{not json")
        add("long.jpg", samples[0].image)
        add("long.txt", b"word " * 200_000)
        add("./dot.jpg", samples[0].image)
        add("wide.jpg", samples[0].image)
        add("wide.txt", b"a dog " * 10_000)  # within the limits of captions, but too long for every model
    (folder / "00001.tar").write_bytes((home / "set" / "00002.tar").read_bytes()[:9000])  # truncated
    (folder / "00002.tar").mkdir()
    for ranker in ("stage1", "clip"):
        out = tmp_path / ranker
        written = capfilt(str(folder), *tiny_capfilt.models(home, ranker), out, HOW, QUIET)
        assert written.shards == 2
        assert len(written.dead) == 1
        assert "00002.tar: cannot be opened" in written.dead[0]
        found = samples_of(out)
        assert {"000000000", "000000002", "odd", "long", "dot", "wide"} <= found.keys()
        assert "000000001" not in found
        assert all(one.about["captions"][0]["from"] == "captioner" for one in (found["000000002"], found["long"]))
        assert written.counts["broken"] == 1
        log = (out / "00000_log.jsonl").read_text()
        for words in ("not a picture in a known format", "odd.json: is not JSON", "long.txt: has 1,000,000 bytes"):
            assert words in log
        assert "cut off" in (out / "00001_log.jsonl").read_text()
        stats = json.loads((out / "00000_stats.json").read_text())
        assert stats["successes"] == stats["counts"]["pictures"] == len(list(read_tar(str(out / "00000.tar"), print)))
    (folder / "00002.tar").rmdir()
    with pytest.raises(UserError, match="none of the 1 shards can be read"):
        capfilt(str(folder / "00009.tar"), *tiny_capfilt.models(home), tmp_path / "none", HOW, QUIET)


def test_training_draws_one_of_the_two(home: Path, whole: Path, tmp_path: Path) -> None:
    kept = {one.key: set(one.captions) for one in samples_of(whole).values()}
    assert {len(texts) for texts in kept.values()} >= {2}
    parts = count_parts(read_parts(str(whole)), pytest.fail)
    pairs = ShardPairs(parts, 13, 0, 12, 2, pytest.fail)
    drawn: dict[str, set[str]] = {}
    for number in range(100):
        batch = pairs(number)
        for name, caption in zip(batch.names or (), batch.captions, strict=True):
            drawn.setdefault(name.split(": ")[1].split(".")[0], set()).add(caption)
    assert drawn == kept
    options = [
        *tiny_runs.options(home),
        "--set",
        "data.held_out=0.2",
        "--set",
        f"data.max_tokens={tiny_capfilt.TOKENS}",
    ]
    said = call("train", "stage1", "--data", whole, "--out", tmp_path / "run", *options)
    assert said.code == 0, said.err


def test_the_command(home: Path, whole: Path, tmp_path: Path) -> None:
    both = ["--captioner", home / "stage2", "--ranker", home / "stage1"]
    said = call("capfilt", home / "set", *both, "--out", tmp_path / "out", "--captions", 3)
    assert said.code == 0, said.err
    assert said.out.startswith(f"{tmp_path / 'out'}: 52 pictures in 3 shards, ")
    assert content(tmp_path / "out") == content(whole)

    def refused(*words: object, data: Path = home / "set", out: str = "refused", **models: object) -> str:
        named = {"captioner": home / "stage2", "ranker": home / "stage1"} | models
        given = [word for name, model in named.items() for word in (f"--{name}", model)]
        said = call("capfilt", data, *given, "--out", tmp_path / out, *words)
        assert said.code == 2, (said.out, said.err)
        return said.err

    (tmp_path / "empty").mkdir()
    for err, words in (
        (refused(captioner=home / "stage1"), "is a stage-1 run, which cannot write text"),
        (refused(captioner=home / "clip"), "another architecture"),
        (refused(ranker=home / "stage2"), "is a stage-2 run, which cannot rank"),
        (refused(ranker=home / "vision"), "does not compare pictures with texts"),
        (refused(ranker=home / "data"), "no config.json"),
        (refused(ranker=home / "nothing"), "no such file, folder or hub name"),
        (refused("--filter", "itm", ranker=home / "clip"), "--filter itm needs a stage-1 run"),
        (refused("--filter", "best"), "--filter best: it must be similarity or itm"),
        (refused("--threshold", 0.3), "--threshold is only for --filter itm"),
        (refused("--filter", "itm", "--threshold", 1.5), "--threshold 1.5: it must be a probability"),
        (refused("--top-p", 0), "--top-p 0.0: it must be above 0"),
        (refused("--part", "3/2"), "--part '3/2': write it as K/N"),
        (refused("--part", "4/4"), "this part of 3 shards is empty"),
        (refused(data=tmp_path / "empty"), "contains no .tar file"),
        (refused(data=home / "set" / "00000.jpg"), "it must end in .tar"),
        (refused(data=tmp_path / "out", out="out"), "is in --out"),
        (refused(data=home / f"set/00000.tar::{whole}/00000.tar"), "they have the same name"),
    ):
        assert err.startswith("openblip2: ")
        assert words in err
        assert err.count("\n") == 1, err
    assert (
        "greater than or equal to 1"
        in call("capfilt", home / "set", *both, "--out", tmp_path / "out", "--captions", 0).err
    )


def test_a_captioner_that_reads_questions_is_refused(home: Path, tmp_path: Path) -> None:
    copytree(home / "stage2", tmp_path / "asks")
    config = json.loads((tmp_path / "asks" / "config.json").read_text())
    config["settings"]["qformer"]["question_in_qformer"], config["settings"]["task"] = True, "vqa"
    (tmp_path / "asks" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="answers questions; give a run that writes captions"):
        capfilt(str(home / "set"), str(tmp_path / "asks"), str(home / "clip"), tmp_path / "out", HOW, QUIET)


def test_a_json_that_grew_too_long_leaves_the_captions(home: Path, tmp_path: Path) -> None:
    samples = [sample(0, 0, "a dog", alt="é" * 400_000), sample(0, 1, "a cat", alt="short")]
    (tmp_path / "set").mkdir()
    with tarfile.open(write_shard(tmp_path / "set" / "00000.tar", samples[1:]), "a") as tar:
        bodies = {"jpg": samples[0].image, "txt": b"a dog", "json": json.dumps(samples[0].about, ensure_ascii=False)}
        for suffix, body in bodies.items():
            content = body.encode() if isinstance(body, str) else body
            info = tarfile.TarInfo(f"{samples[0].key}.{suffix}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    capfilt(str(tmp_path / "set"), *tiny_capfilt.models(home), tmp_path / "out", HOW, QUIET)
    found = samples_of(tmp_path / "out")
    assert found[samples[0].key].about.keys() == {"captions"}
    assert found[samples[1].key].about["alt"] == "short"
    assert "its .json would be too long" in (tmp_path / "out" / "00000_log.jsonl").read_text()


def test_rankers_encode_each_picture_and_text_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ranker = open_models(*tiny_capfilt.models(home), False)
    assert isinstance(ranker, RunRanker)
    vision = ranker.matcher.model.vision
    assert vision is not None
    rows: list[int] = []
    vision.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    picture = PictureFile(next(read_tar(str(home / "set" / "00000.tar"), pytest.fail)).image, "")
    texts, owners = ["a dog", "a cat", "a bus", "a dog", "a dog"], [0, 1, 1, 1, 2]
    scores = ranker.scores([ranker.pixels(picture)] * 3, texts, owners)
    assert rows == [3]
    assert len(scores) == 5
    assert scores[0] == pytest.approx(scores[3], abs=1e-5)


def test_a_broken_clip_is_one_line(home: Path, tmp_path: Path) -> None:
    copytree(home / "clip", tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match=r"ranker .* cannot be loaded"):
        ClipRanker(tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "clip" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"ranker .* cannot be loaded"):
        ClipRanker(tmp_path / "clip")
