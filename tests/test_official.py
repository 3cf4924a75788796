"""The official annotation files: each format as its authors publish it, every bad entry, and every unusable file."""

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny_runs
from openblip2.data.annotations import Pictures
from openblip2.data.records import Question, Record
from openblip2.data.sources import _recognised
from openblip2.data.sources import read_official as read_file
from openblip2.errors import UserError

# Pictures of every data set in one folder. Their content does not matter, because reading annotations opens none.
NAMES = [
    "train2014/COCO_train2014_000000057870.jpg",
    "val2014/COCO_val2014_000000391895.jpg",
    "val2014/COCO_val2014_000000522418.jpg",
    "val2014/COCO_val2014_000000184613.jpg",
    "test2015/COCO_test2015_000000262144.jpg",
    "flickr30k-images/1000092795.jpg",
    "flickr30k-images/1007129816.jpg",
    "nocaps/0013ea2087020901.jpg",
    "nocaps/00c04ae2c9fd7a3e.jpg",
    "nocaps/001464cfae2a30b8.jpg",
    "gqa/n161313.jpg",
    "gqa/2407890.jpg",
]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name in NAMES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"a picture")
    (tmp_path / "secret.jpg").write_bytes(b"outside")
    return root


Write = Callable[..., Path]


def read_official(path: Path, *arguments: Any) -> tuple[list[Record], list[str]]:
    _, records, skipped = read_file(path, *arguments)
    return records, skipped


def official_kind(path: Path) -> str:
    kind, _ = _recognised(json.loads(path.read_bytes()), path)
    return kind


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(content: Any, name: str = "annotations.json") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return write


# --- the files, in the published format


def coco_image(name: str, split: str, captions: list[Any], **changes: Any) -> dict[str, Any]:
    sentences = [
        {"tokens": str(raw).split(), "raw": raw, "imgid": 3, "sentid": 770337 + n} for n, raw in enumerate(captions)
    ]
    number = int(name[-16:-4])
    image = {"filepath": name[5:-17], "sentids": [770337], "filename": name, "imgid": 3, "split": split}
    return image | {"sentences": sentences, "cocoid": number} | changes


def dataset_coco() -> dict[str, Any]:
    return {
        "images": [
            coco_image("COCO_val2014_000000391895.jpg", "test", ["A man with a red helmet.", "Man riding a bike"]),
            coco_image("COCO_train2014_000000057870.jpg", "train", ["A restaurant has modern wooden tables."]),
            coco_image("COCO_val2014_000000522418.jpg", "restval", ["A woman cutting a cake."]),
            coco_image("COCO_val2014_000000184613.jpg", "val", ["A child holding an umbrella."]),
        ],
        "dataset": "coco",
    }


def dataset_flickr30k() -> dict[str, Any]:
    def image(name: str, split: str, raw: str) -> dict[str, Any]:
        sentence = {"tokens": raw.lower().split(), "raw": raw, "imgid": 0, "sentid": 0}
        return {"sentids": [0], "imgid": 0, "sentences": [sentence], "split": split, "filename": name}

    return {
        "images": [
            image("1000092795.jpg", "train", "Two young guys with shaggy hair."),
            image("1007129816.jpg", "test", "The man with pierced ears."),
        ],
        "dataset": "flickr30k",
    }


def nocaps_val() -> dict[str, Any]:
    def image(number: int, name: str, domain: str) -> dict[str, Any]:
        url = f"https://s3.amazonaws.com/nocaps/val/{name}.jpg"
        size = {"height": 1024, "width": 732, "license": 0, "date_captured": "2018-11-06 11:04:33"}
        return {
            "id": number,
            "open_images_id": name,
            **size,
            "coco_url": url,
            "file_name": f"{name}.jpg",
            "domain": domain,
        }

    captions = [(0, "A baby is standing in front of a house."), (1, "A kiwi."), (0, "A little girl.")]
    return {
        "licenses": [],
        "info": {"url": "http://nocaps.org", "description": "nocaps validation dataset", "year": 2018},
        "images": [
            image(0, "0013ea2087020901", "in-domain"),
            image(1, "00c04ae2c9fd7a3e", "out-domain"),
        ],
        "annotations": [{"image_id": i, "id": n, "caption": caption} for n, (i, caption) in enumerate(captions)],
    }


def vqa_head(subtype: str) -> dict[str, Any]:
    info = {"version": "2.0", "year": 2017, "contributor": "VQA Team"}
    return {"info": info, "license": {"name": "CC"}, "data_subtype": subtype, "data_type": "mscoco"}


def vqa_questions(subtype: str = "val2014") -> dict[str, Any]:
    asked = [
        {"image_id": 391895, "question": "Where is he looking?", "question_id": 391895000},
        {"image_id": 522418, "question": "Is this a cake?", "question_id": 522418001},
        {"image_id": 391895, "question": "How many wheels?", "question_id": 391895002},
    ]
    return vqa_head(subtype) | {"task_type": "Open-Ended", "questions": asked}


