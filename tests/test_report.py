"""The report, parsed as by a browser: it is well-formed and self-contained, and shows every figure."""

import base64
import json
import math
import re
from dataclasses import asdict
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from openblip2.apps.report import chart, duration, goals, percent, smooth, write_report
from openblip2.evaluate.health import ITM_CHANCE
from openblip2.presets import preset

EVIL = "<script>alert('a & \"b\"')</script>"
VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Collects elements with their attributes and all text, and checks that every element is closed correctly."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        self.text = " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def scores(accuracy: float, number: float) -> dict[str, Any]:
    return {
        "n": 400,
        "accuracy": accuracy,
        "open": {"n": 250, "accuracy": accuracy + number / 1000},
        "yes/no": {"n": 150, "accuracy": accuracy - number / 1000},
    }


@pytest.fixture
def metrics() -> dict[str, Any]:
    """Metrics in which all figures differ."""
    shares = dict(zip(("exact", "objects", "attributes"), (0.311, 0.522, 0.433), strict=True))
    shares |= {"objects_and_attributes": 0.424, "relations": 0.875}
    return {
        "world": "full",
        "pictures": {"train": 3417, "test": 512},
        "retrieval": {
            "n": 511,
            "chance": 1 / 511,
            "itc": {"tr@1": 0.611, "ir@1": 0.622, "tr@5": 0.833, "ir@5": 0.844},
            "itm": {"tr@1": 0.655, "ir@1": 0.666, "tr@5": 0.877, "ir@5": 0.888, "reranked": 16},
            "itm+itc": {"tr@1": 0.665, "ir@1": 0.676, "tr@5": 0.887, "ir@5": 0.898, "reranked": 16},
        },
        "caption": {"n": 510, **shares, "chance": {"n": 510, **{name: v / 100 for name, v in shares.items()}}},
        "vqa": {
            "scenes": scores(0.455, 7)
            | {"zero_shot": True, "prompt": "Question: {} Answer:"}
            | {"baselines": {"majority": scores(0.144, 3), "question_only": scores(0.177, 5)}},
            "easy-vqa": scores(0.355, 8)
            | {"zero_shot": True, "prompt": "Question: {} Answer:"}
            | {"baselines": {"majority": scores(0.101, 2), "question_only": scores(0.233, 4)}},
        },
        "grounding": {"n": 128, "loss_right": 0.913, "loss_shuffled": 2.714, "verdict": "the model looks: yes"},
        "pointing": {"n": 97, "texts": 193, "pointing": 0.512, "chance": 0.149, "centre": 0.075}
        | {"best fixed place": 0.201},
        "health": {
            "stage1": {"bad": [], "effective_rank": 4.31, "queries": 19},
            "stage2": {"bad": [], "effective_rank": None, "queries": 19},
        },
        "seconds": {"data": 21.3, "features": 88.0, "stage1": 245.0, "stage2": 302.0, "evaluation": 131.0}
        | {"total": 787.3},
        "peak_memory_gb": 5.37,
    }


@pytest.fixture
def examples(tmp_path: Path) -> dict[str, Any]:
    """Three held-out pictures; the second caption is wrong, the third is an HTML injection."""
    images = []
    for n, colour in enumerate(("red", "blue", "teal")):
        images.append(str(tmp_path / f"{n}.png"))
        Image.new("RGB", (300, 200), colour).save(images[-1])
    texts = ["two red cats", "two blue dogs", EVIL]
    things = [
        {"noun": noun, "colour": colour, "size": None, "place": None, "number": 2}
        for noun, colour in (("cat", "red"), ("dog", "blue"), ("bus", "green"))
    ]
    facts = [{"kind": "group", "objects": [thing], "relation": None} for thing in things]
    written = ["two red cats", "two red cats", EVIL]
    asked = [("what color?", "red", "Red."), ("how many?", "three", "two"), (EVIL, EVIL, "")]
    return {
        "captions": [
            {"image": i, "caption": c, "references": [t, "there are some"], "facts": f}
            for i, c, t, f in zip(images, written, texts, facts, strict=True)
        ],
        "answers": {
            name: [
                {"image": i, "question": q, "reference": r, "answer": a}
                for i, (q, r, a) in zip(images, asked, strict=True)
            ]
            for name in ("scenes", "easy-vqa")
        },
        "retrieval": {
            "image_to_text": [
                {"image": images[0], "reference": texts[0], "found": [texts[1], texts[0], EVIL]},
                {"image": images[1], "reference": texts[1], "found": [texts[2], texts[0], EVIL]},
            ],
            "text_to_image": [
                {"text": texts[0], "image": images[0], "found": images, "captions": texts},
                {"text": texts[1], "image": images[1], "found": images[::2], "captions": texts[::2]},
            ],
        },
        "maps": [
            {"image": images[n], "text": texts[n], "relevance": images[0], "attention": images[1]} for n in (1, 2)
        ],
    }


