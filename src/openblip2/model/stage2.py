"""Stage 2: generative learning (paper, section 3.2). A frozen language model reads the queries as a soft prompt.

Shapes: B images, S side in px, P patch tokens, V encoder width, Q queries, D Q-Former width, L LLM width.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from openblip2.model.language import Decoding, LanguageModel
from openblip2.model.qformer import QFormer
from openblip2.model.stage1 import see
from openblip2.model.vision import Vision


class Stage2(nn.Module):
    """Frozen image encoder -> Q-Former (its query path only) -> one linear layer -> frozen language model.

    Args:
        qformer: without its text path. language: `DecoderLM` or `EncoderDecoderLM`.
        vision: the frozen encoder; None when only ready-made features are given.
    """

    def __init__(self, qformer: QFormer, language: LanguageModel, vision: Vision | None = None) -> None:
        super().__init__()
        self.vision, self.qformer, self.language = vision, qformer, language
        self.projection = nn.Linear(qformer.width, language.width)

    def losses(
        self,
        prompts: Sequence[str],
        captions: Sequence[str],
        *,
        images: Tensor | None = None,
        features: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Language-modelling loss of `captions` behind the soft visual prompt and the text `prompts`, B of each."""
        soft = self.soft_prompt(images=images, features=features)
        return {"lm": self.language.loss(soft, prompts, captions)}

    def soft_prompt(self, *, images: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """What the language model sees of the images, `[B, Q, L]`: uint8 `[B, 3, S, S]` or features `[B, P, V]`."""
        seen = self.qformer(self.qformer.look(see(self.vision, images, features)))
        return self.projection(seen.queries)

    def generate(
        self,
        prompts: Sequence[str],
        decoding: Decoding,
        *,
        images: Tensor | None = None,
        features: Tensor | None = None,
    ) -> list[str]:
        """One text for each image, by the language model's own `generate`."""
        return self.language.generate(self.soft_prompt(images=images, features=features), prompts, decoding)