def vqa_annotations(subtype: str = "val2014") -> dict[str, Any]:
    def annotation(number: int, kind: str, best: str, others: str) -> dict[str, Any]:
        given = [best] * 6 + [others] * 4
        answers = [{"answer": a, "answer_confidence": "yes", "answer_id": n + 1} for n, a in enumerate(given)]
        image = number // 1000
        told = {"question_type": "what is", "multiple_choice_answer": best, "answer_type": kind}
        return told | {"answers": answers, "image_id": image, "question_id": number}

    return vqa_head(subtype) | {
        "annotations": [  # in a different order from the questions
            annotation(522418001, "yes/no", "yes", "no"),
            annotation(391895000, "other", "down", "at table"),
            annotation(391895002, "number", "several", "4"),
        ]
    }


def okvqa_annotations() -> dict[str, Any]:
    given = [("cars", "car"), ("traffic", "traffic"), ("people advancing", "people advance"), ("traffic", "traffic")]
    pairs = [pair for pair in [*given, ("lorries", "lorry")] for _ in range(2)]  # five annotators, each twice
    answers = [
        {"answer_id": n + 1, "raw_answer": raw, "answer_confidence": "yes", "answer": stem}
        for n, (raw, stem) in enumerate(pairs)
    ]
    told = {"image_id": 522418, "answer_type": "other", "question_type": "four", "question_id": 5224185}
    return {
        "license": {"name": "Creative Commons"},
        "data_subtype": "val2014",
        "question_types": {"four": "Sports and Recreation", "other": "Other"},
        "annotations": [told | {"answers": answers}],
    }


def okvqa_questions() -> dict[str, Any]:
    asked = {"image_id": 522418, "question": "What do the lights prevent?", "question_id": 5224185}
    return {"license": {}, "data_subtype": "val2014", "task_type": "Open-Ended", "questions": [asked]}


def gqa_questions() -> dict[str, Any]:
    def question(image: str, words: str, answer: str) -> dict[str, Any]:
        return {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "apple (271881)"}],
            "entailed": [],
            "equivalent": ["201640614"],
            "question": words,
            "imageId": image,
            "isBalanced": True,
            "groups": {"global": None, "local": "8r-binary-apple"},
            "answer": answer,
            "semanticStr": "select: apple (271881)",
            "annotations": {"answer": {}, "question": {"4": "271881"}, "fullAnswer": {}},
            "types": {"detailed": "existAttr", "semantic": "attr", "structural": "verify"},
            "fullAnswer": "No, there is none.",
        }

    return {
        "201307251": question("n161313", "Is it overcast?", "no"),
        "201640614": question("2407890", "Who is wearing the dress?", "woman"),
        "202225914": question("n161313", "What is the apple on?", "table"),
    }


# --- each kind, as published


@pytest.mark.parametrize(
    ("split", "ids"),
    [("train", ["57870", "522418"]), ("restval", ["522418"]), ("val", ["184613"]), ("test", ["391895"])],
)
def test_karpathys_coco_trains_on_restval_too(write: Write, images: Path, split: str, ids: list[str]) -> None:
    records, skipped = read_official(write(dataset_coco()), images, split)
    assert skipped == []
    assert [record.id for record in records] == ids


def test_karpathys_coco_is_told_by_its_content(write: Write, images: Path) -> None:
    path = write(dataset_coco())
    assert official_kind(path) == "coco-karpathy"
    assert read_official(path, images, "test")[0] == [
        Record(
            "391895",
            images / "val2014/COCO_val2014_000000391895.jpg",
            ("A man with a red helmet.", "Man riding a bike"),
        )
    ]


def test_karpathys_flickr30k_has_no_folders_and_no_numbers(write: Write, images: Path) -> None:
    path = write(dataset_flickr30k())
    assert official_kind(path) == "flickr30k"
    records, skipped = read_official(path, images / "flickr30k-images", "test")
    image = images / "flickr30k-images/1007129816.jpg"
    assert (records, skipped) == ([Record("1007129816", image, ("The man with pierced ears.",))], [])
    assert [r.id for r in read_official(path, images / "flickr30k-images", "train")[0]] == ["1000092795"]


