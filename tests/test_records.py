"""Reading and writing data: every source, every kind of bad row, and reading back what was written."""

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_runs
from openblip2.data.records import Question, Record, read_records, write_records
from openblip2.data.rows import LISTS, read_rows
from openblip2.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with three picture files. Their content does not matter: reading records opens no picture."""
    root = tmp_path / "data"
    (root / "sub").mkdir(parents=True)
    for name in ("cat.jpg", "dog.PNG", "sub/bus.webp"):
        (root / name).write_bytes(b"a picture")
    return root


def jsonl(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


GOOD = {"image": "cat.jpg", "caption": "a cat"}


# --- sources


def test_json_lines_with_one_or_several_captions(folder: Path) -> None:
    path = jsonl(
        folder,
        {"image": "cat.jpg", "caption": "A cat."},
        "",
        {
            "image": "sub/bus.webp",
            "captions": ["a bus", "a red bus"],
            "id": 7,
            "questions": [{"text": "what colour?", "answer": "red", "kind": "open"}],
            "facts": {"noun": "bus"},
            "licence": "unknown keys are not ours to judge",
        },
    )
    records, skipped = read_records(path)
    assert skipped == []
    assert records == [
        Record("cat.jpg", folder / "cat.jpg", ("A cat.",)),
        Record(
            "7",
            folder / "sub/bus.webp",
            ("a bus", "a red bus"),
            (Question("what colour?", "red", "open"),),
            {"noun": "bus"},
        ),
    ]


def test_a_folder_with_records_jsonl_is_read_through_it(folder: Path) -> None:
    jsonl(folder, GOOD, name="records.jsonl")
    (folder / "dog.txt").write_text("not asked for")
    assert [record.captions for record in read_records(folder)[0]] == [("a cat",)]


@pytest.mark.parametrize(("name", "tab"), [("rows.csv", ","), ("rows.tsv", "\t"), ("ROWS.CSV", ",")])
def test_table_rows_of_one_image_become_one_record(folder: Path, name: str, tab: str) -> None:
    lines = [
        ["Caption", "width", " image"],
        ['"a cat, ""Tom"""', "10", "cat.jpg"],
        ["a dog", "20", "dog.PNG"],
        [],
        ['"a cat\non two lines"', "10", "./cat.jpg"],
    ]
    (folder / name).write_text("\ufeff" + "\n".join(tab.join(line) for line in lines), encoding="utf-8")
    records, skipped = read_records(folder / name)
    assert skipped == []
    assert records == [
        Record("cat.jpg", folder / "cat.jpg", ('a cat, "Tom"', "a cat\non two lines")),
        Record("dog.PNG", folder / "dog.PNG", ("a dog",)),
    ]


def test_json_rows_of_one_image_are_joined_like_table_rows(folder: Path) -> None:
    question = {"text": "what?", "answer": "cat", "kind": "open"}
    path = jsonl(folder, GOOD, {"image": "sub/../cat.jpg", "caption": "my cat", "questions": [question]})
    assert read_records(path)[0] == [
        Record("cat.jpg", folder / "cat.jpg", ("a cat", "my cat"), (Question("what?", "cat", "open"),))
    ]


def test_a_folder_of_pictures_with_text_beside_them(folder: Path) -> None:
    (folder / "cat.txt").write_text("a cat\n\n  \nmy cat\n")
    (folder / "sub/bus.txt").write_text("\ufeffein Bus, grün", encoding="utf-8")
    (folder / "README.txt").write_text("about these pictures")
    (folder / ".hidden.jpg").write_bytes(b"of the system's own")
    records, skipped = read_records(folder)
    assert records == [
        Record("cat.jpg", folder / "cat.jpg", ("a cat", "my cat")),
        Record("sub/bus.webp", folder / "sub/bus.webp", ("ein Bus, grün",)),
    ]
    assert [tiny_runs.REMEDY.split(line)[0] for line in skipped] == [
        f"{folder / 'dog.PNG'}: no caption file",
        f"{folder / 'README.txt'}: no picture for it",
    ]


@pytest.mark.parametrize("content", [b"", b" \n ", b"\xff\xfe\xff"])
def test_a_caption_file_that_is_empty_or_not_text_costs_its_picture_only(folder: Path, content: bytes) -> None:
    (folder / "cat.txt").write_bytes(content)
    (folder / "dog.txt").write_text("a dog")
    records, skipped = read_records(folder)
    assert [record.id for record in records] == ["dog.PNG"]
    assert skipped[0].startswith(f"{folder / 'cat.jpg'}: its caption file ")


