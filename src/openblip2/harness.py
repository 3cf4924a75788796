"""Evaluates a stage-2 run with lmms-eval: `lmms-eval --model openblip2 --model_args run=RUN --tasks ...`.

The harness finds the model through `manifest`, this package's entry point in the group `lmms_eval.models`. This is the
only module that cannot be imported without its extra, `lmms`, because it defines a subclass of a class of the harness.

Shapes: Q queries, L language model width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from lmms_eval.api.instance import GenerationResult  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from loguru import logger  # pyright: ignore[reportMissingImports]
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from openblip2.data.images import open_picture
from openblip2.data.text import clean_question
from openblip2.errors import UserError
from openblip2.hardware import computing
from openblip2.inference.captioner import Captioner
from openblip2.model.decoding import Decoding
from openblip2.model.language import EncoderDecoderLM
from openblip2.model.likelihood import likelihoods
from openblip2.model.template import dialogue
from openblip2.model.token_rows import context_of, room_for_prompt

GREEDY = Decoding(max_new_tokens=256, beams=1)  # for a task that sets no options
# Names that tasks use -> different names of the same fields of `Decoding`. `until` is applied to the generated text.
NAMES = {"num_beams": "beams", "do_sample": "sample"}


class Asked(NamedTuple):
    """A request: its text, the prompt with this text, and the image that it is about (None if there is none)."""

    words: str
    prompt: str
    picture: Image.Image | None


class OpenBlip2(lmms):
    """A run as a model for the harness, for tasks with at most one image per request.

    Args:
        run: a stage-2 run in any form that `openblip2.load` accepts.
        batch_size: number of requests that are processed at once.
        device, precision: see `openblip2.load`.
        question: template for a task's text, which replaces `{}` ("{}": the text as it is); None = the run's template
            (`language.question`).

    Raises:
        UserError: as `load`; or it is a stage-1 run, the batch size is not a number, or `question` has no `{}`.
    """

    # The harness passes image and text separately. It does not request likelihoods from models that take whole chats.
    is_simple = True

    def __init__(
        self,
        run: str,
        batch_size: int | str = 1,
        device: str | None = None,
        precision: str | None = None,
        question: str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size={batch_size}: give a number, 1 or more")
        self.batch_size = int(batch_size)
        self.captioner = Captioner.from_pretrained(str(run), device, precision=precision)
        self.language = self.captioner.model.language
        self.form = self.captioner.settings.language.question if question is None else question
        if "{}" not in self.form:
            raise UserError(f"question={self.form}: it must contain {{}}, which is replaced by a task's text")
        self.context, self.device = context_of(self.language), self.captioner.model.projection.weight.device
        self.ignored: set[str] = set()  # options of tasks that the log has already reported

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The text generated for each request, cut before any of the strings in its task's `until`.

        A request that the model cannot process (several images, a video, text that is too long) gets the answer "",
        which counts as wrong, and is reported in the log.

        Raises:
            UserError: the model can process none of the requests.
        """
        refused: list[UserError] = []
        found = [""] * len(requests)
        alike: dict[tuple[Decoding, tuple[str, ...]], list[int]] = {}
        for row, request in enumerate(requests):
            words, options, _, place, task, _ = request.args
            with _naming(task, place, refused):
                decoding = self._decoding(options)
                new = self._fitting(self._prompt(words), decoding.max_new_tokens)
                until = options.get("until") or ()
                until = (until,) if isinstance(until, str) else tuple(until)
                alike.setdefault((replace(decoding, max_new_tokens=new), until), []).append(row)
        bar = tqdm(total=len(requests), desc="openblip2", disable=self.rank != 0 or len(requests) == 1)
        for (decoding, until), rows in alike.items():
            for start in range(0, len(rows), self.batch_size):
                asked: dict[int, Asked] = {}
                part = rows[start : start + self.batch_size]
                for row in part:
                    words, _, look, place, task, split = requests[row].args
                    with _naming(task, place, refused):
                        asked[row] = self._ask(words, look(self.task_dict[task][split][place]))
                for row, text in zip(asked, self._write(list(asked.values()), decoding), strict=True):
                    found[row] = _cut(text, until)
                bar.update(len(part))
        bar.close()
        if requests and len(refused) == len(requests):
            raise UserError(f"this model can process none of {len(requests)} requests: {refused[0]}")
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Not supported, as in most adapters of the harness, because a round may contain several images."""
        raise UserError("this model does not support tasks with several rounds: remove them from --tasks")

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """The loss of each request's continuation, and whether greedy decoding would generate it.

        Despite the name, this is the mean negative log-likelihood per token, as in the harness's own adapters, because
        the harness takes the smallest value as the answer. Each pair is the text of a `GenerationResult`, because
        release 0.7.3 turns a plain pair into a string and cannot score it. Its `--use_cache` supports neither.

        Raises:
            UserError: the model cannot process a request.
        """
        found: list[Any] = []
        for (place, task, split), rows in groupby(requests, key=lambda request: request.args[3:6]):
            document = self.task_dict[task][split][place]
            for words, same in groupby(rows, key=lambda request: request.args[0]):
                group = [request.args for request in same]
                texts = [(text if isinstance(text, str) else text(document)).strip() for _, text, *_ in group]
                asked = self._ask(words, group[0][2](document))
                ends = max(len(self.language.tokenizer(text)["input_ids"]) for text in texts) + len(self.language.end)
                if self._fitting(asked.prompt, ends) < ends:
                    raise UserError(f"{task}, document {place}: its text is too long with its answers")
                with torch.inference_mode(), self._computing():
                    losses, likeliest = likelihoods(self.language, self._soft_prompt(asked), asked.prompt, texts)
                pairs: Any = zip(losses.tolist(), likeliest.tolist(), strict=True)
                found += [GenerationResult(text=pair) for pair in pairs]
        return found

    def clean(self) -> None:
        """Frees the model's memory, which the harness may need for a judge model."""
        del self.captioner, self.language
        super().clean()

    def _ask(self, words: str, seen: Sequence[Any] | None) -> Asked:
        pictures = [one for one in seen or () if one is not None]
        if len(pictures) > 1 or not all(isinstance(one, Image.Image) for one in pictures):
            kinds = ", ".join(type(one).__name__ for one in pictures[:3])
            raise UserError(f"it has {len(pictures)} inputs ({kinds}); this model takes one picture or none")
        plain = _plain(words)
        if self.captioner.settings.reads_prompts:
            self.captioner.qformer_texts([self.form.replace("{}", plain)])
        return Asked(plain, self._prompt(plain), open_picture(pictures[0]) if pictures else None)

    def _prompt(self, words: str) -> str:
        return dialogue([], _plain(words), self.form, self.language.template, self.language.tokenizer)

    def _read(self, asked: Asked) -> str:
        """The text of a request for a Q-Former that takes text as input."""
        as_written = self.captioner.settings.reads_prompts
        return self.form.replace("{}", asked.words) if as_written else clean_question(asked.words)

    def _write(self, asked: Sequence[Asked], decoding: Decoding) -> list[str]:
        """Generates one text for each request."""
        shown = [one for one in asked if one.picture is not None]
        others = [one.prompt for one in asked if one.picture is None]
        read = [self._read(one) for one in shown] if self.captioner.tokens else None
        pictures = [one.picture for one in shown if one.picture is not None]
        texts = iter(self.captioner.generate(pictures, [one.prompt for one in shown], decoding, read) if shown else ())
        with torch.inference_mode(), self._computing():
            soft = self._nothing().expand(len(others), -1, -1)
            plain = iter(self.language.generate(soft, others, decoding) if others else ())
        return [next(plain if one.picture is None else texts) for one in asked]

    def _soft_prompt(self, asked: Asked) -> Tensor:
        """The soft prompt `[1, Q, L]`, or `[1, 0, L]` if there is no image."""
        if asked.picture is None:
            return self._nothing()
        read = [self._read(asked)] if self.captioner.tokens else None
        return self.captioner.soft_prompt([asked.picture], read).to(self.device)

    def _nothing(self) -> Tensor:
        return torch.zeros(1, 0, self.language.width, device=self.device)

    def _computing(self) -> AbstractContextManager[None]:
        return computing(self.captioner.model, self.captioner.settings.train.precision)

    def _fitting(self, prompt: str, new: int) -> int:
        """How many of `new` tokens can be generated after a prompt, at least 1."""
        queries = self.captioner.model.tokens
        length, room = self.language.length(prompt), room_for_prompt(self.language, self.context, queries, 1)
        if room is None:
            return new
        if length > room:
            raise UserError(f"its text takes {length} tokens with the template, but only {room} fit")
        return new if isinstance(self.language, EncoderDecoderLM) else min(new, room + 1 - length)

    def _decoding(self, options: Mapping[str, Any]) -> Decoding:
        given = {NAMES.get(name, name): value for name, value in options.items() if value is not None}
        known = {field.name for field in fields(Decoding)}
        if ignored := given.keys() - known - {"until"} - self.ignored:
            logger.warning(f"generation_kwargs that this model ignores: {', '.join(sorted(ignored))}")
            self.ignored |= ignored
        # As in the harness's own adapters: temperature 0 means greedy, any other samples unless do_sample is False.
        heat = given.get("temperature")
        given["sample"] = bool(given.get("sample", heat)) and heat != 0
        unread = () if given["sample"] else ("temperature", "top_p")
        return replace(GREEDY, **{name: given[name] for name in given.keys() & known if name not in unread})


def manifest() -> Any:
    """The result that the harness's entry point requires: the model's name in the harness, and its class."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(model_id="openblip2", simple_class_path=f"{__name__}.{OpenBlip2.__name__}")


@contextmanager
def _naming(task: str, place: int, refused: list[UserError]) -> Iterator[None]:
    """Logs and collects the error of a request that the model cannot process."""
    try:
        yield
    except UserError as error:
        logger.warning(f"{task}, document {place}, gets an empty answer: {error}")
        refused.append(error)


def _plain(words: str) -> str:
    # The run's template sets the position of the image; the model would read a task's placeholder for it as text.
    return words.replace("<image>", "").strip()


def _cut(text: str, until: Sequence[str]) -> str:
    for end in filter(None, until):
        text = text.partition(end)[0]
    return text.strip()
