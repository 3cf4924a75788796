"""The interface of the module between the frozen image encoder and the language model in stage 2.

The paper's connector is the Q-Former (`model/qformer.py`). Another connector needs a subclass of `Connector` in its own
file and an entry in `CONNECTORS` of `model/build.py`; users of this package can add their own class to it, too.

Shapes: B images, P patch tokens, V encoder width, Q visual tokens, D their width, T question tokens.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

Question = tuple[Tensor, Tensor]  # the Q-Former's token ids [B, T] int64, and [B, T] bool, False on padding


class Connector(nn.Module, ABC):
    """Converts the features of an image into visual tokens, which stage 2 then projects to the language model.

    The builder calls a subclass as `Kind(patches, image_width, **options)`: P, V, and the setting `connector.options`.
    The other constructor parameters are therefore its settings, and are checked against their annotations. A setting
    that does not fit P or V is a `UserError`. The Q-Former has its own settings (`qformer`), and the sizes of a BERT.

    Attributes:
        name: value of the setting `connector.name`, and first part of its tensors' names in model.safetensors.
        has_stage1: whether stage 2 can start from a stage-1 run.
        tokens: Q.
        width: D.
        sizes: stored in `config.json`, so that a run is only loaded into a connector of the same sizes.
        reads_questions: whether `visual_tokens` requires a question; if False, it accepts none.
        checkpoint_activations: True saves memory: the backward pass recomputes the layers.
    """

    name: ClassVar[str]
    has_stage1: ClassVar[bool] = False

    def __init__(self, tokens: int, width: int, image_width: int) -> None:
        super().__init__()
        self.tokens, self.width, self.image_width = tokens, width, image_width
        self.sizes = {"tokens": tokens, "width": width, "image_width": image_width}
        self.reads_questions = self.checkpoint_activations = False

    @abstractmethod
    def visual_tokens(self, patches: Tensor, question: Question | None = None) -> Tensor:
        """Features `[B, P, V]` to visual tokens `[B, Q, D]`. The features may be in half precision, the weights not."""
