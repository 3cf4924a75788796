"""Nucleus sampling (Holtzman et al., 2020) without sorting the vocabulary at every word: the same distribution.

What is drawn is told to the language model's own `generate` by leaving it nothing else to choose.

Shapes: B rows, W words of the vocabulary.
"""

import torch
from torch import Tensor
from transformers import LogitsProcessor

LIKELY = 512  # words that are sorted first; a nucleus is rarely larger


class NucleusSampling(LogitsProcessor):
    """Draws each row's next word from the fewest words that together reach `top_p`; all others become impossible.

    Args:
        top_p: in (0, 1].
        temperature: > 0, what logits are divided by first.
    """

    def __init__(self, top_p: float, temperature: float) -> None:
        self.top_p, self.temperature = top_p, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits `[B, W]` -> 0 for the word that was drawn, -inf for all others, `[B, W]`."""
        logits = scores.float() / self.temperature
        every = logits.logsumexp(dim=1, keepdim=True)
        drawn = torch.empty(len(logits), dtype=torch.long, device=logits.device)
        likely, words = logits.topk(min(LIKELY, logits.shape[1]), dim=1)
        wide = (likely - every).exp().sum(dim=1) < self.top_p
        drawn[~wide] = self._draw(likely[~wide], words[~wide], every[~wide])
        if wide.any():
            drawn[wide] = self._draw(*logits[wide].sort(dim=1, descending=True), every[wide])
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, drawn.unsqueeze(1), 0.0)

    def _draw(self, sorted_logits: Tensor, words: Tensor, every: Tensor) -> Tensor:
        shares = (sorted_logits - every).exp()
        above = shares.cumsum(dim=1) - shares  # of the words that are likelier
        shares = shares * (above < self.top_p)  # the first always stays
        return words.gather(1, torch.multinomial(shares, 1)).squeeze(1) if len(words) else words[:, 0]
