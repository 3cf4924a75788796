import io
import json
import random
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest

import tiny_runs
from openblip2.data.web import expand
from openblip2.data.web.mixture import count_parts, read_parts
from openblip2.data.web.tars import MAX_CAPTION, MOST_HEADER, Sample, read_tar, tar_members
from openblip2.data.web.write_shards import write_tar
from openblip2.errors import UserError

Entry = tuple[str, bytes]


def made(path: Path, entries: list[Entry | tarfile.TarInfo], form: int = tarfile.GNU_FORMAT) -> Path:
    """Writes a tar file with the standard library."""
    with tarfile.open(path, "w", format=form) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
                continue
            member = tarfile.TarInfo(entry[0])
            member.size = len(entry[1])
            tar.addfile(member, io.BytesIO(entry[1]))
    return path


def read(path: Path | str) -> tuple[list[Sample], list[str]]:
    problems: list[str] = []
    return list(read_tar(str(path), problems.append)), problems


def sample(key: str, *captions: str, image: bytes = b"picture", **about: object) -> Sample:
    return Sample(key, image, "jpg", captions, about)


def written(path: Path, samples: list[Sample]) -> Path:
    with write_tar(path) as writer:
        for one in samples:
            writer.add(one)
    return path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_lie_where_the_standard_library_finds_them(tmp_path: Path, form: int) -> None:
    draw = random.Random(form)
    names = [f"{'d' * draw.randrange(1, 90)}/{n}{'x' * draw.randrange(80)}.jpg" for n in range(60)]
    names += [] if form == tarfile.USTAR_FORMAT else ["long/" * 60 + "a.jpg", "grün.jpg"]
    path = made(tmp_path / "a.tar", [(name, draw.randbytes(draw.randrange(1500))) for name in names], form)
    with tarfile.open(path) as theirs, path.open("rb") as file:
        expected = [(m.name, m.offset_data, m.size) for m in theirs]
        assert [tuple(m) for m in tar_members(file, path.stat().st_size, pytest.fail)] == expected


def test_a_pax_size_and_a_size_in_base_256_are_read(tmp_path: Path) -> None:
    big = tarfile.TarInfo("big.jpg")
    big.size = 9 * 2**30
    pax = tarfile.TarInfo("x.jpg")
    pax.pax_headers = {"comment": "no matter", "path": "real.jpg"}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(pax)
    with (tmp_path / "a.tar").open("ab") as file:
        file.truncate(3 * 512)  # the end-of-archive marker is missing
        file.seek(3 * 512)
        file.write(big.tobuf(tarfile.GNU_FORMAT) + big.tobuf(tarfile.PAX_FORMAT))
    problems: list[str] = []
    with (tmp_path / "a.tar").open("rb") as file:
        found = tar_members(file, 2**40, problems.append)
    assert [(m.name, m.size) for m in found] == [("real.jpg", 0), ("big.jpg", 9 * 2**30)]
    with (tmp_path / "a.tar").open("rb") as file:
        assert len(tar_members(file, (tmp_path / "a.tar").stat().st_size, problems.append)) == 1
    assert "big.jpg: the tar file is cut off in this member" in problems[-1]


def test_a_shard_as_img2dataset_writes_it(tmp_path: Path) -> None:
    about = {"caption": "a cat", "url": "u", "key": "000000000", "status": "success", "width": 3}
    path = made(
        tmp_path / "00000.tar",
        [
            ("000000000.jpg", b"1"),
            ("000000000.json", json.dumps(about).encode()),
            ("000000000.txt", b"a cat"),
            ("000000001.jpg", b"2"),
            ("000000001.json", b'{"caption": "a dog"}'),
            ("000000002.txt", b"a cow"),  # members in any order
            ("000000002.webp", b"3"),
            ("000000002.cls", b"7"),
            ("000000003.jpg", b"4"),
            ("000000003.json", b'{"caption": " ", "phrase": 3, "TEXT": "a bus"}'),
        ],
    )
    samples, problems = read(path)
    assert samples == [
        Sample("000000000", b"1", "jpg", ("a cat",), about),
        Sample("000000001", b"2", "jpg", ("a dog",), {"caption": "a dog"}),
        Sample("000000002", b"3", "webp", ("a cow",), {}),
        Sample("000000003", b"4", "jpg", ("a bus",), {"caption": " ", "phrase": 3, "TEXT": "a bus"}),
    ]
    assert problems == []


def test_what_capfilt_wrote_stands_above_the_web_caption(tmp_path: Path) -> None:
    scored = [{"text": "a cat on a mat", "score": 0.4}, {"text": "buy cats", "score": 0.3}]
    one = Sample("a/0", b"x", "jpg", ("a cat on a mat", "buy cats"), {"captions": scored, "url": "u"})
    path = written(tmp_path / "a.tar", [one, sample("b", "one", "two"), sample("c", "one"), sample("d")])
    samples, problems = read(path)
    assert problems == []
    assert samples[0] == one
    assert [s.captions for s in samples[1:]] == [("one", "two"), ("one",), ()]
    with tarfile.open(path) as tar:
        assert tar.extractfile("a/0.txt").read() == b"a cat on a mat"  # pyright: ignore[reportOptionalMemberAccess]
    # Captions that differ from those in `about` replace them.
    other = written(tmp_path / "b.tar", [one._replace(captions=("new",))])
    assert read(other)[0] == [Sample("a/0", b"x", "jpg", ("new",), {"url": "u"})]