# --- tables in the formats of other tools

FORMS = {
    "Hugging Face": ("metadata.csv", "file_name,text\ncat.jpg,a cat\ndog.PNG,a dog\n"),
    "Hugging Face, tab": ("rows.tsv", "file_name\ttext\ncat.jpg\ta cat\ndog.PNG\ta dog\n"),
    "Excel in German": ("rows.csv", "image;caption\r\ncat.jpg;a cat\r\ndog.PNG;a dog\r\n"),
    "Excel with sep": ("rows.csv", "sep=;\r\nimage;caption\r\ncat.jpg;a cat\r\ndog.PNG;a dog\r\n"),
    "Excel with sep=|": ("rows.csv", '"sep=|"\nimage|caption\ncat.jpg|a cat\ndog.PNG|a dog\n'),
    "Excel with a tab": ("rows.csv", "sep=\t\nimage\tcaption\ncat.jpg\ta cat\ndog.PNG\ta dog\n"),
    "tabs in a .csv": ("rows.csv", "image_path\tcaption\ncat.jpg\ta cat\ndog.PNG\ta dog\n"),
    "pandas": ("rows.csv", ",filename,captions\n0,cat.jpg,\"['a cat']\"\n1,dog.PNG,\"['a dog']\"\n"),
    "pandas, JSON": ("rows.csv", 'raw,filename\n"[""a cat""]",cat.jpg\na dog,dog.PNG\n'),
    "Flickr8k": ("captions.txt", "image,caption\ncat.jpg,a cat\ndog.PNG,a dog\n"),
    "Flickr30k": ("results.csv", "image_name| comment_number| comment\ncat.jpg| 0| a cat\ndog.PNG| 1| a dog\n"),
    "JSON lines": (
        "metadata.jsonl",
        '{"file_name": "cat.jpg", "text": "a cat"}\n{"file_name": "dog.PNG", "captions": "a dog"}\n',
    ),
    "JSON, lists": (
        "rows.jsonl",
        '{"filepath": "cat.jpg", "text": ["a cat"]}\n{"path": "dog.PNG", "caption": ["a dog"]}',
    ),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("form", FORMS)
def test_tables_as_other_tools_write_them(folder: Path, form: str, encoding: str) -> None:
    name, text = FORMS[form]
    (folder / name).write_text(text, encoding=encoding, newline="")
    for source in [folder / name, *([folder] if name in LISTS else [])]:
        records, skipped = read_records(source)
        assert skipped == []
        assert [(r.id, [c.strip() for c in r.captions]) for r in records] == (
            [("cat.jpg", ["a cat"]), ("dog.PNG", ["a dog"])]
        )


def test_our_own_names_go_before_those_of_others(folder: Path) -> None:
    path = jsonl(folder, {"path": "gone.jpg", "image": "cat.jpg", "text": "written on it", "caption": "a cat"})
    assert read_records(path)[0] == [Record("cat.jpg", folder / "cat.jpg", ("a cat",))]
    path = jsonl(folder, {"file_name": "cat.jpg", "text": None, "question": "what is it?", "answer": "a cat"})
    assert read_records(path, "questions")[0][0].captions == ()


def test_columns_with_other_names_are_named(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,label\ncat.jpg,3\n")
    (folder / "cat.txt").write_text("a cat")
    with pytest.raises(UserError, match=r"metadata\.csv:1: the first line is 'file_name,label'; .*caption.*rename"):
        read_records(folder)


@pytest.mark.parametrize("name", ["results_20130124.token", "Flickr8k.token.txt"])
def test_a_table_without_names_of_columns_says_how_to_name_them(folder: Path, name: str) -> None:
    rows = "cat.jpg#0\ta cat\ncat.jpg#1\tthe cat\ndog.PNG#0\ta dog\n"
    (folder / name).write_text(rows)
    remedy = "add image<TAB>caption as line 1, and remove #0, #1, ... from the names"
    with pytest.raises(UserError, match=rf"{name}:1: the first line is 'cat.jpg#0\\ta cat'; no line .*{remedy}"):
        read_records(folder / name)
    (folder / name).write_text("image\tcaption\n" + re.sub(r"#\d\t", "\t", rows))
    assert [len(record.captions) for record in read_records(folder / name)[0]] == [2, 1]
    (folder / "rows.csv").write_text("cat.jpg,a cat\ndog.PNG,a dog\n")
    with pytest.raises(UserError, match=r"no line names the columns: add one before it, for example image,caption"):
        read_records(folder / "rows.csv")


def test_a_captions_txt_that_is_no_table_is_a_text_like_any_other(folder: Path) -> None:
    (folder / "captions.txt").write_text("about these captions")
    (folder / "cat.txt").write_text("a cat")
    assert [record.id for record in read_records(folder)[0]] == ["cat.jpg"]


def test_a_list_in_a_subfolder_is_named(folder: Path) -> None:
    (folder / "sub/metadata.csv").write_text("file_name,text\nbus.webp,a bus\n")
    (folder / "cat.txt").write_text("a cat")
    _, skipped = read_records(folder)
    assert any("bus.webp: no caption file: give" in line and "metadata.csv" in line for line in skipped)
    assert read_records(folder / "sub")[0][0].captions == ("a bus",)


def test_pictures_are_found_beside_a_table_of_flickr8k(folder: Path) -> None:
    (folder / "Images").mkdir()
    (folder / "Images/1.jpg").write_bytes(b"a picture")
    (folder / "captions.txt").write_text("image,caption\n1.jpg,a boy\n")
    assert read_records(folder)[0] == [Record("Images/1.jpg", folder / "Images/1.jpg", ("a boy",))]


def test_caption_files_by_any_name(folder: Path) -> None:
    (folder / "cat.jpg.txt").write_text("a cat")
    (folder / "DOG.TXT").write_text("ein Hündchen", encoding="utf-16")
    (folder / "sub/bus.jpg").write_bytes(b"another picture")
    (folder / "sub/bus.txt").write_text("a bus")
    records, skipped = read_records(folder)
    assert [(r.id, r.captions) for r in records] == [
        ("cat.jpg", ("a cat",)),
        ("dog.PNG", ("ein Hündchen",)),
        ("sub/bus.jpg", ("a bus",)),
    ]
    assert skipped == [f"{folder / 'sub/bus.webp'}: bus.txt is already used for bus.jpg: write a separate bus.webp.txt"]


def test_a_caption_file_in_another_encoding_is_named(folder: Path) -> None:
    (folder / "cat.txt").write_bytes("le café".encode("latin-1"))
    (folder / "dog.txt").write_text("a dog")
    assert "cat.jpg: its caption file cat.txt is not UTF-8 text: save it as UTF-8" in read_records(folder)[1][0]


def test_pictures_that_have_to_be_converted_are_counted(folder: Path) -> None:
    for name in ("a.HEIC", "b.heic", "c.dng"):
        (folder / name).write_bytes(b"a picture")
        (folder / name).with_suffix(".txt").write_text("its caption is not named on its own")
    (folder / "c.jpg").write_bytes(b"c.dng, converted")
    for name in ("d.jfif", "e.jpe", "f.pgm", "g.pnm"):
        (folder / name).write_bytes(b"a picture")
        (folder / name).with_suffix(".txt").write_text("a picture")
    for name in ("cat.jpg", "dog.PNG", "sub/bus.webp"):
        (folder / name).unlink()
    records, skipped = read_records(folder)
    assert [record.id for record in records] == ["c.jpg", "d.jfif", "e.jpe", "f.pgm", "g.pnm"]
    assert skipped == [
        f"{folder}: 1 .dng file is left out; convert it to JPEG",
        f"{folder}: 2 .heic files are left out; convert them to JPEG",
    ]


@pytest.mark.parametrize(("encoding", "word"), [("latin-1", "café"), ("gbk", "一只红色的猫")])
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_file_in_another_encoding_is_refused(folder: Path, name: str, encoding: str, word: str) -> None:
    captions = [f"{word} {n}" if n % 3 == 0 else f"a cat {n}" for n in range(12)]
    csv_ = "image,caption\n" + "".join(f"cat.jpg,{text}\n" for text in captions)
    json_ = "".join(json.dumps({"image": "cat.jpg", "caption": c}, ensure_ascii=False) + "\n" for c in captions)
    (folder / name).write_bytes((csv_ if name.endswith("csv") else json_).encode(encoding))
    with pytest.raises(UserError, match=rf"{name}: 4 of its 1\d lines are not UTF-8 text; save it as UTF-8"):
        read_records(folder / name)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16"])
def test_utf_16_that_cannot_be_read_is_named(folder: Path, encoding: str) -> None:
    content = "image,caption\ncat.jpg,a cat\n".encode(encoding)
    (folder / "rows.csv").write_bytes(content if encoding == "utf-16-le" else content[:-1])
    with pytest.raises(UserError, match=r"rows\.csv.* is not (valid )?UTF-(8|16) text[;:] save it as UTF-8"):
        read_records(folder / "rows.csv")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "records.jsonl"])
