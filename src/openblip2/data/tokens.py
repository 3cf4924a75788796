"""Text for the Q-Former: BERT's tokens, `[CLS] words [SEP]`, with one more token `[DEC]` at the end of the vocabulary.

Shapes: B texts, T tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class QFormerTokens:
    """The tokenizer of the BERT that the Q-Former starts from.

    Args:
        tokenizer: a `transformers` tokenizer of the BERT family.
        longest: maximum number of tokens of a text, including special tokens.
    """

    def __init__(self, tokenizer: Any, longest: int = 32) -> None:
        self.tokenizer, self.longest = tokenizer, longest

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
        return self.tokenizer(list(texts), split_special_tokens=True, **how)


def only_unknown(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Which of the texts become only the tokenizer's unknown token (`[UNK]`), so that nothing is left of them."""
    if tokenizer.unk_token_id is None or not texts:
        return []
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [n for n, ids in enumerate(rows) if ids and set(ids) == {tokenizer.unk_token_id}]


def stack(batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Joins tokenised batches of different lengths, padding the shorter ones."""
    longest = max(tokens.shape[1] for tokens, _ in batches)
    pad = torch.nn.functional.pad
    tokens = torch.cat([pad(tokens, (0, longest - tokens.shape[1])) for tokens, _ in batches])
    valid = torch.cat([pad(valid, (0, longest - valid.shape[1])) for _, valid in batches])
    return tokens, valid


def question_tokens(
    tokens: QFormerTokens | None, questions: Sequence[str] | None, device: torch.device | None = None
) -> tuple[Tensor, Tensor] | None:
    """Questions as a Q-Former reads them, `[B, T]` ids and which are no padding; None if it reads no questions."""
    if tokens is None or questions is None:
        return None
    ids, valid = tokens(questions)
    return ids.to(device), valid.to(device)
