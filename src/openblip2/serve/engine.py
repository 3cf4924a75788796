"""The process that holds the models: batches of jobs in, results out. Nothing of HTTP is known here.

Shapes: B pictures, Q queries, L LLM width.
"""

import hashlib
import io
import signal
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openblip2.attend import look, overlay
from openblip2.captioner import Captioner
from openblip2.chat import Form
from openblip2.data.images import PictureFile, open_picture
from openblip2.data.text import clean_question
from openblip2.errors import UserError
from openblip2.inference import load
from openblip2.inputs import clean_texts
from openblip2.matcher import Matcher
from openblip2.search.find import Finder
from openblip2.serve.jobs import Attend, Embed, Failed, Job, Match, Search, Write, Written
from openblip2.train.hardware import computing

SEEN = 256  # pictures whose soft prompts are kept


class Engine:
    """Models of both kinds, of which one may be missing, and an index.

    Args:
        pieces: a queue that takes (stream, text) while a text is written; None = nothing is streamed.
        stop: is set while what is being written is wanted by nobody any more.
    """

    def __init__(
        self, captioner: str | None, matcher: str | None, index: str | None, pieces: Any = None, stop: Any = None
    ) -> None:
        self.pieces, self.stop = pieces, stop
        self.captioner, self.matcher = _load(captioner, Captioner), _load(matcher, Matcher)
        self.finder = Finder(Path(index), self.matcher) if index is not None else None
        self.form = Form(self.captioner) if self.captioner is not None else None
        self._soft: OrderedDict[bytes, Tensor] = OrderedDict()

    def run(self, jobs: Sequence[Job]) -> list[Any]:
        """Results in the jobs' order, `Failed` where one cannot be done. All are `together`."""
        first = jobs[0]
        if isinstance(first, Write):
            return self._write([job for job in jobs if isinstance(job, Write)])
        return [self._one(job) for job in jobs]

    def _one(self, job: Job) -> Any:
        try:
            if isinstance(job, Search):
                return self._search(job)
            if isinstance(job, Match):
                return self._match(job)
            if isinstance(job, Embed):
                return self._embed(job)
            assert isinstance(job, Attend)
            return self._attend(job)
        except UserError as error:
            return Failed(str(error))

    def _write(self, jobs: list[Write]) -> list[Any]:
        results: list[Any] = [None] * len(jobs)
        ready: list[tuple[int, str, PictureFile, str]] = []
        captioner, form = self.captioner, self.form
        assert captioner is not None
        assert form is not None
        for n, job in enumerate(jobs):
            try:
                picture = _opened(job.picture)
                prompt, asked = self._prompt(job)
            except UserError as error:
                results[n] = Failed(str(error))
            else:
                ready.append((n, prompt, picture, asked))
        if not ready:  # then there is no end of pieces to be sent either
            return results
        how = jobs[0].decoding
        with self._followed(jobs[0].stream):
            if captioner.tokens is None:
                texts = self._write_cached([(prompt, picture) for _, prompt, picture, _ in ready], how)
            else:
                texts = captioner.generate(
                    [p for *_, p, _ in ready], [p for _, p, *_ in ready], how, [a for *_, a in ready]
                )
        language, queries = captioner.model.language, captioner.model.qformer.queries.shape[1]
        for (n, prompt, _, _), text in zip(ready, texts, strict=True):
            count = len(language.tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore
            results[n] = Written(text, language.length(prompt) + queries, count)
        return results

    def _prompt(self, job: Write) -> tuple[str, str]:
        """What the language model reads behind the picture, and what a Q-Former that reads questions does."""
        assert self.captioner is not None
        assert self.form is not None
        settings = self.captioner.settings.language
        if job.question is None:
            if self.captioner.tokens is not None:
                raise UserError("this model answers questions, and needs one")
            return settings.prompts[0] if job.prompt is None else job.prompt, ""
        if job.plain or self.captioner.tokens is not None:
            (asked,) = clean_texts([job.question], clean_question)
            if job.plain:
                return settings.question.replace("{}", asked), asked
        else:
            asked = ""
        return self.form.prompt(job.turns, job.question, job.decoding.max_new_tokens), asked

    def _write_cached(self, asked: list[tuple[str, PictureFile]], how: Any) -> list[str]:
        """Pictures that were seen before are not looked at again."""
        captioner = self.captioner
        assert captioner is not None
        names = [hashlib.sha256(picture.content).digest() for _, picture in asked]
        unseen = {name: picture for name, (_, picture) in zip(names, asked, strict=True) if name not in self._soft}
        if unseen:
            found = captioner.soft_prompt(list(unseen.values()))
            self._soft |= zip(unseen, found, strict=True)
        order = list(dict.fromkeys(names))
        device = captioner.model.projection.weight.device
        soft = torch.stack([self._soft[name] for name in order]).to(device)
        for name in order:
            self._soft.move_to_end(name)
        while len(self._soft) > SEEN:
            self._soft.popitem(last=False)
        with torch.inference_mode(), computing(captioner.model, captioner.settings.train.precision):
            about = [order.index(name) for name in names]
            return captioner.model.language.generate(soft, [prompt for prompt, _ in asked], how, about)

    @contextmanager
    def _followed(self, stream: int):
        """While it writes: pieces are sent, and it ends where nobody waits."""
        from transformers import StoppingCriteriaList

        assert self.captioner is not None
        language = self.captioner.model.language
        if self.stop is not None:
            language.watched["stopping_criteria"] = StoppingCriteriaList([_until(self.stop)])
        if stream and self.pieces is not None:
            language.watched["streamer"] = _streamer(language.tokenizer, lambda text: self.pieces.put((stream, text)))
        try:
            yield
        finally:
            language.watched.clear()
            if stream and self.pieces is not None:
                self.pieces.put((stream, None))

    def _match(self, job: Match) -> Any:
        matcher = _require(self.matcher)
        picture, texts = _opened(job.picture), list(job.texts)
        cosines = matcher.similarity([picture], texts)[0].tolist()
        chances = matcher.match([picture] * len(texts), texts).tolist()
        return list(zip(cosines, chances, strict=True))

    def _embed(self, job: Embed) -> Any:
        matcher = _require(self.matcher)
        if job.picture is not None:
            return matcher.embed_image(_opened(job.picture))
        return matcher.embed_text(job.text or "")

    def _search(self, job: Search) -> Any:
        if self.finder is None:
            raise UserError("this server has no index: start it with --index")
        if job.picture is not None:
            hits = self.finder.by_picture(_opened(job.picture), job.best)
        else:
            hits = self.finder.by_text(job.text or "", job.best, job.rerank)
        rows = self.finder.index.rows
        return [(hit.number, rows[hit.number].path, hit.similarity, hit.match) for hit in hits]

    def _attend(self, job: Attend) -> Any:
        model = self.matcher or self.captioner
        assert model is not None
        picture = open_picture(_opened(job.picture))
        found = look(model, picture, job.text, job.by)
        maps = [one for _, one in found.words]
        drawn = overlay(picture, sum(maps[1:], maps[0]) if maps else found.average)
        stream = io.BytesIO()
        drawn.save(stream, "PNG")
        return stream.getvalue()


def _load(run: str | None, kind: type) -> Any:
    if run is None:
        return None
    model = load(run)
    if not isinstance(model, kind):
        raise UserError(f"{run} is a {type(model).__name__}, not a {kind.__name__}")
    return model


def _require(matcher: Matcher | None) -> Matcher:
    if matcher is None:
        raise UserError("this server has no stage-1 run: start it with --matcher")
    return matcher


def _opened(content: bytes) -> PictureFile:
    """A picture that can be opened, or a `UserError`."""
    picture = PictureFile(content, "the picture")
    open_picture(picture)
    return picture


def _until(stop: Any) -> Any:
    from transformers import StoppingCriteria

    class Until(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Any:
            return torch.full((len(input_ids),), stop.is_set(), device=input_ids.device)

    return Until()


def _streamer(tokenizer: Any, put: Any) -> Any:
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                put(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)


_engine: Engine | None = None


def start(captioner: str | None, matcher: str | None, index: str | None, pieces: Any, stop: Any, threads: int) -> None:
    """Makes this process one that holds the models. Ctrl-C is the server's business."""
    global _engine
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    _engine = Engine(captioner, matcher, index, pieces, stop)


def run(jobs: Sequence[Job]) -> list[Any]:
    """In such a process: what `Engine.run` makes of the jobs; nothing for none, which tells that it has started."""
    assert _engine is not None
    if _engine.stop is not None:
        _engine.stop.clear()
    return _engine.run(jobs) if jobs else []