def test_a_git_lfs_pointer_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text(LFS)
    with pytest.raises(UserError, match=rf"{name}: is a git-LFS pointer, not the file itself: run `git lfs pull`"):
        read_records(folder if name == "records.jsonl" else folder / name)


def test_paths_hold_from_the_current_folder_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(folder, GOOD)
    monkeypatch.chdir(folder)
    (record,), _ = read_records(Path("rows.jsonl"))
    assert record.image.is_file()
    assert record.id == "cat.jpg"


# --- bad rows


BAD_ROWS = {
    "not JSON": ("{'image': 1}", "not JSON"),
    "cut off": ('{"image": "cat.jpg", "capt', "not JSON"),
    "no object": ("[1, 2]", "not an object"),
    "nested without end": ("[" * 100_000, "JSON"),
    "no image": ({"caption": "a cat"}, 'no "image"'),
    "image is a number": ({"image": 3, "caption": "a cat"}, 'no "image"'),
    "missing file": ({"image": "gone.jpg", "caption": "a cat"}, "'gone.jpg' is missing"),
    "folder for a file": ({"image": "sub", "caption": "a cat"}, "'sub' is missing"),
    "name with a zero": ({"image": "cat\0.jpg", "caption": "a cat"}, "is missing"),
    "endless name": ({"image": "x" * 5000, "caption": "a cat"}, "is missing"),
    "backslash": ({"image": "sub\\bus.webp", "caption": "a bus"}, "has a backslash: write /"),
    "address": ({"image": "http://example.org/a.jpg", "caption": "a cat"}, "pictures are not downloaded"),
    "pandas' nan": ({"image": "cat.jpg", "caption": "nan"}, "pandas writes a missing value"),
    "upwards": ({"image": "../cat.jpg", "caption": "a cat"}, "outside the data folder"),
    "upwards hidden": ({"image": "sub/../../data2/cat.jpg", "caption": "a cat"}, "outside the data folder"),
    "absolute": ({"image": "/cat.jpg", "caption": "a cat"}, "outside the data folder"),
    "no caption": ({"image": "cat.jpg"}, "no caption"),
    "misspelt": ({"image": "cat.jpg", "captoin": "a cat"}, "no caption"),
    "both": (
        {"image": "cat.jpg", "caption": "a cat", "captions": ["a cat"]},
        'both "caption" and "captions"',
    ),
    "empty caption": ({"image": "cat.jpg", "caption": ""}, "the caption '' is empty"),
    "blank caption": ({"image": "cat.jpg", "caption": " \t"}, "is empty: at least one word is needed"),
    "caption of dots": ({"image": "cat.jpg", "caption": "(...)"}, "is empty: at least one word is needed"),
    "one of several empty": ({"image": "cat.jpg", "captions": ["a cat", ""]}, "is empty"),
    "no captions": ({"image": "cat.jpg", "captions": []}, "no caption"),
    "captions are an object": ({"image": "cat.jpg", "captions": {"a": "cat"}}, "caption is not text"),
    "caption is null": ({"image": "cat.jpg", "caption": None}, "caption is not text"),
    "caption is a number": ({"image": "cat.jpg", "captions": [4]}, "caption is not text"),
    "half a character": ('{"image": "cat.jpg", "caption": "a \\ud800 cat"}', "caption is not text"),
    "id is a list": ({**GOOD, "id": [1]}, '"id"'),
    "id is true": ({**GOOD, "id": True}, '"id"'),
    "id is blank": ({**GOOD, "id": ""}, '"id"'),
    "facts are text": ({**GOOD, "facts": "a cat"}, '"facts"'),
    "questions are text": ({**GOOD, "questions": "what?"}, '"questions"'),
    "question is text": ({**GOOD, "questions": ["what?"]}, "a question without text"),
    "no answer": ({**GOOD, "questions": [{"text": "what?", "kind": "open"}]}, "has no answer"),
    "answer is a number": (
        {**GOOD, "questions": [{"text": "how many?", "answer": 2, "kind": "number"}]},
        "has no answer",
    ),
    "unknown kind": (
        {**GOOD, "questions": [{"text": "what?", "answer": "cat", "kind": "opn"}]},
        "one of open, yes/no, number",
    ),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_skipped_and_named(folder: Path, kind: str) -> None:
    row, what = BAD_ROWS[kind]
    (folder.parent / "cat.jpg").write_bytes(b"outside")
    path = jsonl(folder, {"image": "dog.PNG", "caption": "a dog"}, row, {"image": "sub/bus.webp", "caption": "b"})
    records, skipped = read_records(path)
    assert [record.captions for record in records] == [("a dog",), ("b",)]
    (line,) = skipped
    assert line.startswith(f"{path}:2: ")
    assert what in line
    assert tiny_runs.REMEDY.search(line), "says what would be right"
    assert "\n" not in line
    assert len(line) < len(str(path)) + 400


def test_a_line_that_is_not_utf8_costs_itself_only(folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_bytes(b'{"image": "cat.jpg", "caption": "caf\xe9"}\n' + json.dumps(GOOD).encode())
    records, skipped = read_records(path)
    assert len(records) == 1
    assert skipped[0].startswith(f"{path}:1: not UTF-8")


def test_one_id_stands_for_one_image(folder: Path) -> None:
    path = jsonl(folder, {**GOOD, "id": "x"}, {"image": "dog.PNG", "caption": "a dog", "id": "x"})
    records, skipped = read_records(path)
    assert [record.image.name for record in records] == ["cat.jpg"]
    assert f"{path}:2: id 'x' is already used for" in skipped[0]


def test_two_rows_of_one_image_cannot_tell_different_facts(folder: Path) -> None:
    path = jsonl(folder, {**GOOD, "facts": {"n": 1}}, GOOD, {**GOOD, "facts": {"n": 2}}, {**GOOD, "facts": {"n": 1}})
    (record,), skipped = read_records(path)
    assert record.facts == {"n": 1}
    assert len(record.captions) == 3
    assert len(skipped) == 1
    assert skipped[0].startswith(f'{path}:3: "facts" differs')


def test_bad_table_rows_are_skipped_and_named(folder: Path) -> None:
    path = folder / "rows.csv"
    path.write_bytes(
        b"image,caption\n"
        b"cat.jpg,a cat, sitting\n"  # 2: the comma makes a third cell
        b"cat.jpg\n"  # 3
        b'cat.jpg,"a "big" cat"\n'  # 4: quotation marks not doubled
        b"cat.jpg,caf\xe9\n"  # 5: not UTF-8
        b"../cat.jpg,a cat\n"  # 6
        b"cat.jpg,\n"  # 7
        b"cat.jpg,a cat\n"
        b'dog.PNG,"never closed\n'  # 9
        b"dog.PNG,a dog\n"
    )
    (cat, dog), skipped = read_records(path)
    assert (cat.captions, dog.captions) == (("a cat",), ("a dog",))
    assert [line.removeprefix(f"{path}:").split(":")[0] for line in skipped] == [*"2345679"]
    for line, what in zip(
        skipped,
        [
            "3 cells",
            "1 cell for 2 columns",
            "not a table row",
            "not Unicode",
            "outside",
            "is empty",
            "mark is not closed",
        ],
        strict=True,
    ):
        assert what in line


@pytest.mark.parametrize("closed", [True, False])
def test_a_quotation_mark_that_is_not_closed_costs_its_row_only(folder: Path, closed: bool) -> None:
    rows = [f"cat.jpg,a cat {n}" for n in range(500)]
    rows[20] = 'dog.PNG,"a dog'
    if closed:  # the rows between the two marks must not become one caption
        rows[400] += '"'
    (folder / "rows.csv").write_text("image,caption\n" + "\n".join(rows) + "\n")
    (record,), (line,) = read_records(folder / "rows.csv")
    assert len(record.captions) == 499
    assert line.startswith(f"{folder / 'rows.csv'}:22: a quotation mark is not closed: ")


@pytest.mark.parametrize("image_first", [True, False])
def test_a_text_of_several_lines_is_one_row(folder: Path, image_first: bool) -> None:
    columns = ("image", "caption"), ("cat.jpg", '"a cat, alone\non a mat,\nasleep"'), ("dog.PNG", "a dog")
    lines = [",".join(row if image_first else row[::-1]) for row in columns]
    (folder / "rows.csv").write_text("\n".join(lines))
    records, skipped = read_records(folder / "rows.csv")
    assert [record.captions for record in records] == [("a cat, alone\non a mat,\nasleep",), ("a dog",)]
    assert skipped == []


def test_a_text_of_very_many_lines_is_not_read(folder: Path) -> None:
    (folder / "rows.csv").write_text('image,caption\ncat.jpg,a cat\ncat.jpg,"a' + "\nnothing" * 200)
    (record,), skipped = read_records(folder / "rows.csv")
    assert record.captions == ("a cat",)
    assert len(skipped) == 201
    assert skipped[0].startswith(f"{folder / 'rows.csv'}:3: a quotation mark is not closed")


CAPTIONS = st.text(st.sampled_from("ab ,"), min_size=1, max_size=6).filter(str.strip)


@settings(max_examples=100, deadline=None)
@given(
    captions=st.lists(CAPTIONS, min_size=1, max_size=30),
    missing=st.sets(st.integers(0, 29)),
    open_at=st.none() | st.integers(0, 29),
    image_first=st.booleans(),
    form=st.sampled_from([("rows.csv", ","), ("rows.tsv", "\t"), ("captions.txt", ","), ("rows.csv", ";")]),
    columns=st.sampled_from([("image", "caption"), ("file_name", "text"), ("filename", "captions")]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_every_row_is_used_or_named(
    captions: list[str],
    missing: set[int],
    open_at: int | None,
    image_first: bool,
    form: tuple[str, str],
    columns: tuple[str, str],
    encoding: str,
) -> None:
    (name, mark), order = form, 1 if image_first else -1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        Path(folder, "here.png").write_bytes(b"")
        lines = [mark.join(columns[::order])]
        for n, caption in enumerate(captions):
            text = f'"{caption}' if n == open_at else f'"{caption}"' if mark in caption else caption
            lines.append(mark.join(("gone.png" if n in missing else "here.png", text)[::order]))
        path.write_text("\n".join(lines) + "\n", encoding=encoding)
        assert len(list(read_rows(path))) == len(captions)
        if {*missing, open_at}.issuperset(range(len(captions))):
            return  # no row can be used
        records, skipped = read_records(path)
        assert sum(len(record.captions) for record in records) + len(skipped) == len(captions)


@settings(max_examples=60, deadline=None)
@given(
    pictures=st.sets(st.sampled_from(["a.jpg", "a.png", "A.JPG", "b.jfif", "b.ppm", "c.heic", "d.dng", "d.dng.png"])),
    texts=st.sets(
        st.sampled_from(["a.txt", "a.jpg.txt", "A.TXT", "b.TXT", "c.txt", "d.dng.txt", "e.txt", "b.ppm.txt"])
    ),
)
def test_every_picture_of_a_folder_is_used_or_named(pictures: set[str], texts: set[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in pictures | texts:
            Path(folder, name).write_text("a caption")
        rows = list(read_rows(Path(folder)))
    used = [row["image"] for _, row in rows if isinstance(row, dict)]
    lines = [f"{where}: {row}" for where, row in rows if isinstance(row, UserError)]
    assert len(used) == len(set(used))
    for name in pictures - set(used):
        sign = f"1 {name[-5:].lstrip('c')} file is left out" if name in ("c.heic", "d.dng") else f"{folder}/{name}: "
        assert any(sign.replace("1 d.dng", "1 .dng") in line for line in lines), (name, lines)


# --- sources without data


def test_no_usable_row_at_all_is_an_error_with_the_first_reason(folder: Path) -> None:
    path = jsonl(folder, {"image": "gone.jpg", "caption": "a cat"}, "nonsense")
    with pytest.raises(UserError, match=r"2 rows cannot be used; the first: .*rows\.jsonl:1: .*'gone\.jpg' is missing"):
        read_records(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.jsonl", b""),
        ("empty.csv", b""),
        ("header.csv", b"image,caption\n"),
        ("columns.csv", b"file,text\ncat.jpg,a cat\n"),
        ("twice.csv", b"image,image,caption\ncat.jpg,cat.jpg,a cat\n"),
        ("picture.png", b"\x89PNG\r\n\x1a\n"),
        ("notes.txt", b"a cat\n"),
        ("binary.jsonl", bytes(range(256)) * 4),
        ("no_suffix", b"{}"),
    ],
)
def test_a_file_without_data_is_an_error_that_names_it(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_records(folder / name)
    assert str(folder / name) in str(caught.value)
    assert tiny_runs.REMEDY.search(str(caught.value))
    assert "\n" not in str(caught.value)


def test_what_is_not_there_or_empty_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: does not exist"):
        read_records(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no picture with a caption; give a folder with"):
        read_records(tmp_path / "empty")
    with pytest.raises(UserError, match=r"3 rows cannot be used; the first: .*no caption file"):
        read_records(folder)
    (folder / "records.jsonl").mkdir()
    with pytest.raises(UserError, match=r"records\.jsonl: cannot be read \(Is a directory\)"):
        read_records(folder)


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=200), name=st.sampled_from(["a.jsonl", "a.csv", "a.tsv", "a.txt"]))
def test_no_bytes_bring_the_reader_down(content: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes((b"" if name == "a.jsonl" else b"image,caption\n") + content)
        with pytest.raises(UserError):
            read_records(path)


# --- writing


_words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).map(lambda text: f"w {text}")
_questions = st.builds(Question, _words, _words, st.sampled_from(["open", "yes/no", "number"]))
_facts = st.none() | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.integers() | st.booleans())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            _words,
            st.sampled_from(["a.png", "deep/b c.png"]),
            st.lists(_words, min_size=1),
            st.lists(_questions),
        ),
        min_size=1,
        unique_by=lambda row: row[0],
    ),
    facts=_facts,
)
def test_what_is_written_is_read_back(rows: list[Any], facts: dict[str, Any] | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "deep").mkdir()
        for picture in ("a.png", "deep/b c.png"):
            (folder / picture).touch()
        records = [Record(i, folder / p, tuple(c), tuple(q), facts) for i, p, c, q in rows]
        write_records(records, folder)
        assert read_records(folder) == (records, [])
        assert os.listdir(folder).count("records.jsonl") == 1
        assert len(os.listdir(folder)) == 3


def test_a_picture_outside_the_folder_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"cat\.jpg: is outside .*sub"):
        write_records([Record("1", folder / "cat.jpg", ("a cat",))], folder / "sub")
    assert not (folder / "sub/records.jsonl").exists()


