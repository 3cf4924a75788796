"""The output embedding of a frozen language model, applied to the positions that are scored and to no others.

A language model asked for logits computes them for every position of every row; most have no target, and the whole of
them, W wide, is more than all else in memory. Here the model runs up to its output embedding, and the loss takes over.

Shapes: B rows, T tokens, L LLM width, W vocabulary, N scored positions.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openblip2.model.fast.chunked_loss import chunked_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def gather_head_input(llm: "PreTrainedModel") -> None:
    """From now on the output embedding reads contiguous rows.

    transformers asks for the last position's logits by a slice, which is not contiguous over several rows, and a CPU
    then multiplies it with a copy of the output embedding for each row: 9 s and 3 GiB instead of 0.02 s for 16 rows
    and OPT's 50,272 x 2,048.
    """
    head = llm.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda module, given: (given[0].contiguous(), *given[1:]))


@torch.no_grad()
def ends_in_head(llm: "PreTrainedModel") -> bool:
    """Whether a language model's logits are what its output embedding gives, and nothing is done to them after it.

    Some cap them (Gemma 2), scale them (Cohere, Granite) or add to them (BART); what comes before (T5's scale, OPT's
    projection) is no matter. Found out by one token: known numbers are put in the place of the output
    embedding's, and must come out as they went in. False also where it is not one plain linear layer.
    """
    head: Any = llm.get_output_embeddings()
    if type(head) is not nn.Linear:  # an adapter or quantised weights: they compute for themselves
        return False
    shown: list[Tensor] = []

    def show(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        # Wide, so that a cap shows, and with a zero, so that what is added does.
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
        plain: what `ends_in_head` says of it; False = by the model's own logits.
        scored: `[B, T]` bool, of the positions that it gives logits of.
        targets: `[N]`.
        given: its arguments.
    """
    if not plain:  # its logits are not what its output embedding gives
        return F.cross_entropy(llm(**given).logits[scored].float(), targets)
    head: Any = llm.get_output_embeddings()
    read: list[Tensor] = []

    def stop(module: nn.Module, rows: tuple[Tensor]) -> tuple[Tensor]:
        read.append(rows[0])  # with its graph: gradients go back through the model
        return (rows[0][:, :0],)  # no rows, so no logits

    hook = head.register_forward_pre_hook(stop)
    try:
        llm(**given)
    finally:
        hook.remove()
    (hidden,) = read
    return chunked_cross_entropy(hidden[scored], head.weight, head.bias, targets)
