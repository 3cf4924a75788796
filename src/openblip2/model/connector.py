"""What stage 2 asks of the module between the frozen image encoder and the language model.

The paper's connector is the Q-Former (`model/qformer.py`). Another one is a subclass of `Connector` in a file of its
own, and one entry in `CONNECTORS` of `model/build.py`; a caller's own class is added there from outside.

Shapes: B images, P patch tokens, V encoder width, Q visual tokens, D their width, T question tokens.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

Question = tuple[Tensor, Tensor]  # the Q-Former's tokens [B, T] int64, and which of them are real [B, T] bool


class Connector(nn.Module, ABC):
    """Turns the features of an image into visual tokens, which stage 2 then projects to the language model.

    The builder calls a subclass as `Kind(patches, image_width, **options)`: P, V, and the setting `connector.options`.
    The other parameters of its constructor are thus its settings, checked against their annotations. A setting that
    does not fit P or V is a `UserError`. The Q-Former has settings of its own (`qformer`), and sizes of a BERT.

    Attributes:
        name: the setting `connector.name`. In model.safetensors the names of its tensors begin with it.
        has_stage1: whether stage 2 can start from a stage-1 run.
        tokens: Q.
        width: D.
        sizes: what `config.json` stores, so that a run is only loaded with a connector of these sizes.
        reads_questions: whether `visual_tokens` takes a question, and needs one.
        checkpoint_activations: True asks for less memory: the backward pass computes the layers again.
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
        """Features `[B, P, V]` to visual tokens `[B, Q, D]`. Features may be in half precision, weights are not."""
