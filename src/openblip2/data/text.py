"""Text as BLIP-2 is trained on it: lower case, without most punctuation, at most 50 words."""

MAX_WORDS = 50
_PUNCTUATION = '.!"()*#:;~'
_TO_SPACES = str.maketrans(_PUNCTUATION, " " * len(_PUNCTUATION))
_TO_NOTHING = str.maketrans("", "", _PUNCTUATION)


def clean_caption(text: str, max_words: int = MAX_WORDS) -> str:
    """A caption as it is used in training.

    Lower case; each of `. ! " ( ) * # : ; ~` becomes a space; several white-space characters become one space; cut
    after `max_words` words. A caption with only punctuation becomes empty.

    Source: the authors' `BlipCaptionProcessor`. Differs from it for a single tab or line break between two words,
    which becomes a space here.
    """
    return _fold(text.lower().translate(_TO_SPACES), max_words)


def clean_question(text: str, max_words: int = MAX_WORDS) -> str:
    """A question as it is given to the language model.

    As `clean_caption`, but punctuation is removed without leaving a space: "what colour (main)?" becomes
    "what colour main?", "u.s." becomes "us".

    Source: the authors' `BlipQuestionProcessor`. Differs from it: white space is reduced as in captions.
    """
    return _fold(text.lower().translate(_TO_NOTHING), max_words)


def _fold(text: str, max_words: int) -> str:
    return " ".join(text.split()[:max_words])
