"""VQA accuracy and similar metrics, compared with two reference programs (tests/data/vqa_reference.json)."""

import json
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from openblip2.data.records import Question, Record
from openblip2.errors import UserError
from openblip2.evaluate.validation import exact_scores, summary
from openblip2.evaluate.vqa import Protocol, lemmas, vqa_normal, vqa_scores
from openblip2.train.prepare import cleaned

ROWS = json.loads((Path(__file__).parent / "data" / "vqa_reference.json").read_text())["questions"]
PROTOCOLS: tuple[Protocol, ...] = ("official", "lavis")


def asked(*answers: str, kind: str = "open") -> Question:
    return Question("what?", answers[0], kind, answers)


def test_the_rules_are_the_reference_programs_rules() -> None:
    assert len(ROWS) > 800
    wrong = [(row[0], row[3], vqa_normal(row[0])) for row in ROWS if vqa_normal(row[0]) != row[3]]
    assert not wrong


@pytest.mark.parametrize("agree", [10, 9])
@pytest.mark.parametrize("answer", ["10:30", "3.5", "$1.50", "u.s.", "#5", "Yes", "f/1.8", "...", " two\nlines "])
def test_a_model_that_writes_what_it_was_taught_is_right(answer: str, agree: int) -> None:
    question = asked(*[answer] * agree, *["other"] * (10 - agree))
    (taught,) = cleaned(Record("1", Path("a.png"), (), (question,))).questions
    assert taught.given[0] == " ".join(answer.split())
    assert vqa_scores([taught.given[0]], [question]) == [1.0]
    assert exact_scores([taught.given[0]], [question]) == [1.0]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_scores_are_the_reference_programs_scores(protocol: Protocol) -> None:
    scores = vqa_scores([row[0] for row in ROWS], [asked(*row[1]) for row in ROWS], protocol)
    theirs = np.array([row[4 if protocol == "official" else 5] for row in ROWS])
    np.testing.assert_allclose(scores, theirs, rtol=0, atol=1e-9)
    assert 0.2 < theirs.mean() < 0.8  # the test data has right and wrong answers


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Two dogs.", "2 dogs"),
        ("none", "0"),
        ("The  Beach", "beach"),
        ("a", ""),
        ("", ""),
        ("dont", "don't"),
        ("U.S.A.", "usa"),
        ("2.5", "2.5"),
        ("t-shirt", "t shirt"),
        ("black - white", "black white"),
        ("1,000-2,000", "10002000"),
        ("yes\nno", "yes no"),
        ("." * 33 + "x", ".x"),
        ("somebody'd", "somebodyd"),
    ],
)
def test_an_answer_by_the_rules(answer: str, normal: str) -> None:
    assert vqa_normal(answer) == normal


@pytest.mark.parametrize("people", [2, 3, 4, 5, 9, 10, 11])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_formula_is_the_mean_over_leaving_one_out(people: int, protocol: Protocol) -> None:
    for same in range(people + 1):
        given = ["cat"] * same + ["dog"] * (people - same)
        subsets = list(combinations(range(people), people - 1))
        expected = np.mean([min(sum(given[place] == "cat" for place in kept) / 3, 1) for kept in subsets])
        assert vqa_scores(["cat"], [asked(*given)], protocol)[0] == pytest.approx(expected)


def test_ten_answers_give_the_published_steps() -> None:
    def score(same: int) -> float:
        return float(vqa_scores(["yes"], [asked(*["yes"] * same, *["no"] * (10 - same))])[0])

    assert [round(score(same), 3) for same in range(6)] == [0, 0.3, 0.6, 0.9, 1, 1]


def test_where_all_agree_the_official_score_takes_the_answer_as_written() -> None:
    agreed = asked(*["yes"] * 10)
    assert vqa_scores(["Yes"], [agreed], "official").tolist() == [0]
    assert vqa_scores(["Yes"], [agreed], "lavis").tolist() == [1]
    assert vqa_scores([" yes\n"], [agreed], "official").tolist() == [1]


def test_lavis_leaves_words_of_people_that_no_prediction_can_be() -> None:
    beach = asked(*["the beach"] * 9, "sea")
    assert vqa_scores(["the beach"], [beach], "official").tolist() == [1]
    assert vqa_scores(["the beach"], [beach], "lavis").tolist() == [0]


def test_one_persons_answer_is_refused() -> None:
    with pytest.raises(UserError, match=r"'what\?' has only one answer.*ten answers"):
        vqa_scores(["cat"], [Question("what?", "cat", "open")])


def test_gqa_compares_after_the_rules_on_both_sides() -> None:
    questions = [asked("t-shirt"), asked("the two dogs"), asked("Left"), asked("left")]
    answers = ["T-shirt.", "2 dogs", "left", "right"]
    assert exact_scores(answers, questions, vqa_normal).tolist() == [1, 1, 1, 0]


def test_exact_match_knows_no_number_words() -> None:
    assert exact_scores(["The Cat!", "2"], [asked("cat"), asked("two")]).tolist() == [1, 0]


def test_the_summary_is_over_all_and_for_each_kind() -> None:
    questions = [asked("yes", kind="yes/no"), asked("no", kind="yes/no"), asked("3", kind="number"), asked("red")]
    found = summary(np.array([1.0, 0.0, 0.6, 0.9]), questions)
    assert found == {
        "n": 4,
        "accuracy": pytest.approx(0.625),
        "yes/no": {"n": 2, "accuracy": 0.5},
        "number": {"n": 1, "accuracy": pytest.approx(0.6)},
        "open": {"n": 1, "accuracy": pytest.approx(0.9)},
    }


def _analyse(answer: str) -> Sequence[SimpleNamespace]:
    known = {"riding": ("ride", "VERB"), "horses": ("horse", "NOUN"), "best": ("good", "ADJ")}
    tokens = [(word, *known.get(word, (word, "X"))) for word in answer.split()]
    return [SimpleNamespace(text=text, lemma_=lemma, pos_=kind) for text, lemma, kind in tokens]


def test_only_nouns_and_verbs_are_brought_to_their_dictionary_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=lambda name: _analyse))
    assert lemmas(["riding best horses", ""]) == ["ride best horse", ""]


def test_a_missing_lemmatiser_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"OK-VQA needs spacy: pip install 'openblip2\[lemmas\]'"):
        lemmas(["dogs"])


def test_a_missing_english_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise OSError(f"[E050] Can't find model {name!r}")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    with pytest.raises(UserError, match="spacy download en_core_web_sm"):
        lemmas(["dogs"])
