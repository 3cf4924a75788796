"""Runs batches of jobs with the models and the index, in the worker process. This module does not use HTTP."""

import hashlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from openblip2.apps.search import ImageSearch
from openblip2.data.images import PictureFile, open_picture
from openblip2.errors import UserError
from openblip2.hardware import computing
from openblip2.inference.attend import By, look, overlay
from openblip2.inference.captioner import Captioner
from openblip2.inference.chat import DialoguePrompt
from openblip2.inference.load import load
from openblip2.inference.matcher import Matcher
from openblip2.model.decoding import Decoding
from openblip2.model.likelihood import TokenScore, token_scores
from openblip2.model.token_rows import require_room

CACHED = 64  # pictures whose features are kept


@dataclass(frozen=True)
class Served:
    """The folders of the stage-2 run, the stage-1 run and the index that a server serves; None = not served."""

    captioner: str | None = None
    matcher: str | None = None
    index: str | None = None


@dataclass(frozen=True)
class Write:
    """A job that generates a text about a picture. The result is a `Reply`.

    Attributes:
        picture: content of a picture file.
        decoding: decoding settings; jobs with equal settings can share a batch.
        question: the question; None = a caption is generated.
        turns: earlier questions and their answers.
        prompt: how a caption begins; None = the run's own prompt.
        plain: whether the question is cleaned as in VQA (`Captioner.answer`); otherwise it is asked as written.
        stream: whether the text is sent while it is generated; such a job runs alone.
        logprobs: number of most likely tokens to list at each position; None = no log-probabilities.
    """

    picture: bytes
    decoding: Decoding
    question: str | None = None
    turns: Sequence[tuple[str, str]] = ()
    prompt: str | None = None
    plain: bool = False
    stream: bool = False
    logprobs: int | None = None


