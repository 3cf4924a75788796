"""`Captioner`: a trained stage-2 model that describes pictures and answers questions about them.

Pictures are paths, PIL images or arrays (see `data/images.py`); lower-level modules work on tensors.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from openblip2.compat import log
from openblip2.data.images import Picture
from openblip2.data.text import question_tokens
from openblip2.errors import UserError
from openblip2.inference.inputs import (
    clean_questions,
    each_readable,
    require_pairs,
    require_readable,
    warn_unknown,
)
from openblip2.inference.pretrained import Compute, Pretrained, QueryFeatures
from openblip2.inference.writing import Written, write_texts
from openblip2.model.language import Decoding
from openblip2.model.likelihood import text_logprobs
from openblip2.model.stage2 import Stage2

CAPTION = Decoding()  # as in the paper: beam 5, at most 30 new tokens
ANSWER = Decoding(max_new_tokens=10, length_penalty=-1.0)  # as in the paper for VQA: beam 5, short answers
CHAT = replace(ANSWER, max_new_tokens=30)  # these three are the defaults of the command line, Python and the server
SAMPLED = Decoding(beams=1, sample=True, seed=0)  # for several captions per picture
ROUNDS = 5  # maximum number of sampling rounds to get enough different captions of a picture


class Captioner(Pretrained):
    """A trained stage-2 model: the language model describes pictures and answers questions about them."""

    model: Stage2
    model_class = Stage2

    def caption(
        self, images: Sequence[Picture], prompt: str | None = None, decoding: Decoding = CAPTION
    ) -> list[str | None]:
        """Writes one caption for each picture; None, with a warning, for a picture that cannot be opened.

        Args:
            prompt: Text after the soft prompt, which InstructBLIP's Q-Former also reads; None = the prompt used in
                training.

        Raises:
            UserError: a prompt that is too long, or a run whose Q-Former reads questions.
        """
        prompt = self._prompt(prompt)
        return each_readable(images, lambda some, numbers: self.generate(some, [prompt] * len(some), decoding))

    def captions(
        self,
        images: Sequence[Picture],
        count: int,
        prompt: str | None = None,
        decoding: Decoding = SAMPLED,
        score: bool = False,
    ) -> list[list[Written] | None]:
        """Generates different captions for each picture, in the order of sampling; None as in `caption`.

        Args:
            count: number of captions per picture. If sampling gives fewer different ones, a warning is logged.
            prompt: as in `caption`.
            decoding: must sample if `count` is above 1. Sample n uses the seed `decoding.seed + n`, so it depends
                neither on the other pictures nor on `count`; repeated captions are left out.
            score: whether to compute the log-probabilities of the captions, too.
        """
        if count > 1 and not decoding.sample:
            raise UserError(f"{count} captions of a picture need sampling: use Decoding(sample=True, beams=1)")
        prompt, precision = self._prompt(prompt), self.settings.train.precision
        self.qformer_texts([prompt])

        def draw(some: Sequence[Picture], numbers: Sequence[int]) -> list[list[Written]]:
            texts = [dict[str, Written]() for _ in some]
            for first in range(0, ROUNDS * count, count):
                short = [n for n, own in enumerate(texts) if len(own) < count]
                seeds = [None if decoding.seed is None else decoding.seed + first + n for n in range(count)]
                hows, prompts = [replace(decoding, seed=seed) for seed in seeds], [prompt] * len(short)
                again, read = [some[n] for n in short], None if self.tokens is None else prompts
                drawn = write_texts(self.model, precision, again, prompts, hows, self.tokens, read, score=score)
                for n, own in zip(short, drawn, strict=True):
                    for one in own:
                        texts[n].setdefault(one.text, one)
            return [list(own.values())[:count] for own in texts]

        found = each_readable(images, draw)
        if few := sum(own is not None and len(own) < count for own in found):
            few = f"{few} of {len(found)} pictures have"
            log.warning("%s fewer than %d different captions in %d draws", few, count, ROUNDS * count)
        return found

    def log_likelihood(self, images: Sequence[Picture], texts: Sequence[str], prompt: str | None = None) -> Tensor:
        """The log-probability of caption n given picture n, including the end token: `[N]`, in nats.

        It is NaN, with a warning, for a picture that cannot be opened.

        Args:
            texts: N captions, which are not cleaned; training captions are in lower case.
            prompt: as in `caption`.
        """
        require_pairs(images, texts, "texts")
        prompt = self._prompt(prompt)
        asked = self.qformer_texts([prompt] * len(images))

        def score(features: Tensor, numbers: Sequence[int]) -> Tensor:
            soft = self.model.soft_prompt(features=features, question=self._read(asked, numbers))
            return text_logprobs(self.model.language, soft, prompt, [texts[n] for n in numbers])

        return self._rows(images, score)

    def choose(self, images: Sequence[Picture], questions: Sequence[str], answers: Sequence[str]) -> Tensor:
        """The probability of each of M answers to question n about picture n, normalised over them: `[N, M]`.

        It is the probability of the whole answer, divided by the sum over all M answers. The row of a picture that
        cannot be opened is NaN, with a warning.

        Args:
            questions: N questions, asked as in `answer`.
            answers: M answers, for example "yes" and "no"; the same for all questions.

        Raises:
            UserError: fewer than two different answers, or an empty one; or as for `answer`.
        """
        if len(set(answers)) < max(2, len(answers)) or not all(map(str.strip, answers)):
            raise UserError(f"answers {','.join(answers)[:80]!r}: give two or more different ones, for example yes,no")
        require_pairs(images, questions, "questions")
        prompts, asked = self.read_questions(questions)

        def score(features: Tensor, numbers: Sequence[int]) -> Tensor:
            read = self._read(asked, numbers)
            soft, language = self.model.soft_prompt(features=features, question=read), self.model.language
            rows = [text_logprobs(language, soft[k, None], prompts[n], answers) for k, n in enumerate(numbers)]
            return torch.stack(rows).softmax(dim=1)

        return self._rows(images, score, len(answers))

    def answer(
        self, images: Sequence[Picture], questions: Sequence[str], decoding: Decoding = ANSWER
    ) -> list[str | None]:
        """Answers question n about picture n, with the run's template for questions (`language.question`).

        A repeated picture is encoded once, as in `generate`. The answer is None, with a warning, for a picture that
        cannot be opened.

        Raises:
            UserError: as for `read_questions`; or the numbers of pictures and questions differ.
        """
        require_pairs(images, questions, "questions")
        prompts, asked = self.read_questions(questions)

        def write(some: Sequence[Picture], numbers: Sequence[int]) -> list[str]:
            read = None if asked is None else [asked[n] for n in numbers]
            return self.generate(some, [prompts[n] for n in numbers], decoding, read)

        return each_readable(images, write)

    def read_questions(self, questions: Sequence[str], form: str | None = None) -> tuple[list[str], list[str] | None]:
        """Returns prompts for the questions, and the texts that the Q-Former reads, if any, for `generate`.

        Questions are cleaned as in training for VQA. For InstructBLIP, the Q-Former reads the prompts, as written.

        Args:
            form: template of a question, with `{}` for its words; None = the run's `language.question`.

        Raises:
            UserError: a question is empty or has more than 50 words, or a prompt is too long for the Q-Former.
        """
        asked = clean_questions(questions, self.settings.reads_prompts)
        tokenizer = self.tokens.tokenizer if self.tokens else self.model.language.tokenizer
        warn_unknown(tokenizer, list(dict.fromkeys(asked)))
        form = self.settings.language.question if form is None else form
        prompts = [form.replace("{}", question) for question in asked]
        return prompts, self.qformer_texts(prompts, asked if self.tokens and not self.settings.reads_prompts else None)

    def qformer_texts(self, prompts: Sequence[str], questions: Sequence[str] | None = None) -> list[str] | None:
        """The texts that the Q-Former reads with each picture: questions, or prompts for InstructBLIP; None = no texts.

        Raises:
            UserError: questions are missing, are given to a Q-Former that reads none, or a prompt is too long.
        """
        if questions is None and self.settings.reads_prompts:
            questions = prompts
        if (questions is None) != (self.tokens is None):
            raise UserError(
                "this run's Q-Former reads questions: give one with each picture, as for `answer`"
                if questions is None
                else f"this run's {self.settings.connector.name} cannot read questions: give them only in the prompts"
            )
        if questions is not None and self.tokens is not None:
            require_pairs(prompts, questions, "questions")
            if self.settings.reads_prompts:
                require_readable(self.tokens, questions)
        return None if questions is None else list(questions)

    def ask(self, image: Picture, questions: Sequence[str], decoding: Decoding = ANSWER) -> list[str]:
        """Answers several questions about one picture, which is encoded once.

        Raises:
            UserError: as for `answer`; or the picture cannot be opened.
        """
        prompts, asked = self.read_questions(questions)
        return self.generate([image] * len(questions), prompts, decoding, asked)

    def features(self, images: Sequence[Picture], texts: Sequence[str] | None = None) -> QueryFeatures:
        """Query outputs for N pictures. The rows of a picture that cannot be opened are NaN, with a warning.

        Args:
            texts: one question per picture, if the Q-Former reads questions; for InstructBLIP, one prompt per picture,
                or None = the prompt for captions.

        Returns:
            `queries [N, Q, D]` and, in `projected`, the soft prompt `[N, Q, L]`; on the CPU.
        """
        asked = None if texts is None else clean_questions(texts, self.settings.reads_prompts)
        query_output = self._query_output(len(images), asked)

        def read(features: Tensor, numbers: Sequence[int]) -> Tensor:
            queries = query_output(features, numbers)
            return torch.cat([queries.float(), self.model.projection(queries).float()], dim=2)

        sizes = self.model.connector.width, self.model.language.width
        return QueryFeatures(*self._rows(images, read, self.model.tokens, sum(sizes)).split(sizes, 2))

    def soft_prompt(self, images: Sequence[Picture], questions: Sequence[str] | None = None) -> Tensor:
        """The soft prompts of N pictures, that is, the projected query outputs: `[N, Q, L]`, on the CPU.

        `questions`: like `texts` of `features`, but they are not cleaned.
        """
        query_output = self._query_output(len(images), questions)

        def read(features: Tensor, numbers: Sequence[int]) -> Tensor:
            return self.model.projection(query_output(features, numbers))

        return self._computed(images, range(len(images)), read)

    def embed(
        self, images: Sequence[Picture], prompts: Sequence[str], questions: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The language model's input embeddings for picture n and prompt n, `[N, T, L]`, and mask `[N, T]`, on the CPU.

        Another program can generate text from them with the language model alone. `questions`: as in `generate`.
        """
        require_pairs(images, prompts, "prompts")
        soft = self.soft_prompt(images, self.qformer_texts(prompts, questions)).to(next(self.model.parameters()).device)
        with torch.inference_mode():
            embeds, mask = self.model.language.embed(soft, prompts)
        return embeds.float().cpu(), mask.cpu()

    def generate(
        self,
        images: Sequence[Picture],
        prompts: Sequence[str],
        decoding: Decoding,
        questions: Sequence[str] | None = None,
        at_once: int | None = None,
    ) -> list[str]:
        """Generates text for picture n after prompt n; see `writing.write_texts`.

        Args:
            questions: one for each picture, if the Q-Former reads questions; for InstructBLIP, None = the prompts.
            at_once: number of texts that are generated together; None = `inputs.group_of`.

        Raises:
            UserError: as for `write_texts`; or questions are missing, or are given to a Q-Former that reads none.
        """
        asked, precision = self.qformer_texts(prompts, questions), self.settings.train.precision
        found = write_texts(self.model, precision, images, prompts, [decoding], self.tokens, asked, at_once)
        return [text for ((text, _),) in found]

    def _query_output(self, count: int, questions: Sequence[str] | None) -> Compute:
        asked = self.qformer_texts([self._prompt(None)] * count, questions)
        return lambda features, numbers: self.model.query_output(features=features, question=self._read(asked, numbers))

    def _prompt(self, prompt: str | None) -> str:
        return self.settings.language.prompts[0] if prompt is None else prompt

    def _read(self, asked: Sequence[str] | None, numbers: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        questions = None if asked is None else [asked[n] for n in numbers]
        return question_tokens(self.tokens, questions, self.model.projection.weight.device)


def greedy(decoding: Decoding) -> Decoding:
    """The same settings without beam search."""
    return replace(decoding, beams=1)