def test_lavis_lists_have_the_ids_of_karpathys_files(write: Write, images: Path) -> None:
    train = [
        {"caption": "A woman cutting.", "image": "val2014/COCO_val2014_000000522418.jpg", "image_id": "coco_522418"},
        {"caption": "A restaurant.", "image": "train2014/COCO_train2014_000000057870.jpg", "image_id": "coco_57870"},
        {"caption": "A cake.", "image": "val2014/COCO_val2014_000000522418.jpg", "image_id": "coco_522418"},
    ]
    path = write(train)
    assert official_kind(path) == "coco-karpathy"
    assert read_official(path, images) == (
        [
            Record("522418", images / "val2014/COCO_val2014_000000522418.jpg", ("A woman cutting.", "A cake.")),
            Record("57870", images / "train2014/COCO_train2014_000000057870.jpg", ("A restaurant.",)),
        ],
        [],
    )
    test = [{"image": "flickr30k-images/1007129816.jpg", "caption": ["The man.", "A man with glasses."]}]
    path = write(test)
    assert official_kind(path) == "flickr30k"
    image = images / "flickr30k-images/1007129816.jpg"
    expected = [Record("1007129816", image, ("The man.", "A man with glasses."))], []
    assert read_official(path, images) == expected
    assert read_official(path, images / "flickr30k-images") == expected, "the folder may be the last"


def test_nocaps_tells_the_domain(write: Write, images: Path) -> None:
    path = write(nocaps_val())
    assert official_kind(path) == "nocaps"
    house = "A baby is standing in front of a house."
    assert read_official(path, images / "nocaps") == (
        [
            Record(
                "0",
                images / "nocaps/0013ea2087020901.jpg",
                (house, "A little girl."),
                facts={"domain": "in-domain"},
            ),
            Record("1", images / "nocaps/00c04ae2c9fd7a3e.jpg", ("A kiwi.",), facts={"domain": "out-domain"}),
        ],
        [],
    )


def test_nocaps_without_domains_and_without_captions(write: Write, images: Path) -> None:
    data = nocaps_val()
    for image in data["images"]:
        del image["domain"]
    assert [record.facts for record in read_official(write(data), images / "nocaps")[0]] == [None, None]
    del data["annotations"]  # as in nocaps_test_image_info.json, whose captions are withheld
    records, skipped = read_official(write(data), images / "nocaps")
    assert [record.captions for record in records] == [(), ()]
    assert skipped == []


def test_cocos_own_captions_are_read_like_nocaps(write: Write, images: Path) -> None:
    image = {"license": 3, "file_name": "COCO_val2014_000000391895.jpg", "height": 360, "width": 640, "id": 391895}
    captions = [{"image_id": 391895, "id": 770337, "caption": "A man with a red helmet."}]
    path = write({"info": {}, "images": [image], "licenses": [], "annotations": captions})
    file = images / "val2014/COCO_val2014_000000391895.jpg"
    expected = [Record("391895", file, ("A man with a red helmet.",))], []
    assert read_official(path, images / "val2014") == expected


def test_vqav2_brings_answers_to_questions(write: Write, images: Path) -> None:
    path, asked = write(vqa_annotations()), write(vqa_questions(), "questions.json")
    assert official_kind(path) == "vqav2"
    for split in (None, "val", "val2014"):
        assert read_official(path, images, split, asked) == (
            [
                Record(
                    "391895",
                    images / "val2014/COCO_val2014_000000391895.jpg",
                    (),
                    (
                        Question(
                            "Where is he looking?", "down", "open", ("down",) * 6 + ("at table",) * 4, "391895000"
                        ),
                        Question("How many wheels?", "several", "number", ("several",) * 6 + ("4",) * 4, "391895002"),
                    ),
                ),
                Record(
                    "522418",
                    images / "val2014/COCO_val2014_000000522418.jpg",
                    (),
                    (Question("Is this a cake?", "yes", "yes/no", ("yes",) * 6 + ("no",) * 4, "522418001"),),
                ),
            ],
            [],
        )
    assert len(read_official(path, images / "val2014", None, asked)[0]) == 2


def test_okvqa_has_its_ten_answers_and_the_most_common_is_the_answer(write: Write, images: Path) -> None:
    path, asked = write(okvqa_annotations()), write(okvqa_questions(), "questions.json")
    assert official_kind(path) == "okvqa"
    ((record,), skipped) = read_official(path, images, "val", asked)
    (question,) = record.questions
    stems = ["car", "traffic", "people advance", "traffic", "lorry"]
    assert question.answers == tuple(stem for stem in stems for _ in range(2))
    assert (question.answer, question.kind, question.id, skipped) == ("traffic", "open", "5224185", [])


@pytest.mark.parametrize("subtype", ["test2015", "test-dev2015"])
def test_questions_of_a_test_split_have_the_answer_nothing(write: Write, images: Path, subtype: str) -> None:
    asked = {"image_id": 262144, "question": "Is the ball flying?", "question_id": 262144000}
    path = write(vqa_head(subtype) | {"task_type": "Open-Ended", "questions": [asked]})
    records, skipped = read_official(path, images, subtype[:-4])
    image = images / "test2015/COCO_test2015_000000262144.jpg"
    question = Question("Is the ball flying?", "", "open", (), "262144000")
    assert (records, skipped) == ([Record("262144", image, (), (question,))], [])


