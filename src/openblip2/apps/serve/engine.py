"""The models and the index in the worker process: batches of jobs in, results out. Nothing of HTTP is known here.

Shapes: L LLM width, Q queries.
"""

import hashlib
import io
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from openblip2.apps.search.find import Finder
from openblip2.apps.serve.jobs import Attend, Embed, Job, Match, Search, Write, Written
from openblip2.attend import look, overlay
from openblip2.captioner import Captioner
from openblip2.chat import Form
from openblip2.data.images import PictureFile, open_picture
from openblip2.data.text import clean_question
from openblip2.errors import UserError
from openblip2.hardware import computing
from openblip2.inference import load
from openblip2.inputs import clean_texts, group_of
from openblip2.matcher import Matcher
from openblip2.model.decoding import Decoding
from openblip2.model.likelihood import TokenScore, token_scores

CACHED = 256  # soft prompts of recent pictures


class Engine:
    """Models of both stages, of which one may be missing, and an index.

    Args:
        captioner: a stage-2 run.
        matcher: a stage-1 run.
        index: a folder that `openblip2 index` wrote.
        send_text: called with each piece of a streamed text.
        stopped: whether writing should stop, because all clients have disconnected.
    """

    def __init__(
        self,
        captioner: str | None,
        matcher: str | None,
        index: str | None,
        send_text: Callable[[str], object],
        stopped: Callable[[], bool],
    ) -> None:
        self.captioner, self.matcher = _load(captioner, Captioner), _load(matcher, Matcher)
        self.finder = Finder(Path(index), self.matcher) if index is not None else None
        self.form = Form(self.captioner) if self.captioner is not None else None
        self._send_text, self._stop = send_text, StoppingCriteriaList([_Stop(stopped)])
        self._soft: OrderedDict[bytes, Tensor] = OrderedDict()

    def run(self, jobs: Sequence[Job]) -> list[Any]:
        """Results in the jobs' order, a `UserError` where a job cannot be done. All jobs are of one kind."""
        if isinstance(jobs[0], Write):
            return self._write(cast(Sequence[Write], jobs))
        return [self._run_one(job) for job in jobs]

    def _run_one(self, job: Job) -> Any:
        try:
            match job:
                case Match():
                    return self._match(job)
                case Embed():
                    matcher = self._matcher()
                    if job.picture is not None:
                        return matcher.embed_image(_opened(job.picture))
                    return matcher.embed_text(job.text or "")
                case Search():
                    return self._search(job)
                case Attend():
                    return self._attend(job)
        except UserError as error:
            return error
        raise AssertionError(job)

    def _write(self, jobs: Sequence[Write]) -> list[Any]:
        captioner = self.captioner
        results: list[Any] = [None] * len(jobs)
        ready: list[tuple[int, PictureFile, str, str]] = []
        for n, job in enumerate(jobs):
            try:
                ready.append((n, _opened(job.picture), *self._prompt(job)))
            except UserError as error:
                results[n] = error
        if not ready:
            return results
        numbers, pictures, prompts, questions = map(list, zip(*ready, strict=True))
        language, how = captioner.model.language, jobs[0].decoding
        language.watched["stopping_criteria"] = self._stop
        if jobs[0].stream and how.beams == 1:
            language.watched["streamer"] = _Streamer(language.tokenizer, self._send_text)
        try:
            if captioner.tokens is None:
                texts = self._write_cached(pictures, prompts, how)
            else:
                texts = captioner.generate(pictures, prompts, how, questions)
        finally:
            language.watched.clear()
        if jobs[0].stream and how.beams > 1:  # beam search knows its text at the end only
            self._send_text(texts[0])
        queries = captioner.model.qformer.queries.shape[1]
        for n, picture, prompt, question, text in zip(numbers, pictures, prompts, questions, texts, strict=True):
            count = len(language.tokenizer(text, add_special_tokens=False)["input_ids"])
            best = jobs[n].logprobs
            tokens = [] if best is None else self._token_scores(picture, prompt, question, text, best)
            results[n] = Written(text, language.length(prompt) + queries, count, tokens)
        return results

    def _token_scores(self, picture: PictureFile, prompt: str, question: str, text: str, best: int) -> list[TokenScore]:
        model = self.captioner.model
        soft = self.captioner.soft_prompt([picture], None if self.captioner.tokens is None else [question])
        with torch.inference_mode(), computing(model, self.captioner.settings.train.precision):
            return token_scores(model.language, soft.to(model.projection.weight.device), prompt, text, best)

    def _prompt(self, job: Write) -> tuple[str, str]:
        """The prompt of the language model, and the question for a Q-Former that reads questions."""
        assert self.form is not None
        settings, reads_question = self.captioner.settings.language, self.captioner.tokens is not None
        if job.question is None:
            if reads_question:
                raise UserError("this model answers questions: ask one")
            return settings.prompts[0] if job.prompt is None else job.prompt, ""
        question = ""
        if job.plain or reads_question:
            (question,) = clean_texts([job.question], clean_question)
        if job.plain:
            return settings.question.replace("{}", question), question
        return self.form.prompt(job.turns, job.question, job.decoding.max_new_tokens), question

    def _write_cached(self, pictures: list[PictureFile], prompts: list[str], how: Decoding) -> list[str]:
        """Writes one text for each prompt; pictures that were encoded lately are not encoded again."""
        model = self.captioner.model
        keys = [hashlib.sha256(picture.content).digest() for picture in pictures]
        new = {key: picture for key, picture in zip(keys, pictures, strict=True) if key not in self._soft}
        if new:
            self._soft |= zip(new, self.captioner.soft_prompt(list(new.values())), strict=True)
        distinct = list(dict.fromkeys(keys))
        soft = torch.stack([self._soft[key] for key in distinct]).to(model.projection.weight.device)  # [N, Q, L]
        for key in distinct:
            self._soft.move_to_end(key)
        while len(self._soft) > CACHED:
            self._soft.popitem(last=False)
        with torch.inference_mode(), computing(model, self.captioner.settings.train.precision):
            places = [distinct.index(key) for key in keys]
            if group_of(model) > 1:
                return model.language.generate(soft, prompts, how, places)
            parts = zip(prompts, places, strict=True)
            return [model.language.generate(soft, [prompt], how, [picture])[0] for prompt, picture in parts]

    def _match(self, job: Match) -> list[tuple[float, float]]:
        matcher, picture, texts = self._matcher(), _opened(job.picture), list(job.texts)
        cosines = matcher.similarity([picture], texts)[0].tolist()
        return list(zip(cosines, matcher.match([picture] * len(texts), texts).tolist(), strict=True))

    def _search(self, job: Search) -> list[tuple[int, str, float, float | None]]:
        if self.finder is None:
            raise UserError("this server has no index: start it with --index")
        if job.picture is not None:
            hits = self.finder.by_picture(_opened(job.picture), job.best)
        else:
            hits = self.finder.by_text(job.text or "", job.best, job.rerank)
        rows = self.finder.index.rows
        return [(hit.number, rows[hit.number].path, hit.similarity, hit.match) for hit in hits]

    def _attend(self, job: Attend) -> bytes:
        picture = open_picture(_opened(job.picture))
        attention = look(self.matcher or self.captioner, picture, job.text, job.by)
        maps = [one for _, one in attention.words]
        png = io.BytesIO()
        overlay(picture, sum(maps[1:], maps[0]) if maps else attention.average).save(png, "PNG")
        return png.getvalue()

    def _matcher(self) -> Matcher:
        if self.matcher is None:
            raise UserError("this server has no stage-1 run: start it with --matcher")
        return self.matcher


def _load(run: str | None, kind: type) -> Any:
    model = None if run is None else load(run)
    if model is not None and not isinstance(model, kind):
        raise UserError(f"{run} is a {type(model).__name__}, not a {kind.__name__}")
    return model


def _opened(content: bytes) -> PictureFile:
    """The picture, which has been opened once to see that it can be. Raises `UserError` if not."""
    picture = PictureFile(content, "the picture")
    open_picture(picture)
    return picture


class _Stop(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Any:
        return torch.full((len(input_ids),), self.stopped(), device=input_ids.device)


class _Streamer(TextStreamer):
    def __init__(self, tokenizer: Any, send_text: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.send_text = send_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.send_text(text)
