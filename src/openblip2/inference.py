"""Trained runs in people's hands: pictures and sentences in, numbers and sentences out.

Pictures are paths, PIL images or arrays (see `data/images.py`); everything below this module works on tensors.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from openblip2.config import RunSettings, from_dict
from openblip2.data.images import Picture, to_pixels
from openblip2.data.text import MAX_WORDS, clean_caption, clean_question
from openblip2.data.tokens import QFormerTokens
from openblip2.errors import UserError
from openblip2.evaluate.retrieval import similarities
from openblip2.model.build import build_stage1, build_stage2, build_vision
from openblip2.model.language import Decoding
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2
from openblip2.train.checkpoint import load_trained, read_config, read_whitening
from openblip2.train.hardware import compute_dtype, computing

CAPTION = Decoding()  # the paper's: beam 5, at most 30 new tokens
ANSWER = Decoding(max_new_tokens=10, length_penalty=-1.0)  # the paper's for VQA: beam 5, short
GROUP = 32  # pictures at once


def load(run: str | Path, device: str | None = None) -> "Matcher | Captioner":
    """A finished run: a `Matcher` from stage 1, a `Captioner` from stage 2.

    Args:
        run: the folder that training wrote. device: "cpu", "cuda", ...; None = a GPU if there is one.

    Raises:
        UserError: not a run, an unfinished one, or weights that do not fit its settings.
    """
    run = Path(run)
    saved = read_config(run)
    settings, sizes = from_dict(saved["settings"]), saved["sizes"]
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = compute_dtype(place, settings.train.precision)
    vision = build_vision(settings, dtype)
    if settings.vision.whiten:
        vision.whitening = read_whitening(run)
    if settings.stage == "stage2":
        captioner = build_stage2(settings, vision, sizes, dtype)
        load_trained(captioner, run / "model.safetensors")
        return Captioner(captioner.to(place).eval(), settings)
    matcher = build_stage1(settings, vision, sizes)
    load_trained(matcher, run / "model.safetensors")
    return Matcher(matcher.to(place).eval(), _load_tokens(run, settings), settings)


class Matcher:
    """A stage-1 run: how well texts fit pictures."""

    def __init__(self, model: Stage1, tokens: QFormerTokens, settings: RunSettings) -> None:
        self.model, self.tokens, self.settings = model, tokens, settings

    def similarity(self, images: Sequence[Picture], texts: Sequence[str]) -> Tensor:
        """The best query's cosine for N pictures and M texts: `[N, M]`, in [-1, 1].

        Raises:
            UserError: a picture that cannot be opened, an empty text, or one longer than the run's text limit.
        """
        tokens, valid = (t.to(self.model.temperature.device) for t in self._tokenise(texts))
        with torch.inference_mode(), computing(self.model, self.settings.train.precision):
            rows = [similarities(self.model, part, tokens, valid) for part in _features(self.model, images)]
        return torch.cat(rows).float().cpu()

    def match(self, images: Sequence[Picture], texts: Sequence[str]) -> Tensor:
        """The probability, by the image-text matching head, that text n belongs to picture n: `[N]`.

        Raises:
            UserError: as `similarity`; or not as many texts as pictures.
        """
        _require_pairs(images, texts, "texts")
        tokens, valid = (t.to(self.model.temperature.device) for t in self._tokenise(texts))
        found, done = [], 0
        with torch.inference_mode(), computing(self.model, self.settings.train.precision):
            for part in _features(self.model, images):
                rows = slice(done, done + len(part))
                logits = self.model.match(self.model.qformer.look(part), tokens[rows], valid[rows])
                found.append(logits.float().softmax(dim=1)[:, 1])
                done += len(part)
        return torch.cat(found).cpu()

    def _tokenise(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        cleaned = _clean(texts, clean_caption)
        for n in self.tokens.too_long(cleaned):
            raise UserError(f"text {texts[n][:40]!r}... is longer than the {self.tokens.longest} tokens of this run")
        return self.tokens(cleaned)


class Captioner:
    """A stage-2 run: what pictures show, and answers about them, in the language model's words."""

    def __init__(self, model: Stage2, settings: RunSettings) -> None:
        self.model, self.settings = model, settings

    def caption(self, images: Sequence[Picture], prompt: str | None = None, decoding: Decoding = CAPTION) -> list[str]:
        """One caption for each picture. `prompt`: text behind the soft prompt; None = the one of training.

        Raises:
            UserError: a picture that cannot be opened.
        """
        prompt = self.settings.language.prompts[0] if prompt is None else prompt
        return self.generate(images, [prompt] * len(images), decoding)

    def answer(self, images: Sequence[Picture], questions: Sequence[str], decoding: Decoding = ANSWER) -> list[str]:
        """The answer to question n about picture n, asked in the run's own form (`language.question`).

        Raises:
            UserError: a picture that cannot be opened, an empty question, one of more than 50 words, or not as
                many as pictures.
        """
        _require_pairs(images, questions, "questions")
        asked = _clean(questions, clean_question)
        form = self.settings.language.question
        return self.generate(images, [form.replace("{}", question) for question in asked], decoding)

    def generate(self, images: Sequence[Picture], prompts: Sequence[str], decoding: Decoding) -> list[str]:
        """The language model's text for picture n behind prompt n."""
        found: list[str] = []
        with torch.inference_mode(), computing(self.model, self.settings.train.precision):
            for features in _features(self.model, images):
                part = prompts[len(found) : len(found) + len(features)]
                found += self.model.generate(part, decoding, features=features)
        return found


def greedy(decoding: Decoding) -> Decoding:
    """The same, without beams."""
    return replace(decoding, beams=1)


def _load_tokens(run: Path, settings: RunSettings) -> QFormerTokens:
    from transformers import AutoTokenizer

    try:
        return QFormerTokens(AutoTokenizer.from_pretrained(run / "tokenizer"), settings.data.max_tokens)
    except (OSError, ValueError) as error:
        raise UserError(f"{run / 'tokenizer'}: no tokenizer; a stage-1 run keeps the one it trained with") from error


def _features(model: Stage1 | Stage2, images: Sequence[Picture]) -> Iterator[Tensor]:
    assert model.vision is not None
    device = next(model.parameters()).device
    for start in range(0, len(images), GROUP):
        yield model.vision(to_pixels(images[start : start + GROUP], model.vision.image_size).to(device))


def _clean(texts: Sequence[str], clean: Callable[[str, int], str]) -> list[str]:
    """Texts as the models were trained on them, whole."""
    found = [clean(text, len(text)) for text in texts]
    for text, cleaned in zip(texts, found, strict=True):
        if not cleaned:
            raise UserError(f"an empty text, {text[:40]!r}: give a sentence in words")
        if (count := len(cleaned.split())) > MAX_WORDS:
            raise UserError(f"text {text[:40]!r}... has {count} words: at most {MAX_WORDS}")
    return found


def _require_pairs(images: Sequence[Picture], texts: Sequence[str], what: str) -> None:
    if len(images) != len(texts):
        raise UserError(f"{len(images)} pictures and {len(texts)} {what}: give one of the {what} for each picture")
