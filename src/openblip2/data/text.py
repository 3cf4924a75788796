"""Text as BLIP-2 is trained on it, and as tokens for the Q-Former.

Captions and questions are in lower case, without most punctuation, and have at most 50 words; answers are as annotated.
A text without spaces (Chinese, Thai, or a broken row) is one word of any length, so characters are limited, too.

The Q-Former's tokens are BERT's, `[CLS] words [SEP]`, with one more token `[DEC]` at the end of the vocabulary.

Shapes: B texts, T tokens.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from openblip2.errors import require_unicode

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


def plain_question(text: str) -> str:
    """A question inside an instruction: as written, on one line, at most as long as `clean_question` leaves it.

    Differs from the authors of InstructBLIP, who clean it as for VQA. An instruction is not cleaned in use, so that
    training with cleaned questions would not know capitals and punctuation.
    """
    return _fold(text, MAX_WORDS)


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


class BertTokens:
    """Texts as tokens of the BERT that the Q-Former starts from.

    Args:
        tokenizer: a `transformers` tokenizer of the BERT family.
        longest: maximum number of tokens of a text, including special tokens.
        positions: how many the Q-Former has places for; None = at least `longest`.
    """

    def __init__(self, tokenizer: Any, longest: int = 32, positions: int | None = None) -> None:
        self.tokenizer, self.longest = tokenizer, min(longest, positions or longest)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`tokens [B, T]` int64 and `valid [B, T]` bool; T is the length of the longest text, at most `longest`."""
        if not texts:  # one of several processes may have none; 2 is the length of an empty text
            return torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.bool)
        how = {"padding": True, "truncation": True, "max_length": self.longest, "return_tensors": "pt"}
        found = self._read(texts, **how)
        return found["input_ids"], found["attention_mask"].bool()

    def too_long(self, texts: Sequence[str]) -> list[int]:
        """Which of the texts have more than `longest` tokens and would be cut."""
        lengths = [len(ids) for ids in self._read(texts, verbose=False)["input_ids"]]
        return [n for n, length in enumerate(lengths) if length > self.longest]

    def _read(self, texts: Sequence[str], **how: Any) -> Any:
        """Control tokens in the texts, such as "[SEP]", are read as plain text."""
        for text in texts:
            require_unicode(text)
        return self.tokenizer(list(texts), split_special_tokens=True, **how)


def only_unknown(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Which of the texts become only the tokenizer's unknown token (`[UNK]`), so that nothing is left of them."""
    for text in texts:
        require_unicode(text)
    if tokenizer.unk_token_id is None or not texts:
        return []
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [n for n, ids in enumerate(rows) if ids and set(ids) == {tokenizer.unk_token_id}]


def question_tokens(
    tokens: BertTokens | None, questions: Sequence[str] | None, device: torch.device | None = None
) -> tuple[Tensor, Tensor] | None:
    """Questions as a Q-Former reads them, `[B, T]` ids and which are no padding; None if it reads no questions."""
    if tokens is None or questions is None:
        return None
    ids, valid = tokens(questions)
    return ids.to(device), valid.to(device)
