"""The paper's own run, held against this plan's arithmetic: which share of the peak do its days imply?

Paper, introduction: "using a single 16-A100(40G) machine, our largest model with ViT-g and FlanT5-XXL requires less
than 6 days for the first stage and less than 3 days for the second stage". Less than: the share is a lower bound.
"""

from openblip2.plan.former import Former
from openblip2.plan.frozen import Encoder, Language
from openblip2.plan.gpus import GPUS

DAYS = {"stage1": 6, "stage2": 3}
WHOSE = {"stage1": "vit-g", "stage2": "vit-g-flant5-xxl"}  # the presets that the sentence is about
GPUS_OF_IT = 16
PUBLISHED = (0.12, 0.18)  # what published runs reach
TEXT = 32  # tokens that stage 1 pads every caption to: the authors' code


def paper_flops(former: Former, encoder: Encoder, language: Language | None) -> float:
    """Floating-point operations of one pair by the paper's way, where nothing is shared between passes.

    `language`: None = stage 1. In stage 2 captions are padded to a batch's longest, which the paper does not tell: what
    it was counted with.
    """
    trained = sum(former.plain_stage1(TEXT).values())
    if language is not None:
        trained = former.look() + former.rows(former.queries, 0)
    beside = language.forward + language.backward if language is not None else 0
    return 2.0 * (encoder.multiply_adds + 3 * trained + beside)


def implied_efficiency(stage: str, steps: int, batch: int, flops: float) -> float:
    """The share of the peak of 16 A100 that the paper's days for a stage imply, at least; `flops` of one pair."""
    available = GPUS_OF_IT * GPUS["A100-40G"].flops * DAYS[stage] * 86400
    return steps * batch * flops / available
