"""Text cleaning compared with the rule of the method, written as regular expressions."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openblip2.data.text import clean_caption, clean_question


def by_the_rule(text: str, in_place_of_punctuation: str, max_words: int) -> str:
    text = re.sub(r"[.!\"()*#:;~]", in_place_of_punctuation, text.lower())
    words = [word for word in re.split(r"\s+", text) if word]
    return " ".join(words[:max_words])[: 20 * max_words].rstrip()


@pytest.mark.parametrize(
    ("caption", "clean"),
    [
        ("A rainbow lorikeet.", "a rainbow lorikeet"),
        ("Two  dogs\t(one: brown)!\n", "two dogs one brown"),
        ('"Mind the gap", it said...', "mind the gap , it said"),
        ("a#b*c;d~e:f(g)h", "a b c d e f g h"),
        ("what's left, really? 50%", "what's left, really? 50%"),  # ' , ? % are not in the list
        ("É.T. in CAFÉ", "é t in café"),
        ("...", ""),
        ("", ""),
    ],
)
def test_captions_lose_case_and_punctuation(caption: str, clean: str) -> None:
    assert clean_caption(caption) == clean


@pytest.mark.parametrize(
    ("question", "clean"),
    [
        ("What is the colour (main)?", "what is the colour main?"),
        ("Is this the U.S.?", "is this the us?"),
        ("  How   many\tdogs?  ", "how many dogs?"),
        ("(...)", ""),
        ("A 3.5 mm f/1.8 lens at 10:30?", "a 3.5 mm f/1.8 lens at 10:30?"),
        ("Is it 5. or #5?", "is it 5 or 5?"),
    ],
)
def test_questions_close_up_where_punctuation_stood(question: str, clean: str) -> None:
    assert clean_question(question) == clean


def test_fifty_words_are_kept_unless_told_otherwise() -> None:
    words = [f"w{number}" for number in range(60)]
    for cleaned in (clean_caption, clean_question):
        assert cleaned(" ".join(words)).split() == words[:50]
        assert cleaned(" . ".join(words), max_words=3) == "w0 w1 w2"


def test_a_text_without_spaces_is_cut_by_its_characters() -> None:
    for cleaned in (clean_caption, clean_question):
        assert cleaned("猫" * 20_000) == "猫" * 1000
        assert cleaned("猫" * 20_000, 20_000) == "猫" * 20_000  # a higher limit keeps the whole text


_texts = st.text(alphabet=st.sampled_from("aBÇ12.!\"()*#:;~,?' \t\n\u00a0"), max_size=60) | st.text(max_size=60)


@settings(deadline=None)  # a busy machine must not fail the test
@given(text=_texts, max_words=st.integers(1, 8))
def test_any_text_comes_out_as_the_rule_says(text: str, max_words: int) -> None:
    assert clean_caption(text, max_words) == by_the_rule(text, " ", max_words)
    # The rule must keep punctuation between digits, so private-use characters, never made by lower(), replace it.
    between = re.sub(r"(?<=\d)[.!\"()*#:;~](?=\d)", lambda mark: chr(0xE000 + ord(mark[0])), text)
    expected = by_the_rule(between, "", max_words)
    assert clean_question(text, max_words) == re.sub("[\ue000-\ue0ff]", lambda one: chr(ord(one[0]) - 0xE000), expected)


@settings(deadline=None)
@given(text=_texts)
def test_clean_text_stays_as_it_is(text: str) -> None:
    for cleaned in (clean_caption, clean_question):
        assert cleaned(cleaned(text)) == cleaned(text)
