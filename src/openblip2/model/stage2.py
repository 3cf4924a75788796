"""Stage 2: generative learning (paper, section 3.2). A frozen language model reads visual tokens as a soft prompt.

Fine-tuned for VQA the question goes into the Q-Former, too (section 4.3, figure 7).

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

# Logit of a soft token that lies on a word's embedding, against one that lies as far away as embeddings are apart.
SHARPNESS = 5.0


class WordTable(NamedTuple):
    """Words with their numbers, and an embedding of each, `[N, L]`; number 0 is ""."""

    numbers: dict[str, int]
    embeddings: Tensor


class Stage2(nn.Module):
    """Frozen image encoder -> connector -> one linear layer -> frozen language model.

    Args:
        connector: the paper's is a Q-Former without its text path, unless it is to read questions.
        language: `DecoderLM` or `EncoderDecoderLM`.
        vision: the frozen encoder; None when only ready-made features are given.
    """

    qformer: QFormer  # the connector, if it is one

    def __init__(self, connector: Connector, language: LanguageModel, vision: FrozenVision | None = None) -> None:
        super().__init__()
        self.vision, self._connector = vision, connector.name
        # Under its own name, with which its tensors are stored: those of one kind do not fit into another.
        self.add_module(connector.name, connector)
        self.language = language
        self.projection = nn.Linear(connector.width, language.width)
        self.first: int | None = None  # the language model reads so many visual tokens, the first ones; None = all

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

        The mean over all tokens with a target. The loss of one process; `fast/` has it over several, or in chunks.

        Args:
            prompts: B texts.
            captions: B texts.
            images: uint8 `[B, 3, S, S]`; either these or features.
            features: `[B, P, V]`.
            question: see `query_output`.
            generator: draws where an encoder-decoder's captions are split, on the CPU; None = torch's own.
            words: with them, `alignment` in place of the language-modelling loss.
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
        """The mean over the tokens with a target, and how many they are; `draws` as in `EncoderDecoderLM.scored`.

        With `words` it is that of `alignment`.
        """
        soft = self.soft_prompt(**given)
        if words is not None:
            return self.alignment(soft, captions, words)
        return self.language.scored(soft, prompts, captions, draws)

    def first_words(self, caption: str) -> list[str]:
        """The words that the soft tokens are aligned with; "" in place of those that a short caption lacks."""
        count = self.tokens
        return (caption.split() + [""] * count)[:count]

    @torch.no_grad()
    def word_table(self, captions: Iterable[str]) -> WordTable:
        """The words of captions and their embeddings, for `alignment`.

        A word's embedding is the mean of its tokens'; a word without tokens is left out. "" is what comes after the
        picture in the template, or END.
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
        """How far the soft prompt is from the captions' own words, and how many soft tokens that is the mean of.

        Not in the paper. Soft token k is compared with the embedding of the caption's word k: the mean squared
        distance, and the cross-entropy of finding that word in the table by its distance. The language model does not
        run, so that a step takes a small part of the time of one with it. It reads such a soft prompt as it reads the
        caption itself.

        Args:
            soft: `[B, Q, L]`.
            captions: B texts.
            table: of all words that captions have. Those of one batch are too few: its captions are often of one form,
                and nothing would tell one form from another. A word that is not in it counts as "".
        """
        rows = [[table.numbers.get(word, 0) for word in self.first_words(caption)] for caption in captions]
        wanted = torch.tensor(rows, device=soft.device)
        # With the mean taken off, and in units of their variance, the embeddings of all language models are alike.
        embeddings = table.embeddings - (mean := table.embeddings.mean(0))
        unit = embeddings.square().sum(1).mean().clamp(min=torch.finfo(torch.float32).tiny)  # 0 for a single word
        distances = torch.cdist(soft.float() - mean, embeddings[None]).square() / unit
        found = F.cross_entropy(-SHARPNESS * distances.flatten(0, 1), wanted.flatten())
        return found + distances.gather(2, wanted[..., None]).mean(), wanted.numel()

    def soft_prompt(
        self, *, images: Tensor | None = None, features: Tensor | None = None, question: Question | None = None
    ) -> Tensor:
        """What the language model sees of the images, `[B, Q, L]`: the projection of `query_output`."""
        return self.projection(self.query_output(images=images, features=features, question=question))

    def query_output(
        self, *, images: Tensor | None = None, features: Tensor | None = None, question: Question | None = None
    ) -> Tensor:
        """The connector's visual tokens of the images, `[B, Q, D]`: uint8 `[B, 3, S, S]` or features `[B, P, V]`.

        Only the first `self.tokens` of them.

        Args:
            question: what the queries look for, where the connector reads questions: of B rows, or of a multiple of
                the images, each image's in a row.

        Raises:
            ValueError: a question and a connector that reads none, or none and one that does.
        """
        if (question is None) == self.connector.reads_questions:
            raise ValueError("a question belongs to a Q-Former with a text path, and such a Q-Former to a question")
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
        """One text for each image, by the language model's own `generate`."""
        soft = self.soft_prompt(images=images, features=features, question=question)
        return self.language.generate(soft, prompts, decoding)
