"""The language of the scenes: every sentence about a scene is true, and the judge distinguishes true from false."""

import collections
import re
from random import Random
from typing import Literal

import pytest

from openblip2.apps.scenes.draw import colours_of, draw_facts
from openblip2.apps.scenes.grammar import Facts, Judgement, Thing, captions, judge, questions, sentences
from openblip2.apps.scenes.vocabulary import (
    COLOURS,
    NOUNS,
    NUMBERS,
    OPPOSITE,
    PLACES,
    SIZES,
    WORLDS,
    plural,
    with_article,
)
from openblip2.data.records import Question

SPLITS: tuple[Literal["train"], Literal["test"]] = ("train", "test")


def some_facts(count: int, split: Literal["train", "test"] = "train") -> list[Facts]:
    return [draw_facts(Random(f"{split} {i}"), split) for i in range(count)]


def thing(noun: str, colour: str, size: str | None = None, place: str | None = None, number: int = 1) -> Thing:
    return {"noun": noun, "colour": colour, "size": size, "place": place, "number": number}


ONE: Facts = {
    "kind": "one",
    "objects": [thing("cat", "red", "small", "in the top left corner")],
    "relation": None,
}
GROUP: Facts = {"kind": "group", "objects": [thing("bus", "blue", number=3)], "relation": None}
PAIR: Facts = {
    "kind": "pair",
    "objects": [thing("ice cream", "red"), thing("bus", "blue")],
    "relation": "to the left of",
}


def test_a_noun_of_the_full_world_is_read_and_wrong_in_the_small_one() -> None:
    facts = draw_facts(Random(0), "train", (1, 0, 0), WORLDS["small"])
    said = f"a {facts['objects'][0]['colour']} lighthouse"
    assert judge(said, facts) == Judgement(objects=False, attributes=False, relation=None)
    facts["objects"][0]["noun"] = "lighthouse"
    assert judge(said, facts).attributes  # so the judge could parse it


# --- words


def test_there_are_hundreds_of_nouns_and_the_shapes_and_colours_of_easy_vqa() -> None:
    assert 200 <= len(NOUNS) <= 230
    assert {"circle", "triangle", "rectangle"} <= set(NOUNS)
    assert {"red", "green", "blue", "black", "gray", "teal", "brown", "yellow"} < set(COLOURS)
    assert len(COLOURS) == 10
    assert not set(NOUNS) & set(COLOURS)  # otherwise "a red orange" would be ambiguous


def test_no_word_form_stands_for_two_nouns() -> None:
    forms = collections.Counter(form for noun in NOUNS for form in {noun, plural(noun)})
    assert max(forms.values()) == 1


@pytest.mark.parametrize(
    ("noun", "many"),
    [
        ("cat", "cats"),
        ("bus", "buses"),
        ("box", "boxes"),
        ("watch", "watches"),
        ("brush", "brushes"),
        ("candy", "candies"),
        ("key", "keys"),
        ("knife", "knives"),
        ("mouse", "mice"),
        ("sheep", "sheep"),
        ("ice cream", "ice creams"),
        ("vase", "vases"),
    ],
)
def test_plural(noun: str, many: str) -> None:
    assert plural(noun) == many


@pytest.mark.parametrize("words", ["a cat", "an orange cat", "an eye", "a unicorn", "an umbrella"])
def test_article(words: str) -> None:
    assert with_article(words.split(maxsplit=1)[1]) == words


# --- captions and the judge


def test_sentences_word_for_word() -> None:
    assert sentences(ONE) == [
        "a small red cat in the top left corner",
        "a red cat",
        "a small red cat",
        "a red cat in the top left corner",
        "there is a red cat",
        "the cat is red",
    ]
    assert sentences(GROUP) == ["three blue buses", "there are three blue buses"]
    assert sentences(PAIR) == [
        "a red ice cream to the left of a blue bus",
        "a red ice cream and a blue bus",
    ]
    unplaced: Facts = {"kind": "one", "objects": [thing("circle", "orange")], "relation": None}
    assert sentences(unplaced) == ["an orange circle", "there is an orange circle", "the circle is orange"]