def test_gqa(write: Write, images: Path) -> None:
    path = write(gqa_questions())
    assert official_kind(path) == "gqa"
    assert read_official(path, images / "gqa") == (
        [
            Record(
                "n161313",
                images / "gqa/n161313.jpg",
                (),
                (
                    Question("Is it overcast?", "no", "yes/no", (), "201307251"),
                    Question("What is the apple on?", "table", "open", (), "202225914"),
                ),
            ),
            Record(
                "2407890",
                images / "gqa/2407890.jpg",
                (),
                (Question("Who is wearing the dress?", "woman", "open", (), "201640614"),),
            ),
        ],
        [],
    )


def test_gqas_test_questions_have_the_answer_nothing(write: Write, images: Path) -> None:
    data = {
        key: {"imageId": row["imageId"], "question": row["question"], "isBalanced": True}
        for key, row in gqa_questions().items()
    }
    records, skipped = read_official(write(data), images / "gqa")
    assert {question.answer for record in records for question in record.questions} == {""}
    assert skipped == []


# --- bad entries: only the bad entry is skipped, and a message names it


Change = Callable[[Any], Any]


def image_of(number: int, **changes: Any) -> Change:
    return lambda data: data["images"][number].update(changes)


BAD_CAPTIONS: dict[str, tuple[str, Change, str, str]] = {
    # what is wrong: kind of file, how its test picture or second image is damaged, place and text of the message
    "coco: no object": ("coco", lambda d: d["images"].insert(0, 7), "images[0]", "7 is not an object"),
    "coco: missing picture": ("coco", image_of(0, filename="gone.jpg"), "images[0]", "is missing"),
    "coco: no file name": ("coco", image_of(0, filename=None), "images[0]", "file name is None"),
    "coco: upwards": ("coco", image_of(0, filename="../../secret.jpg"), "images[0]", "is outside the folder"),
    "coco: upwards by the folder": (
        "coco",
        image_of(0, filepath="..", filename="secret.jpg"),
        "images[0]",
        "is outside the folder",
    ),
    "coco: absolute": ("coco", image_of(0, filepath="/etc", filename="passwd"), "images[0]", "is outside the folder"),
    "coco: a folder": ("coco", image_of(0, filepath=".", filename="val2014"), "images[0]", "is missing"),
    "coco: zero in the name": ("coco", image_of(0, filepath="a\0b"), "images[0]", "is missing"),
    "coco: folder's name a number": ("coco", image_of(0, filepath=3), "images[0]", "file path is 3"),
    "coco: unknown split": (
        "coco",
        image_of(0, split="tset"),
        "images[0]",
        "\"split\" is 'tset': it must be one of",
    ),
    "coco: split is a list": ("coco", image_of(0, split=["test"]), "images[0]", '"split" is '),
    "coco: no sentences": ("coco", image_of(0, sentences="a man"), "images[0]", '"sentences" is '),
    "coco: empty sentences": ("coco", image_of(0, sentences=[]), "images[0]", "no usable caption"),
    "coco: one empty sentence": ("coco", image_of(0, sentences=[{"raw": " "}]), "images[0]", "the caption is empty"),
    "coco: a sentence of dots": ("coco", image_of(0, sentences=[{"raw": "..."}]), "images[0]", "is empty: at least"),
    "coco: half a character": ("coco", image_of(0, sentences=[{"raw": "\ud800"}]), "images[0]", "not Unicode text"),
    "coco: id is true": ("coco", image_of(0, cocoid=True), "images[0]", '"cocoid" is True'),
    "nocaps: no object": ("nocaps", lambda d: d["images"].insert(0, []), "images[0]", "[] is not an object"),
    "nocaps: missing picture": ("nocaps", image_of(1, file_name="gone.jpg"), "images[1]", "is missing"),
    "nocaps: upwards": ("nocaps", image_of(1, file_name="../../secret.jpg"), "images[1]", "is outside"),
    "nocaps: id twice": ("nocaps", image_of(1, id=0), "images[1]", "id '0' appears twice"),
    "nocaps: no id": ("nocaps", image_of(1, id=None), "images[1]", '"id" is None'),
    "nocaps: unknown domain": (
        "nocaps",
        image_of(1, domain="far"),
        "images[1]",
        "unknown domain 'far': it must be",
    ),
    "nocaps: domain is a list": ("nocaps", image_of(1, domain=[]), "images[1]", "unknown domain []"),
}


