"""Stage 1: representation learning (paper, section 3.1). The queries learn to extract text-relevant image features.

Shapes: B images, S side in px, P patch tokens, V encoder width, Q queries, T text tokens, D width, E shared space.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openblip2.model.blocks import LMHead
from openblip2.model.fast.chunked_loss import chunked_cross_entropy
from openblip2.model.objectives import (
    Contrast,
    HardNegatives,
    contrastive,
    decorrelation,
    hard_negatives,
    matching,
    same_image,
)
from openblip2.model.qformer import Cache, Memory, QFormer
from openblip2.model.vision import FrozenVision

OBJECTIVES = ("itc", "itm", "itg")


class Stage1(nn.Module):
    """A Q-Former between a frozen image encoder and text, with the heads of the three objectives.

    Args:
        qformer: a Q-Former with its text path; the last id of its vocabulary is `[DEC]`.
        vision: the frozen encoder; None if only precomputed features are given.
        shared_width: E.
        temperature: initial value of the learned temperature.
        label_smoothing: of ITC and ITG.
        detach_gathered: see `objectives.contrastive`.
        writes: False omits the head of ITG, as in transformers' checkpoints: such a model can score, but not train.
        decorrelation: weight of `objectives.decorrelation`, which is not in the paper; 0 = without it.
        smooth_maximum: of ITC's loss, see `objectives.similarity`; not in the paper; 0 = without it. Scores of trained
            models always use the maximum.
    """

    def __init__(
        self,
        qformer: QFormer,
        vision: FrozenVision | None = None,
        shared_width: int = 256,
        temperature: float = 0.07,
        label_smoothing: float = 0.1,
        detach_gathered: bool = False,
        writes: bool = True,
        decorrelation: float = 0.0,
        smooth_maximum: float = 0.0,
    ) -> None:
        super().__init__()
        assert qformer.word_embeddings is not None, "stage 1 needs the Q-Former's text path"
        self.vision, self.qformer = vision, qformer
        self.vision_proj = nn.Linear(qformer.width, shared_width)  # one for all queries, as in the authors' code
        self.text_proj = nn.Linear(qformer.width, shared_width)
        self.itm_head = nn.Linear(qformer.width, 2)  # "a two-class linear classifier" for each query (3.1)
        self.lm_head = LMHead(qformer.width, qformer.word_embeddings) if writes else None
        self.temperature = nn.Parameter(torch.tensor(temperature))  # learned, as in ALBEF
        self.label_smoothing, self.detach_gathered = label_smoothing, detach_gathered
        self.decorrelation, self.smooth_maximum = decorrelation, smooth_maximum

    @property
    def connector(self) -> QFormer:
        """The Q-Former, under the same name as in `Stage2`."""
        return self.qformer

    def losses(
        self,
        tokens: Tensor,
        valid: Tensor,
        ids: Tensor | None = None,
        *,
        images: Tensor | None = None,
        features: Tensor | None = None,
        negatives: HardNegatives | tuple[Tensor, Tensor] | None = None,
        objectives: Collection[str] = OBJECTIVES,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The three losses, or only those named in `objectives`, unweighted; the paper minimises their sum.

        These are the losses of one process. `fast/` computes the same losses over several processes, or in chunks.

        Args:
            tokens: `[B, T]`, `[CLS] words [SEP]`, right-padded.
            valid: `[B, T]` bool, False on padding.
            ids: `[B]` int64, equal for captions of the same image; None = all images differ.
            images: `[B, 3, S, S]` uint8; give either these or features.
            features: `[B, P, V]`, from the frozen encoder.
            negatives: hard negatives `(texts [B], images [B])` to use instead of drawn ones; -1 = none.
            objectives: which losses. A step without ITM needs less than half of the work. ITC is always computed,
                because ITM's negatives are drawn from its similarities.
            generator: random generator on the CPU for drawing negatives; None = torch's default generator.
        """
        memory = self.qformer.encode_image(see(self.vision, images, features))  # once, for all passes
        positives = same_image(torch.arange(len(tokens), device=tokens.device) if ids is None else ids)

        # Uni-modal mask: queries and text do not attend to each other, so `query_pass` and `text_pass` are two passes.
        queries, cache = self.qformer.query_pass(memory)
        itc = self.contrast(self.image_vectors(queries), self.text_vectors(tokens, valid), positives)
        losses = {"itc": itc.loss}

        # Multimodal causal mask: query rows are as in the query pass, so `causal_pass` only computes text rows.
        if "itg" in objectives:
            losses["itg"] = self.generation_loss(cache, tokens, valid)

        # Bi-directional mask: matched pairs, wrong images and wrong texts in one `joint_pass`.
        if "itm" in objectives:
            if negatives is None:
                draws = torch.rand(2, len(tokens), dtype=torch.float64, generator=generator)
                negatives = hard_negatives(itc.image_to_text, itc.text_to_image, positives, draws)  # as in ALBEF
            pairs = itm_pairs(tokens, valid, HardNegatives(*negatives))
            losses["itm"] = matching(self.match(memory.take(pairs.images), pairs.tokens, pairs.valid), pairs.is_match)
        if self.decorrelation:
            losses["decorrelation"] = self.decorrelation * decorrelation(queries)
        return in_order(losses, objectives)

    def contrast(
        self, image: Tensor, text: Tensor, positives: Tensor, transpose: Callable[[Tensor], Tensor] = torch.t
    ) -> Contrast:
        """ITC of image vectors `[B, Q, E]` and text vectors `[G, E]`; other arguments: see `objectives.contrastive`."""
        options = (self.label_smoothing, self.detach_gathered, transpose, self.smooth_maximum)
        return contrastive(image, text, self.temperature, positives, *options)

    def generation_loss(self, cache: Cache, tokens: Tensor, valid: Tensor) -> Tensor:
        """ITG of texts `[B, T]`, given the cache of a query pass: the mean over all positions with a target."""
        rows, targets = self.write(cache, tokens, valid)
        assert self.lm_head is not None
        assert self.qformer.word_embeddings is not None
        weight, bias = self.qformer.word_embeddings.weight, self.lm_head.bias
        return chunked_cross_entropy(rows, weight, bias, targets, self.label_smoothing)

    def image_vectors(self, queries: Tensor) -> Tensor:
        """Projects query outputs into the shared space and normalises them: `[B, Q, D]` -> `[B, Q, E]`, of length 1."""
        return F.normalize(self.vision_proj(queries).float(), dim=-1)

    def text_vectors(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """Projects the text's `[CLS]` output into the shared space and normalises it: `[B, T]` -> `[B, E]`."""
        return F.normalize(self.text_proj(self.qformer.text_pass(tokens, valid)).float(), dim=-1)

    def match(self, memory: Memory, tokens: Tensor, valid: Tensor) -> Tensor:
        """Match logits of N pairs, averaged over the queries: `[N, 2]`, class 1 = match."""
        return self.itm_head(self.qformer.joint_pass(memory, tokens, valid)).mean(dim=1)  # "average the logits" (3.1)

    def write(self, cache: Cache, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of the word decoder, `[N, D]`, and targets, `[N]`, at every position whose next token is not padding.

        `[DEC]` replaces `[CLS]` and is never a target; `[SEP]` is a target.
        """
        assert self.qformer.word_embeddings is not None
        if self.lm_head is None:
            raise ValueError("this model has no ITG head (transformers' format has none), so it has no ITG loss")
        start = tokens.new_full((len(tokens), 1), self.qformer.word_embeddings.num_embeddings - 1)
        tokens = torch.cat([start, tokens[:, 1:]], dim=1)
        # The last token has no next token to predict, so its row is not computed.
        hidden = self.qformer.causal_pass(cache, tokens, valid, keep_text=tokens.shape[1] - 1)
        scored = valid[:, 1:]  # row n predicts token n + 1
        return self.lm_head.hidden(hidden[scored]), tokens[:, 1:][scored]


class Pairs(NamedTuple):
    """The pairs of image-text matching: the true ones, then those with a wrong image, then those with a wrong text."""

    images: Tensor  # [N] int64, indices of images
    tokens: Tensor  # [N, T]
    valid: Tensor  # [N, T]
    is_match: Tensor  # [N] bool


def itm_pairs(tokens: Tensor, valid: Tensor, negatives: HardNegatives, rows: Tensor | None = None) -> Pairs:
    """Builds N = 3B pairs, or fewer if some rows have no negative.

    Args:
        tokens: `[M, T]`, the texts of the batch's B rows, followed by others that can be negatives.
        valid: `[M, T]` bool.
        negatives: of the B rows.
        rows: `[n]` int64: only build the pairs of these rows of the batch, at most 3n; None = all rows.
    """
    own = torch.arange(len(negatives.texts), device=tokens.device) if rows is None else rows
    wrong_images, wrong_texts = negatives.images[own], negatives.texts[own]  # [n]
    with_image, with_text = wrong_images >= 0, wrong_texts >= 0  # -1: there is no negative, because all others match
    images = torch.cat([own, wrong_images[with_image], own[with_text]])
    texts = torch.cat([own, own[with_image], wrong_texts[with_text]])
    return Pairs(images, tokens[texts], valid[texts], torch.arange(len(images), device=tokens.device) < len(own))


def in_order(losses: dict[str, Tensor], objectives: Collection[str]) -> dict[str, Tensor]:
    """Selects the losses in `objectives`, and decorrelation if present, always in the same order."""
    wanted = (*objectives, "decorrelation")
    return {name: losses[name] for name in (*OBJECTIVES, "decorrelation") if name in losses and name in wanted}


def see(vision: FrozenVision | None, images: Tensor | None, features: Tensor | None) -> Tensor:
    """Features `[B, P, V]`: the given ones, or the frozen encoder's output for `images [B, 3, S, S]` uint8.

    Raises:
        ValueError: neither or both are given, or images are given but there is no encoder.
    """
    if (images is None) == (features is None):
        raise ValueError("give either images or features, but not both")
    if features is not None:
        return features
    if vision is None:
        raise ValueError("this model was built without an image encoder: give features, or build it with one")
    if images is not None and not len(images):  # a process may have no images, but encoders need at least one
        return vision(images.new_zeros(1, *images.shape[1:]))[:0]
    return vision(images)