def test_equal_samples_make_equal_bytes_and_nobody_sees_half_a_shard(tmp_path: Path) -> None:
    samples = [sample(f"{n:09}", f"grün {n}", url="u" * n, odd="\ud800") for n in range(5)]
    first, second = (written(tmp_path / name, samples) for name in ("a.tar", "b.tar"))
    assert first.read_bytes() == second.read_bytes()
    with suppress(KeyboardInterrupt), write_tar(tmp_path / "c.tar") as writer:
        writer.add(samples[0])
        assert not (tmp_path / "c.tar").exists()
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]


@pytest.mark.parametrize("key", ["", "a.b", "/a", "a/../b", "a\nb", "a\\b", "twice"])
def test_a_key_that_no_reader_would_take_is_not_written(tmp_path: Path, key: str) -> None:
    with write_tar(tmp_path / "a.tar") as writer:
        writer.add(sample("twice"))
        with pytest.raises(UserError, match="a new name without dots"):
            writer.add(sample(key))


def test_names_that_lead_out_and_links_are_left_out_and_named(tmp_path: Path) -> None:
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard = tarfile.TarInfo("hard.jpg")
    hard.type, hard.linkname = tarfile.LNKTYPE, "../x.jpg"
    pipe = tarfile.TarInfo("pipe.jpg")
    pipe.type = tarfile.FIFOTYPE
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    bad = ["/abs.jpg", "../up.jpg", "a/../../up.jpg", "C:/x.jpg", "\\x.jpg", "new\nline.jpg"]
    before = {path for path in tmp_path.rglob("*")}
    path = made(tmp_path / "a.tar", [*[(name, b"x") for name in bad], link, hard, pipe, folder, ("good.jpg", b"x")])
    samples, problems = read(path)
    assert [s.key for s in samples] == ["good"]
    assert len(problems) == len(bad) + 3
    assert all(str(path) in line and "\n" not in line for line in problems)
    assert {found for found in tmp_path.rglob("*")} - before == {path}  # nothing was unpacked


def test_a_header_without_measure_is_left_out_with_its_member(tmp_path: Path) -> None:
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 20 * MOST_HEADER
    follows = tarfile.TarInfo("short.jpg")
    path = tmp_path / "a.tar"
    good = tarfile.TarInfo("good.jpg")
    good.size = 1
    path.write_bytes(
        name.tobuf(tarfile.GNU_FORMAT)
        + bytes(name.size)
        + follows.tobuf(tarfile.GNU_FORMAT)
        + good.tobuf(tarfile.GNU_FORMAT)
        + b"x".ljust(512, b"\0")
        + bytes(1024)
    )
    samples, problems = read(path)
    assert [s.key for s in samples] == ["good"]
    assert len(problems) == 1
    assert "a header of 1,310,720 bytes" in problems[0]


def test_bad_members_cost_themselves_and_not_their_shard(tmp_path: Path) -> None:
    path = made(
        tmp_path / "a.tar",
        [
            ("0.jpg", b"x"),
            ("0.json", b"{not json"),
            ("0.txt", b"kept"),
            ("1.jpg", b"x"),
            ("1.txt", b"m" * 2**20),  # a caption of a megabyte
            ("2.jpg", b"x"),
            ("2.json", b'["no object"]'),
            ("3.jpg", b"x"),
            ("3.txt", b"\xff\xfe"),
            ("4.jpg", b"x"),
            ("4.json", b"[" * 100_000),
            ("5.jpg", b""),
            ("6.txt", b"no picture"),
            ("7.jpg", b"x"),
            ("7.jpg", b"again"),
            ("8.jpg", b"x"),
            ("8.json", json.dumps({"captions": ["ok", 5, "\ud800", "m" * (MAX_CAPTION + 1), " "]}).encode()),
            ("9.jpg", b"x"),
            ("9.json", json.dumps({"captions": 3}).encode()),
            ("9.txt", b"mine"),
            ("10.jpg", b"x"),
            ("10.json", b" " * (2**20 + 1)),
        ],
    )
    samples, problems = read(path)
    assert {s.key: s.captions for s in samples} == {
        **{str(n): () for n in (1, 2, 3, 4, 7, 10)},
        "0": ("kept",),
        "8": ("ok",),
        "9": ("mine",),
    }
    assert samples[0].about == {}
    names = ["0.json", "1.txt", "2.json", "3.txt", "4.json", "5.jpg", "6", "7.jpg", "8", "9.json", "10.json"]
    for name in names:
        assert any(line.startswith(f"{path}: {name}") and tiny_runs.REMEDY.search(line) for line in problems), name


