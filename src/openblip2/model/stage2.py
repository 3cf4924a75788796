"""Stage 2: generative learning (paper, section 3.2). A frozen language model reads visual tokens as a soft prompt.

In fine-tuning for VQA, the Q-Former reads the question, too (section 4.3, figure 7).

Shapes: B images, S side in px, P patch tokens, V encoder width, Q visual tokens, D their width, L LLM width, T tokens.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openblip2.model.connector import Connector, Question
from openblip2.model.language import Decoding, LanguageModel
from openblip2.model.qformer import QFormer
from openblip2.model.stage1 import see
from openblip2.model.token_rows import template_ids, text_ids
from openblip2.model.vision import FrozenVision

# How much larger the logit of a word is at distance 0 from a soft token than at the typical distance of embeddings.
SHARPNESS = 5.0


class WordTable(NamedTuple):
    """Words with their numbers, and the embedding of each number, `[N, L]`; number 0 is ""."""

    numbers: dict[str, int]
    embeddings: Tensor


class Stage2(nn.Module):
    """Frozen image encoder -> connector -> one linear layer -> frozen language model.

    Args:
        connector: in the paper a Q-Former, which has no text path unless it reads questions.
        language: `DecoderLM` or `EncoderDecoderLM`.
        vision: the frozen encoder; None if only precomputed features are given.
    """

    qformer: QFormer  # the connector, if it is a Q-Former

    def __init__(self, connector: Connector, language: LanguageModel, vision: FrozenVision | None = None) -> None:
        super().__init__()
        self.vision, self._connector = vision, connector.name
        # Registered and stored under its own name, because the tensors of one kind do not fit into another.
        self.add_module(connector.name, connector)
        self.language = language
        self.projection = nn.Linear(connector.width, language.width)
        self.first: int | None = None  # number of first visual tokens that the language model reads; None = all

    @property
    def connector(self) -> Connector:
        """The module between image encoder and language model."""
        found = self.get_submodule(self._connector)
        assert isinstance(found, Connector)
        return found

    @property
    def tokens(self) -> int:
        """How many visual tokens the language model reads."""
        return self.connector.tokens if self.first is None else self.first

    def losses(
        self,
        prompts: Sequence[str],
        captions: Sequence[str],
        *,
        images: Tensor | None = None,
        features: Tensor | None = None,
        question: Question | None = None,
        generator: torch.Generator | None = None,
        words: WordTable | None = None,
    ) -> dict[str, Tensor]:
        """Language-modelling loss of `captions` after the soft visual prompt and the text `prompts`, B of each.

        The mean over all target tokens. This is the loss of one process; `fast/` has it over several, or in chunks.

        Args:
            prompts: B texts.
            captions: B texts.
            images: uint8 `[B, 3, S, S]`; give either these or features.
            features: `[B, P, V]`.
            question: see `query_output`.
            generator: on the CPU, draws where an encoder-decoder's captions are split; None = torch's default.
            words: if given, `alignment` replaces the language-modelling loss.
        """
        draws = torch.rand(len(captions), generator=generator).tolist()
        given: dict[str, Any] = {"images": images, "features": features, "question": question}
        loss, _ = self.scored(prompts, captions, draws, words, **given)
        return {"lm" if words is None else "alignment": loss}

    def scored(
        self,
        prompts: Sequence[str],
        captions: Sequence[str],
        draws: Sequence[float] | None = None,
        words: WordTable | None = None,
        **given: Any,
    ) -> tuple[Tensor, int]:
        """The mean loss over the target tokens, and their number; `draws` as in `EncoderDecoderLM.scored`.

        If `words` are given, it is the loss of `alignment`.
        """
        soft = self.soft_prompt(**given)
        if words is not None:
            return self.alignment(soft, captions, words)
        return self.language.scored(soft, prompts, captions, draws)

    def first_words(self, caption: str) -> list[str]:
        """The caption's words that the soft tokens are aligned with; "" for each missing word of a short caption."""
        count = self.tokens
        return (caption.split() + [""] * count)[:count]

    @torch.no_grad()
    def word_table(self, captions: Iterable[str]) -> WordTable:
        """The words of captions and their embeddings, for `alignment`.

        A word's embedding is the mean of its tokens' embeddings; a word without tokens is left out. The embedding of ""
        is that of the first token after the picture in the template, or of END.
        """
        language, device = self.language, self.projection.weight.device
        after = template_ids(language.tokenizer, language.template.split("{image}")[1].format(prompt=""))
        words = sorted({word for caption in captions for word in self.first_words(caption)} - {""})
        found = {word: text_ids(language.tokenizer, f" {word}") for word in words}
        found = {"": [(after or language.end)[0]]} | {word: ids for word, ids in found.items() if ids}
        embed: Any = language.llm.get_input_embeddings()
        means = [embed(torch.tensor(row, device=device)).float().mean(0) for row in found.values()]
        return WordTable({word: n for n, word in enumerate(found)}, torch.stack(means))

    def alignment(self, soft: Tensor, captions: Sequence[str], table: WordTable) -> tuple[Tensor, int]:
        """The distance between the soft prompt and the captions' words, and the number of soft tokens in this mean.

        Not in the paper. Soft token k is compared with the embedding of the caption's word k, so that the soft prompt
        reads as the caption: the loss is the mean squared distance, plus the cross-entropy of finding that word in the
        table by its distance. The language model does not run, so a step takes a small part of the usual time.

        Args:
            soft: `[B, Q, L]`.
            captions: B texts.
            table: of all words in the captions. The words of one batch are too few, because its captions often have one
                form, and the loss would not separate different forms. A word that is not in it counts as "".
        """
        rows = [[table.numbers.get(word, 0) for word in self.first_words(caption)] for caption in captions]
        wanted = torch.tensor(rows, device=soft.device)
        # Without their mean, and in units of their variance, the embeddings of all language models have the same scale.
        embeddings = table.embeddings - (mean := table.embeddings.mean(0))
        unit = embeddings.square().sum(1).mean().clamp(min=torch.finfo(torch.float32).tiny)  # 0 for a single word
        distances = torch.cdist(soft.float() - mean, embeddings[None]).square() / unit
        found = F.cross_entropy(-SHARPNESS * distances.flatten(0, 1), wanted.flatten())
        return found + distances.gather(2, wanted[..., None]).mean(), wanted.numel()

    def soft_prompt(
        self, *, images: Tensor | None = None, features: Tensor | None = None, question: Question | None = None
    ) -> Tensor:
        """The soft prompt for the language model, `[B, Q, L]`: the projection of `query_output`."""
        return self.projection(self.query_output(images=images, features=features, question=question))

    def query_output(
        self, *, images: Tensor | None = None, features: Tensor | None = None, question: Question | None = None
    ) -> Tensor:
        """The first `tokens` visual tokens `[B, Q, D]`, from images uint8 `[B, 3, S, S]` or features `[B, P, V]`.

        Args:
            question: if the connector reads questions: one row per image, or equally many consecutive rows for each.

        Raises:
            ValueError: a question is given but the connector reads none, or it reads questions but none is given.
        """
        if (question is None) == self.connector.reads_questions:
            raise ValueError("give a question if the Q-Former has a text path, and only then")
        return self.connector.visual_tokens(see(self.vision, images, features), question)[:, : self.tokens]

    def generate(
        self,
        prompts: Sequence[str],
        decoding: Decoding,
        *,
        images: Tensor | None = None,
        features: Tensor | None = None,
        question: Question | None = None,
    ) -> list[str]:
        """Generates one text for each image with the language model's own `generate`."""
        soft = self.soft_prompt(images=images, features=features, question=question)
        return self.language.generate(soft, prompts, decoding)