@pytest.mark.parametrize("split", SPLITS)
def test_every_sentence_of_a_scene_is_true_and_short(split: Literal["train", "test"]) -> None:
    for facts in some_facts(500, split):
        for i, sentence in enumerate(sentences(facts)):
            relation = True if facts["kind"] == "pair" and i < 1 else None
            assert judge(sentence, facts) == Judgement(objects=True, attributes=True, relation=relation), sentence
            assert len(sentence.split()) <= 14
        told = captions(facts, Random(0))
        assert 2 <= len(told) <= 4
        assert len(set(told)) == len(told)
        assert set(told) <= set(sentences(facts))
        assert told[0] == sentences(facts)[0]


def test_a_sentence_with_one_thing_changed_is_false() -> None:
    random = Random(1)
    for facts in some_facts(500):
        here = [each["noun"] for each in facts["objects"]]
        stranger = random.choice([noun for noun in NOUNS if noun not in here])
        first = facts["objects"][0]
        other_colour = random.choice([colour for colour in COLOURS if colour != first["colour"]])
        for i, sentence in enumerate(sentences(facts)):
            noun = plural(first["noun"]) if facts["kind"] == "group" else first["noun"]
            assert not judge(change(sentence, noun, stranger), facts).objects
            # Only the colour of the first object is changed, because the other may have the same.
            recoloured = re.sub(rf"\b{first['colour']} {noun}\b", f"{other_colour} {noun}", sentence)
            recoloured = re.sub(rf"\b{noun} is {first['colour']}\b", f"{noun} is {other_colour}", recoloured)
            assert recoloured != sentence
            assert judge(recoloured, facts).objects
            assert not judge(recoloured, facts).attributes
            assert judge(sentence.rsplit(" ", 1)[0], facts) != judge(sentence, facts)  # without the last word
            for number in NUMBERS[:4]:
                if facts["kind"] == "group" and number != NUMBERS[first["number"] - 1]:
                    counted = change(sentence, NUMBERS[first["number"] - 1], number)
                    assert judge(counted, facts) == Judgement(objects=True, attributes=False, relation=None)
            for relation, opposite in OPPOSITE.items():
                if f" {relation} " in sentence:
                    assert judge(change(sentence, relation, opposite), facts).relation is False
                    swapped = " ".join(
                        [sentence.split(f" {relation} ")[1], relation, sentence.split(f" {relation} ")[0]]
                    )
                    assert judge(swapped, facts) == Judgement(objects=True, attributes=True, relation=False)
            if facts["kind"] == "one" and i == 0:
                size = SIZES[1 - SIZES.index(str(first["size"]))]
                assert not judge(change(sentence, str(first["size"]), size), facts).attributes
                place = random.choice([place for place in PLACES if place != first["place"]])
                assert not judge(change(sentence, str(first["place"]), place), facts).attributes


def change(sentence: str, old: str, new: str) -> str:
    changed = re.sub(rf"\b{old}\b", new, sentence, count=1)
    assert changed != sentence
    return changed


@pytest.mark.parametrize(
    ("facts", "caption"),
    [
        (ONE, "A small red cat in the top left corner."),
        (ONE, "a red small cat"),
        (ONE, "one red cat"),
        (ONE, "red cat"),
        (ONE, "the small cat is red in the top left corner"),
        (ONE, "the red cat is in the top left corner"),
        (GROUP, "there are three blue buses ."),
        (PAIR, "the red ice cream is to the left of the blue bus"),
        (PAIR, "there is a blue bus to the right of a red ice cream"),
        (PAIR, "the bus is blue and the ice cream is red"),
    ],
)
def test_a_true_caption_in_other_words(facts: Facts, caption: str) -> None:
    verdict = judge(caption, facts)
    assert verdict.objects
    assert verdict.attributes
    assert verdict.relation is not False


