"""Stage 2: generative learning (paper, section 3.2). A frozen language model reads the queries as a soft prompt.

Fine-tuned for VQA the question goes into the Q-Former, too (section 4.3, figure 7).

Shapes: B images, S side in px, P patch tokens, V encoder width, Q queries, D Q-Former width, L LLM width, T tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openblip2.model.language import Decoding, LanguageModel
from openblip2.model.qformer import QFormer
from openblip2.model.stage1 import see
from openblip2.model.vision import Vision

Question = tuple[Tensor, Tensor]  # the Q-Former's tokens [B, T] int64, and which of them are real [B, T] bool


class Stage2(nn.Module):
    """Frozen image encoder -> Q-Former (its query path only) -> one linear layer -> frozen language model.

    Args:
        qformer: without its text path, unless it is to read questions.
        language: `DecoderLM` or `EncoderDecoderLM`.
        vision: the frozen encoder; None when only ready-made features are given.
    """

    def __init__(self, qformer: QFormer, language: LanguageModel, vision: Vision | None = None) -> None:
        super().__init__()
        self.vision, self.qformer, self.language = vision, qformer, language
        self.projection = nn.Linear(qformer.width, language.width)

    @property
    def question_in_qformer(self) -> bool:
        """Whether a question goes into the Q-Former, too."""
        return self.qformer.word_embeddings is not None

    def losses(
        self,
        prompts: Sequence[str],
        captions: Sequence[str],
        *,
        images: Tensor | None = None,
        features: Tensor | None = None,
        question: Question | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Language-modelling loss of `captions` after the soft visual prompt and the text `prompts`, B of each.

        The mean over all tokens with a target. The loss of one process; `fast/` has it over several, or in chunks.

        Args:
            prompts: B texts.
            captions: B texts.
            images: uint8 `[B, 3, S, S]`; either these or features.
            features: `[B, P, V]`.
            question: see `query_output`.
            generator: draws where an encoder-decoder's captions are split, on the CPU; None = torch's own.
        """
        draws = torch.rand(len(captions), generator=generator).tolist()
        return {
            "lm": self.scored(prompts, captions, draws, images=images, features=features, question=question)[0],
        }

    def scored(
        self, prompts: Sequence[str], captions: Sequence[str], draws: Sequence[float] | None = None, **given: Any
    ) -> tuple[Tensor, int]:
        """The mean over the tokens with a target, and how many they are; `draws` as in `EncoderDecoderLM.scored`."""
        return self.language.scored(self.soft_prompt(**given), prompts, captions, draws)

    def soft_prompt(
        self, *, images: Tensor | None = None, features: Tensor | None = None, question: Question | None = None
    ) -> Tensor:
        """What the language model sees of the images, `[B, Q, L]`: the projection of `query_output`."""
        return self.projection(self.query_output(images=images, features=features, question=question))

    def query_output(
        self, *, images: Tensor | None = None, features: Tensor | None = None, question: Question | None = None
    ) -> Tensor:
        """What the queries read from the images, `[B, Q, D]`: uint8 `[B, 3, S, S]` or features `[B, P, V]`.

        Args:
            question: what the queries look for, where the Q-Former reads questions: of B rows, or of a multiple of
                the images, each image's in a row.

        Raises:
            ValueError: a question and a Q-Former that reads none, or none and one that does.
        """
        if (question is None) == self.question_in_qformer:
            raise ValueError("a question belongs to a Q-Former with a text path, and such a Q-Former to a question")
        patches = see(self.vision, images, features)
        if question is None:
            return self.qformer.query_output(patches)
        return self.qformer.joint_pass(self.qformer.encode_image(patches), *question)

    def generate(
        self,
        prompts: Sequence[str],
        decoding: Decoding,
        *,
        images: Tensor | None = None,
        features: Tensor | None = None,
        question: Question | None = None,
    ) -> list[str]:
        """One text for each image, by the language model's own `generate`."""
        soft = self.soft_prompt(images=images, features=features, question=question)
        return self.language.generate(soft, prompts, decoding)