def test_pictures_that_are_left_out_are_named(tmp_path: Path) -> None:
    entries = ["22.05.jpg", "22.05.txt", "a.HEIC", "b.jfif", "b.txt", "c.v1.pnm", "._d.jpg", "notes.md", "e.cls"]
    samples, problems = read(made(tmp_path / "a.tar", [(name, b"x") for name in entries]))
    assert [s.key for s in samples] == ["b"]
    assert [line.removeprefix(f"{tmp_path}/a.tar: ").split("; ") for line in problems] == [
        ["22.05.jpg: has a dot within its name, where webdataset begins the suffix", "rename it"],
        ["a.HEIC: this picture format is not supported", "convert it to JPEG"],
        ["c.v1.pnm: has a dot within its name, where webdataset begins the suffix", "rename it"],
    ]


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        (["s0.img", "s0.cap"], r"none of its 2 files is a picture \(s0\.img, \.\.\.\)"),
        (["22.05.jpg", "22.05.txt"], r"22\.05\.jpg: has a dot within its name"),
        (["s0.txt"], r"s0: no image; add s0\.jpg"),
    ],
)
def test_shards_without_a_sample_say_why(tmp_path: Path, entries: list[str], why: str) -> None:
    made(tmp_path / "a.tar", [(name, b"x") for name in entries])
    problems: list[str] = []
    with pytest.raises(UserError, match=f"none of its 1 shards contains a sample; the first problem: .*{why}"):
        count_parts(read_parts(str(tmp_path / "a.tar")), problems.append)
    assert problems


def test_a_shard_that_is_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=r"a\.tar: is a git-LFS pointer, not the file itself: run `git lfs pull`"):
        read(tmp_path / "a.tar")


@pytest.mark.parametrize("keep", [3 * 512 + 100, 4 * 512, 4 * 512 + 5, 6 * 512 + 200])
def test_a_shard_that_was_cut_off_gives_what_is_whole(tmp_path: Path, keep: int) -> None:
    path = made(tmp_path / "a.tar", [(f"{n}.jpg", b"x" * 512) for n in range(6)])
    path.write_bytes(path.read_bytes()[:keep])
    samples, problems = read(path)
    assert [s.key for s in samples] == [str(n) for n in range(keep // 1024)]
    assert len(problems) == 1
    assert "cut off" in problems[0]


def test_noise_is_named_and_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(random.Random(0).randbytes(5000))
    samples, problems = read(tmp_path / "a.tar")
    assert (samples, len(problems)) == ([], 1)
    assert "no tar header" in problems[0]
    for url in (str(tmp_path / "none.tar"), "memory://none.tar", "nosuch://x.tar"):
        with pytest.raises(UserError, match="tar"):
            read(url)


def test_flipped_bytes_never_raise(tmp_path: Path) -> None:
    whole = written(tmp_path / "a.tar", [sample(f"{n}", "a", "b", url="u" * 700) for n in range(4)]).read_bytes()
    draw = random.Random(7)
    for _ in range(300):
        broken = bytearray(whole)
        for _ in range(draw.randrange(1, 6)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        (tmp_path / "b.tar").write_bytes(broken)
        samples, _ = read(tmp_path / "b.tar")
        assert len(samples) <= 6


def test_a_remote_shard_reads_as_a_local_one(tmp_path: Path) -> None:
    import fsspec

    path = written(tmp_path / "a.tar", [sample("0", "one"), sample("1", "two")])
    with fsspec.open("memory://shards/a.tar", "wb") as file:
        file.write(path.read_bytes())  # pyright: ignore[reportAttributeAccessIssue]
    assert read("memory://shards/a.tar") == read(path)
    assert read(path.as_uri())[0] == read(path)[0]


def test_what_names_shards(tmp_path: Path) -> None:
    for name in ("00001.tar", "00000.tar", ".half.tar", "notes.txt"):
        (tmp_path / name).touch()
    two = [str(tmp_path / name) for name in ("00000.tar", "00001.tar")]
    assert expand(str(tmp_path)) == expand(f"{tmp_path}/*.tar") == expand(f"{tmp_path}/{{00000..00001}}.tar") == two
    assert expand(f"{two[1]}::{two[0]}") == [two[1], two[0]]
    assert expand("s3://b/{9..11}-{a,b}.tar")[:3] == ["s3://b/9-a.tar", "s3://b/9-b.tar", "s3://b/10-a.tar"]
    assert len(expand("{00000..00999}.tar")) == 1000
    (tmp_path / "empty").mkdir()
    for bad in ("", str(tmp_path / "empty"), "no*thing", "{5..3}.tar", "{0..9999}{0..9999}.tar", "a.tar::a.tar"):
        with pytest.raises(UserError, match=r"shard|\.tar"):
            expand(bad)