class Reply(NamedTuple):
    """A text, the numbers of tokens in its prompt (with soft tokens) and in the text, and scored tokens on request."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    tokens: Sequence[TokenScore] = ()


Job = Write | partial[Any]  # the partial is a method of `Engine` without `self`


class Engine:
    """The models of both stages (one may be missing) and an optional index. A job must not use a missing part.

    Args:
        served: the models and the index.
        send_text: called with the part of a streamed text that is generated so far.
        stopped: returns whether generation should stop because all clients have disconnected.
    """

    def __init__(self, served: Served, send_text: Callable[[str], object], stopped: Callable[[], bool]) -> None:
        self.captioner, self.matcher = _load(served.captioner, Captioner), _load(served.matcher, Matcher)
        self.search: Any = ImageSearch(Path(served.index), self.matcher) if served.index is not None else None
        self.dialogue: Any = DialoguePrompt(self.captioner) if self.captioner is not None else None
        self._send_text, self._stopped = send_text, stopped

    def run(self, jobs: Sequence[Job]) -> list[Any]:
        """Results in the order of the jobs, with a `UserError` for a failed job. All jobs must be of one kind."""
        writes = [job for job in jobs if isinstance(job, Write)]
        calls = [job for job in jobs if isinstance(job, partial)]
        return self._write(writes) if writes else [_result_or_error(call, self) for call in calls]

    def match(self, picture: bytes, texts: list[str]) -> list[dict[str, Any]]:
        """How well texts fit a picture: the cosine of ITC and the probability of ITM."""
        file = _opened(picture)
        cosines = self.matcher.similarity([file], texts)[0].tolist()
        scores = zip(texts, cosines, self.matcher.match([file] * len(texts), texts).tolist(), strict=True)
        return [{"text": text, "similarity": cosine, "match": match} for text, cosine, match in scores]

    def embed(self, inputs: list[str | bytes]) -> list[list[float]]:
        """A vector of length 1 for each text or picture file."""
        model = self.matcher
        return [model.embed_text(x) if isinstance(x, str) else model.embed_image(_opened(x)) for x in inputs]

    def find(self, query: str | bytes, best: int, rerank: int) -> list[dict[str, Any]]:
        """Pictures of the index that fit a text, or that are similar to a picture file."""
        if isinstance(query, bytes):
            hits = self.search.by_picture(_opened(query), best)
        else:
            hits = self.search.by_text(query, best, rerank)
        rows = self.search.index.rows
        return [
            {"id": hit.number, "path": rows[hit.number].path, "similarity": hit.similarity, "match": hit.match}
            for hit in hits
        ]

    def attend(self, picture: bytes, text: str | None, by: By) -> bytes:
        """Draws the attention map of a text, or of all queries, over the picture. Returns a PNG file."""
        image = open_picture(_opened(picture))
        attention = look(self.matcher or self.captioner, image, text, by)
        maps = [one for _, one in attention.words]
        png = io.BytesIO()
        overlay(image, sum(maps[1:], maps[0]) if maps else attention.average).save(png, "PNG")
        return png.getvalue()

    def _write(self, jobs: Sequence[Write]) -> list[Any]:
        results = [_result_or_error(self._inputs, job) for job in jobs]
        ready = [n for n, inputs in enumerate(results) if not isinstance(inputs, UserError)]
        if not ready:
            return results
        pictures, prompts, read = map(list, zip(*(results[n] for n in ready), strict=True))
        decoding, language = jobs[0].decoding, self.captioner.model.language
        # In beam search, the text is known only at the end, so it is not streamed.
        send_text = self._send_text if jobs[0].stream and decoding.beams == 1 else None
        watch = _Watch(language.tokenizer, send_text, self._stopped)
        language.watched["stopping_criteria"] = StoppingCriteriaList([watch])
        try:
            texts = self.captioner.generate(pictures, prompts, decoding, read if self.captioner.tokens else None)
        finally:
            language.watched.clear()
        for n, picture, prompt, asked, text in zip(ready, pictures, prompts, read, texts, strict=True):
            results[n] = self._written(picture, prompt, asked, text, jobs[n].logprobs)
        return results

    def _written(self, picture: PictureFile, prompt: str, read: str | None, text: str, best: int | None) -> Reply:
        model, scores = self.captioner.model, list[TokenScore]()
        if best is not None:
            soft = self.captioner.soft_prompt([picture], None if read is None else [read])
            with computing(model, self.captioner.settings.train.precision):
                soft = soft.to(model.projection.weight.device)
                scores = token_scores(model.language, soft, prompt, text, best)
        length = len(model.language.tokenizer(text, add_special_tokens=False)["input_ids"])
        return Reply(text, model.language.length(prompt) + model.tokens, length, scores)

    def _inputs(self, job: Write) -> tuple[PictureFile, str, str | None]:
        """The picture, the prompt of the language model, and the text for the Q-Former (None if it reads no text)."""
        picture, captioner, longest = _opened(job.picture), self.captioner, job.decoding.max_new_tokens
        prompt, read = "", None
        if job.question is None:
            prompt = captioner.settings.language.prompts[0] if job.prompt is None else job.prompt
            read = captioner.qformer_texts([prompt])
        elif job.plain or captioner.tokens is not None:
            (prompt,), read = captioner.read_questions([job.question])
        if job.question is None or job.plain:
            require_room(captioner.model.language, prompt, captioner.model.tokens, longest)
        else:
            prompt = self.dialogue.write(job.turns, job.question, longest)
        return picture, prompt, read[0] if read else None


def _load(run: str | None, kind: type) -> Any:
    if run is None:
        return None
    model = load(run)
    if not isinstance(model, kind):
        raise UserError(f"{run} is a {type(model).__name__}, not a {kind.__name__}")
    _cache_features(model.model.vision)
    return model


def _cache_features(vision: Any) -> None:
    """Adds a cache to an encoder: the features of recent pictures, with the hash of their pixels as key."""
    encode, known = vision.forward, dict[bytes, Tensor]()

    def forward(pixels: Tensor) -> Tensor:
        keys = [hashlib.sha256(picture.numpy().tobytes()).digest() for picture in pixels.cpu()]
        new = {key: picture for key, picture in zip(keys, pixels, strict=True) if key not in known}
        if new:
            known.update(zip(new, encode(torch.stack(list(new.values()))).cpu(), strict=True))
        recent = {key: known.pop(key) for key in dict.fromkeys(keys)}
        known.update(recent)  # so that the most recently used ones are at the end
        for key in list(known)[:-CACHED]:
            del known[key]
        return torch.stack([recent[key] for key in keys]).to(pixels.device)

    vision.forward = forward


def _opened(content: bytes) -> PictureFile:
    """Returns the picture after opening it once as a test. Raises `UserError` if that fails."""
    picture = PictureFile(content, "the picture")
    open_picture(picture)
    return picture


def _result_or_error(do: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return do(*arguments)
    except UserError as error:
        return error


class _Watch(StoppingCriteria):
    """Called after each token: sends the text so far, and stops when all clients have disconnected."""

    def __init__(self, tokenizer: Any, send_text: Callable[[str], object] | None, stopped: Callable[[], bool]) -> None:
        self.tokenizer, self.send_text, self.stopped = tokenizer, send_text, stopped

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Any:
        if self.send_text is not None:
            text = self.tokenizer.decode(input_ids[0], skip_special_tokens=True).strip()
            # Text after the last space can still change, so it is held back. Scripts without spaces are above U+024F.
            self.send_text(re.sub(r"[!-\u024f\ufffd]+$", "", text))
        return torch.full((len(input_ids),), self.stopped(), device=input_ids.device)
