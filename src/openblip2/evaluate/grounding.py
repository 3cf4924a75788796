"""The grounding gap: does the language model look at the picture, or only write what captions usually say?"""

from dataclasses import dataclass
from typing import Any

import torch

from openblip2.data.features import Features
from openblip2.evaluate.effective_rank import effective_rank
from openblip2.model.likelihood import likelihoods
from openblip2.model.stage2 import Stage2

NOT_LOOKING = 0.02  # a gap of less than this share of the loss is no more than noise
GROUP = 32  # pictures at once


@dataclass(frozen=True)
class Grounding:
    """Caption loss (nats a token) with the right picture and with another one, over `n` pictures.

    Attributes:
        effective_rank: of the query outputs of the same pictures.
    """

    right: float
    shuffled: float
    n: int
    effective_rank: float

    @property
    def gap(self) -> float:
        return self.shuffled - self.right

    def verdict(self) -> str:
        """The gap in plain words."""
        if self.gap < NOT_LOOKING * self.right:
            return (
                "the model is NOT looking at the picture: its captions are as likely with another one (train longer, "
                "start from a stage-1 run, or set warm_start=true)"
            )
        return f"the model looks: another picture makes the caption {self.gap:.2f} nats a token less likely"

    def as_log(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "loss_right": self.right,
            "loss_shuffled": self.shuffled,
            "effective_rank": self.effective_rank,
            "verdict": self.verdict(),
        }


def grounding(model: Stage2, held_out: Features, seed: int, prompt: str = "", most: int = 128) -> Grounding:
    """Measures the gap on at most `most` held-out pictures, each with its first caption.

    The other picture is the next one of the batch, with another caption. What an encoder-decoder draws (the split
    point) is drawn alike for both losses.
    """
    device = model.projection.weight.device
    right = shuffled = 0.0
    queries: list[torch.Tensor] = []
    rows = [rows for rows in torch.arange(min(most, len(held_out))).split(GROUP) if len(rows) > 1]
    for part in rows:
        features = held_out.values[part].to(device)
        captions = [held_out.records[n].captions[0] for n in part.tolist()]
        prompts = [prompt] * len(captions)
        queries.append(model.query_output(features=features))
        soft = model.projection(queries[-1])
        draws = torch.rand(len(part), generator=torch.Generator().manual_seed(seed)).tolist()
        for kind, seen in (("right", soft), ("shuffled", soft.roll(1, dims=0))):
            loss = float(model.language.scored(seen, prompts, captions, draws)[0]) * len(part)
            right, shuffled = (right + loss, shuffled) if kind == "right" else (right, shuffled + loss)
    count = sum(map(len, rows))
    return Grounding(right / count, shuffled / count, count, effective_rank(torch.cat(queries)))


def caption_losses(model: Stage2, held_out: Features, prompt: str = "") -> tuple[list[float], list[float]]:
    """Each picture's own loss of its first caption, nats a token: with the right picture, and with another one.

    The other picture is the one before it, the last for the first; but for that as in `grounding`, whose means weigh
    every token alike and not every picture. An encoder-decoder writes the whole caption.
    """
    device = model.projection.weight.device
    captions = [record.captions[0] for record in held_out.records]
    soft = torch.cat([model.soft_prompt(features=part.to(device)) for part in held_out.values.split(GROUP)])
    found: tuple[list[float], list[float]] = ([], [])
    for losses, seen in zip(found, (soft, soft.roll(1, dims=0)), strict=True):
        for rows in torch.arange(len(captions)).split(GROUP):
            texts = [captions[n] for n in rows.tolist()]
            losses += likelihoods(model.language, seen[rows.to(device)], prompt, texts)[0].tolist()
    return found
