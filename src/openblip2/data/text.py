"""Prepares text as for the training of BLIP-2, and converts it to tokens for the Q-Former.

A text without spaces (Chinese, Thai, or a broken row) is one word of any length, so its characters are limited, too.

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
WORD_CHARACTERS = 20  # maximum number of characters of a text per allowed word
MAX_CHARACTERS = MAX_WORDS * WORD_CHARACTERS
_PUNCTUATION = '.!"()*#:;~'
_TO_SPACES = str.maketrans(_PUNCTUATION, " " * len(_PUNCTUATION))
_REMOVED = re.compile(rf"(?<!\d)[{re.escape(_PUNCTUATION)}]|[{re.escape(_PUNCTUATION)}](?!\d)")

_SIDE = re.compile(r"\b(left|right)", re.IGNORECASE)


def clean_caption(text: str, max_words: int = MAX_WORDS) -> str:
    """A caption as it is used in training.

    Lower case; each of `. ! " ( ) * # : ; ~` becomes a space; white space becomes one space; cut after `max_words`
    words or 20 times as many characters. A caption with only punctuation becomes empty.

    Source: the authors' `BlipCaptionProcessor`. Differs from it: a single tab or line break becomes a space, too.
    """
    return _fold(text.lower().translate(_TO_SPACES), max_words)


def clean_question(text: str, max_words: int = MAX_WORDS) -> str:
    """A question as it is given to the language model.

    As `clean_caption`, but punctuation is removed without leaving a space: "what colour (main)?" becomes
    "what colour main?", "u.s." becomes "us". Between two digits it stays: "is it 10:30?", "a 3.5 mm lens?".

    Source: the authors' `BlipQuestionProcessor`. Differs from it: white space is reduced as in captions; the authors
    also remove punctuation between digits, which turns 3.5 mm into 35 mm.
    """
    return _fold(_REMOVED.sub("", text.lower()), max_words)


def plain_question(text: str) -> str:
    """A question inside an instruction: as written, on one line, with the same maximum length as in `clean_question`.

    Differs from the authors of InstructBLIP, who clean it as for VQA. Instructions are not cleaned at inference, so a
    model that was trained with cleaned questions would not know capital letters and punctuation.
    """
    return _fold(text, MAX_WORDS)


def clean_answer(text: str) -> str:
    """An answer as used in training and scoring: as annotated ("10:30", "$1.50"), on one line and stripped.

    Source: the authors' `COCOVQADataset`, which does not change answers, and the official VQA score (`VQAEval`).
    """
    return text.replace("\n", " ").replace("\t", " ").strip()


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded as UTF-8, so has no lone surrogates (from JSON's "\\ud800" or invalid bytes)."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def names_side(texts: Iterable[str]) -> bool:
    """Whether a text says left or right, which is wrong for a flipped image (only in English)."""
    return any(map(_SIDE.search, texts))


def _fold(text: str, max_words: int) -> str:
    return " ".join(text.split()[:max_words])[: max_words * WORD_CHARACTERS].rstrip()


class BertTokens:
    """Texts as tokens of the BERT that the Q-Former starts from.

    Args:
        tokenizer: a `transformers` tokenizer of the BERT family.
        longest: maximum number of tokens of a text, including special tokens.
        positions: number of position embeddings in the Q-Former; None = at least `longest`.
    """

    def __init__(self, tokenizer: Any, longest: int = 32, positions: int | None = None) -> None:
        self.tokenizer, self.longest = tokenizer, min(longest, positions or longest)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`tokens [B, T]` int64 and `valid [B, T]` bool; T is the length of the longest text, at most `longest`."""
        if not texts:  # a process may have no texts; an empty text has 2 tokens
            return torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.bool)
        found = self._read(texts, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
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
    """Which of the texts become only the tokenizer's unknown token (`[UNK]`) and so contain no information."""
    for text in texts:
        require_unicode(text)
    if tokenizer.unk_token_id is None or not texts:
        return []
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [n for n, ids in enumerate(rows) if ids and set(ids) == {tokenizer.unk_token_id}]


def question_tokens(
    tokens: BertTokens | None, questions: Sequence[str] | None, device: torch.device | None = None
) -> tuple[Tensor, Tensor] | None:
    """Token ids `[B, T]` of questions for a Q-Former, and which are not padding; None if it takes no questions."""
    if tokens is None or questions is None:
        return None
    ids, valid = tokens(questions)
    return ids.to(device), valid.to(device)