@pytest.mark.parametrize("case", BAD_CAPTIONS)
def test_a_bad_picture_is_skipped_and_named(write: Write, images: Path, case: str) -> None:
    kind, spoil, where, what = BAD_CAPTIONS[case]
    data = dataset_coco() if kind == "coco" else nocaps_val()
    data["images"].append(coco_image("COCO_val2014_000000184613.jpg", "test", ["Good."])) if kind == "coco" else None
    spoil(data)
    path = write(data)
    root, split = (images, "test") if kind == "coco" else (images / "nocaps", None)
    records, skipped = read_official(path, root, split)
    good = [record.id for record in records]
    assert "184613" in good if kind == "coco" else "0" in good
    assert all(record.image.is_relative_to(images) for record in records)
    lines = [line for line in skipped if line.startswith(f"{path}: {where}: ") and what in line]
    assert len(lines) == 1
    assert all(tiny_runs.REMEDY.search(line) for line in skipped)
    assert all("\n" not in line and len(line) < len(str(path)) + 300 for line in skipped)


def test_a_picture_that_is_there_twice_is_read_once(write: Write, images: Path) -> None:
    data = dataset_coco()
    data["images"].append(data["images"][0] | {"sentences": [{"raw": "Other."}]})
    path = write(data)
    (record,), skipped = read_official(path, images, "test")
    assert len(record.captions) == 2
    assert skipped == [f"{path}: images[4]: id '391895' appears twice: each picture must appear once"]


def test_of_several_captions_only_the_bad_ones_are_left_out(write: Write, images: Path) -> None:
    data = dataset_coco()
    data["images"][0]["sentences"] = [{"raw": "A man."}, {"raw": ""}, {"tokens": ["a"]}, 5, {"raw": "Two men."}]
    path = write(data)
    (record,), skipped = read_official(path, images, "test")
    assert record.captions == ("A man.", "Two men.")
    assert [line.split(": ")[1] for line in skipped] == [f"images[0].sentences[{n}]" for n in (1, 2, 3)]


def test_bad_rows_of_a_list(write: Write, images: Path) -> None:
    name = "val2014/COCO_val2014_000000522418.jpg"
    good = {"image": name, "caption": "a cake"}
    (images / "other").mkdir()
    (images / "other" / Path(name).name).write_bytes(b"another picture of the same name")
    rows: list[tuple[Any, str]] = [
        ("a cat", "is not an object"),
        ({"image": name}, "caption is None"),
        ({"image": name, "caption": []}, "no usable caption"),
        ({"image": name, "caption": ""}, "the caption is empty"),
        ({"image": name, "caption": 3}, "caption is 3"),
        ({"image": None, "caption": "a cake"}, "picture name is None"),
        ({"image": " ", "caption": "a cake"}, "the picture name is empty"),
        ({"image": "gone.jpg", "caption": "a cake"}, "'gone.jpg' is missing"),
        ({"image": "../secret.jpg", "caption": "a cake"}, "is outside the folder"),
        ({"image": "val2014\\..\\..\\secret.jpg", "caption": "a cake"}, "is outside the folder"),
        ({"image": str(images / name), "caption": "a cake"}, "is outside the folder"),
        ({"image": f"other/{Path(name).name}", "caption": "a cake"}, "id '522418' is already used for"),
    ]
    path = write([good, *(row for row, _ in rows)])
    records, skipped = read_official(path, images)
    assert [record.captions for record in records] == [("a cake",)]
    assert len(skipped) == len(rows)
    for number, (line, (_, what)) in enumerate(zip(skipped, rows, strict=True), start=1):
        assert line.startswith(f"{path}: [{number}]: ")
        assert what in line
        assert tiny_runs.REMEDY.search(line)


def test_captions_without_images_and_images_without_captions(write: Write, images: Path) -> None:
    data = nocaps_val()
    data["images"].append({"id": 2, "file_name": "001464cfae2a30b8.jpg"})
    data["annotations"] += [{"image_id": 9, "caption": "A ghost."}, {"caption": "Lost."}, 1, {"image_id": 1}]
    path = write(data)
    records, skipped = read_official(path, images / "nocaps")
    assert [(record.id, len(record.captions)) for record in records] == [("0", 2), ("1", 1)]
    assert [tiny_runs.REMEDY.split(line.removeprefix(f"{path}: "))[0] for line in skipped] == [
        "annotations[3]: a caption of image 9, which is not among the images",
        'annotations[4]: "image_id" is None',
        "annotations[5]: 1 is not an object",
        "annotations[6]: caption is None",
        "images[2]: image 2 has no caption",
    ]


def question_of(number: int, **changes: Any) -> Change:
    return lambda both: both[1]["questions"][number].update(changes)


def annotation_of(number: int, **changes: Any) -> Change:
    return lambda both: both[0]["annotations"][number].update(changes)


def drop(file: int, name: str, number: int) -> Change:
    return lambda both: both[file][name].pop(number)


