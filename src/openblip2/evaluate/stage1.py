"""How stage 1 is doing on held-out pictures, while it trains."""

from typing import Any

import torch

from openblip2.data.batches import pair_ids
from openblip2.data.features import Features
from openblip2.data.tokens import QFormerTokens
from openblip2.evaluate.effective_rank import effective_rank
from openblip2.evaluate.retrieval import recalls, similarities, text_vectors
from openblip2.model.objectives import HardNegatives, similarity
from openblip2.model.stage1 import Stage1, itm_pairs

GROUP = 48  # pairs at once: the losses' in-batch negatives, as many as a small batch has


def measure_stage1(model: Stage1, tokens: QFormerTokens, held_out: Features, seed: int) -> dict[str, Any]:
    """Held-out ITC, ITM and ITG; ITM accuracy on 1 true and 2 hard false pairs each, and on 1 true and 1 easy one (the
    next picture's text, chance is a half); recall@1 both ways; how many queries texts find their pictures by; the
    effective rank of a picture's query outputs.
    """
    device = model.temperature.device
    captions = [record.captions[0] for record in held_out.records]
    texts, valid = (t.to(device) for t in tokens(captions))
    sums = {"itc": 0.0, "itm": 0.0, "itg": 0.0}
    right = count = easy_right = easy_count = 0
    outputs: list[torch.Tensor] = []
    for rows in torch.arange(len(captions)).split(GROUP):
        features = held_out.values[rows].to(device)
        longest = int(valid[rows].sum(1).max())
        part, real = texts[rows, :longest], valid[rows, :longest]
        ids = pair_ids(rows.tolist(), [captions[row] for row in rows.tolist()]).to(device)
        parts = model.losses(part, real, ids, features=features)
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(rows) / len(captions)
        hits, pairs = matching_hits(model, features, part, real, ids)
        right, count = right + hits, count + pairs
        hits, pairs = easy_hits(model, features, part, real, ids)
        easy_right, easy_count = easy_right + hits, easy_count + pairs
        outputs.append(model.qformer.query_output(features))
    queries = torch.cat(outputs)
    images, words = model.image_vectors(queries), text_vectors(model, texts, valid)
    scores = torch.cat([similarity(part, words) for part in images.split(GROUP)])
    same = torch.tensor([[a == b for b in captions] for a in captions], device=device)
    found = recalls(scores, scores, same, ks=(1,))
    return {
        "n": len(captions),
        **sums,
        "itm_accuracy": right / max(1, count),
        "itm_easy_accuracy": easy_right / max(1, easy_count),
        **found,
        "queries_used": queries_used(images, words),
        "effective_rank": effective_rank(queries),
    }


def easy_hits(
    model: Stage1, features: torch.Tensor, tokens: torch.Tensor, valid: torch.Tensor, ids: torch.Tensor
) -> tuple[int, int]:
    """As `matching_hits`, with each picture's own text and the next picture's."""
    other = torch.arange(len(ids), device=ids.device).roll(-1)
    wrong = ids != ids[other]
    memory = model.qformer.encode_image(features)
    own = model.match(memory, tokens, valid).argmax(1).bool()[wrong]
    next_one = model.match(memory, tokens[other], valid[other]).argmax(1).bool()[wrong]
    return int(own.sum() + (~next_one).sum()), 2 * int(wrong.sum())


def queries_used(images: torch.Tensor, texts: torch.Tensor) -> float:
    """By how many queries texts find their own pictures, in effect (1 to Q): e to the entropy of which is nearest.

    Args:
        images: `[N, Q, E]`, the query directions of N pictures.
        texts: `[N, E]`, the directions of their texts.
    """
    cosines = torch.einsum("nqe,ne->nq", images, texts)
    shares = torch.bincount(cosines.argmax(1), minlength=cosines.shape[1]).double() / len(cosines)
    return float(torch.special.entr(shares).sum().exp())


def matching_hits(
    model: Stage1, features: torch.Tensor, tokens: torch.Tensor, valid: torch.Tensor, ids: torch.Tensor
) -> tuple[int, int]:
    """ITM decisions that are right, and how many were made, on true pairs and on the hardest false ones."""
    scores = similarities(model, features, tokens, valid)
    same = ids[:, None] == ids[None, :]
    hardest, none = scores.masked_fill(same, -torch.inf), same.all(dim=1)
    rivals = HardNegatives(hardest.argmax(1).masked_fill(none, -1), hardest.argmax(0).masked_fill(none, -1))
    pairs = itm_pairs(tokens, valid, rivals)
    memory = model.qformer.encode_image(features).take(pairs.images)
    logits = model.match(memory, pairs.tokens, pairs.valid)
    return int((logits.argmax(1).bool() == pairs.is_match).sum()), len(pairs.is_match)
