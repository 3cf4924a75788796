"""Cross-entropy over a vocabulary without keeping all of its logits in memory.

N x W logits would be larger than anything else in a step, so they are computed for one chunk of positions at a time. A
frozen language model runs up to its output embedding, which is then applied only to the positions with a target. The
model itself would compute logits for every position of every row, most of which have no target.

Shapes: B rows, T tokens, N positions with a target, D width, W vocabulary.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from openblip2.model.objectives import generation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_BYTES = 64 * 2**20  # of fp32 logits at a time
FEWEST_ROWS = 256  # with fewer rows, the speed of a product is limited by reading the weight


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    """Mean cross-entropy of the logits `hidden @ weight.T + bias` without ever holding all of them.

    The gradient is computed chunk by chunk together with the loss, for the inputs that require one; it cannot be
    differentiated again. Products are in autocast's dtype, as in `F.linear`; sums over chunks are in fp32.

    Args:
        hidden: `[N, D]`, N >= 1.
        weight: `[W, D]`.
        bias: `[W]`.
        targets: `[N]` int64.
        label_smoothing: share of each target that is spread evenly over all `W`.
        chunk: rows at a time; None = as many as fit `CHUNK_BYTES`. If all N fit in one chunk, they are not chunked.
    """
    if chunk is None:
        chunk = max(FEWEST_ROWS, CHUNK_BYTES // (4 * len(weight)))
    if len(targets) <= chunk:  # one chunk: plain cross-entropy needs no more memory
        return generation(F.linear(hidden, weight, bias), targets, label_smoothing)
    place = hidden.device.type
    dtype = torch.get_autocast_dtype(place) if torch.is_autocast_enabled(place) else weight.dtype
    with torch.autocast(place, enabled=False):
        loss = _ChunkedCrossEntropy.apply(
            hidden, weight, bias, targets, label_smoothing, chunk, dtype, torch.is_grad_enabled()
        )
    assert isinstance(loss, Tensor)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        smoothing: float,
        chunk: int,
        dtype: torch.dtype,
        trains: bool,  # determined outside, because gradients are always off inside `forward`
    ) -> Tensor:
        of_hidden, of_weight, of_bias = (
            torch.zeros_like(given, dtype=torch.float32) if trains and wanted and given is not None else None
            for given, wanted in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        factor, offset = weight.to(dtype), None if bias is None else bias.to(dtype)  # once, not in each chunk
        loss = torch.zeros((), device=hidden.device)
        for first in range(0, len(targets), chunk):
            part = slice(first, first + chunk)
            rows, wanted = hidden[part].to(dtype), targets[part, None]
            logs = F.linear(rows, factor, offset).float().log_softmax(dim=1)  # [chunk, W]
            loss -= (1 - smoothing) * logs.gather(1, wanted).sum() + smoothing * logs.mean(dim=1).sum()
            if of_hidden is None and of_weight is None and of_bias is None:
                continue
            # The gradient at the logits, without the factor 1 / N of the mean: probabilities minus targets.
            error = logs.exp_().sub_(smoothing / len(weight))  # in place: a chunk of logits is large
            error.scatter_add_(1, wanted, torch.full_like(error[:, :1], smoothing - 1))
            if of_bias is not None:
                of_bias += error.sum(dim=0)
            error = error.to(dtype)  # products are in the dtype of autocast, as in `F.linear`
            if of_hidden is not None:
                of_hidden[part] = error @ factor
            if of_weight is not None:
                of_weight += error.T @ rows
        gradients = (of_hidden, of_weight, of_bias)
        given = (hidden, weight, bias)
        ctx.save_for_backward(
            *(None if g is None else g.div_(len(targets)).to(x.dtype) for g, x in zip(gradients, given, strict=True))  # pyright: ignore
        )
        return loss / len(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return *(None if g is None else g * upstream[0] for g in ctx.saved_tensors), *[None] * 5


def gather_head_input(llm: "PreTrainedModel") -> None:
    """Adds a hook that gives the output embedding contiguous rows.

    transformers selects the last position by a slice, which is not contiguous over several rows. A CPU then multiplies
    it with one copy of the output embedding for each row: 9 s and 3 GiB instead of 0.02 s for 16 rows and OPT's output
    embedding of 50,272 x 2,048.
    """
    head = llm.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda module, given: (given[0].contiguous(), *given[1:]))


@torch.no_grad()
def ends_in_head(llm: "PreTrainedModel") -> bool:
    """Whether a language model returns the output of its output embedding as its logits, without changing it.

    Some models cap it (Gemma 2), scale it (Cohere, Granite) or add to it (BART); steps before the output embedding
    (T5's scale, OPT's projection) do not matter. It is tested with one token: known numbers replace the embedding's
    output, and the model must return them unchanged. Also False if the embedding is not one plain linear layer.
    """
    head: Any = llm.get_output_embeddings()
    if type(head) is not nn.Linear:  # a layer with an adapter or quantised weights has its own computation
        return False
    shown: list[Tensor] = []

    def show(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        # A wide range, so that a cap is visible, with values near zero, so that an added term is visible.
        shown.append(torch.linspace(-1000, 1000, output.shape[-1]).to(output).expand_as(output))
        return shown[-1]

    hook = head.register_forward_hook(show)
    try:
        word = torch.zeros(1, 1, dtype=torch.long, device=llm.device)  # any token
        more = {"decoder_input_ids": word} if llm.config.is_encoder_decoder else {}
        logits = llm(input_ids=word, use_cache=False, **more).logits
    finally:
        hook.remove()
    return len(shown) == 1 and torch.equal(logits.float(), shown[0].float())


def loss_at(llm: "PreTrainedModel", plain: bool, scored: Tensor, targets: Tensor, **given: Any) -> Tensor:
    """Mean cross-entropy at the scored positions of one pass of a language model.

    Args:
        plain: the result of `ends_in_head`; False = use the model's own logits.
        scored: `[B, T]` bool, which positions have a target, among those for which the model gives logits.
        targets: `[N]`.
        given: arguments of the language model.
    """
    if not plain:  # its logits differ from what its output embedding gives
        return F.cross_entropy(llm(**given).logits[scored].float(), targets)
    head: Any = llm.get_output_embeddings()
    read: list[Tensor] = []

    def stop(module: nn.Module, rows: tuple[Tensor]) -> tuple[Tensor]:
        read.append(rows[0])  # with its graph, so that gradients reach the model
        return (rows[0][:, :0],)  # no rows, so that no logits are computed

    hook = head.register_forward_pre_hook(stop)
    try:
        llm(**given)
    finally:
        hook.remove()
    (hidden,) = read
    return chunked_cross_entropy(hidden[scored], head.weight, head.bias, targets)
