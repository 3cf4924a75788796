"""What one accelerator sends in a step, in bytes, and what it would send by other ways.

A ring over N processes: all-gather and reduce-scatter send (N - 1) / N of the whole, all-reduce twice that.

Shapes: as in `former.py`; N processes, B pairs of a process.
"""

from dataclasses import dataclass

from openblip2.plan.former import Former

SCALAR = 4  # gradients, vectors of ITC: fp32
HALF = 2  # frozen features and weights
TOKEN = 4  # a token's id travels as int32
RIVALS = 16  # and of each row which text and which image was drawn


@dataclass(frozen=True)
class Flow:
    """`bytes` that one accelerator sends in a step. `chosen`: False: another way of the line above, for comparison."""

    name: str
    bytes: int
    chosen: bool = True


def gradients(trained: int, processes: int) -> Flow:
    """DDP's all-reduce, once a step however often gradients are accumulated."""
    return Flow("gradients, all-reduced in fp32", round(2 * (processes - 1) / processes * SCALAR * trained))


def frozen_layers(whose: str, layer_bytes: float, processes: int, passes: int) -> Flow:
    """FSDP2's all-gather of the frozen layers; they have no gradient to reduce.

    `passes`: how often a step goes through them, forward and backward.
    """
    return Flow(f"layers of the {whose}, by FSDP2", round(passes * (processes - 1) / processes * layer_bytes))


def contrast(f: Former, pairs: int, processes: int, batches: int = 1) -> list[Flow]:
    """ITC: the texts' vectors to all and the sum of their gradients back; similarities to whose text it is, and back.

    Image vectors, one for each query, stay where they are.
    """
    others = processes - 1
    texts = others * pairs * f.shared * SCALAR
    turned = 2 * pairs * others * pairs * SCALAR
    images = 3 * others * pairs * f.queries * f.shared * SCALAR
    return [
        Flow("ITC: text vectors and similarities", batches * (3 * texts + turned)),
        Flow("(image and text vectors gathered)", batches * (3 * texts + images), False),
    ]


def negatives(f: Former, pairs: int, processes: int, text: int, batches: int = 1) -> list[Flow]:
    """ITM's wrong images from other processes, one for each text, and the token ids of all texts; and two other ways.

    Frozen features need no gradient, so what is chosen goes one way; keys and values have one, which goes back.
    """
    chosen = pairs * (processes - 1) / processes
    features = HALF * f.patches * f.image_width
    keys_values = 2 * 2 * f.crossing * HALF * f.patches * f.width
    texts = (processes - 1) * pairs * (TOKEN * text + RIVALS)
    return [
        Flow("ITM: features of the chosen negatives", round(batches * (chosen * features + texts))),
        Flow("(their keys and values, gradients back)", round(batches * (chosen * keys_values + texts)), False),
        Flow("(all features gathered)", batches * (processes - 1) * pairs * features, False),
    ]
