import json
from pathlib import Path

import pytest
from PIL import Image

import tiny_runs
from openblip2.data.records import Record, read_records
from openblip2.data.web import expand
from openblip2.data.web.tars import read_tar
from openblip2.data.web.write_shards import write_shards
from openblip2.errors import UserError
from test_cli import call


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_records_become_shards_and_nothing_of_them_is_lost(tmp_path: Path) -> None:
    records, _ = read_records(tiny_runs.pictures(tmp_path / "data", 11))
    records[3] = Record("twice", records[3].image, ("one", "two"))
    written = write_shards(records, tmp_path / "out", size=4)
    assert written == (3, 11, [])
    shards = expand(str(tmp_path / "out"))
    samples = [sample for shard in shards for sample in read_tar(shard, pytest.fail)]
    assert len({sample.key for sample in samples}) == 11
    found = {sample.about["image_id"]: sample for sample in samples}
    assert found.keys() == {record.id for record in records}
    for record in records:
        assert found[record.id].captions == record.captions
        assert found[record.id].image == record.image.read_bytes()
    assert [sample.about["image_id"] for sample in samples] != [record.id for record in records]  # shuffled
    stats = [json.loads(Path(shard.replace(".tar", "_stats.json")).read_text()) for shard in shards]
    assert [row["successes"] for row in stats] == [4, 4, 3]


def test_an_interrupted_run_is_gone_on_with(tmp_path: Path) -> None:
    records, _ = read_records(tiny_runs.pictures(tmp_path / "data", 9))
    whole = write_shards(records, tmp_path / "whole", size=4)
    out = tmp_path / "out"

    behind = 0

    def dies(count: int) -> None:
        nonlocal behind
        behind += count
        if behind == 6:  # after the second sample of the second shard
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(records, out, size=4, advance=dies)
    before = (out / "00000.tar").stat().st_mtime_ns
    (out / ".00001.tar.new").write_bytes(b"half")
    assert write_shards(records, out, size=4) == whole
    assert (out / "00000.tar").stat().st_mtime_ns == before
    assert content(out) == content(tmp_path / "whole")
    for others, size in ((records[1:], 4), (records, 5), (records[:2], 1)):
        with pytest.raises(UserError, match="other records"):
            write_shards(others, out, size=size)


def test_a_shard_of_another_program_is_not_replaced(tmp_path: Path) -> None:
    records, _ = read_records(tiny_runs.pictures(tmp_path / "data", 3))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "00000.tar").write_bytes(b"of another program")
    with pytest.raises(UserError, match=r"00000.tar: was made by another program or with other records: give another"):
        write_shards(records, tmp_path / "out")
    assert (tmp_path / "out" / "00000.tar").read_bytes() == b"of another program"


def test_what_cannot_be_taken_is_named(tmp_path: Path) -> None:
    folder = tiny_runs.pictures(tmp_path / "data", 5)
    records, _ = read_records(folder)
    records[1].image.write_bytes(b"no picture")
    (folder / "odd.xyz").write_bytes(records[0].image.read_bytes())
    records.append(Record("odd", folder / "odd.xyz", ("odd",)))
    _, samples, skipped = write_shards(records, tmp_path / "out")
    assert samples == 4
    assert sorted(line.split(":")[0] for line in skipped) == [str(records[1].image), str(folder / "odd.xyz")]
    with pytest.raises(UserError, match="none of the pictures"):
        write_shards([records[1]], tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be created"):
        write_shards(records, tmp_path / "file")


def test_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(3):
        Image.new("RGB", (9, 9)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"caption {n}\nanother {n}\n")
    said = call("prepare", folder, "--out", tmp_path / "out", "--size", 2)
    assert (said.code, said.out.splitlines()[-1]) == (0, f"{tmp_path / 'out'}: 3 samples in 2 shards")
    captions = {sample.captions for shard in expand(str(tmp_path / "out")) for sample in read_tar(shard, pytest.fail)}
    assert captions == {(f"caption {n}", f"another {n}") for n in range(3)}
    said = call("prepare", tmp_path / "nothing", "--out", tmp_path / "out")
    assert (said.code, said.err.count("\n")) == (2, 1)


def test_easy_vqa_needs_a_split(tmp_path: Path) -> None:
    said = call("prepare", "easy-vqa", "--out", tmp_path / "out")
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "--split train or --split test" in said.err
    assert not (tmp_path / "out").exists()
