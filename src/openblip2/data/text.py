"""Text as BLIP-2 is trained on it: lower case, without most punctuation, at most 50 words; answers as annotated.

A text without spaces (Chinese, Thai, or a broken row) is one word of any length, so characters are limited, too.
"""

import re
from collections.abc import Iterable

MAX_WORDS = 50
WORD_CHARACTERS = 20  # a text has at most so many for each word that it may have
MAX_CHARACTERS = MAX_WORDS * WORD_CHARACTERS
_PUNCTUATION = '.!"()*#:;~'
_TO_SPACES = str.maketrans(_PUNCTUATION, " " * len(_PUNCTUATION))
_REMOVED = re.compile(rf"(?<!\d)[{re.escape(_PUNCTUATION)}]|[{re.escape(_PUNCTUATION)}](?!\d)")

_SIDE = re.compile(r"\b(left|right)", re.IGNORECASE)


def clean_caption(text: str, max_words: int = MAX_WORDS) -> str:
    """A caption as it is used in training.

    Lower case; each of `. ! " ( ) * # : ; ~` becomes a space; several white-space characters become one space; cut
    after `max_words` words or 20 times as many characters. A caption with only punctuation becomes empty.

    Source: the authors' `BlipCaptionProcessor`. Differs from it for a single tab or line break between two words,
    which becomes a space here.
    """
    return _fold(text.lower().translate(_TO_SPACES), max_words)


def clean_question(text: str, max_words: int = MAX_WORDS) -> str:
    """A question as it is given to the language model.

    As `clean_caption`, but punctuation is removed without leaving a space: "what colour (main)?" becomes
    "what colour main?", "u.s." becomes "us". Between two digits it stays: "is it 10:30?", "a 3.5 mm lens?".

    Source: the authors' `BlipQuestionProcessor`. Differs from it: white space is reduced as in captions; the authors
    also remove punctuation between digits, which makes 35 mm of 3.5 mm.
    """
    return _fold(_REMOVED.sub("", text.lower()), max_words)


def clean_answer(text: str) -> str:
    """An answer as it is taught and scored: as annotated ("10:30", "$1.50"), on one line without outer white space.

    Source: the authors' `COCOVQADataset`, which leaves answers alone, and the official VQA score (`VQAEval`).
    """
    return text.replace("\n", " ").replace("\t", " ").strip()


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: not JSON's "\\ud800", nor bytes that were read although they are not."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def names_side(texts: Iterable[str]) -> bool:
    """Whether a text says left or right, which a mirrored picture makes wrong (English alone)."""
    return any(map(_SIDE.search, texts))


def _fold(text: str, max_words: int) -> str:
    return " ".join(text.split()[:max_words])[: max_words * WORD_CHARACTERS].rstrip()
