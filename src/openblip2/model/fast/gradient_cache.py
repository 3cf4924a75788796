"""Large batches in little memory: a step in chunks, with the losses and the gradients of the whole batch.

Not in the paper; enabled by `train.chunk`. Stage 1 uses a gradient cache (Gao et al. 2021, "Scaling Deep Contrastive
Learning Batch Size under Memory Limited Setup"), in three passes:

1. image and text vectors of all chunks, without a graph;
2. ITC of all vectors, over all processes: its gradient at each vector is stored, and hard negatives are drawn;
3. for each chunk: the vectors again, now with a graph, through which the stored gradients reach the parameters, and
   the chunk's share of ITM and ITG; the sum of the shares is the mean over the whole batch.

Only one chunk's graph is in memory at a time. Unlike the batches that `train.accumulate` adds up, the chunks share
their negatives.

Shapes: B pairs, P patch tokens, V encoder width, Q queries, T text tokens, D Q-Former width, E shared space.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from openblip2.distributed.collectives import part_of, share, world_size
from openblip2.model.fast import joined_batch
from openblip2.model.objectives import HardNegatives, decorrelation, matching
from openblip2.model.qformer import Cache, Memory
from openblip2.model.stage1 import OBJECTIVES, Pairs, Stage1, itm_pairs, see
from openblip2.model.stage2 import Stage2, WordTable


def step_losses(model: Stage1 | Stage2, chunk: int) -> Callable[..., dict[str, Tensor]]:
    """`model.losses`, or a function with the same arguments and result for several processes or for chunks.

    Args:
        chunk: `train.chunk`, pairs at a time in each process; 0 = all.
    """
    first = isinstance(model, Stage1)
    if chunk:  # checked first, because it also handles several processes
        return partial(stage1_losses if first else stage2_losses, model, chunk)
    if world_size() > 1:
        return partial(joined_batch.joined_stage1_losses if first else joined_batch.joined_stage2_losses, model)
    return model.losses


def stage1_losses(
    model: Stage1,
    chunk: int,
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
    """`Stage1.losses` of the joined batch, at most `chunk` pairs at a time; gradients must be enabled.

    The gradients are those of the sum of the losses. They are already computed when this function returns; `backward`
    adds them to the parameters, and can be called once. With dropout, the masks differ from those of a step without
    chunks, as they would with another random seed.

    Args:
        chunk: pairs at a time, at least 1; the same in all processes.
        tokens: this and the other arguments are as for `joined_batch.joined_stage1_losses`.
        images: each is encoded once; the features of all `B` are kept in memory for the step.
    """
    count, device = len(tokens), tokens.device
    shared, _, targets = joined_batch.share_texts(valid)
    if chunk >= max(shared.counts):  # the same decision in all processes, which wait for each other
        given: dict[str, Any] = {"images": images, "features": features, "negatives": negatives}
        return joined_batch.joined_stage1_losses(
            model, tokens, valid, ids, objectives=objectives, generator=generator, **given
        )
    patches = _see(model, -(-max(shared.counts) // chunk), images, features)
    positives = joined_batch.joined_positives(ids, tokens, shared)  # [B, G]
    chunks = torch.arange(count, device=device).split(chunk)

    states, outputs, vectors = [], [], []
    with torch.no_grad():  # pass 1
        for rows in chunks:
            # Pass 3 must draw the same dropout masks, so that the stored gradients belong to the same vectors.
            states.append(_random_state(device))
            memory = model.qformer.encode_image(patches[rows])
            queries, _, *found = _vectors(model, memory, tokens[rows], valid[rows])
            outputs.append(queries)  # decorrelation needs their mean over the whole batch
            vectors.append(found)
    # Autocast caches the weights that it has cast; older torch would reuse those that were cast without a graph.
    torch.clear_autocast_cache()
    image, text = (torch.cat(side).requires_grad_() for side in zip(*vectors, strict=True))

    gradients = Gradients(model)
    itc = joined_batch.joined_contrast(model, image, text, positives, shared)  # pass 2
    mean = joined_batch.joined_mean(torch.cat(outputs), shared) if model.decorrelation else None
    names = [name for name in OBJECTIVES if name in objectives] + ["decorrelation"] * (mean is not None)
    sums = {name: torch.zeros((), device=device) for name in names}
    kept: list[Tensor] = []
    if "itc" in objectives:
        sums["itc"] = itc.loss.detach()  # its gradient is stored in `kept`
        kept = gradients.add([itc.loss], at=[image, text])  # [B, Q, E] and [B, E]; also adds that of the temperature
    local = None
    if "itm" in objectives:
        if negatives is None:
            negatives = joined_batch.joined_negatives(itc, positives, shared, generator)
        local = joined_batch.bring(HardNegatives(*negatives), patches, tokens, valid, shared)
        patches = torch.cat([patches, local.fetched]) if len(local.fetched) else patches

    for rows, state in zip(chunks, states, strict=True):  # pass 3
        if count == 0:
            break  # this process has no rows
        # A negative may be an image of another chunk, which is then encoded again, with a graph.
        pairs = None if local is None else itm_pairs(local.tokens, local.valid, local.negatives, rows)
        needed, index = _needed(rows, pairs, len(patches))
        memory = model.connector.encode_image(patches[needed])
        with _replayed(state, device):
            queries, cache, *found = _vectors(model, _first(memory, len(rows)), tokens[rows], valid[rows])
        parts = {}
        if "itg" in objectives:
            loss = model.generation_loss(cache, tokens[rows], valid[rows])
            parts["itg"] = loss * (valid[rows, 1:].sum() / targets * len(shared.counts))
        if pairs is not None and local is not None:
            logits = model.match(memory.take(index[pairs.images]), pairs.tokens, pairs.valid)
            parts["itm"] = matching(logits, pairs.is_match) * (len(logits) / local.pairs * len(shared.counts))
        if mean is not None:
            share_of_batch = len(rows) / shared.total * len(shared.counts)
            parts["decorrelation"] = model.decorrelation * decorrelation(queries, mean) * share_of_batch
        # The gradient of the sum at each part is 1; the gradients at the vectors were stored in pass 2.
        ends = [*parts.values(), *(found if kept else ())]
        gradients.add(ends, [*[None] * len(parts), *(part[rows] for part in kept)])
        for name, part in parts.items():
            sums[name] += part.detach()  # only for the log: its gradient is added already
    return gradients.attach(sums, every=count == 0)


def stage2_losses(
    model: Stage2,
    chunk: int,
    prompts: Sequence[str],
    captions: Sequence[str],
    *,
    images: Tensor | None = None,
    features: Tensor | None = None,
    question: tuple[Tensor, Tensor] | None = None,
    generator: torch.Generator | None = None,
    words: WordTable | None = None,
) -> dict[str, Tensor]:
    """`Stage2.losses`, at most `chunk` pairs at a time; gradients must be enabled.

    The loss is the mean over all target tokens, for any chunk size, and not the mean of the chunks' means. `chunk` and
    `backward` are as for `stage1_losses`, the other arguments as for `Stage2.losses`.
    """
    shared = share(len(captions))
    most = max(shared.counts)
    if chunk >= most:
        options: dict[str, Any] = {"images": images, "features": features, "question": question}
        return joined_batch.joined_stage2_losses(model, prompts, captions, generator=generator, words=words, **options)
    draws = joined_batch.joined_splits(shared, generator)
    gradients = Gradients(model)
    total, scored = torch.zeros((), device=model.projection.weight.device), 0
    chunks = -(-most // chunk)  # the same number in every process, because a sharded model must run in all of them
    for number in range(chunks):
        rows = part_of(len(captions), number, chunks)
        loss, count = joined_batch.scored(
            model,
            prompts[rows],
            captions[rows],
            draws[rows],
            words,
            images=None if images is None else images[rows],
            features=None if features is None else features[rows],
            question=None if question is None else (question[0][rows], question[1][rows]),
        )
        gradients.add([loss], times=count)  # scaled afterwards, because the gradient of a sum might overflow in fp16
        total, scored = total + loss.detach() * count, scored + count
    tokens = share(1, scored)
    every = scored if tokens.one else tokens.sums[0] / len(tokens.counts)
    return gradients.attach({"lm" if words is None else "alignment": total / every}, over=every)


class Gradients:
    """Accumulates the gradient of a sum of losses for a model's trained parameters, and returns it once."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.sums: list[Tensor | None] = [None] * len(self.parameters)

    def add(
        self,
        outputs: Sequence[Tensor],
        weights: Sequence[Tensor | None] | None = None,
        at: Sequence[Tensor] = (),
        times: float = 1.0,
    ) -> list[Tensor]:
        """Backpropagates from `outputs` and frees their graph; returns the gradients at the tensors `at`.

        Args:
            weights: gradients at the outputs; None = 1, for scalars.
            times: factor for the gradients that are added to the parameters' sums.
        """
        # A backward pass has the dtypes of its forward pass; autocast would also round the parts that ran without it.
        with torch.autocast(outputs[0].device.type, enabled=False):
            found = torch.autograd.grad(outputs, [*at, *self.parameters], weights, allow_unused=True)
        for n, part in enumerate(found[len(at) :]):
            before = self.sums[n]
            if part is not None:
                self.sums[n] = part * times if before is None else before.add_(part, alpha=times)
        return list(found[: len(at)])

    def attach(self, losses: dict[str, Tensor], over: float = 1.0, every: bool = False) -> dict[str, Tensor]:
        """Returns the losses, scalars without a graph, with the accumulated gradients, divided by `over`, as theirs.

        A parameter that no loss depended on gets no gradient, as with a normal graph. With `every`, all parameters get
        one: in a process without rows no loss depends on any, but other processes wait for its gradients.
        """
        pairs = zip(self.parameters, self.sums, strict=True)
        parameters, sums = zip(*((p, total) for p, total in pairs if every or total is not None), strict=True)
        values: Any = _Ready.apply(list(sums), over, torch.stack(list(losses.values())), *parameters)
        return dict(zip(losses, values.unbind(), strict=True))