def test_a_write_that_fails_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = [Record("1", folder / "cat.jpg", ("a cat",))]
    write_records(old, folder)
    before = sorted(os.listdir(folder))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_records([Record("2", folder / "dog.PNG", ("a dog",))], folder)
    assert read_records(folder)[0] == old
    assert sorted(os.listdir(folder)) == before


def test_questions_with_and_without_captions(folder: Path) -> None:
    path = jsonl(
        folder,
        {"image": "dog.PNG", "question": "what is it?", "answers": ["dog", "a dog", "dog"], "question_id": 7},
        {"image": "dog.PNG", "question": "is it a cat?", "answer": "no"},
        {"image": "sub/bus.webp", "question": "how many?", "answer": "2", "caption": "two buses"},
        {"image": "sub/bus.webp", "caption": "a bus"},
    )
    records, skipped = read_records(path, "questions")
    assert [record.questions for record in records] == [
        (
            Question("what is it?", "dog", "open", ("dog", "a dog", "dog"), "7"),
            Question("is it a cat?", "no", "yes/no"),
        ),
        (Question("how many?", "2", "number"),),
    ]
    assert [record.captions for record in records] == [(), ("two buses",)]
    assert [question.given for question in records[0].questions] == [("dog", "a dog", "dog"), ("no",)]
    assert len(skipped) == 1
    assert ":4: no question" in skipped[0]
    captioned, _ = read_records(path)
    assert [record.captions for record in captioned] == [("two buses", "a bus")]
    write_records(records, folder)
    assert read_records(folder, "questions")[0] == records


def test_a_table_of_questions(folder: Path) -> None:
    path = folder / "asked.csv"
    path.write_text("image,question,answer\ndog.PNG,what is it?,dog\ndog.PNG,,dog\n", encoding="utf-8")
    records, skipped = read_records(path, "questions")
    assert records[0].questions == (Question("what is it?", "dog", "open"),)
    assert ":3: a question without text" in skipped[0]
    with pytest.raises(UserError, match="no caption"):
        read_records(path)
