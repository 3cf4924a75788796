"""A naive implementation, in which passes share no computation: tests and timings compare ours with it.

It runs the passes over all layers that the paper and its code describe: image and text separately (ITC), image and
text together (ITM, for the matching pairs and the two kinds of negative pairs), and both with the causal mask (ITG).
Each pass recomputes the keys and values of its images and pads its texts to 32 tokens. Logits are computed for every
position. It uses the model's own weights and its `QFormer.forward`, which is one pass with a given mask.

Shapes: B images, P patch tokens, V encoder width, Q queries, T text tokens, D width, E shared space, W vocabulary.
"""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from openblip2.model.qformer import bidirectional_mask, causal_mask, unimodal_mask
from openblip2.model.stage1 import Stage1

LONGEST = 32  # the authors' `max_txt_len`
NO_TARGET = -100


def naive_losses(
    model: Stage1, tokens: Tensor, valid: Tensor, ids: Tensor, features: Tensor, negatives: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """`itc`, `itm` and `itg` as `Stage1.losses` returns them, in one process.

    Args:
        tokens: `[B, T]`, T at most 32.
        valid: `[B, T]`.
        ids: `[B]`.
        features: `[B, P, V]`.
        negatives: hard negatives `(texts [B], images [B])`, -1 for none.
    """
    former, smoothing = model.qformer, model.label_smoothing
    assert former.word_embeddings is not None
    assert model.lm_head is not None
    count = former.queries.shape[1]
    tokens, valid = _padded(model, tokens, valid)

    image = former(former.encode_image(features)).queries
    text = former(tokens=tokens, mask=unimodal_mask(0, valid)).text
    image = F.normalize(model.vision_proj(image).float(), dim=-1)
    text = F.normalize(model.text_proj(text[:, 0]).float(), dim=-1)
    with torch.autocast(image.device.type, enabled=False):
        scores = torch.einsum("bqe,ne->bqn", image, text).amax(dim=1) / model.temperature
    same = (ids[:, None] == ids).float()
    targets = (1 - smoothing) * same / same.sum(dim=1, keepdim=True) + smoothing / len(ids)
    itc = (F.cross_entropy(scores, targets) + F.cross_entropy(scores.T, targets)) / 2

    # The matching pairs, each text with its negative image, and each image with its negative text.
    texts, images = negatives
    own, with_image, with_text = torch.arange(len(ids), device=ids.device), images >= 0, texts >= 0
    wrong_image, wrong_text = (images[with_image], own[with_image]), (own[with_text], texts[with_text])
    logits, matches = [], []
    for of_image, of_text in ((own, own), wrong_image, wrong_text):
        mask = bidirectional_mask(count, valid[of_text])
        seen = former(former.encode_image(features[of_image]), tokens[of_text], mask).queries
        logits.append(model.itm_head(seen).mean(dim=1))
        matches.append(torch.full_like(of_image, int(of_image is own and of_text is own)))
    itm = F.cross_entropy(torch.cat(logits).float(), torch.cat(matches))

    written = torch.cat(
        [torch.full_like(tokens[:, :1], former.word_embeddings.num_embeddings - 1), tokens[:, 1:]], dim=1
    )
    rows = former(former.encode_image(features), written, causal_mask(count, valid)).text
    words = model.lm_head(rows, former.word_embeddings)[:, :-1]
    following = tokens[:, 1:].masked_fill(~valid[:, 1:], NO_TARGET)
    itg = F.cross_entropy(
        words.flatten(0, 1).float(), following.flatten(), ignore_index=NO_TARGET, label_smoothing=smoothing
    )
    return {"itc": itc, "itm": itm, "itg": itg}


def _padded(model: Stage1, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Pads texts to the length in the authors' code, or to the model's number of positions if that is smaller."""
    assert model.qformer.positions is not None
    missing = max(0, min(LONGEST, model.qformer.positions.num_embeddings) - tokens.shape[1])
    return F.pad(tokens, (0, missing)), F.pad(valid, (0, missing))


def naive_rerank(
    model: Stage1, features: Tensor, tokens: Tensor, valid: Tensor, scores: Tensor, best: int
) -> tuple[Tensor, Tensor]:
    """Ranks as `evaluate.ranking.rerank`, but computes the ITM scores of all pairs, one image after another.

    As in the authors' evaluation, an image is repeated for every candidate, so its keys and values are recomputed.
    """
    tokens, valid = _padded(model, tokens, valid)
    rows = []
    for patches in features:
        logits = model.match(model.qformer.encode_image(patches.repeat(len(tokens), 1, 1)), tokens, valid).float()
        rows.append(logits[:, 1] - logits[:, 0])
    odds, ranked = torch.stack(rows), []
    for dim in (1, 0):
        candidates = scores.topk(min(best, scores.shape[dim]), dim=dim).indices
        is_candidate = torch.zeros_like(scores, dtype=torch.bool).scatter(dim, candidates, True)
        ranked.append(torch.where(is_candidate, odds, scores - 1e3))
    return ranked[0], ranked[1]


def naive_picture(file: bytes, side: int) -> Tensor:
    """A JPEG decoded and resized by Pillow: uint8 `[3, S, S]`."""
    image = Image.open(io.BytesIO(file)).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
