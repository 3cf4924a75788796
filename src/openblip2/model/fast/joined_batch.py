"""Losses of stage 1 over several processes, with the values and gradients of one process that has the joined batch.

Each process has some rows of the joined batch and returns weighted losses. Their mean over processes, and that of
their gradients (data parallelism), equal those of one process with all rows, which uses `Stage1.losses`.

ITC compares with the text vectors of all processes. For ITM, hard negatives are drawn from the joined batch, and only
these are sent: a text as token ids, an image as the frozen encoder's features, once to each process that needs it. The
receiver computes keys and values: of 6 layers, they are 9,216 numbers per patch, ViT-g's features 1,408, and their
gradient would have to be sent back, too.

Shapes: B rows here, G over all processes, S side in px, P patch tokens, V encoder width, Q queries, T text tokens,
E shared space.
"""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from openblip2.distributed.collectives import Share, fetch_rows, gather, plan_route, share, transpose, world_size
from openblip2.model.objectives import Contrast, HardNegatives, decorrelation, hard_negatives, matching, same_image
from openblip2.model.stage1 import OBJECTIVES, Stage1, in_order, itm_pairs, see
from openblip2.model.stage2 import Stage2, WordTable


def joined_stage1_losses(
    model: Stage1,
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
    """This process' part of `Stage1.losses` of the joined batch.

    Arguments are as for `Stage1.losses`, for this process' rows. B and T may differ between processes; B may be 0.

    Args:
        negatives: indices into the joined batch.
        generator: in the same state in all processes, so that all draw the same numbers for the joined batch.
    """
    shared, *targets = share_texts(valid)
    positives = joined_positives(ids, tokens, shared)
    patches = see(model.vision, images, features)  # other processes may need them
    memory = model.connector.encode_image(patches)
    queries, cache = model.connector.query_pass(memory)
    itc = joined_contrast(model, model.image_vectors(queries), model.text_vectors(tokens, valid), positives, shared)
    losses = {"itc": itc.loss}
    if "itg" in objectives:
        losses["itg"] = shared.weigh(model.generation_loss(cache, tokens, valid), *targets)
    if "itm" in objectives:
        negatives = joined_negatives(itc, positives, shared, generator) if negatives is None else negatives
        local = bring(HardNegatives(*negatives), patches, tokens, valid, shared)
        pairs = itm_pairs(local.tokens, local.valid, local.negatives)
        # With gradients, all processes must take part in the backward pass, also those that fetched nothing.
        if len(local.fetched) or local.fetched.requires_grad:
            memory = memory.join(model.connector.encode_image(local.fetched))
        loss = matching(model.match(memory.take(pairs.images), pairs.tokens, pairs.valid), pairs.is_match)
        losses["itm"] = shared.weigh(loss, len(pairs.images), local.pairs)
    if model.decorrelation:
        loss = model.decorrelation * decorrelation(queries, joined_mean(queries, shared))
        losses["decorrelation"] = shared.weigh(loss, len(queries), shared.total)
    return in_order(losses, objectives)


def share_texts(valid: Tensor) -> tuple[Share, Tensor, int | Tensor]:
    """The joined batch's `Share` (`most[0]` is the longest T), and the number of target tokens here and in total."""
    count = valid[:, 1:].sum()
    if world_size() == 1:  # `int(count)` would wait for the GPU
        return share(len(valid)), count, count
    shared = share(len(valid), valid.shape[1], count)
    return shared, count, shared.sums[1]


def joined_positives(ids: Tensor | None, tokens: Tensor, shared: Share) -> Tensor:
    """Which texts of the joined batch belong to which of our images: `[B, G]`; `ids` as for `Stage1.losses`."""
    ids = shared.first + torch.arange(len(tokens), device=tokens.device) if ids is None else ids
    return same_image(ids, gather(ids, shared))  # [B, G]


def joined_contrast(model: Stage1, image: Tensor, text: Tensor, positives: Tensor, shared: Share) -> Contrast:
    """ITC of our image vectors `[B, Q, E]` and text vectors `[B, E]` with those of the other processes."""
    itc = model.contrast(image, gather(text, shared), positives, partial(transpose, shared=shared))
    return itc._replace(loss=shared.weigh(itc.loss, len(image), shared.total))


def joined_mean(rows: Tensor, shared: Share) -> Tensor:
    """The mean over the joined batch, without gradient: `[B, ...]` -> `[...]`, fp32."""
    return gather(rows.detach().float().sum(dim=0, keepdim=True)).sum(dim=0) / shared.total


def joined_negatives(
    itc: Contrast, positives: Tensor, shared: Share, generator: torch.Generator | None
) -> HardNegatives:
    """Draws hard negatives from the joined batch: all processes draw the numbers of all rows and use their own."""
    draws = torch.rand(2, shared.total, dtype=torch.float64, generator=generator)[:, shared.own]
    return hard_negatives(itc.image_to_text, itc.text_to_image, positives, draws)


class Local(NamedTuple):
    """What a process needs for its own share of image-text matching."""

    fetched: Tensor  # [n, P, V], features of other processes' images, n <= B
    tokens: Tensor  # [M, T], our own texts; with several processes, followed by those of all
    valid: Tensor  # [M, T]
    negatives: HardNegatives  # indices into our own images followed by `fetched`, and into `tokens`
    pairs: int | Tensor  # number of pairs over all processes


def bring(negatives: HardNegatives, patches: Tensor, tokens: Tensor, valid: Tensor, shared: Share) -> Local:
    """Fetches the hard negatives that other processes have.

    Args:
        negatives: indices into the joined batch.
        patches: `[B, P, V]`, of our images; gradients, if there are any, are sent back to the process of the image.
        tokens: `[B, T]`; T may differ between processes: `shared.most[0]` is the largest.
        valid: `[B, T]` bool.
    """
    asked = torch.stack([negatives.texts, negatives.images], dim=1)
    if shared.one:
        return Local(patches[:0], tokens, valid, negatives, len(tokens) + (asked >= 0).sum())
    asked = gather(asked, shared)  # of all processes, so that each knows what it has to send
    route = plan_route([part[:, 1].tolist() for part in asked.cpu().split(shared.counts)], shared)
    # Tokens and `valid` are sent as one message, in which padding is -1.
    marked = F.pad(tokens.where(valid, -1), (0, shared.most[0] - tokens.shape[1]), value=-1).to(torch.int32)
    texts = torch.cat([marked, gather(marked, shared)]).long()  # ours first, so that true pairs have equal indices
    local = HardNegatives(
        torch.where(negatives.texts < 0, -1, negatives.texts + len(tokens)),  # the joined batch follows ours
        torch.tensor(route.places, dtype=torch.int64, device=tokens.device),
    )
    pairs = shared.total + int((asked >= 0).sum())
    return Local(fetch_rows(patches, route), texts.clamp(min=0), texts >= 0, local, pairs)


def joined_stage2_losses(
    model: Stage2,
    prompts: Sequence[str],
    captions: Sequence[str],
    *,
    generator: torch.Generator | None = None,
    words: WordTable | None = None,
    **given: Any,
) -> dict[str, Tensor]:
    """This process' part of `Stage2.losses` of the joined batch; it may have no rows.

    Arguments are as for `Stage2.losses`; the generator must be in the same state in all processes.
    """
    draws = joined_splits(share(len(captions)), generator)  # the same for any number of processes
    loss, count = scored(model, prompts, captions, draws, words, **given)
    shared = share(1, count)
    return {"lm" if words is None else "alignment": loss if shared.one else shared.weigh(loss, count, shared.sums[0])}


def joined_splits(shared: Share, generator: torch.Generator | None) -> list[float]:
    """Random numbers in [0, 1) for our captions: all processes draw those of the joined batch and use their own."""
    return torch.rand(shared.total, generator=generator)[shared.own].tolist()


def scored(
    model: Stage2,
    prompts: Sequence[str],
    captions: Sequence[str],
    draws: Sequence[float],
    words: WordTable | None,
    images: Tensor | None = None,
    features: Tensor | None = None,
    question: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, int]:
    """`Stage2.scored`; without rows, it runs a blank picture and returns a loss of 0 with a count of 0.

    The blank picture is needed because a language model that is sharded over processes must run in all of them.
    """
    if captions:
        return model.scored(prompts, captions, draws, words, images=images, features=features, question=question)
    images, features = (None if part is None else part.new_zeros(1, *part.shape[1:]) for part in (images, features))
    if question is not None:
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.projection.weight.device)
        question = token, torch.ones_like(token, dtype=torch.bool)
    loss, _ = model.scored([""], ["a"], [0.0], words, images=images, features=features, question=question)
    return loss * 0.0, 0  # 0 with a graph, so that this process takes part in the backward pass