@pytest.mark.parametrize(
    ("facts", "caption", "objects", "attributes", "relation"),
    [
        (ONE, "a cat", True, False, None),  # the colour is missing
        (ONE, "a red blue cat", True, False, None),  # two colours contradict
        (ONE, "two red cats", True, False, None),
        (ONE, "a big small red cat", True, False, None),
        (ONE, "a red cat and a red cat", False, False, None),
        (ONE, "a red cat to the left of a blue bus", False, False, False),
        (GROUP, "the buses are blue", True, False, None),  # the number is missing
        (GROUP, "a blue bus", True, False, None),
        (GROUP, "a blue buses", True, False, None),
        (PAIR, "a red ice cream", False, False, None),
        (PAIR, "a blue ice cream to the left of a red bus", True, False, True),  # the colours are swapped
        (PAIR, "a red ice cream above a blue bus", True, True, False),
        (PAIR, "a big red ice cream and a blue bus", True, False, None),  # the sizes of a pair are unknown
        (PAIR, "a red ice cream and a blue bus on the left", True, False, None),  # and so are the places
        (PAIR, "a red ice cream and a blue bus and a red ice cream", False, False, None),
    ],
)
def test_a_caption_partly_true(
    facts: Facts, caption: str, objects: bool, attributes: bool, relation: bool | None
) -> None:
    assert judge(caption, facts) == Judgement(objects, attributes, relation)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        ".",
        "a red",
        "red",
        "a red cat a red cat",
        "a red catfish",
        "a red cat in the top left",
        "a red cat is",
        "a red cat and",
        "a picture of a red cat",
        "a red cat and a dragon",
        "in the middle",
        "there is",
        "a red cat to the left of",
        "\x00",
        "红色的猫",
        "a red cat " * 50,
    ],
)
def test_garbage_is_false(caption: str) -> None:
    assert judge(caption, ONE) == Judgement(objects=False, attributes=False, relation=None)


# --- questions


def answer(question: str, facts: Facts) -> str:
    """The answer according to the facts, computed in another way than by the generator of the questions."""
    objects = facts["objects"]

    def about(words: str) -> Thing:
        return next(each for each in objects if words in (each["noun"], plural(each["noun"])))

    if found := re.fullmatch(r"what color (?:is|are) the (.+)\?", question):
        return about(found[1])["colour"]
    if found := re.fullmatch(r"what objects? (?:is|are) in the picture\?", question):
        (only,) = objects
        return only["noun"] if only["number"] == 1 else plural(only["noun"])
    if found := re.fullmatch(r"how many (.+) are there\?", question):
        return NUMBERS[about(found[1])["number"] - 1]
    if found := re.fullmatch(r"is there an? (.+)\?", question):
        return "yes" if found[1] in [each["noun"] for each in objects] else "no"
    relations = "|".join(OPPOSITE)
    if found := re.fullmatch(rf"what is ({relations}) the (.+)\?", question):
        (other,) = [each["noun"] for each in objects if each["noun"] != found[2]]
        assert judge(f"a {other} {found[1]} a {found[2]}", facts).relation is True
        return other
    if found := re.fullmatch(rf"is the (.+) ({relations}) the (.+)\?", question):
        return "yes" if judge(f"a {found[1]} {found[2]} a {found[3]}", facts).relation else "no"
    found = re.fullmatch(r"(?:is|are) the (.+) (\S+)\?", question)
    assert found, question
    return "yes" if about(found[1])["colour"] == found[2] else "no"


def asked_about(count: int) -> list[tuple[Facts, tuple[Question, ...]]]:
    return [
        (facts, questions(facts, Random(i), lambda noun: colours_of(noun, "train")))
        for i, facts in enumerate(some_facts(count))
    ]


def test_answers_are_true_and_of_their_kind() -> None:
    for facts, asked in asked_about(500):
        assert 3 <= len(asked) <= 5
        for question in asked:
            assert question.answer == answer(question.text, facts), question
            kind = "yes/no" if question.answer in ("yes", "no") else "open"
            assert question.kind == ("number" if question.answer in NUMBERS else kind)


def test_no_answer_is_the_usual_one() -> None:
    asked = [question for _, asked in asked_about(3000) for question in asked]
    for opening in (
        r"is there an? ",
        r"(?:is|are) the \S+( cream)? \S+\?",
        r"is the .* (of|above|below) the",
    ):
        answers = [question.answer for question in asked if re.match(opening, question.text)]
        assert len(answers) > 1000
        assert 0.45 < answers.count("yes") / len(answers) < 0.55
    numbers = collections.Counter(question.answer for question in asked if question.kind == "number")
    assert set(numbers) == set(NUMBERS)
    assert max(numbers.values()) < 0.35 * numbers.total()
