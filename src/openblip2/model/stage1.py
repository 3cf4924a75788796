"""Stage 1: representation learning (paper, section 3.1). The queries learn to extract what text can say.

Shapes: B images, S side in px, P patch tokens, V encoder width, Q queries, T text tokens, D width, E shared space.
"""

from collections.abc import Collection
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openblip2 import distributed
from openblip2.distributed import Share
from openblip2.model import masks
from openblip2.model.exchange import bring
from openblip2.model.objectives import (
    Contrast,
    Rivals,
    chunked_cross_entropy,
    contrastive,
    decorrelation,
    hard_negatives,
    matching,
    same_image,
    sigmoid_contrastive,
)
from openblip2.model.qformer import Memory, QFormer, Seen, WordHead
from openblip2.model.vision import Vision

OBJECTIVES = ("itc", "itm", "itg")
SIGMOID_BIAS = -10.0  # SigLIP's start: so low that nearly all pairs, which are no match, begin as none


class Stage1(nn.Module):
    """A Q-Former between a frozen image encoder and text, with the heads of the three objectives.

    Args:
        qformer: with its text path; the last id of its vocabulary is `[DEC]`.
        vision: the frozen encoder; None when only ready-made features are given.
        shared_width: E. temperature: the start of the learned temperature.
        label_smoothing: of ITC and ITG. one_sided: see `objectives.contrastive`.
        writes: False leaves out the head of ITG, as transformers' checkpoints do: good for scores, not for training.
        contrast: ITC by `objectives.contrastive`, or (not the paper's) by `sigmoid_contrastive`, with a learned bias.
        decorrelation: weight of `objectives.decorrelation`, which is not in the paper; 0 = without it.
    """

    def __init__(
        self,
        qformer: QFormer,
        vision: Vision | None = None,
        shared_width: int = 256,
        temperature: float = 0.07,
        label_smoothing: float = 0.1,
        one_sided: bool = False,
        writes: bool = True,
        contrast: Literal["softmax", "sigmoid"] = "softmax",
        decorrelation: float = 0.0,
    ) -> None:
        super().__init__()
        assert qformer.words is not None, "stage 1 needs the Q-Former's text path"
        assert not (one_sided and contrast == "sigmoid"), "the sigmoid loss has one direction: nothing to leave out"
        self.vision, self.qformer = vision, qformer
        self.image_head = nn.Linear(qformer.width, shared_width)
        self.text_head = nn.Linear(qformer.width, shared_width)
        self.match_head = nn.Linear(qformer.width, 2)
        self.word_head = WordHead(qformer.width, qformer.words) if writes else None
        self.temperature = nn.Parameter(torch.tensor(temperature))
        # None is no parameter: a checkpoint of the paper's ITC does not have it.
        self.contrast_bias = nn.Parameter(torch.tensor(SIGMOID_BIAS)) if contrast == "sigmoid" else None
        self.label_smoothing, self.one_sided, self.decorrelation = label_smoothing, one_sided, decorrelation

    def losses(
        self,
        tokens: Tensor,
        valid: Tensor,
        ids: Tensor | None = None,
        *,
        images: Tensor | None = None,
        features: Tensor | None = None,
        negatives: Rivals | tuple[Tensor, Tensor] | None = None,
        objectives: Collection[str] = OBJECTIVES,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The three losses, or those of them in `objectives`, by name, unweighted; their sum is what the paper trains.

        In several processes each gives its part of the joined batch. Their losses' mean over processes, and their
        gradients', are those of one process with the joined batch.

        Args:
            tokens: `[B, T]`, `[CLS] words [SEP]`, right-padded. valid: `[B, T]` bool, False on padding. B and T may
                differ from process to process, and B may be 0.
            ids: `[B]` int64, equal for captions of the same image; None = all images differ.
            images: `[B, 3, S, S]` uint8, or features: `[B, P, V]` from the frozen encoder; one of the two.
            negatives: given hard negatives `(texts [B], images [B])` instead of drawn ones, -1 for none. They are
                places in the joined batch.
            objectives: what is wanted. Without ITM more than half of a step's work is spared; ITC is always computed,
                for ITM's negatives come from it.
            generator: what negatives are drawn by, on the CPU; None = torch's own. Alike in all processes it makes the
                draw one of the joined batch, however many there are.
        """
        shared, words = share_texts(valid)
        ids = shared.first + torch.arange(len(tokens), device=tokens.device) if ids is None else ids
        positives = same_image(ids, shared)
        patches = see(self.vision, images, features)
        memory = self.qformer.look(patches)
        alone = self.qformer(memory)
        itc = self.contrast(self.image_vectors(alone), self.text_vectors(tokens, valid), positives, shared)
        found = {"itc": itc.loss}
        if self.decorrelation:
            found["decorrelation"] = self.decorrelation * decorrelation(alone.queries)
        if "itg" in objectives:
            found["itg"] = shared.weigh(self.writing_loss(alone, tokens, valid), *words)
        if "itm" in objectives:
            rivals = self.rivals(itc, positives, shared, generator) if negatives is None else Rivals(*negatives)
            at_hand = bring(rivals, patches, tokens, valid, shared)
            pairs = pair_up(at_hand.tokens, at_hand.valid, at_hand.rivals)
            if len(at_hand.fetched) or at_hand.fetched.requires_grad:  # gradients' way back leads through all processes
                memory = memory.join(self.qformer.look(at_hand.fetched))
            loss = matching(self.match(memory.take(pairs.images), pairs.tokens, pairs.valid), pairs.is_match)
            found["itm"] = shared.weigh(loss, len(pairs.images), at_hand.pairs)
        return {
            name: found[name]
            for name in (*OBJECTIVES, "decorrelation")
            if name in (*objectives, "decorrelation") and name in found
        }

    def contrast(self, image: Tensor, text: Tensor, positives: Tensor, shared: Share | None = None) -> Contrast:
        """ITC of image vectors `[B, Q, E]` and text vectors `[B, E]`; `positives [B, G]` from `same_image`."""
        if self.contrast_bias is not None:
            return sigmoid_contrastive(image, text, self.temperature, self.contrast_bias, positives, shared)
        return contrastive(image, text, self.temperature, positives, self.label_smoothing, self.one_sided, shared)

    def rivals(
        self, itc: Contrast, positives: Tensor, shared: Share, generator: torch.Generator | None = None
    ) -> Rivals:
        """Hard negatives from the joined batch, `positives [B, G]`, by as many draws as it has rows: ours are ours."""
        draws = torch.rand(2, shared.total, dtype=torch.float64, generator=generator)[:, shared.own]
        return hard_negatives(itc.image_to_text, itc.text_to_image, positives, draws.to(positives.device))

    def writing_loss(self, alone: Seen, tokens: Tensor, valid: Tensor) -> Tensor:
        """ITG of the images of a query pass and their texts: the mean over all positions with a target."""
        rows, targets = self.write(alone, tokens, valid)
        assert self.word_head is not None
        assert self.qformer.words is not None
        weight, bias = self.qformer.words.weight, self.word_head.bias
        return chunked_cross_entropy(rows, weight, bias, targets, self.label_smoothing)

    def image_vectors(self, alone: Seen) -> Tensor:
        """Each query's direction in the shared space: `[B, Q, E]`, of length 1."""
        assert alone.queries is not None
        return F.normalize(self.image_head(alone.queries).float(), dim=-1)

    def text_vectors(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """The text's direction in the shared space, read off `[CLS]`: `[B, T]` -> `[B, E]`, of length 1."""
        return F.normalize(self.text_head(self.text_row(tokens, valid)).float(), dim=-1)

    def text_row(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """What the text stream makes of a text alone, read off `[CLS]`: `[B, T]` -> `[B, D]`."""
        seen = self.qformer(tokens=tokens, mask=masks.padding(valid), keep_text=1)
        assert seen.text is not None
        return seen.text[:, 0]

    def match(self, memory: Memory, tokens: Tensor, valid: Tensor) -> Tensor:
        """Match logits of N pairs, averaged over the queries: `[N, 2]`, class 1 = match."""
        count = self.qformer.queries.shape[1]
        seen = self.qformer(memory, tokens, masks.bidirectional(count, valid), keep_text=0)
        return self.match_head(seen.queries).mean(dim=1)

    def write(self, alone: Seen, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """What the word decoder reads, `[N, D]`, and targets `[N]` at every position whose next token is real.

        `[DEC]` stands where `[CLS]` stood; it is never a target, `[SEP]` is one.
        """
        assert self.qformer.words is not None
        if self.word_head is None:
            raise ValueError("this stage 1 has no head for ITG (it came from transformers, which has none): no losses")
        queries = self.qformer.queries.shape[1]
        start = tokens.new_full((len(tokens), 1), self.qformer.words.num_embeddings - 1)
        tokens = torch.cat([start, tokens[:, 1:]], dim=1)
        # The last token has no next one. What is never scored is left out where nothing else looks at it any more.
        hidden = self.qformer.write(alone, tokens, masks.causal(queries, valid), keep_text=tokens.shape[1] - 1)
        scored = valid[:, 1:]
        return self.word_head.hidden(hidden[scored]), tokens[:, 1:][scored]


class Pairs(NamedTuple):
    """The pairs of image-text matching: the true ones, then those with a wrong image, then those with a wrong text."""

    images: Tensor  # [N] int64, rows of the batch, or of what stands behind it
    tokens: Tensor  # [N, T]
    valid: Tensor  # [N, T]
    is_match: Tensor  # [N] bool


def pair_up(tokens: Tensor, valid: Tensor, rivals: Rivals, rows: Tensor | None = None) -> Pairs:
    """N = 3B pairs, less those for which a row had no negative.

    Args:
        tokens, valid: `[M, T]`, the texts of the batch's B rows, and behind them others that may be rivals.
        rows: `[n]` int64: the pairs of these rows of the batch alone, at most 3n; None = of all.
    """
    own = torch.arange(len(rivals.texts), device=tokens.device) if rows is None else rows
    rival_images, rival_texts = rivals.images[own], rivals.texts[own]
    with_image, with_text = rival_images >= 0, rival_texts >= 0
    images = torch.cat([own, rival_images[with_image], own[with_text]])
    texts = torch.cat([own, own[with_image], rival_texts[with_text]])
    return Pairs(images, tokens[texts], valid[texts], torch.arange(len(images), device=tokens.device) < len(own))


class Words(NamedTuple):
    """How many tokens have a target in ITG: here, and over all processes."""

    here: Tensor
    total: int | Tensor


def share_texts(valid: Tensor) -> tuple[Share, Words]:
    """How the joined batch is shared out, `most[0]` of it being the longest T; `valid [B, T]`."""
    words = valid[:, 1:].sum()
    if distributed.world_size() == 1:  # and nothing waits for a GPU
        return distributed.share(len(valid)), Words(words, words)
    shared = distributed.share(len(valid), valid.shape[1], words)
    return shared, Words(words, shared.sums[1])


def see(vision: Vision | None, images: Tensor | None, features: Tensor | None) -> Tensor:
    """Features `[B, P, V]`: those given, or what the frozen encoder makes of `images [B, 3, S, S]` uint8.

    Raises:
        ValueError: neither or both are given, or there are images and no encoder.
    """
    if (images is None) == (features is None):
        raise ValueError("give either images or features, not both and not neither")
    if features is not None:
        return features
    if vision is None:
        raise ValueError("this model was built without an image encoder: give features, or build it with one")
    if images is not None and not len(images):  # one of several processes may have none, and encoders must have one
        return vision(images.new_zeros(1, *images.shape[1:]))[:0]
    return vision(images)
