"""A trained stage 2 in people's hands: pictures, prompts and questions in, sentences out.

Pictures are paths, PIL images or arrays (see `data/images.py`); everything below this module works on tensors.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from openblip2.config import RunSettings
from openblip2.data.images import Picture
from openblip2.data.text import clean_question
from openblip2.data.tokens import QFormerTokens, question_tokens
from openblip2.errors import UserError
from openblip2.hardware import computing
from openblip2.inference.inputs import (
    GROUP,
    clean_texts,
    each_readable,
    features_of,
    group_of,
    require_pairs,
    same_pictures,
    warn_unknown,
)
from openblip2.inference.pretrained import Pretrained
from openblip2.model.language import Decoding
from openblip2.model.stage2 import Stage2

CAPTION = Decoding()  # the paper's: beam 5, at most 30 new tokens
ANSWER = Decoding(max_new_tokens=10, length_penalty=-1.0)  # the paper's for VQA: beam 5, short
CHAT = replace(ANSWER, max_new_tokens=30)  # these three are the defaults of the command line, Python and the server


class Captioner(Pretrained):
    """A trained stage 2: what pictures show, and answers about them, in the language model's words."""

    model: Stage2
    model_class = Stage2

    def __init__(
        self,
        model: Stage2,
        settings: RunSettings,
        carries: frozenset[str] = frozenset(),
        measured: Mapping[str, Any] | None = None,
        tokens: QFormerTokens | None = None,
    ) -> None:
        """`tokens`: where the Q-Former reads questions (fine-tuned for VQA)."""
        super().__init__(model, settings, carries, measured, tokens.tokenizer if tokens else None)
        self.tokens = tokens

    def caption(
        self, images: Sequence[Picture], prompt: str | None = None, decoding: Decoding = CAPTION
    ) -> list[str | None]:
        """One caption for each picture; None for a picture that cannot be opened, which a warning names.

        Args:
            prompt: Text after the soft prompt; None = the one of training.
        """
        prompt = self.settings.language.prompts[0] if prompt is None else prompt
        return each_readable(images, lambda some, numbers: self.generate(some, [prompt] * len(some), decoding))

    def answer(
        self, images: Sequence[Picture], questions: Sequence[str], decoding: Decoding = ANSWER
    ) -> list[str | None]:
        """The answer to question n about picture n, asked in the run's own form (`language.question`).

        A picture that repeats is looked at once, as in `generate`. The answer is None for a picture that cannot be
        opened, which a warning names.

        Raises:
            UserError: an empty question, one of more than 50 words, or not as many as pictures.
        """
        require_pairs(images, questions, "questions")
        prompts, asked = self.read_questions(questions)

        def write(some: Sequence[Picture], numbers: Sequence[int]) -> list[str]:
            read = None if asked is None else [asked[n] for n in numbers]
            return self.generate(some, [prompts[n] for n in numbers], decoding, read)

        return each_readable(images, write)

    def read_questions(self, questions: Sequence[str]) -> tuple[list[str], list[str] | None]:
        """Prompts that ask the questions, and the questions for a Q-Former that reads them, as `generate` takes them.

        Raises:
            UserError: an empty question, or one of more than 50 words.
        """
        asked = clean_texts(questions, clean_question)
        warn_unknown(
            self.tokens.tokenizer if self.tokens else self.model.language.tokenizer, list(dict.fromkeys(asked))
        )
        form = self.settings.language.question
        return [form.replace("{}", question) for question in asked], asked if self.tokens else None

    def ask(self, image: Picture, questions: Sequence[str], decoding: Decoding = ANSWER) -> list[str]:
        """Answers to many questions about one picture, which is looked at once.

        Raises:
            UserError: as `answer`; or the picture cannot be opened.
        """
        prompts, asked = self.read_questions(questions)
        return self.generate([image] * len(questions), prompts, decoding, asked)

    def soft_prompt(self, images: Sequence[Picture], questions: Sequence[str] | None = None) -> Tensor:
        """What the language model sees of N pictures, the projected queries: `[N, Q, L]`, on the CPU.

        `questions`: one for each picture, where the Q-Former reads them.
        """
        with torch.inference_mode(), computing(self.model, self.settings.train.precision):
            outputs = self._query_output(images, questions)
            return torch.cat([self.model.projection(part).float().cpu() for part in outputs])

    def embed(
        self, images: Sequence[Picture], prompts: Sequence[str], questions: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """All that the language model reads for picture n and prompt n: `[N, T, L]` and mask `[N, T]`, on the CPU.

        What another program needs to write the text with the language model alone.
        """
        require_pairs(images, prompts, "prompts")
        soft = self.soft_prompt(images, questions).to(next(self.model.parameters()).device)
        with torch.inference_mode():
            embeds, mask = self.model.language.embed(soft, prompts)
        return embeds.float().cpu(), mask.cpu()

    def generate(
        self,
        images: Sequence[Picture],
        prompts: Sequence[str],
        decoding: Decoding,
        questions: Sequence[str] | None = None,
        at_once: int = GROUP,
    ) -> list[str]:
        """The language model's text for picture n after prompt n.

        A picture that repeats, by its path or as the same object of a list, goes through the encoder and the Q-Former
        once, and where prompts begin alike the language model reads it once, too. Prompts of like length go together.

        Args:
            questions: one for each picture, where the Q-Former reads them: then a picture that repeats goes through
                the encoder once in each group of 32, and through the Q-Former with each question.
            at_once: texts that are written together, where no questions are read and `inputs.group_of` is not 1.

        Raises:
            UserError: a picture that cannot be opened; no questions where they are read, or some where they are not.
        """
        self._require_questions(images, questions)
        if questions is not None:
            return self._generate_asked(images, prompts, decoding, questions)
        names = same_pictures(images)
        left, language = Counter(names), self.model.language
        lengths = {prompt: language.length(prompt) for prompt in set(prompts)}
        first = {name: n for n, name in reversed(list(enumerate(names)))}
        # Prompts about one picture stay together, for they share more than padding costs.
        order = sorted(
            range(len(names)),
            key=lambda n: (first[names[n]] if left[names[n]] > 1 else len(names), lengths[prompts[n]]),
        )
        found, soft = [""] * len(names), dict[str | int, Tensor]()
        with torch.inference_mode(), computing(self.model, self.settings.train.precision):
            at_once = at_once if group_of(self.model) > 1 else 1
            for start in range(0, len(order), at_once):
                rows = order[start : start + at_once]
                here = {names[n]: n for n in rows}
                unseen = [n for name, n in here.items() if name not in soft]
                for features in features_of(self.model, [images[n] for n in unseen]):
                    soft |= zip((names[n] for n in unseen), self.model.soft_prompt(features=features), strict=True)
                about = [list(here).index(names[n]) for n in rows]
                given = torch.stack([soft[name] for name in here])
                texts = language.generate(given, [prompts[n] for n in rows], decoding, about)
                for n, text in zip(rows, texts, strict=True):
                    found[n] = text
                left.subtract(names[n] for n in rows)
                soft = {name: one for name, one in soft.items() if left[name]}
        return found

    def _generate_asked(
        self, images: Sequence[Picture], prompts: Sequence[str], decoding: Decoding, questions: Sequence[str]
    ) -> list[str]:
        names, found = same_pictures(images), [""] * len(images)
        first = {name: n for n, name in reversed(list(enumerate(names)))}
        order = sorted(range(len(names)), key=lambda n: (first[names[n]], len(prompts[n])))
        with torch.inference_mode(), computing(self.model, self.settings.train.precision):
            group = group_of(self.model)
            for start in range(0, len(order), group):
                rows = order[start : start + group]
                here = {names[n]: n for n in rows}
                features = torch.cat(list(features_of(self.model, [images[n] for n in here.values()])))
                about = [list(here).index(names[n]) for n in rows]
                read = self._read([questions[n] for n in rows])
                soft = self.model.soft_prompt(features=features[about], question=read)
                texts = self.model.language.generate(soft, [prompts[n] for n in rows], decoding)
                for n, text in zip(rows, texts, strict=True):
                    found[n] = text
        return found

    def _query_output(self, images: Sequence[Picture], questions: Sequence[str] | None) -> Iterator[Tensor]:
        self._require_questions(images, questions)
        start = 0
        for part in features_of(self.model, images):
            read = self._read(questions[start : start + len(part)] if questions else None)
            yield self.model.query_output(features=part, question=read)
            start += len(part)

    def _read(self, questions: Sequence[str] | None) -> tuple[Tensor, Tensor] | None:
        return question_tokens(self.tokens, questions, self.model.projection.weight.device)

    def _require_questions(self, images: Sequence[Picture], questions: Sequence[str] | None) -> None:
        if (questions is None) != (self.tokens is None):
            raise UserError(
                "this run answers questions, which its Q-Former reads: give one with each picture, as for `answer`"
                if questions is None
                else f"this run's {self.settings.connector.name} reads no questions: give them in the prompts alone"
            )
        if questions is not None:
            require_pairs(images, questions, "questions")


def greedy(decoding: Decoding) -> Decoding:
    """The same, without beams."""
    return replace(decoding, beams=1)
