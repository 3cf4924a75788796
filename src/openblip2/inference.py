"""Trained runs in people's hands: pictures and sentences in, numbers and sentences out.

Pictures are paths, PIL images or arrays (see `data/images.py`); everything below this module works on tensors.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from torch import Tensor

from openblip2.config import RunSettings
from openblip2.data.images import Picture, to_pixels
from openblip2.data.text import MAX_WORDS, clean_caption, clean_question
from openblip2.data.tokens import QFormerTokens
from openblip2.errors import UserError, one_line
from openblip2.evaluate.retrieval import similarities
from openblip2.model.language import Decoding, LanguageModel
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2
from openblip2.model.vision import Vision
from openblip2.train.checkpoint import kept_parameters
from openblip2.train.hardware import computing
from openblip2.weights.assemble import assemble, find_tokenizer
from openblip2.weights.card import model_card, usage
from openblip2.weights.checkpoint import Parts, carried
from openblip2.weights.run import fresh_folder, write_run
from openblip2.weights.source import read_checkpoint

CAPTION = Decoding()  # the paper's: beam 5, at most 30 new tokens
ANSWER = Decoding(max_new_tokens=10, length_penalty=-1.0)  # the paper's for VQA: beam 5, short
GROUP = 32  # pictures at once


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

    Raises:
        UserError: none of these, an unfinished or damaged one, or keys, sizes or parts that do not fit.
    """
    parts = Parts(heads, vision, language, tokenizer)
    checkpoint = read_checkpoint(source, parts, revision)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, settings = assemble(checkpoint, place, precision or checkpoint.settings.train.precision)
    if isinstance(model, Stage2):
        return Captioner(model, settings, carried(checkpoint), checkpoint.measured)
    tokens = QFormerTokens(find_tokenizer(checkpoint), settings.data.max_tokens)
    return Matcher(model, tokens, settings, carried(checkpoint), checkpoint.measured)


class Pretrained:
    """What both kinds of trained model share: they are saved, loaded and published as the ecosystem expects.

    Args:
        carries: frozen parts ("vision", "language") that no name leads to: saving writes them along.
        measured: what the last validation found, for the model card.
    """

    def __init__(
        self,
        model: Stage1 | Stage2,
        settings: RunSettings,
        carries: frozenset[str] = frozenset(),
        measured: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.settings, self.carries, self.measured = model, settings, carries, measured or {}

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str | None = None, **options: Any) -> Self:
        """`load`, which see for the options, for those who know what it will give.

        Raises:
            UserError: as `load`; or it is the other kind.
        """
        found = load(source, device, **options)
        if not isinstance(found, cls):
            raise UserError(
                f"{source} is a {type(found).__name__}, not a {cls.__name__}: openblip2.load tells them apart"
            )
        return found

    def save_pretrained(self, folder: str | Path, merge: bool = False) -> None:
        """Writes a run of ours with a model card: the trained parts, and by name the frozen ones.

        Args:
            folder: a new one. merge: write the frozen parts along, too. Frozen parts are written in the precision in
                which they were loaded; `convert` copies them as they lie in their files.

        Raises:
            UserError: the folder is there already, or a quantised language model would have to be written.
        """
        carries = self.carries | ({"vision", "language"} if merge else set())
        self._save(Path(folder), Path(folder).name, carries)

    def push_to_hub(self, repo: str, private: bool = False, token: str | None = None, merge: bool = False) -> str:
        """Publishes what `save_pretrained` writes as a repository of the hub; returns its address.

        Frozen parts that were loaded from a folder of this machine are written along.

        Raises:
            UserError: as `save_pretrained`; or the hub refuses.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        here = {part for part in ("vision", "language") if Path(getattr(self.settings, part).name).exists()}
        carries = self.carries | here | ({"vision", "language"} if merge else set())
        with TemporaryDirectory() as scratch:
            folder = Path(scratch) / "run"
            self._save(folder, repo, carries)
            try:
                hub = HfApi(token=token)
                address = str(hub.create_repo(repo, private=private, exist_ok=True))
                hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="openblip2 run")
            except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
                raise UserError(f"{repo} cannot be published: {one_line(error)}") from error
        return address

    def _save(self, folder: Path, name: str, carries: frozenset[str]) -> None:
        model, stage2 = self.model, isinstance(self.model, Stage2)
        carries = carries if stage2 else carries - {"language"}
        if "language" in carries and self.settings.language.weights in ("int8", "int4"):
            raise UserError(
                f"a language model in {self.settings.language.weights} is not written: load with language.weights=auto"
            )
        trained = kept_parameters(model)
        count = sum(p.numel() for p in trained.values())
        assert model.vision is not None
        with fresh_folder(folder) as draft:
            write_run(
                draft,
                self.settings,
                model.qformer.sizes,
                trained,
                model.vision,
                model.language if isinstance(model, Stage2) else None,
                self.tokens.tokenizer if isinstance(self, Matcher) else None,
                carries,
                model.vision.whitening,
            )
            card = model_card(self.settings, count, self.measured, usage(self.settings.stage, name), carries=carries)
            (draft / "README.md").write_text(card, encoding="utf-8")


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
        super().__init__(model, settings, carries, measured)
        self.tokens = tokens

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


class Captioner(Pretrained):
    """A trained stage 2: what pictures show, and answers about them, in the language model's words."""

    model: Stage2

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

    def soft_prompt(self, images: Sequence[Picture]) -> Tensor:
        """What the language model sees of N pictures, the projected queries: `[N, Q, L]`, on the CPU."""
        with torch.inference_mode(), computing(self.model, self.settings.train.precision):
            rows = [self.model.soft_prompt(features=part).float().cpu() for part in _features(self.model, images)]
        return torch.cat(rows)

    def embed(self, images: Sequence[Picture], prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """All that the language model reads for picture n and prompt n: `[N, T, L]` and mask `[N, T]`, on the CPU.

        What another program needs to write the text with the language model alone.
        """
        _require_pairs(images, prompts, "prompts")
        soft = self.soft_prompt(images).to(next(self.model.parameters()).device)
        with torch.inference_mode():
            embeds, mask = self.model.language.embed(soft, prompts)
        return embeds.float().cpu(), mask.cpu()

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
