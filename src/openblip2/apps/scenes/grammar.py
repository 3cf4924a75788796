"""The grammar of the drawn scenes: captions, questions, and a parser that checks captions.

There are three kinds of scenes, and every caption names every object with its colour:

    one     "a small red cat in the top left corner"
    group   "three blue buses"
    pair    "a red cat to the left of a blue bus", the left or upper one first

`Facts` are the content of a scene. `sentences` writes captions from them, and `judge` compares a caption with them.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, NotRequired, TypedDict

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
from openblip2.data.text import clean_caption


class Thing(TypedDict):
    """The objects of one noun in a scene. `size` and `place` are None if captions do not mention them.

    `boxes` exist after drawing: left, top, right, bottom of each object as fractions of the image's sides.
    """

    noun: str
    colour: str
    size: str | None
    place: str | None
    number: int
    boxes: NotRequired[list[list[float]]]


class Facts(TypedDict):
    """The content of a scene, as JSON. In a pair, `relation` is that of the first object to the second."""

    kind: Literal["one", "group", "pair"]
    objects: list[Thing]
    relation: str | None


@dataclass(frozen=True, slots=True)
class Judgement:
    """Which parts of a caption are true; see `judge`."""

    objects: bool
    attributes: bool
    relation: bool | None


def sentences(facts: Facts) -> list[str]:
    """All captions of the grammar for a scene, the most detailed first. Each is true and names every object."""
    first, *others = facts["objects"]
    if facts["kind"] == "group":
        some = f"{NUMBERS[first['number'] - 1]} {first['colour']} {plural(first['noun'])}"
        return [some, f"there are {some}"]
    if others:
        a, b, relation = named(first), named(others[0]), str(facts["relation"])
        # In reading order, as people describe images; only questions use the inverse relation.
        return [f"{a} {relation} {b}", f"{a} and {b}"]
    bare, place = named(first), first["place"] or ""
    sized = with_article(f"{first['size'] or ''} {first['colour']} {first['noun']}".strip())
    every = [
        f"{sized} {place}".strip(),
        bare,
        sized,
        f"{bare} {place}".strip(),
        f"there is {bare}",
        f"the {first['noun']} is {first['colour']}",
    ]
    return list(dict.fromkeys(every))


def captions(facts: Facts, random: Random) -> tuple[str, ...]:
    """Two to four of the `sentences`, including the first two, one detailed and one short."""
    first, second, *more = sentences(facts)
    return (first, second, *random.sample(more, random.randint(0, min(2, len(more)))))


def questions(
    facts: Facts, random: Random, colours: Callable[[str], Sequence[str]], nouns: Sequence[str] = WORLDS["full"]
) -> tuple[Question, ...]:
    """Four or five questions about a scene, in a fixed order of forms.

    The answer to a yes/no question is random. A question with the answer "no" names something that could have been in
    the scene, so the question alone does not reveal the answer.

    Args:
        facts: facts of the scene.
        random: source of all random choices.
        colours: returns the colours that a noun can have.
        nouns: nouns that scenes can contain.
    """
    asked = {"one": _about_one, "group": _about_group, "pair": _about_pair}[facts["kind"]](facts, random)
    thing = random.choice(facts["objects"])
    return (*asked, _is_there(facts, random, nouns), _is_coloured(thing, random, colours))


def _about_one(facts: Facts, random: Random) -> list[Question]:
    (thing,) = facts["objects"]
    asked = [
        Question(f"what color is the {thing['noun']}?", thing["colour"], "open"),
        Question("what object is in the picture?", thing["noun"], "open"),
    ]
    if random.random() < 1 / 4:  # so that "one" is not a more frequent answer than "two", "three" or "four"
        asked.append(Question(f"how many {plural(thing['noun'])} are there?", NUMBERS[0], "number"))
    return asked


def _about_group(facts: Facts, random: Random) -> list[Question]:
    (thing,) = facts["objects"]
    many = plural(thing["noun"])
    return [
        Question(f"what color are the {many}?", thing["colour"], "open"),
        Question("what objects are in the picture?", many, "open"),
        Question(f"how many {many} are there?", NUMBERS[thing["number"] - 1], "number"),
    ]


def _about_pair(facts: Facts, random: Random) -> list[Question]:
    first, second = facts["objects"]
    relation = str(facts["relation"])
    if random.random() < 0.5:
        first, second, relation = second, first, OPPOSITE[relation]
    true = random.random() < 0.5
    stated = relation if true else OPPOSITE[relation]
    return [
        Question(f"what color is the {first['noun']}?", first["colour"], "open"),
        Question(f"what is {relation} the {second['noun']}?", first["noun"], "open"),
        Question(f"is the {first['noun']} {stated} the {second['noun']}?", _yes(true), "yes/no"),
    ]


def _is_there(facts: Facts, random: Random, nouns: Sequence[str]) -> Question:
    here = [thing["noun"] for thing in facts["objects"]]
    true = random.random() < 0.5
    noun = random.choice(here if true else [noun for noun in nouns if noun not in here])
    return Question(f"is there {with_article(noun)}?", _yes(true), "yes/no")


def _is_coloured(thing: Thing, random: Random, colours: Callable[[str], Sequence[str]]) -> Question:
    true = random.random() < 0.5
    others = [colour for colour in colours(thing["noun"]) if colour != thing["colour"]]
    colour = thing["colour"] if true else random.choice(others)
    subject = f"is the {thing['noun']}" if thing["number"] == 1 else f"are the {plural(thing['noun'])}"
    return Question(f"{subject} {colour}?", _yes(true), "yes/no")


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def named(thing: Thing) -> str:
    """One of the objects: "a red cat"."""
    return with_article(f"{thing['colour']} {thing['noun']}")


def _any_of(words: Iterable[str]) -> str:
    # Longest first, because a regular expression takes the first alternative that matches.
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


_FORMS = {noun: noun for noun in NOUNS} | {plural(noun): noun for noun in NOUNS}
_PHRASE = re.compile(
    rf"(?:(?P<count>a|an|the|{_any_of(NUMBERS)}) )?(?P<looks>(?:(?:{_any_of((*SIZES, *COLOURS))}) )*)"
    rf"(?P<noun>{_any_of(_FORMS)})(?: (?:is|are) (?P<colour>{_any_of(COLOURS)}))?"
    rf"(?: (?:(?:is|are) )?(?P<place>{_any_of(PLACES)}))?"
)
_LINK = re.compile(rf" (?:and|(?:(?:is|are) )?(?P<relation>{_any_of(OPPOSITE)})) ")
_OPENING = re.compile(r"there (?:is|are) ")


def judge(caption: str, facts: Mapping[str, Any]) -> Judgement:
    """Which parts of `caption` are true for the scene with these `Facts`.

    - `objects`: the nouns of the scene are named once each, and no others.
    - `attributes`: in addition, colours and numbers are stated and right, and no size or place is wrong.
    - `relation`: the stated relation is right; None if none is stated.

    All word orders of the grammar are accepted ("the cat is red", "a big red cat", "a red big cat"). A caption that
    contains anything else or is cut off is false in all parts.
    """
    read = _read(caption)
    if read is None:
        return Judgement(objects=False, attributes=False, relation=None)
    phrases, relations = read
    nouns = [_FORMS[phrase["noun"]] for phrase in phrases]
    things: dict[str, Thing] = {thing["noun"]: thing for thing in facts["objects"]}
    objects = sorted(nouns) == sorted(things)
    attributes = objects and all(_fits(phrase, things[noun]) for phrase, noun in zip(phrases, nouns, strict=True))
    stated = [
        relation if [left, right] == list(things) else OPPOSITE[relation]
        for left, relation, right in zip(nouns[:-1], relations, nouns[1:], strict=True)
        if relation is not None
    ]
    true = objects and all(relation == facts["relation"] for relation in stated)
    return Judgement(objects, attributes, relation=true if stated else None)


def _read(caption: str) -> tuple[list[re.Match[str]], list[str | None]] | None:
    """The noun phrases of a caption and their relations (None for "and"); None if it does not fit the grammar."""
    text = clean_caption(caption)
    opening = _OPENING.match(text)
    at = opening.end() if opening else 0
    phrases: list[re.Match[str]] = []
    relations: list[str | None] = []
    while phrase := _PHRASE.match(text, at):
        phrases.append(phrase)
        if phrase.end() == len(text):
            return phrases, relations
        link = _LINK.match(text, phrase.end())
        if link is None:
            return None
        relations.append(link["relation"])
        at = link.end()
    return None


def _fits(phrase: re.Match[str], thing: Thing) -> bool:
    """Whether colour and number are stated and right, and size and place are right or not stated."""
    looks = phrase["looks"].split()
    colours = {look for look in [*looks, phrase["colour"]] if look in COLOURS}
    sizes = {look for look in looks if look in SIZES}
    if phrase["count"] in NUMBERS:
        number = NUMBERS.index(phrase["count"]) + 1
    else:  # "a cat", "the cat" and "cat" are one; "the cats" has no number
        number = 1 if phrase["noun"] in NOUNS else None
    return (
        colours == {thing["colour"]}
        and number == thing["number"]
        and sizes <= {thing["size"]}
        and phrase["place"] in (None, thing["place"])
    )