@pytest.fixture
def logs(tmp_path: Path) -> list[Path]:
    """Logs of 120 steps with two validations, each beside a configuration."""
    found = []
    for stage, losses in (("stage1", ("itc", "itm", "itg")), ("stage2", ("lm",))):
        run = tmp_path / stage
        run.mkdir()
        (run / "config.json").write_text(json.dumps({"settings": asdict(preset(stage, "laptop"))}))
        rows: list[dict[str, Any]] = [
            {"step": n, "loss": 9.0, "lr": 1e-4} | {name: 3 / n for name in losses} for n in range(1, 121)
        ]
        held_out = (
            {"itc": 1.5, "itm": 0.5, "itg": 2.5} if stage == "stage1" else {"loss_right": 1.5, "loss_shuffled": 2.5}
        )
        rows += [{"step": n, "validation": {"n": 9, **held_out}} for n in (60, 120)]
        found.append(run / "log.jsonl")
        found[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def written(tmp_path: Path, metrics: dict[str, Any], examples: dict[str, Any], logs: list[Path]) -> Page:
    path = tmp_path / "report.html"
    write_report(path, metrics, examples, *logs)
    assert [file.name for file in tmp_path.glob("report*")] == ["report.html"]  # no temporary file is left
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_nothing_is_fetched_from_outside(
    tmp_path: Path, metrics: dict[str, Any], examples: dict[str, Any], logs: list[Path]
) -> None:
    page = written(tmp_path, metrics, examples, logs)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http:" not in html
    assert "https:" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    sources = [attributes["src"] for _, attributes in page.elements if "src" in attributes]
    assert len(sources) == 3 + 2 * 3 + 2 + 4 + 2 + 2 * 3 + 4
    kinds = tuple(f"data:image/{kind};base64," for kind in ("png", "jpeg", "svg+xml"))
    assert all(str(source).startswith(kinds) for source in sources)
    for source in sources[-4:]:  # the charts
        svg = base64.b64decode(str(source).split(",")[1]).decode()
        assert not re.search(r"""(?:href|src)=["'](?!#)|url\((?!#)|@import|<script""", svg)
    links = [str(attributes["href"]) for attributes in page.all("a")]
    anchors = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {link.removeprefix("#") for link in links} <= anchors
    assert str(tmp_path) not in html


def test_pictures_are_small_and_described(
    tmp_path: Path, metrics: dict[str, Any], examples: dict[str, Any], logs: list[Path]
) -> None:
    page = written(tmp_path, metrics, examples, logs)
    charts = [attributes for attributes in page.all("img") if attributes["class"] == "chart"]
    for attributes in (one for one in page.all("img") if one not in charts):
        picture = Image.open(BytesIO(base64.b64decode(str(attributes["src"]).split(",")[1])))
        assert picture.size == (int(str(attributes["width"])), int(str(attributes["height"])))
        assert max(picture.size) in (160, 112)
        assert math.isclose(picture.width / picture.height, 1.5, rel_tol=0.02)
        assert str(attributes["alt"]).startswith("Picture: ")
    assert len(charts) == 4
    assert all("loss over steps. training" in str(a["alt"]) and "held out" in str(a["alt"]) for a in charts)
    assert "(ITM), loss over steps. training, mean of 5 steps: 1.83 at step 1, 0.0252 at step 120" in str(
        charts[1]["alt"]
    )
    assert str(charts[1]["alt"]).endswith("held out: 0.5 at step 60, 0.5 at step 120; chance: 0.6365.")


def test_what_models_write_is_escaped(
    tmp_path: Path, metrics: dict[str, Any], examples: dict[str, Any], logs: list[Path]
) -> None:
    metrics["grounding"]["verdict"] = EVIL
    page = written(tmp_path, metrics, examples, logs)
    assert not page.all("script")
    assert page.text.count(EVIL) == 11


def test_every_figure_is_there(
    tmp_path: Path, metrics: dict[str, Any], examples: dict[str, Any], logs: list[Path]
) -> None:
    text = written(tmp_path, metrics, examples, logs).text
    figures = ["61.1 %", "62.2 %", "83.3 %", "84.4 %", "65.5 %", "66.6 %", "87.7 %", "88.8 %", "best 16 re-ranked"]
    figures += ["0.2 %", "1.0 %", "511 held-out"]  # chance of 1 and of 5 in 511
    figures += ["31.1 %", "52.2 %", "43.3 %", "42.4 %", "87.5 %", "0.4 %", "0.9 %"]
    figures += ["45.5 %", "46.2 %", "44.8 %", "17.7 %", "18.2 %", "14.4 %", "14.7 %"]
    figures += ["35.5 %", "36.3 %", "34.7 %", "23.3 %", "23.7 %", "10.1 %", "10.3 %"]
    figures += ["51.2 %", "14.9 %", "7.5 %", "20.1 %", "193 texts", "97 held-out"]
    figures += ["0.91", "2.71", "The model looks: yes.", "0.913", "2.714"]
    figures += ["13 min 7 s", "21.3 s", "1 min 28 s", "4 min 5 s", "5 min 2 s", "2 min 11 s", "5.4 GB", "3,417", "512"]
    figures += ["the 19 queries after stage 1: 4.3", "reports no problem in either run", "222 kinds of things"]
    figures += ["wheel:dinov2-small", "wheel:smollm2-135m-instruct", "wheel:minilm-l6"]
    assert [figure for figure in figures if figure not in text] == []
    assert text.count("Zero-shot: ") == 2


def test_right_and_wrong_are_told_apart_in_their_order(
    tmp_path: Path, metrics: dict[str, Any], examples: dict[str, Any], logs: list[Path]
) -> None:
    text = written(tmp_path, metrics, examples, logs).text
    captions = text[text.index("1 of these 3 captions have no mistake") : text.index("Questions and answers An answer")]
    assert captions.count("✓ one of its own captions") == 2  # the injection is also its own reference
    assert captions.count("✓ objects ✓ attributes") == 1
    assert captions.count("✗ objects ✗ attributes") == 2
    assert captions.index("✓ objects") < captions.index("✗ objects")
    answers = text[text.index("1 of these 3 are right. ") :]
    assert answers.index("✓ right") < answers.index("✗ wrong")
    assert "“Red.” Reference: red ✓ right" in answers
    assert "(nothing) Reference: <script>" in answers
    retrieval = text[text.index("From picture to caption") : text.index("Goals The goals")]
    assert "two blue dogs two red cats ✓ right" in retrieval
    assert "✗ not among them two blue dogs" in retrieval
    assert "✓ 1. right 2. 3." in retrieval
    assert "1. 2. ✗ missed" in retrieval


def test_goals_met_and_missed(metrics: dict[str, Any]) -> None:
    assert [goal.met for goal in goals(metrics)] == [True] * 9
    metrics["retrieval"]["itc"]["ir@1"] = 0.59  # the lower of the two directions counts
    metrics["retrieval"]["itm"] |= {"tr@1": 0.9, "ir@1": 0.589}  # a gain in one direction does not offset a loss
    metrics["caption"]["objects_and_attributes"] = None
    metrics["grounding"]["loss_right"] = 1.4
    metrics["pointing"]["pointing"] = 0.149
    metrics["vqa"]["easy-vqa"]["open"]["accuracy"] = 0.237
    metrics["vqa"]["easy-vqa"]["baselines"]["question_only"]["open"]["accuracy"] = 0.237
    metrics["health"]["stage2"]["bad"] = ["BAD   grounding: no"]
    metrics["seconds"]["total"] = 3601.0
    metrics["peak_memory_gb"] = 8.1
    assert [goal.met for goal in goals(metrics)] == [None, False, False, False, False, False, False, False, False]


def test_goals_of_the_small_world(metrics: dict[str, Any]) -> None:
    metrics |= {"world": "small", "peak_memory_gb": 4.0}
    metrics["seconds"]["total"] = 720.0
    metrics["caption"]["objects_and_attributes"] = 0.85
    asked = metrics["vqa"]["scenes"]
    asked["open"]["accuracy"] = 0.6
    asked["baselines"]["majority"]["yes/no"]["accuracy"] = 0.34  # the higher of the two baselines
    assert asked["yes/no"]["accuracy"] > 0.44
    assert [goal.met for goal in goals(metrics)] == [True] * 9
    metrics["caption"]["objects_and_attributes"] = 0.84
    metrics["grounding"]["loss_right"] = 1.4
    asked["open"]["accuracy"] = 0.59
    asked["baselines"]["majority"]["yes/no"]["accuracy"] = 0.36
    metrics["retrieval"]["itm"]["ir@1"] = 0.62
    metrics["health"]["stage1"] |= {"effective_rank": 3.9, "bad": ["BAD   ITM: 0.64"]}
    metrics["seconds"]["total"] = 721.0
    metrics["peak_memory_gb"] = 4.1
    assert [goal.met for goal in goals(metrics)] == [False] * 9
    metrics["health"]["stage1"]["effective_rank"] = None
    del asked["yes/no"], asked["open"]
    assert [goal.met for goal in goals(metrics)].count(None) == 3


def test_the_report_leads_with_captions_then_questions_then_retrieval(
    tmp_path: Path, metrics: dict[str, Any], examples: dict[str, Any], logs: list[Path]
) -> None:
    metrics["health"]["stage2"]["bad"] = [f"BAD   grounding: {EVIL}"]
    page = written(tmp_path, metrics, examples, logs)
    sections = [attributes["id"] for attributes in page.all("h2")]
    assert sections[:4] == ["captions", "questions-and-answers", "retrieval", "goals"]
    cards = page.text[: page.text.index("vertical mark")]
    order = ("Captions with every", "Open questions answered", "The right caption for a picture")
    assert [cards.index(card) for card in order] == sorted(cards.index(card) for card in order)
    assert f"stage2: BAD grounding: {EVIL}" in page.text


def test_a_missed_goal_is_said_at_the_top(
    tmp_path: Path, metrics: dict[str, Any], examples: dict[str, Any], logs: list[Path]
) -> None:
    assert "Goals missed: 0 of 9" in written(tmp_path, metrics, examples, logs).text
    metrics["retrieval"]["itc"]["tr@1"] = 0.2
    text = written(tmp_path, metrics, examples, logs).text
    assert "Goals missed: 1 of 9" in text.split("Does the model use")[0]
    assert text.count("✗ missed") == 2  # the other one is a caption whose picture was not found


def test_a_chart_is_to_scale_from_zero() -> None:
    svg = chart("Loss", "loss", {"a": [(0, 4.0), (50, 2.0), (100, 1.0)], "b": [(100, 3.0)]})["svg"].decode()
    (path, _) = re.findall(r'<path d="([^"]+)"[^>]*stroke: #1f6fc4', svg)  # the second belongs to the legend
    places = [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path)]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x0 < x1 < x2
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.01)
    assert y0 < y1 < y2  # downwards
    assert (y1 - y0) / 2 == pytest.approx(y2 - y1, abs=0.01)
    ticks = re.findall(r'x="([\d.]+)" y="([\d.]+)" style="stroke: #000000', svg)
    floor = max(float(y) for _, y in ticks)
    assert floor - y2 == pytest.approx(y2 - y1, abs=0.01)  # 0 to 1 is as far as 1 to 2
    (dot, _) = re.findall(r'x="([\d.]+)" y="([\d.]+)" style="fill: #c2571a', svg)
    assert tuple(map(float, dot)) == pytest.approx((x2, (y0 + y1) / 2), abs=0.01)


