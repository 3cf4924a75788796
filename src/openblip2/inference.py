"""Trained runs in people's hands: pictures and sentences in, numbers and sentences out.

Pictures are paths, PIL images or arrays (see `data/images.py`); everything below this module works on tensors.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openblip2.config import RunSettings, change
from openblip2.data.images import Picture
from openblip2.data.text import clean_caption, clean_question
from openblip2.data.tokens import QFormerTokens
from openblip2.errors import UserError
from openblip2.evaluate.answering import question_tokens
from openblip2.evaluate.retrieval import rerank, similarities
from openblip2.inputs import GROUP, clean_texts, features_of, require_pairs, same_pictures
from openblip2.model.language import Decoding, LanguageModel
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2
from openblip2.model.vision import Vision
from openblip2.pretrained import Pretrained
from openblip2.train.hardware import computing
from openblip2.weights.assemble import assemble, find_tokenizer
from openblip2.weights.checkpoint import Parts, carried
from openblip2.weights.source import read_checkpoint

CAPTION = Decoding()  # the paper's: beam 5, at most 30 new tokens
ANSWER = Decoding(max_new_tokens=10, length_penalty=-1.0)  # the paper's for VQA: beam 5, short


def load(
    source: str | Path,
    device: str | None = None,
    *,
    precision: str | None = None,
    heads: int | None = None,
    vision: str | Vision | None = None,
    language: str | LanguageModel | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    language_weights: str | None = None,
) -> "Matcher | Captioner":
    """A trained model: a `Matcher` from stage 1, a `Captioner` from stage 2.

    Args:
        source: a run of ours, a LAVIS `.pth`, or transformers' BLIP-2: a path, or a name on the hub.
        device: "cpu", "cuda", ...; None = a GPU if there is one.
        precision: "auto", "bf16" or "fp32" instead of the run's own (`train.precision`).
        heads: attention heads of the Q-Former, which no LAVIS file tells; None = BERT's 12.
        vision, language, tokenizer: the image encoder, the language model and the Q-Former's tokenizer, by name or
            ready, instead of those that the source names.
        revision: branch, tag or commit on the hub.
        language_weights: as the setting `language.weights`, "int8" for one, instead of the source's own.

    Raises:
        UserError: none of these, an unfinished or damaged one, or keys, sizes or parts that do not fit.
    """
    parts = Parts(heads, vision, language, tokenizer)
    checkpoint = read_checkpoint(source, parts, revision)
    if language_weights is not None:
        if checkpoint.settings.stage == "stage1" or isinstance(language, LanguageModel):
            raise UserError("language_weights is for a language model that is yet to be loaded: there is none here")
        settings = change(checkpoint.settings, {"language.weights": language_weights})
        checkpoint = replace(checkpoint, settings=settings)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, settings = assemble(checkpoint, place, precision or checkpoint.settings.train.precision)
    reads = settings.stage == "stage1" or settings.qformer.reads_question
    tokens = QFormerTokens(find_tokenizer(checkpoint), settings.data.max_tokens) if reads else None
    if isinstance(model, Stage2):
        return Captioner(model, settings, carried(checkpoint), checkpoint.measured, tokens)
    assert tokens is not None
    return Matcher(model, tokens, settings, carried(checkpoint), checkpoint.measured)


class Matcher(Pretrained):
    """A trained stage 1: how well texts fit pictures."""

    model: Stage1

    def __init__(
        self,
        model: Stage1,
        tokens: QFormerTokens,
        settings: RunSettings,
        carries: frozenset[str] = frozenset(),
        measured: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, settings, carries, measured, tokens.tokenizer)
        self.tokens = tokens

    def similarity(self, images: Sequence[Picture], texts: Sequence[str]) -> Tensor:
        """The best query's cosine for N pictures and M texts: `[N, M]`, in [-1, 1].

        Raises:
            UserError: a picture that cannot be opened, an empty text, or one longer than the run's text limit.
        """
        tokens, valid = (t.to(self.model.temperature.device) for t in self._tokenise(texts))
        with torch.inference_mode(), computing(self.model, self.settings.train.precision):
            rows = [similarities(self.model, part, tokens, valid) for part in features_of(self.model, images)]
        return torch.cat(rows).float().cpu()

    def match(self, images: Sequence[Picture], texts: Sequence[str]) -> Tensor:
        """The probability, by the image-text matching head, that text n belongs to picture n: `[N]`.

        Raises:
            UserError: as `similarity`; or not as many texts as pictures.
        """
        require_pairs(images, texts, "texts")
        tokens, valid = (t.to(self.model.temperature.device) for t in self._tokenise(texts))
        found, done = [], 0
        with torch.inference_mode(), computing(self.model, self.settings.train.precision):
            for part in features_of(self.model, images):
                rows = slice(done, done + len(part))
                logits = self.model.match(self.model.qformer.look(part), tokens[rows], valid[rows])
                found.append(logits.float().softmax(dim=1)[:, 1])
                done += len(part)
        return torch.cat(found).cpu()

    def rerank(self, images: Sequence[Picture], texts: Sequence[str], best: int = 128) -> tuple[Tensor, Tensor]:
        """Scores of N pictures and M texts that rank as in the paper's retrieval: two `[N, M]`.

        By the first each picture finds its texts, by the second each text its pictures: the `best` by `similarity`
        have the matching head's log-odds, and all others stand behind them. All pictures' features are in memory.

        Raises:
            UserError: as `similarity`.
        """
        tokens, valid = (t.to(self.model.temperature.device) for t in self._tokenise(texts))
        with torch.inference_mode(), computing(self.model, self.settings.train.precision):
            features = torch.cat(list(features_of(self.model, images)))
            scores = similarities(self.model, features, tokens, valid)
            by_image, by_text = rerank(self.model, features, tokens, valid, scores, best)
        return by_image.float().cpu(), by_text.float().cpu()

    def _tokenise(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        cleaned = clean_texts(texts, clean_caption)
        for n in self.tokens.too_long(cleaned):
            raise UserError(f"text {texts[n][:40]!r}... is longer than the {self.tokens.longest} tokens of this run")
        return self.tokens(cleaned)


class Captioner(Pretrained):
    """A trained stage 2: what pictures show, and answers about them, in the language model's words."""

    model: Stage2

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

    def caption(self, images: Sequence[Picture], prompt: str | None = None, decoding: Decoding = CAPTION) -> list[str]:
        """One caption for each picture. `prompt`: text behind the soft prompt; None = the one of training.

        Raises:
            UserError: a picture that cannot be opened.
        """
        prompt = self.settings.language.prompts[0] if prompt is None else prompt
        return self.generate(images, [prompt] * len(images), decoding)

    def answer(self, images: Sequence[Picture], questions: Sequence[str], decoding: Decoding = ANSWER) -> list[str]:
        """The answer to question n about picture n, asked in the run's own form (`language.question`).

        A picture that repeats is looked at once, as in `generate`.

        Raises:
            UserError: a picture that cannot be opened, an empty question, one of more than 50 words, or not as
                many as pictures.
        """
        require_pairs(images, questions, "questions")
        asked = clean_texts(questions, clean_question)
        form = self.settings.language.question
        prompts = [form.replace("{}", question) for question in asked]
        return self.generate(images, prompts, decoding, asked if self.tokens else None)

    def ask(self, image: Picture, questions: Sequence[str], decoding: Decoding = ANSWER) -> list[str]:
        """Answers to many questions about one picture, which is looked at once.

        Raises:
            UserError: as `answer`.
        """
        return self.answer([image] * len(questions), questions, decoding)

    def soft_prompt(self, images: Sequence[Picture], questions: Sequence[str] | None = None) -> Tensor:
        """What the language model sees of N pictures, the projected queries: `[N, Q, L]`, on the CPU.

        `questions`: one for each picture, where the Q-Former reads them.
        """
        self._require_questions(images, questions)
        rows: list[Tensor] = []
        with torch.inference_mode(), computing(self.model, self.settings.train.precision):
            for n, part in enumerate(features_of(self.model, images)):
                read = self._read(questions[n * GROUP : (n + 1) * GROUP] if questions else None)
                rows.append(self.model.soft_prompt(features=part, question=read).float().cpu())
        return torch.cat(rows)

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
    ) -> list[str]:
        """The language model's text for picture n behind prompt n.

        A picture that repeats, by its path or as the same object of a list, goes through the encoder and the Q-Former
        once, and where prompts begin alike the language model reads it once, too. Prompts of like length go together.

        Args:
            questions: one for each picture, where the Q-Former reads them: then a picture that repeats goes through
                the encoder once in each group of 32, and through the Q-Former with each question.

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
            for start in range(0, len(order), GROUP):
                rows = order[start : start + GROUP]
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
            for start in range(0, len(order), GROUP):
                rows = order[start : start + GROUP]
                here = {names[n]: n for n in rows}
                features = torch.cat(list(features_of(self.model, [images[n] for n in here.values()])))
                about = [list(here).index(names[n]) for n in rows]
                read = self._read([questions[n] for n in rows])
                soft = self.model.soft_prompt(features=features[about], question=read)
                texts = self.model.language.generate(soft, [prompts[n] for n in rows], decoding)
                for n, text in zip(rows, texts, strict=True):
                    found[n] = text
        return found

    def _read(self, questions: Sequence[str] | None) -> tuple[Tensor, Tensor] | None:
        return question_tokens(self.tokens, questions, self.model.projection.weight.device)

    def _require_questions(self, images: Sequence[Picture], questions: Sequence[str] | None) -> None:
        if (questions is None) != (self.tokens is None):
            raise UserError(
                "this run answers questions, which its Q-Former reads: ask one (`answer`)"
                if questions is None
                else "this run's Q-Former reads no questions: give them in the prompts alone"
            )
        if questions is not None:
            require_pairs(images, questions, "questions")


def greedy(decoding: Decoding) -> Decoding:
    """The same, without beams."""
    return replace(decoding, beams=1)
