"""What the forward pass of the trained part keeps for the backward pass, in bytes for one pair.

Followed through `model/qformer.py` line by line: a linear layer keeps its input (under autocast a copy in the compute
dtype, one for each layer that reads it), a LayerNorm its fp32 input, GELU its input, attention its queries, keys,
values and output, dropout its mask. Tests hold the sums against what autograd really saves.

Shapes: as in `former.py`; H heads.
"""

from dataclasses import dataclass

from openblip2.plan.former import Former

STATISTICS = 8  # a LayerNorm's mean and deviation, fp32, for each row


@dataclass(frozen=True)
class Arithmetic:
    """How it is computed.

    Attributes:
        compute: bytes of a number in matrix products: 2 under autocast to bf16, 4 in fp32.
        fused: attention by a kernel that keeps no probabilities (GPUs); False: plain matrix products (CPUs).
        dropout: whether there is any. mask: bytes of one dropped unit's mark: 1 on GPUs, `compute` on CPUs.
        features: bytes of a number of the frozen encoder's features.
        checkpoint: `train.checkpoint_activations`.
    """

    compute: int = 2
    fused: bool = True
    dropout: bool = True
    features: int = 2
    checkpoint: bool = False

    @property
    def mask(self) -> int:
        return (1 if self.fused else self.compute) if self.dropout else 0


def kept_stage1(f: Former, how: Arithmetic, text: int, together: int) -> dict[str, int]:
    """Of one pair of stage 1 by part, T = `text`, among `together` pairs over all processes."""
    q, d, e, c = f.queries, f.width, f.shared, how.compute
    scored = text - 1
    similarities = 4 * (q + 3) * together  # of every query, of the best, both ways divided by the temperature
    head = scored * (c * d + c * d + 4 * d + STATISTICS) if how.compute == 2 else scored * 3 * 4 * d
    return {
        "image keys and values": kept_looking(f, how) + 3 * 2 * f.crossing * c * f.patches * d,  # and those of ITM
        "query pass": kept_pass(f, how, q, 0, cached=True),
        "text pass": kept_pass(f, how, 0, text, keep_text=1, masked=True),
        "ITC": similarities + c * (q + 1) * d + 3 * 4 * (q + 1) * e,
        "ITM, 3 pairs": 3 * (kept_pass(f, how, q, text, keep_text=0, masked=True) + c * q * d),
        "ITG": kept_pass(f, how, 0, text, keep_text=scored, past=q, masked=True) + head,
    }


def kept_stage2(f: Former, how: Arithmetic, width: int) -> dict[str, int]:
    """Of one caption's way to the soft prompt of a language model of `width` L."""
    return {
        "image keys and values": kept_looking(f, how),
        "query pass": kept_pass(f, how, f.queries, 0, cached=True),
        "projection": how.compute * f.queries * (f.width + width),
    }


def kept_looking(f: Former, how: Arithmetic) -> int:
    """Of an image: its features in fp32 before the norm, behind it once for each product, keys and values."""
    numbers = f.patches * f.image_width
    before = 0 if how.features == 4 else 4 * numbers  # what came in fp32 is not copied
    behind = 4 * numbers if how.compute == 4 else 2 * f.crossing * how.compute * numbers
    return before + behind + STATISTICS * f.patches + 2 * f.crossing * how.compute * f.patches * f.width


def kept_pass(
    f: Former,
    how: Arithmetic,
    queries: int,
    text: int,
    keep_text: int | None = None,
    past: int = 0,
    masked: bool = False,
    cached: bool = False,
) -> int:
    """Of one pass over `queries` and `text` rows; arguments as of `Former.rows`.

    Args:
        masked: whether there is a mask. cached: whether keys and values outlive the pass, for ITG.
    """
    d, total, most = f.width, 0, 0
    for n in range(f.layers):
        last = n == f.layers - 1 and keep_text is not None
        kept_text = keep_text if last and keep_text is not None else text
        kept, rows = queries + kept_text, queries + text
        layer = _self_attention(f, how, rows, kept, rows + past, masked, last)
        if queries and n % f.cross_every == 0:
            layer += _cross_attention(f, how, queries)
        layer += _feed_forward(f, how, queries) + _feed_forward(f, how, kept_text)
        most = max(most, layer)
        total += layer
    own = 2 * how.compute * (queries + text) * d * f.layers  # keys and values, which the pass holds to its end
    embedded = 0 if not how.dropout else 1 if how.fused else 4  # its dropout is in fp32
    embedding = text * (4 * d + embedded * d + STATISTICS)
    if how.checkpoint:  # each layer's input; and, one after the other, the keys and values or one layer whole
        return (
            embedding + 4 * (queries + text) * d * f.layers + (own if cached else 0) + max(0 if cached else own, most)
        )
    held = own if cached and not how.fused else 0  # plain attention keeps copies, the cache what they are of
    return embedding + total + held


def _self_attention(f: Former, how: Arithmetic, rows: int, kept: int, seen: int, masked: bool, last: bool) -> int:
    d, c = f.width, how.compute
    inputs = c * d * (2 * rows + kept) if c == 2 else 4 * d * (rows + (kept if last else 0))
    return inputs + _attention(f, how, kept, seen, masked, own=True) + _residual(how, kept, d)


def _cross_attention(f: Former, how: Arithmetic, queries: int) -> int:
    d = f.width
    return (
        how.compute * queries * d
        + _attention(f, how, queries, f.patches, False, own=False)
        + _residual(how, queries, d)
    )


def _attention(f: Former, how: Arithmetic, kept: int, seen: int, masked: bool, own: bool) -> int:
    """`own`: keys and values are the pass's own, and not the image's, which all passes share."""
    d, c = f.width, how.compute
    pairs = f.heads * kept * seen
    if how.fused:
        keys_values = 2 * c * seen * d if own else 0
        return c * kept * d + keys_values + c * kept * d + 4 * f.heads * kept + (c * kept * seen if masked else 0)
    # Plain products are in fp32, of copies that lie side by side.
    probabilities = 4 * pairs * (3 if how.dropout else 1)
    return 4 * kept * d + 2 * 4 * seen * d + probabilities + c * kept * d


def _feed_forward(f: Former, how: Arithmetic, rows: int) -> int:
    return rows * how.compute * (f.width + 2 * f.ffn) + _residual(how, rows, f.width)


def _residual(how: Arithmetic, rows: int, width: int) -> int:
    """Dropout, sum and norm behind a block."""
    return rows * (how.mask * width + 4 * width + STATISTICS)