class _Ready(torch.autograd.Function):
    """Losses whose gradients are already computed."""

    @staticmethod
    def forward(ctx: Any, sums: list[Tensor | None], over: float, values: Tensor, *_: Tensor) -> Tensor:
        ctx.sums, ctx.over = sums, over
        return values.clone()  # a new tensor, not the input itself

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weights,) = grads
        assert ctx.sums is not None, "these gradients were handed out before"
        assert bool((weights == weights[0]).all()), "these gradients are of the losses' sum: no loss has its own"
        sums, ctx.sums = ctx.sums, None  # frees them; a second backward pass finds none
        scale = weights[0] / ctx.over  # the sum may be scaled, as `train.accumulate` does
        return (None, None, None, *(None if total is None else total.mul_(scale) for total in sums))


def _see(model: Stage1, chunks: int, images: Tensor | None, features: Tensor | None) -> Tensor:
    """`see` with the images in `chunks` parts, as many in every process as for `stage2_losses`: `[B, P, V]`."""
    if images is None or features is not None:
        return see(model.vision, images, features)
    return torch.cat([see(model.vision, part, None) for part in images.tensor_split(chunks)])


def _vectors(model: Stage1, memory: Memory, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Cache, Tensor, Tensor]:
    """The query pass, image vectors `[n, Q, E]` and text vectors `[n, E]`, which are computed in passes 1 and 3."""
    queries, cache = model.connector.query_pass(memory)
    return queries, cache, model.image_vectors(queries), model.text_vectors(tokens, valid)


def _needed(rows: Tensor, pairs: Pairs | None, count: int) -> tuple[Tensor, Tensor]:
    """Images that a chunk needs, its own first, `[n]`; and the index of each of `count` images in them, `[count]`."""
    others = rows[:0] if pairs is None else pairs.images[~torch.isin(pairs.images, rows)].unique()
    needed = torch.cat([rows, others])
    index = needed.new_full((count,), -1)  # -1 is never used: `needed` has all images of the pairs
    index[needed] = torch.arange(len(needed), device=needed.device)
    return needed, index


def _first(memory: Memory, count: int) -> Memory:
    """The memory of the first `count` images, without a copy."""
    return Memory(tuple((keys[:count], values[:count]) for keys, values in memory.layers))


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The state of torch's random generators."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _replayed(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Inside the block, random numbers are drawn from `state` on; afterwards the previous state is restored."""
    cpu, gpu = state
    with torch.random.fork_rng([] if gpu is None else [device]):
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, device)
        yield
