"""Text as BLIP-2 is trained on it: lower case, without most punctuation, 50 words at most."""

MAX_WORDS = 50
_PUNCTUATION = '.!"()*#:;~'
_TO_SPACES = str.maketrans(_PUNCTUATION, " " * len(_PUNCTUATION))
_TO_NOTHING = str.maketrans("", "", _PUNCTUATION)


def clean_caption(text: str, max_words: int = MAX_WORDS) -> str:
    """A caption as the Q-Former and the language model learn it.

    Lower case; each of `. ! " ( ) * # : ; ~` becomes a space; runs of white space become one space; cut after
    `max_words` words. May come out empty: a caption of punctuation alone says nothing.

    Source: the authors' `BlipCaptionProcessor`. Differs from it where a single tab or line break stands
    between two words: it stays there and is a space here.
    """
    return _fold(text.lower().translate(_TO_SPACES), max_words)


def clean_question(text: str, max_words: int = MAX_WORDS) -> str:
    """A question as the language model is asked it.

    As `clean_caption`, but the punctuation is removed and leaves no space: "what colour (main)?" becomes
    "what colour main?", "u.s." becomes "us".

    Source: the authors' `BlipQuestionProcessor`. Differs from it in folding white space, which there happens
    to captions only.
    """
    return _fold(text.lower().translate(_TO_NOTHING), max_words)


def _fold(text: str, max_words: int) -> str:
    return " ".join(text.split()[:max_words])