# what is wrong: how question 391895002 (questions[2], annotations[2]) is damaged, file, place and text of the message
BAD_QUESTIONS: dict[str, tuple[Change, str, str, str]] = {
    "no question": (drop(1, "questions", 2), "annotations", "annotations[2]", "391895002 is not among the questions"),
    "no annotation": (drop(0, "annotations", 2), "questions", "questions[2]", "question 391895002 has no annotation"),
    "question is empty": (question_of(2, question=" "), "questions", "questions[2]", "the question is empty"),
    "question is a number": (question_of(2, question=4), "questions", "questions[2]", "question is 4"),
    "two pictures": (question_of(2, image_id=522418), "questions", "questions[2]", "391895 in its annotation"),
    "image is text": (question_of(2, image_id="../x"), "questions", "questions[2]", "\"image_id\" is '../x'"),
    "image is true": (question_of(2, image_id=True), "questions", "questions[2]", '"image_id" is True'),
    "missing picture": (
        lambda both: (question_of(2, image_id=5)(both), annotation_of(2, image_id=5)(both)),
        "questions",
        "questions[2]",
        "COCO_val2014_000000000005.jpg' is missing",
    ),
    "annotation no object": (
        lambda both: both[0]["annotations"].append("what?"),
        "annotations",
        "annotations[3]",
        "'what?' is not an object",
    ),
    "annotation without id": (
        lambda both: both[0]["annotations"].append({}),
        "annotations",
        "annotations[3]",
        '"question_id" is None',
    ),
    "annotation twice": (
        lambda both: both[0]["annotations"].append(both[0]["annotations"][1]),
        "annotations",
        "annotations[3]",
        "question 391895000 has two annotations",
    ),
    "question twice": (
        lambda both: both[1]["questions"].append(both[1]["questions"][0]),
        "questions",
        "questions[3]",
        "question 391895000 appears twice",
    ),
    "question no object": (
        lambda both: both[1]["questions"].append(None),
        "questions",
        "questions[3]",
        "None is not an object",
    ),
    "answers missing": (annotation_of(2, answers=None), "annotations", "annotations[2]", "391895002 has no answers"),
    "answers empty": (annotation_of(2, answers=[]), "annotations", "annotations[2]", "391895002 has no answers"),
    "an empty answer": (
        annotation_of(2, answers=[{"answer": "2"}, {"answer": ""}]),
        "annotations",
        "annotations[2]",
        "the answer to question 391895002 is empty",
    ),
    "an answer is a number": (
        annotation_of(2, answers=[{"answer": 2}]),
        "annotations",
        "annotations[2]",
        "answer to question 391895002 is 2",
    ),
    "the answer is empty": (
        annotation_of(2, multiple_choice_answer=""),
        "annotations",
        "annotations[2]",
        "the answer to question 391895002 is empty",
    ),
}


@pytest.mark.parametrize("case", BAD_QUESTIONS)
def test_a_bad_question_is_skipped_and_named_once(write: Write, images: Path, case: str) -> None:
    spoil, file, where, what = BAD_QUESTIONS[case]
    both = vqa_annotations(), vqa_questions()
    spoil(both)
    path = write(both[0])
    asked = write(both[1], "questions.json")
    records, skipped = read_official(path, images, None, asked)
    read = {question.id for record in records for question in record.questions}
    assert {"391895000", "522418001"} <= read
    assert sum(len(record.questions) for record in records) == len(read)
    (line,) = skipped
    assert line.startswith(f"{path if file == 'annotations' else asked}: {where}: ")
    assert what in line
    assert tiny_runs.REMEDY.search(line)
    assert "\n" not in line


def test_the_kind_is_told_by_the_answer_where_the_file_does_not(write: Write, images: Path) -> None:
    both = vqa_annotations(), vqa_questions()
    for annotation in both[0]["annotations"]:
        annotation["answer_type"] = ["unknown"]
    both[0]["annotations"][2]["multiple_choice_answer"] = "2"
    records, _ = read_official(write(both[0]), images, None, write(both[1], "questions.json"))
    assert [q.kind for record in records for q in record.questions] == ["open", "number", "yes/no"]


def test_bad_questions_of_gqa(write: Write, images: Path) -> None:
    data = gqa_questions()
    good = data["201640614"]
    bad: dict[str, tuple[Any, str]] = {
        "1": ("what?", "is not an object"),
        "2": (good | {"imageId": "gone"}, "'gone.jpg' is missing"),
        "3": (good | {"imageId": "../../secret"}, "is outside the folder"),
        "4": (good | {"imageId": None}, '"imageId" is None'),
        "5": (good | {"imageId": 1.5}, '"imageId" is 1.5'),
        "6": (good | {"question": ""}, "the question is empty"),
        "7": (good | {"answer": ""}, "the answer is empty"),
        "8": ({key: good[key] for key in ("imageId", "question")}, "answer is None"),
        "9": (good | {"answer": ["woman"]}, "answer is ["),
    }
    path = write(data | {key: row for key, (row, _) in bad.items()})
    records, skipped = read_official(path, images / "gqa")
    assert sum(len(record.questions) for record in records) == 3
    assert len(skipped) == len(bad)
    for line, (key, (_, what)) in zip(skipped, bad.items(), strict=True):
        assert line.startswith(f"{path}: question '{key}': ")
        assert what in line
        assert tiny_runs.REMEDY.search(line)


