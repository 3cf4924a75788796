"""The web application: the page, the routes beside OpenAI's, and how errors are answered."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from prometheus_client import generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

import openblip2
from openblip2.apps.search.index import open_index
from openblip2.apps.serve import openai
from openblip2.apps.serve.batcher import Batcher, Full, Limits
from openblip2.apps.serve.errors import ServeError, error_response
from openblip2.apps.serve.jobs import Attend, Match, Search, Write
from openblip2.apps.serve.middleware import Guard, Metrics
from openblip2.apps.serve.worker import Worker
from openblip2.captioner import ANSWER, CAPTION
from openblip2.errors import UserError

ASSETS = {"page.js": "text/javascript", "page.css": "text/css"}
# The page loads nothing from elsewhere, and no text that it shows can run.
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
POLICY += "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"

MULTIPART = Form(media_type="multipart/form-data")
Text = Annotated[str, Field(max_length=4000)]


class Fields(BaseModel):
    """Fields of a form. Others are refused."""

    model_config = ConfigDict(extra="forbid")


class CaptionForm(Fields):
    """POST /caption."""

    image: UploadFile
    prompt: Annotated[str, Field(max_length=1000)] | None = None
    beams: Annotated[int, Field(ge=1, le=5)] = CAPTION.beams


class AnswerForm(Fields):
    """POST /answer."""

    image: UploadFile
    question: Text


class MatchForm(Fields):
    """POST /match."""

    image: UploadFile
    text: list[str]


class AttendForm(Fields):
    """POST /attend."""

    image: UploadFile
    text: Text | None = None
    by: Literal["itc", "itm"] = "itc"


class SearchForm(Fields):
    """POST /search."""

    text: Text | None = None
    image: UploadFile | None = None
    best: Annotated[int, Field(ge=1, le=100)] = 12
    rerank: Annotated[int, Field(ge=0, le=64)] = 0


def make_app(worker: Worker, index: Path | None, limits: Limits, token: str | None, hosts: list[str]) -> FastAPI:
    """The application.

    Args:
        worker: with the models loaded; it is closed with the application.
        index: the index that the worker searches, whose pictures are shown.
        limits: of requests.
        token: that clients must send; None = none.
        hosts: names by which clients may call the server.
    """
    metrics = Metrics()
    folder = open_index(index) if index is not None else None
    models = openai.Models(*(run and (Path(run).name or "openblip2") for run in worker.models[:2]))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher = app.state.batcher = Batcher(worker, limits, metrics.batch.observe)
        worker.on_restart = metrics.restarts.inc
        metrics.queue.set_function(lambda: len(batcher.waiting) + len(batcher.running))
        yield
        await batcher.close()
        worker.close()

    # The pages at docs_url and redoc_url load scripts from elsewhere; /openapi.json is served.
    app = FastAPI(title="openblip2", version=openblip2.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.models = models
    app.include_router(openai.router)

    def busy() -> ServeError | None:
        batcher = app.state.batcher
        return Full(batcher.retry_after) if batcher.full else None

    app.add_middleware(Guard, hosts=hosts, token=token, limit=limits.bytes, busy=busy, metrics=metrics)

    async def answer_error(request: Request, error: Exception) -> Response:
        return error_response(error)

    for kind in (UserError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, answer_error)

    async def do(request: Request, job: Any) -> Any:
        return (await app.state.batcher.answer(request, job))[0]

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        text = (files("openblip2.apps.serve") / "page.html").read_text(encoding="utf-8")
        return Response(text, media_type="text/html", headers={"Content-Security-Policy": POLICY})

    @app.get("/assets/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in ASSETS:
            raise ServeError("no such file", 404)
        return Response((files("openblip2.apps.serve") / name).read_bytes(), media_type=ASSETS[name])

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """That the server is ready, and what it can do."""
        can = {"write": models.writer is not None, "match": models.matcher is not None, "search": folder is not None}
        model = models.writer or models.matcher
        return {"status": "ok", "model": model, "can": can, "version": openblip2.__version__}

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Metrics for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/caption")
    async def caption(request: Request, form: Annotated[CaptionForm, MULTIPART]) -> dict[str, str]:
        """A caption of a picture, which begins with `prompt`."""
        models.require("writer")
        job = Write(await form.image.read(), replace(CAPTION, beams=form.beams), prompt=form.prompt)
        return {"caption": (await do(request, job)).text}

    @app.post("/answer")
    async def answer(request: Request, form: Annotated[AnswerForm, MULTIPART]) -> dict[str, str]:
        """A short answer to a question about a picture."""
        models.require("writer")
        job = Write(await form.image.read(), ANSWER, form.question, plain=True)
        return {"answer": (await do(request, job)).text}

    @app.post("/match")
    async def match(request: Request, form: Annotated[MatchForm, MULTIPART]) -> dict[str, Any]:
        """How well texts fit a picture: the cosine of ITC and the probability of ITM, sorted by the cosine."""
        if not 0 < len(form.text) <= limits.texts:
            raise ServeError(f"{len(form.text)} texts: send 1 to {limits.texts}", param="text")
        scores = await do(request, Match(await form.image.read(), tuple(form.text)))
        rows = [
            {"text": text, "similarity": cosine, "match": probability}
            for text, (cosine, probability) in zip(form.text, scores, strict=True)
        ]
        return {"texts": sorted(rows, key=lambda row: -row["similarity"])}

    @app.post("/attend")
    async def attend(request: Request, form: Annotated[AttendForm, MULTIPART]) -> Response:
        """The picture with an attention map over it, as PNG: for a text, or of all queries."""
        job = Attend(await form.image.read(), form.text or None, form.by)
        return Response(await do(request, job), media_type="image/png")

    @app.post("/search")
    async def search(request: Request, form: Annotated[SearchForm, MULTIPART]) -> dict[str, Any]:
        """Pictures of the index that fit a text, or that are like a picture."""
        if (form.text is None) == (form.image is None):
            raise ServeError("give either a text or an image")
        picture = None if form.image is None else await form.image.read()
        hits = await do(request, Search(form.text, picture, form.best, form.rerank))
        names = ("id", "path", "similarity", "match")
        return {"pictures": [dict(zip(names, hit, strict=True)) for hit in hits]}

    @app.get("/pictures/{number}")
    async def picture(number: int, whole: bool = False) -> Response:
        """A picture of the index: its thumbnail, or with `whole` the file itself."""
        if folder is None or number not in folder.rows:
            raise ServeError("no such picture", 404)
        try:
            path = folder.path(number) if whole else folder.thumbnail(number)
        except UserError as error:
            raise ServeError(str(error), 404) from error
        if not path.is_file():
            raise ServeError("no such picture", 404)
        # A file of the folder could be HTML or SVG: nothing in it may run.
        return FileResponse(path, headers={"Content-Security-Policy": "default-src 'none'; sandbox"})

    return app
