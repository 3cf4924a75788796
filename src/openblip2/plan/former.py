"""The trained part in figures: parameters and multiply-adds of each pass of a Q-Former, from its sizes alone.

Multiply-adds of one pair, forward; norms, activations and softmax are not counted, as everywhere in the field. The
backward pass of what trains takes twice as many.

Shapes: P patch tokens, V encoder width, Q queries, T text tokens, D width, F FFN width, E shared space, W vocabulary,
L width of the language model, G pairs over all processes.
"""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Former:
    """Sizes of a Q-Former between an encoder and text; see `model.qformer.QFormer`."""

    width: int  # D
    layers: int
    heads: int
    ffn: int  # F
    vocabulary: int  # W, `[DEC]` included
    positions: int
    queries: int  # Q
    cross_every: int
    patches: int  # P
    image_width: int  # V
    shared: int = 256  # E

    @cached_property
    def crossing(self) -> int:
        """Layers with cross-attention."""
        return len(range(0, self.layers, self.cross_every))

    def parameters(self, text: bool) -> int:
        """Trained parameters of the Q-Former itself; `text`: with its text path (stage 1)."""
        d, f = self.width, self.ffn
        norm, ffn = 2 * d, 2 * d * f + f + d + 2 * d
        layer = 4 * (d * d + d) + norm + (2 if text else 1) * ffn
        cross = 2 * (d * d + d) + 2 * (self.image_width * d + d) + norm
        words = (self.vocabulary + self.positions) * d if text else 0
        return 2 * self.image_width + self.queries * d + words + norm + self.layers * layer + self.crossing * cross

    def heads_parameters(self, bias: bool = False) -> int:
        """Of stage 1's heads; the word decoder's weight is the word embedding. `bias`: of sigmoid ITC."""
        d, e = self.width, self.shared
        return 2 * (d * e + e) + 2 * d + 2 + (d * d + d + 2 * d + self.vocabulary) + 1 + bias

    def linear_weights(self, text: bool) -> int:
        """Parameters of linear layers in the Q-Former: what autocast keeps a second copy of."""
        d, f = self.width, self.ffn
        layer = 4 * d * (d + 1) + (2 if text else 1) * (2 * d * f + f + d)
        return self.layers * layer + self.crossing * (2 * d * (d + 1) + 2 * d * (self.image_width + 1))

    def look(self) -> int:
        """Keys and values of one image, for all layers that cross."""
        return 2 * self.crossing * self.patches * self.image_width * self.width

    def rows(self, queries: int, text: int, keep_text: int | None = None, past: int = 0) -> int:
        """One pass over `queries` and `text` rows, the image's keys and values not counted.

        Args:
            keep_text: text rows that go on in the last layer, None = all. past: rows whose keys and values are there.
        """
        d, total = self.width, 0
        for n in range(self.layers):
            last = n == self.layers - 1 and keep_text is not None
            kept = queries + (keep_text if last and keep_text is not None else text)
            rows = queries + text
            total += 2 * rows * d * d + 2 * kept * d * d + 2 * kept * (rows + past) * d
            total += 2 * kept * d * self.ffn
            if n % self.cross_every == 0:
                total += 2 * queries * d * d + 2 * queries * self.patches * d
        return total

    def stage1(self, text: int, together: int, far: float = 0.0, one_sided: bool = False) -> dict[str, int]:
        """Multiply-adds of one pair by part, as `Stage1.losses` computes them.

        Args:
            text: T. together: G. far: share of ITM's wrong images that have to be looked at once more, for they come
                from other processes or chunks, as features. one_sided: `stage1.detach_gathered`.
        """
        d, q, e = self.width, self.queries, self.shared
        return {
            "image keys and values": round(self.look() * (1 + far)),
            "query pass": self.rows(q, 0),
            "text pass": self.rows(0, text, keep_text=1),
            "ITC": (q + 1) * d * e + (2 if one_sided else 1) * q * e * together,
            "ITM, 3 pairs": 3 * (self.rows(q, text, keep_text=0) + 2 * q * d),
            "ITG": self.rows(0, text, text - 1, past=q) + (text - 1) * (d * d + d * self.vocabulary),
        }

    def stage2(self, width: int) -> dict[str, int]:
        """The same of stage 2: the query pass and the projection to a language model of `width` L."""
        return {
            "image keys and values": self.look(),
            "query pass": self.rows(self.queries, 0),
            "projection": self.queries * self.width * width,
        }

    def plain_stage1(self, text: int = 32, share: bool = False) -> dict[str, int]:
        """What the paper's way takes: whole passes, padded text, image keys and values anew in each (`share`: once).

        ITG goes on from the query pass, as in the authors' code. Small heads are left out.
        """
        q, look = self.queries, self.look()
        again = 0 if share else look
        return {
            "query pass": self.rows(q, 0) + look,
            "text pass": self.rows(0, text),
            "ITM, 3 pairs": 3 * (self.rows(q, text) + again),
            "ITG": self.rows(0, text, past=q) + text * self.width * (self.width + self.vocabulary),
        }