def places(data: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values in a JSON document, including the document; in lists, only to the first value."""
    inside = data.items() if isinstance(data, dict) else enumerate(data[:1]) if isinstance(data, list) else ()
    return [here, *(way for key, value in inside for way in places(value, (*here, key)))]


def spoiled(data: Any, way: tuple[Any, ...], value: Any) -> Any:
    if not way:
        return value
    copy = data.copy()
    copy[way[0]] = spoiled(data[way[0]], way[1:], value)
    return copy


@pytest.mark.parametrize("form", ["coco", "listed", "nocaps", "vqav2", "questions", "gqa"])
def test_whatever_stands_in_any_place_is_skipped_or_refused_in_one_line(write: Write, images: Path, form: str) -> None:
    flickr = {"image": "flickr30k-images/1007129816.jpg", "caption": ["The man.", "A man."]}
    data, root, split = {
        "coco": (dataset_coco(), images, "test"),
        "listed": ([flickr, flickr], images, None),
        "nocaps": (nocaps_val(), images / "nocaps", None),
        "vqav2": (vqa_annotations(), images, None),
        "questions": (vqa_questions(), images, None),
        "gqa": (dict([*gqa_questions().items()][:2]), images / "gqa", None),
    }[form]
    annotations, asked = write(vqa_annotations()), write(vqa_questions(), "questions.json")
    questions = asked if form in ("vqav2", "questions") else None
    usable = 0
    for way in places(data):
        for value in (None, True, -1, 1.5, "", "x\ny", "\ud800", "a\0", [], [[]], {}, {"image_id": {}}):
            write(spoiled(data, way, value), (asked if form == "questions" else annotations).name)
            try:
                records, skipped = read_official(annotations, root, split, questions)
            except UserError as problem:
                skipped, records = [str(problem)], []
            usable += bool(records)
            for record in records:
                assert record.image.is_file()
                assert record.id.strip()
                assert all(caption.strip() for caption in record.captions)
                assert all(q.text.strip() and q.answer.strip() and all(q.given) for q in record.questions)
                assert record.captions or record.questions
            assert all("\n" not in line and tiny_runs.REMEDY.search(line) for line in skipped)
    assert usable > 40


# --- files that are not annotations, and arguments that do not fit


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (json.dumps(dataset_coco()).encode()[:-40], r": not JSON, or truncated \(.*line 1 column \d+.*\): give"),
        (json.dumps(dataset_coco(), indent=1).encode()[:300], r": not JSON, or truncated \(.*line \d\d column"),
        (b"", ": not JSON, or truncated"),
        (b"PK\x03\x04 a zip archive", ": not JSON, or truncated"),
        (b'{"images": "caf\xe9"}', ": not JSON, or truncated"),
        (b"[" * 100_000, ": not JSON, or truncated"),
        (b"7", "is none of the official annotation files: give Karpathy's"),
        (b"[]", "is none of"),
        (b"{}", "is none of"),
        (b'[{"image": "x.jpg"}]', "is none of"),
        (b'{"images": []}', "is none of"),
        (b'{"images": {"sentences": 1}}', "is none of"),
        (b'{"annotations": [{"image_id": 3, "bbox": []}]}', "is none of"),
        (b'{"1": {"question": "what?"}}', "is none of"),
    ],
)
def test_a_file_of_another_form_is_an_error_that_names_it(
    write: Write, images: Path, content: bytes, what: str
) -> None:
    path = write(content)
    with pytest.raises(UserError, match=what) as caught:
        read_official(path, images, "test")
    assert str(path) in str(caught.value)
    assert tiny_runs.REMEDY.search(str(caught.value))
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_an_error(write: Write, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json: no such file"):
        read_official(tmp_path / "none.json", images)
    with pytest.raises(UserError, match=r"images: cannot be read \(Is a directory"):
        read_official(images, images)
    with pytest.raises(UserError, match="nowhere: no such folder: give the folder of the pictures"):
        read_official(write(gqa_questions()), tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no\.json: no such file"):
        read_official(write(vqa_annotations()), images, None, tmp_path / "no.json")


@pytest.mark.parametrize("split", [None, "testA", "validation", ""])
def test_an_unknown_split_lists_the_known_ones(write: Write, images: Path, split: str | None) -> None:
    what = "contains several splits" if split is None else f"unknown split '{split}'"
    with pytest.raises(UserError, match=f"{what}: give one of train, restval, val, test "):
        read_official(write(dataset_coco()), images, split)


def test_a_split_of_a_file_that_has_one(write: Write, images: Path) -> None:
    asked = write(vqa_questions(), "questions.json")
    with pytest.raises(UserError, match="unknown split 'train': leave it out, this file is of val2014"):
        read_official(write(vqa_annotations()), images, "train", asked)
    for data, root in ((gqa_questions(), "gqa"), (nocaps_val(), "nocaps")):
        with pytest.raises(UserError, match="contains only one split, so 'val' cannot be chosen: leave out --split"):
            read_official(write(data), images / root, "val")


def test_the_two_files_of_vqa_have_to_fit(write: Write, images: Path) -> None:
    name = "v2_mscoco_val2014_annotations.json"
    with pytest.raises(UserError, match=r"answers without .*: give v2_OpenEnded_mscoco_val2014_questions\.json"):
        read_official(write(vqa_annotations(), name), images)
    with pytest.raises(UserError, match="questions of val2014 without their answers: give"):
        read_official(write(vqa_questions()), images)
    asked = write(vqa_questions("train2014"), "questions.json")
    with pytest.raises(UserError, match=r"is of val2014, but .*questions\.json of train2014: give files of one split"):
        read_official(write(vqa_annotations()), images, None, asked)
    with pytest.raises(UserError, match="contains no annotations: give"):
        read_official(write(vqa_questions()), images, None, write(vqa_annotations(), "questions.json"))
    with pytest.raises(UserError, match="no questions: it must be"):
        read_official(write(vqa_annotations()), images, None, write(gqa_questions(), "questions.json"))
    with pytest.raises(UserError, match="gqa has no second file: leave out --questions"):
        read_official(write(gqa_questions()), images, None, asked)


@pytest.mark.parametrize("subtype", [None, 2014, "val", "../2014", "val2014/.."])
def test_the_subtype_has_to_be_one(write: Write, images: Path, subtype: Any) -> None:
    data = vqa_questions() | {"data_subtype": subtype}
    with pytest.raises(UserError, match=r'"data_subtype" is .*: it must be train2014, val2014'):
        read_official(write(vqa_annotations()), images, None, write(data, "questions.json"))


def test_nothing_usable_is_an_error_with_the_first_reason(write: Write, images: Path) -> None:
    asked = write(vqa_questions(), "questions.json")
    with pytest.raises(UserError, match=r"no usable entry; 3 cannot be used; the first: .*questions\[0\]: image"):
        read_official(write(vqa_annotations()), images / "gqa", None, asked)
    data = dataset_coco()
    del data["images"][0]
    with pytest.raises(UserError, match="contains no usable entry of the split 'test'; give another split"):
        read_official(write(data), images, "test")


def test_lists_have_to_be_lists(write: Write, images: Path) -> None:
    data = nocaps_val() | {"annotations": {"0": "A baby."}}
    with pytest.raises(UserError, match=r'"annotations" is .*: it must be a list'):
        read_official(write(data), images / "nocaps")


def test_garbage_is_collected_again_afterwards(write: Write, images: Path) -> None:
    read_official(write(gqa_questions()), images / "gqa")
    assert gc.isenabled()
    with pytest.raises(UserError):
        read_official(write(b"{}"), images)
    assert gc.isenabled()


# --- pictures


def test_each_folder_of_pictures_is_listed_once(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []
    scandir = os.scandir

    def spy(folder: Any) -> Any:
        listed.append(os.fspath(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", spy)
    pictures = Pictures(images)
    for _ in range(3):
        assert pictures.find("val2014/COCO_val2014_000000391895.jpg").is_file()
        with pytest.raises(UserError, match="is missing"):
            pictures.find("val2014/gone.jpg")
        with pytest.raises(UserError, match="is missing"):
            pictures.find("nowhere/gone.jpg")
    assert len(listed) == len(set(listed)) == 3


def test_linked_pictures_are_found(images: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.jpg").symlink_to(images / NAMES[0])
    (tmp_path / "links" / "coco").symlink_to(images / "val2014")
    (tmp_path / "links" / "broken.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "links" / "circle.jpg").symlink_to(tmp_path / "links" / "circle.jpg")
    pictures = Pictures(tmp_path / "links")
    assert pictures.find("a.jpg") == tmp_path / "links" / "a.jpg"
    assert pictures.find("coco/COCO_val2014_000000391895.jpg").is_file()
    with pytest.raises(UserError, match="is missing"):
        pictures.find("broken.jpg")
    with pytest.raises(UserError, match="is missing"):
        pictures.find("circle.jpg")


def test_a_folder_that_cannot_be_listed_is_named_as_such(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match=r"val2014: cannot be listed \(Permission denied\): give a readable folder"):
        Pictures(images).find("val2014/COCO_val2014_000000391895.jpg")