def test_chance_is_the_entropy_of_one_match_in_three() -> None:
    assert math.isclose(ITM_CHANCE, -(math.log(1 / 3) + 2 * math.log(2 / 3)) / 3, abs_tol=1e-4)
    assert b"chance: 0.6365" in chart("ITM", "loss", {"a": [(1, 0.0)]}, ITM_CHANCE)["svg"]


def test_values_that_are_not_finite_are_left_out_of_a_chart() -> None:
    drawn = chart("Norm", "norm", {"a": [(1, 2.0), (2, math.inf), (3, math.nan)], "b": [(3, math.nan)]})
    assert b"<svg" in drawn["svg"]
    assert "a: 2 at step 1, nan at step 3" in drawn["alt"]
    assert b"<svg" in chart("Norm", "norm", {"a": [(1, math.nan)]})["svg"]


def test_smoothing_is_a_mean_of_neighbours() -> None:
    points = [(float(n), float(n % 2)) for n in range(6)]
    assert smooth(points, 0) == points
    assert [y for _, y in smooth(points, 1)] == pytest.approx([1 / 2, 1 / 3, 2 / 3, 1 / 3, 2 / 3, 1 / 2])
    assert len(smooth([(float(n), 1.0) for n in range(250_000)], 3)) <= 300


def test_numbers_in_words() -> None:
    assert (percent(0.4567), percent(0.0), percent(None)) == ("45.7\u00a0%", "0.0\u00a0%", "not measured")
    assert (duration(7.26), duration(75.2), duration(3599.7)) == ("7.3 s", "1 min 15 s", "60 min 0 s")
