"""Dialogues about a picture: a question is asked after the earlier ones and their answers (paper, 4.1 and figure 4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from openblip2.data.images import Picture
from openblip2.data.text import question_tokens
from openblip2.errors import UserError
from openblip2.hardware import computing
from openblip2.inference.captioner import CHAT, Captioner
from openblip2.inference.inputs import features_of
from openblip2.model.language import Decoding
from openblip2.model.template import dialogue
from openblip2.model.token_rows import context_of, require_room, room_for_prompt


class DialoguePrompt:
    """Writes the prompts of a dialogue for a language model, with as many turns as fit.

    Args:
        question: template of a question, with `{}` for its words ("{}": the words alone); None = the run's
            `language.question`.
        context: maximum number of tokens that the language model reads and writes, including the Q soft tokens; None =
            the language model's own limit, which is the maximum.

    Raises:
        UserError: `question` has no `{}`, the run's template has no `{prompt}`, or the context is larger than that of
            the language model.
    """

    def __init__(self, captioner: Captioner, question: str | None = None, context: int | None = None) -> None:
        self.language, settings = captioner.model.language, captioner.settings.language
        self.queries = captioner.model.tokens
        self.question = settings.question if question is None else question
        if "{}" not in self.question:
            raise UserError(f"question {self.question!r}: it needs {{}} for the question text")
        if "{prompt}" not in self.language.template:
            raise UserError(f"template {settings.template!r}: it needs {{prompt}} for the question text")
        limit = context_of(self.language)
        if context is not None and limit is not None and context > limit:
            raise UserError(f"context {context}: this language model has a context of {limit} tokens")
        self.context = limit if context is None else context

    def write(self, turns: Sequence[tuple[str, str]], question: str, longest: int) -> str:
        """The text for the template's `{prompt}`: as many of the latest turns as fit, and the question.

        Args:
            turns: earlier questions and their answers.
            longest: maximum number of new tokens in the answer.

        Raises:
            UserError: an empty question, or one that is too long even without turns.
        """
        question = question.strip()
        if not question:
            raise UserError("an empty question: ask something in words")
        room = room_for_prompt(self.language, self.context, self.queries, longest)
        prompt = self._write(question)
        require_room(self.language, prompt, self.queries, longest, self.context)
        for start in reversed(range(len(turns))):
            longer = self._write(question, turns[start:])
            if room is not None and self.language.length(longer) > room:
                break
            prompt = longer
        return prompt

    def _write(self, question: str, turns: Sequence[tuple[str, str]] = ()) -> str:
        return dialogue(turns, question, self.question, self.language.template, self.language.tokenizer)


class Chat:
    """A dialogue about one picture, which is encoded once, when the chat is created.

    The language model reads questions as they are written, whereas `Captioner.answer` cleans them, as the authors do
    for VQA. A connector that reads questions reads only the current one, without earlier turns: cleaned, or as written
    for InstructBLIP.

    Args:
        decoding: how answers are generated.
        question, context: see `DialoguePrompt`.

    Attributes:
        turns: the questions and their answers so far.

    Raises:
        UserError: as for `DialoguePrompt`; or the picture cannot be opened.
    """

    def __init__(
        self,
        captioner: Captioner,
        image: Picture,
        decoding: Decoding = CHAT,
        question: str | None = None,
        context: int | None = None,
    ) -> None:
        self.dialogue = DialoguePrompt(captioner, question, context)
        self.captioner, self.decoding = captioner, decoding
        self.turns: list[tuple[str, str]] = []
        with torch.inference_mode(), computing(captioner.model, captioner.settings.train.precision):
            (self.features,) = features_of(captioner.model, [image])  # [1, P, V]
            self.soft = captioner.model.soft_prompt(features=self.features) if captioner.tokens is None else None

    def ask(self, question: str) -> str:
        """Answers a question, and appends the question and the answer to `turns`.

        Raises:
            UserError: an empty question, or one that is too long even without turns; `turns` is then unchanged.
        """
        prompt, model = self.prompt(question), self.captioner.model
        with torch.inference_mode(), computing(model, self.captioner.settings.train.precision):
            (answer,) = model.language.generate(self._soft_prompt(question), [prompt], self.decoding)
        self.turns.append((question.strip(), answer))
        return answer

    def prompt(self, question: str) -> str:
        """The prompt for a new question; see `DialoguePrompt.write`."""
        return self.dialogue.write(self.turns, question, self.decoding.max_new_tokens)

    def _soft_prompt(self, question: str) -> Tensor:
        """The soft prompt for a question, `[1, Q, L]`."""
        if self.soft is not None:
            return self.soft
        _, asked = self.captioner.read_questions([question], self.dialogue.question)
        tokens = question_tokens(self.captioner.tokens, asked, self.features.device)
        return self.captioner.model.soft_prompt(features=self.features, question=tokens)
