"""Stage 1: representation learning (paper, section 3.1). The queries learn to extract what text can say.

Shapes: B images, S side in px, P patch tokens, V encoder width, Q queries, T text tokens, D width, E shared space.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openblip2 import distributed
from openblip2.model import masks
from openblip2.model.objectives import Rivals, contrastive, generation, hard_negatives, matching, same_image
from openblip2.model.qformer import Memory, QFormer, Seen, WordHead
from openblip2.model.vision import Vision


class Stage1(nn.Module):
    """A Q-Former between a frozen image encoder and text, with the heads of the three objectives.

    Args:
        qformer: with its text path; the last id of its vocabulary is `[DEC]`.
        vision: the frozen encoder; None when only ready-made features are given.
        shared_width: E. temperature: the start of the learned temperature.
        label_smoothing: of ITC and ITG. one_sided: see `objectives.contrastive`.
        writes: False leaves out the head of ITG, as transformers' checkpoints do: good for scores, not for training.
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
    ) -> None:
        super().__init__()
        assert qformer.words is not None, "stage 1 needs the Q-Former's text path"
        self.vision, self.qformer = vision, qformer
        self.image_head = nn.Linear(qformer.width, shared_width)
        self.text_head = nn.Linear(qformer.width, shared_width)
        self.match_head = nn.Linear(qformer.width, 2)
        self.word_head = WordHead(qformer.width, qformer.words) if writes else None
        self.temperature = nn.Parameter(torch.tensor(temperature))
        self.label_smoothing, self.one_sided = label_smoothing, one_sided

    def losses(
        self,
        tokens: Tensor,
        valid: Tensor,
        ids: Tensor | None = None,
        *,
        images: Tensor | None = None,
        features: Tensor | None = None,
        negatives: Rivals | tuple[Tensor, Tensor] | None = None,
        with_matching: bool = True,
    ) -> dict[str, Tensor]:
        """The three losses, by name, unweighted; their sum is what the paper trains.

        Args:
            tokens: `[B, T]`, `[CLS] words [SEP]`, right-padded. valid: `[B, T]` bool, False on padding.
            ids: `[B]` int64, equal for captions of the same image; None = all images differ.
            images: `[B, 3, S, S]` uint8, or features: `[B, P, V]` from the frozen encoder; one of the two.
            negatives: given hard negatives `(texts [B], images [B])` instead of drawn ones, -1 for none.
            with_matching: False leaves out ITM, more than half of a step's work (`stage1.matching_from`).
        """
        ids = torch.arange(len(tokens), device=tokens.device) if ids is None else ids
        positives = same_image(ids)
        memory = self.qformer.look(see(self.vision, images, features))
        alone = self.qformer(memory)
        image, text = self.image_vectors(alone), self.text_vectors(tokens, valid)
        itc = contrastive(image, text, self.temperature, positives, self.label_smoothing, self.one_sided)

        itg = generation(*self.write(alone, tokens, valid), self.label_smoothing)
        if not with_matching:
            return {"itc": itc.loss, "itg": itg}

        rivals = self._rivals(itc.image_to_text, itc.text_to_image, positives) if negatives is None else negatives
        pairs = pair_up(tokens, valid, Rivals(*rivals))
        itm = matching(self.match(memory.take(pairs.images), pairs.tokens, pairs.valid), pairs.is_match)
        return {"itc": itc.loss, "itm": itm, "itg": itg}

    def image_vectors(self, alone: Seen) -> Tensor:
        """Each query's direction in the shared space: `[B, Q, E]`, of length 1."""
        assert alone.queries is not None
        return F.normalize(self.image_head(alone.queries).float(), dim=-1)

    def text_vectors(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """The text's direction in the shared space, read off `[CLS]`: `[B, T]` -> `[B, E]`, of length 1."""
        return F.normalize(self.text_head(self.text_rows(tokens, valid)[:, 0]).float(), dim=-1)

    def text_rows(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """What the text stream makes of a text alone: `[B, T]` -> `[B, T, D]`."""
        seen = self.qformer(tokens=tokens, mask=masks.padding(valid))
        assert seen.text is not None
        return seen.text

    def match(self, memory: Memory, tokens: Tensor, valid: Tensor) -> Tensor:
        """Match logits of N pairs, averaged over the queries: `[N, 2]`, class 1 = match."""
        count = self.qformer.queries.shape[1]
        seen = self.qformer(memory, tokens, masks.bidirectional(count, valid))
        return self.match_head(seen.queries).mean(dim=1)

    def write(self, alone: Seen, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Word logits `[N, W]` and targets `[N]` at every position whose next token is real.

        `[DEC]` stands where `[CLS]` stood; it is never a target, `[SEP]` is one.
        """
        assert self.qformer.words is not None
        if self.word_head is None:
            raise ValueError("this stage 1 has no head for ITG (it came from transformers, which has none): no losses")
        queries = self.qformer.queries.shape[1]
        start = tokens.new_full((len(tokens), 1), self.qformer.words.num_embeddings - 1)
        tokens = torch.cat([start, tokens[:, 1:]], dim=1)
        hidden = self.qformer.write(alone, tokens, masks.causal(queries, valid))
        scored = valid[:, 1:]
        return self.word_head(hidden[:, :-1][scored], self.qformer.words), tokens[:, 1:][scored]

    def _rivals(self, image_to_text: Tensor, text_to_image: Tensor, positives: Tensor) -> Rivals:
        # Negatives come from this process' own rows, whose image memory is at hand.
        count, first = len(positives), distributed.rank() * len(positives)
        here = slice(first, first + count)
        return hard_negatives(image_to_text[:, here], text_to_image[:, here], positives[:, here])


class Pairs(NamedTuple):
    """The pairs of image-text matching: the true ones, then those with a wrong image, then those with a wrong text."""

    images: Tensor  # [N] int64, rows of the batch
    tokens: Tensor  # [N, T]
    valid: Tensor  # [N, T]
    is_match: Tensor  # [N] bool


def pair_up(tokens: Tensor, valid: Tensor, rivals: Rivals) -> Pairs:
    """N = 3B pairs, less those for which a row had no negative: `tokens [B, T]`, `valid [B, T]`."""
    own = torch.arange(len(tokens), device=tokens.device)
    with_image, with_text = rivals.images >= 0, rivals.texts >= 0
    images = torch.cat([own, rivals.images[with_image], own[with_text]])
    texts = torch.cat([own, own[with_image], rivals.texts[with_text]])
    return Pairs(images, tokens[texts], valid[texts], torch.arange(len(images), device=tokens.device) < len(own))


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
    return vision(images)
