"""Stage 2: generative learning (paper, section 3.2). A frozen language model reads the queries as a soft prompt.

Fine-tuned for VQA the question goes into the Q-Former, too (section 4.3, figure 7).

Shapes: B images, S side in px, P patch tokens, V encoder width, Q queries, D Q-Former width, L LLM width, T tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from openblip2.distributed import Share, share
from openblip2.model import masks
from openblip2.model.language import Decoding, LanguageModel
from openblip2.model.qformer import QFormer
from openblip2.model.stage1 import see
from openblip2.model.vision import Vision

Question = tuple[Tensor, Tensor]  # the Q-Former's tokens [B, T] int64, and which of them are real [B, T] bool


class Stage2(nn.Module):
    """Frozen image encoder -> Q-Former (its query path only) -> one linear layer -> frozen language model.

    Args:
        qformer: without its text path, unless it is to read questions. language: `DecoderLM` or `EncoderDecoderLM`.
        vision: the frozen encoder; None when only ready-made features are given.
    """

    def __init__(self, qformer: QFormer, language: LanguageModel, vision: Vision | None = None) -> None:
        super().__init__()
        self.vision, self.qformer, self.language = vision, qformer, language
        self.projection = nn.Linear(qformer.width, language.width)

    @property
    def reads_question(self) -> bool:
        """Whether a question goes into the Q-Former, too."""
        return self.qformer.words is not None

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
        """Language-modelling loss of `captions` behind the soft visual prompt and the text `prompts`, B of each.

        The mean over all tokens with a target. In several processes each gives its part of the joined batch, which may
        be nothing. Their losses' mean over processes, and their gradients', are those of one process with that batch.

        Args:
            generator: where an encoder-decoder's captions are split is drawn by it, on the CPU; None = torch's own.
        """
        draws = self.split_draws(share(len(captions)), generator)
        loss, count = self.scored(prompts, captions, images=images, features=features, question=question, draws=draws)
        shared = share(1, count)
        return {"lm": loss if shared.one else shared.weigh(loss, count, shared.sums[0])}

    def scored(
        self,
        prompts: Sequence[str],
        captions: Sequence[str],
        *,
        images: Tensor | None = None,
        features: Tensor | None = None,
        question: Question | None = None,
        draws: Sequence[float] | None = None,
    ) -> tuple[Tensor, int]:
        """The mean over the tokens with a target, and how many they are; `draws` as in `EncoderDecoderLM.scored`.

        Of no pairs it is the loss of a blank picture, of which 0 tokens count: a language model that lies in pieces
        over processes must run in all of them.
        """
        if captions:
            soft = self.soft_prompt(images=images, features=features, question=question)
            return self.language.scored(soft, prompts, captions, draws)
        blank = [None if given is None else given.new_zeros(1, *given.shape[1:]) for given in (images, features)]
        asked = None
        if question is not None:
            token = torch.zeros(1, 1, dtype=torch.int64, device=self.projection.weight.device)
            asked = (token, torch.ones_like(token, dtype=torch.bool))
        soft = self.soft_prompt(images=blank[0], features=blank[1], question=asked)
        return self.language.scored(soft, [""], ["a"], [0.0])[0] * 0.0, 0

    @staticmethod
    def split_draws(shared: Share, generator: torch.Generator | None) -> list[float]:
        """A number in [0, 1) for each of our captions: as many are drawn as the joined batch has, and ours are ours."""
        return torch.rand(shared.total, generator=generator)[shared.own].tolist()

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
        if (question is None) == self.reads_question:
            raise ValueError("a question belongs to a Q-Former with a text path, and such a Q-Former to a question")
        patches = see(self.vision, images, features)
        if question is None:
            return self.qformer.query_output(patches)
        tokens, valid = question
        mask = masks.bidirectional(self.qformer.queries.shape[1], valid)
        return self.qformer(self.qformer.look(patches), tokens, mask, keep_text=0).queries

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
