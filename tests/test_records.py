"""Reading and writing data: every source, every kind of bad row, and the way back."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_runs
from openblip2.data.records import Question, Record, read_records, write_records
from openblip2.data.rows import MOST_SWALLOWED, read_rows
from openblip2.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with three picture files. What is in them does not matter: reading records opens none."""
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
        f"{folder / 'README.txt'}: no picture beside it",
    ]


@pytest.mark.parametrize("content", [b"", b" \n ", b"\xff\xfe\xff"])
def test_a_caption_file_that_is_empty_or_not_text_costs_its_picture_only(folder: Path, content: bytes) -> None:
    (folder / "cat.txt").write_bytes(content)
    (folder / "dog.txt").write_text("a dog")
    records, skipped = read_records(folder)
    assert [record.id for record in records] == ["dog.PNG"]
    assert skipped[0].startswith(f"{folder / 'cat.jpg'}: its caption file ")


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
    "captions not a list": ({"image": "cat.jpg", "captions": "a cat"}, "no caption"),
    "caption is null": ({"image": "cat.jpg", "caption": None}, "not Unicode text"),
    "caption is a number": ({"image": "cat.jpg", "captions": [4]}, "not Unicode text"),
    "half a character": ('{"image": "cat.jpg", "caption": "a \\ud800 cat"}', "not Unicode text"),
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
    assert f"{path}:2: id 'x' already stands for" in skipped[0]


def test_two_rows_of_one_image_cannot_tell_different_facts(folder: Path) -> None:
    path = jsonl(folder, {**GOOD, "facts": {"n": 1}}, GOOD, {**GOOD, "facts": {"n": 2}}, {**GOOD, "facts": {"n": 1}})
    (record,), skipped = read_records(path)
    assert record.facts == {"n": 1}
    assert len(record.captions) == 3
    assert len(skipped) == 1
    assert skipped[0].startswith(f'{path}:3: other "facts"')


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
        b'dog.PNG,"never closed\n'  # 9: swallows what follows, and says so
        b"dog.PNG,a dog\n"  # 10
    )
    (record,), skipped = read_records(path)
    assert record.captions == ("a cat",)
    assert [line.removeprefix(f"{path}:").split(":")[0] for line in skipped] == [*"2345679", "10"]
    for line, what in zip(
        skipped,
        [
            "3 cells",
            "1 cells",
            "not a table row",
            "not Unicode",
            "outside",
            "is empty",
            "mark is not closed",
            "a part of line 9",
        ],
        strict=True,
    ):
        assert what in line


@pytest.mark.parametrize("closed", [True, False])
def test_a_quotation_mark_that_swallows_many_rows_is_refused(folder: Path, closed: bool) -> None:
    rows = [f"cat.jpg,a cat {n}" for n in range(500)]
    rows[20] = 'dog.PNG,"a dog'
    if closed:  # without this, all later rows would become one caption
        rows[400] += '"'
    (folder / "rows.csv").write_text("image,caption\n" + "\n".join(rows) + "\n")
    with pytest.raises(UserError, match=rf"rows\.csv:22: .*not closed: lines 22 to {402 if closed else 501} were"):
        read_records(folder / "rows.csv")


def test_a_text_of_many_lines_is_refused_where_no_line_looks_like_a_row(folder: Path) -> None:
    (folder / "rows.csv").write_text('image,caption\ncat.jpg,a cat\ncat.jpg,"a' + "\nnothing" * 200)
    with pytest.raises(UserError, match=r"rows\.csv:3: .*lines 3 to 203"):
        read_records(folder / "rows.csv")


CAPTIONS = st.text(st.sampled_from("ab ,"), min_size=1, max_size=6).filter(str.strip)


@settings(max_examples=100, deadline=None)
@given(
    captions=st.lists(CAPTIONS, min_size=1, max_size=30),
    missing=st.sets(st.integers(0, 29)),
    open_at=st.none() | st.integers(0, 29),
    image_first=st.booleans(),
)
def test_every_row_is_used_or_named(
    captions: list[str], missing: set[int], open_at: int | None, image_first: bool
) -> None:
    """Or the table is refused, which only a quotation mark that is not closed brings about."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.csv")
        Path(folder, "here.png").write_bytes(b"")
        lines = ["image,caption" if image_first else "caption,image"]
        for n, caption in enumerate(captions):
            text = f'"{caption}' if n == open_at else f'"{caption}"' if "," in caption else caption
            image = "gone.png" if n in missing else "here.png"
            lines.append(f"{image},{text}" if image_first else f"{text},{image}")
        path.write_text("\n".join(lines) + "\n")
        rows = list(read_rows(path)) if open_at is None or len(captions) - open_at <= MOST_SWALLOWED else None
        if rows is not None:
            assert len(rows) == len(captions)
        try:
            records, skipped = read_records(path)
        except UserError:
            return
        assert sum(len(record.captions) for record in records) + len(skipped) == len(captions)


# --- sources that are no data


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
    with pytest.raises(UserError, match="holds no picture with a caption; give a folder with"):
        read_records(tmp_path / "empty")
    with pytest.raises(UserError, match=r"3 rows cannot be used; the first: .*no caption file"):
        read_records(folder)
    (folder / "records.jsonl").mkdir()
    with pytest.raises(UserError, match=r"records\.jsonl: cannot be read \(Is a directory\)"):
        read_records(folder)


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=200), name=st.sampled_from(["a.jsonl", "a.csv", "a.tsv"]))
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
