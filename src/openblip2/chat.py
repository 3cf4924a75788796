"""Talking about a picture: each question is asked behind the earlier ones and their answers (paper, 4.1 and figure 4).

Shapes: Q queries, L LLM width, P patch tokens, V encoder width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from openblip2.captioner import CHAT, Captioner
from openblip2.data.images import Picture
from openblip2.data.text import clean_question
from openblip2.data.tokens import question_tokens
from openblip2.errors import UserError
from openblip2.hardware import computing
from openblip2.inputs import features_of
from openblip2.model.context import context_of, room_for_prompt
from openblip2.model.language import Decoding
from openblip2.model.template import dialogue


class Form:
    """How questions are put to a language model, one behind the other, and how many turns it has room for.

    Args:
        question: how a question is put, `{}` being it ("{}": the words alone); None = the run's `language.question`.
        context: tokens that the language model takes at once, the Q soft ones and the answer's counted; None = its
            own limit, which is the most.

    Raises:
        UserError: `question` without `{}`, a run whose template has no place for a question, or a context beyond the
            language model's own.
    """

    def __init__(self, captioner: Captioner, question: str | None = None, context: int | None = None) -> None:
        self.language, settings = captioner.model.language, captioner.settings.language
        self.queries = captioner.model.qformer.queries.shape[1]
        self.question = settings.question if question is None else question
        if "{}" not in self.question:
            raise UserError(f"question {self.question!r}: it must hold {{}}, in whose place a question goes")
        if "{prompt}" not in self.language.template:
            raise UserError(f"template {settings.template!r}: without {{prompt}} it has no place for a question")
        most = context_of(self.language)
        if context is not None and most is not None and context > most:
            raise UserError(f"context {context}: this language model takes {most} tokens at once")
        self.context = most if context is None else context

    def prompt(self, turns: Sequence[tuple[str, str]], question: str, longest: int) -> str:
        """The text in the template's `{prompt}` that asks this now: as many of the latest turns as fit, then it.

        Args:
            turns: questions and their answers.
            longest: new tokens that the answer may take.

        Raises:
            UserError: an empty question, or one too long even alone.
        """
        question = question.strip()
        if not question:
            raise UserError("an empty question: ask something in words")
        room = room_for_prompt(self.language, self.context, self.queries, longest)
        found = self._written([], question)
        if room is not None and (length := self.language.length(found)) > room:
            raise UserError(
                f"question {question[:40]!r}... takes {length} tokens with the template around it: {max(room, 0)} fit "
                f"beside the picture and the answer (the language model takes {self.context})"
            )
        for start in reversed(range(len(turns))):
            longer = self._written(turns[start:], question)
            if room is not None and self.language.length(longer) > room:
                break
            found = longer
        return found

    def _written(self, turns: Sequence[tuple[str, str]], question: str) -> str:
        return dialogue(turns, question, self.question, self.language.template, self.language.tokenizer)


class Chat:
    """Questions about one picture. The encoder and the Q-Former see it once, when the chat is made.

    A question is asked as it is written, however long it is while it fits. Differs from `Captioner.answer`, which makes
    it plain, as the authors do for VQA. A Q-Former that reads questions looks anew for each one, made plain.

    Args:
        captioner: a trained stage 2.
        image: the picture.
        decoding: of the answers.
        question, context: see `Form`.

    Attributes:
        turns: every question and its answer, the first one first.

    Raises:
        UserError: as `Form`; or a picture that cannot be opened.
    """

    def __init__(
        self,
        captioner: Captioner,
        image: Picture,
        decoding: Decoding = CHAT,
        question: str | None = None,
        context: int | None = None,
    ) -> None:
        self.form = Form(captioner, question, context)
        self.captioner, self.decoding = captioner, decoding
        self.turns: list[tuple[str, str]] = []
        with torch.inference_mode(), computing(captioner.model, captioner.settings.train.precision):
            (self.features,) = features_of(captioner.model, [image])  # [1, P, V]
            self.soft = captioner.model.soft_prompt(features=self.features) if captioner.tokens is None else None

    def ask(self, question: str) -> str:
        """The answer, which with its question is kept for the next.

        Raises:
            UserError: an empty question, or one too long even alone; the chat stays as it was.
        """
        prompt, model = self.prompt(question), self.captioner.model
        with torch.inference_mode(), computing(model, self.captioner.settings.train.precision):
            (answer,) = model.language.generate(self._soft_prompt(question), [prompt], self.decoding)
        self.turns.append((question.strip(), answer))
        return answer

    def prompt(self, question: str) -> str:
        """What the language model is given to ask this now; see `Form.prompt`."""
        return self.form.prompt(self.turns, question, self.decoding.max_new_tokens)

    def _soft_prompt(self, question: str) -> Tensor:
        """`[1, Q, L]`."""
        if self.soft is not None:
            return self.soft
        read = question_tokens(self.captioner.tokens, [clean_question(question)], self.features.device)
        return self.captioner.model.soft_prompt(features=self.features, question=read)
