"""The web application: the page, the routes beside OpenAI's, and how errors are answered."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

import openblip2
from openblip2.apps.search.index import open_index
from openblip2.apps.serve import openai
from openblip2.apps.serve.batcher import Batcher, Limits
from openblip2.apps.serve.http import Guard, ServeError, error_response
from openblip2.apps.serve.jobs import Call, Job, Write
from openblip2.apps.serve.worker import Worker
from openblip2.errors import UserError
from openblip2.inference.captioner import ANSWER, CAPTION

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


router = APIRouter()


def make_app(worker: Worker, limits: Limits, token: str | None, hosts: list[str]) -> FastAPI:
    """The application.

    Args:
        worker: with the models loaded; it is closed with the application.
        limits: of requests.
        token: that clients must send; None = none.
        hosts: names by which clients may call the server.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.batcher = Batcher(worker, limits)
        yield
        await app.state.batcher.close()
        worker.close()

    # The pages at docs_url and redoc_url load scripts from elsewhere; /openapi.json is served.
    app = FastAPI(title="openblip2", version=openblip2.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    served = worker.served
    app.state.served = {kind: Path(path).name or "openblip2" for kind, path in vars(served).items() if path}
    app.state.created = int(time.time())
    app.state.index = open_index(Path(served.index)) if served.index is not None else None
    app.include_router(router)
    app.include_router(openai.router)
    app.add_middleware(Guard, hosts=hosts, token=token, limit=limits.bytes)
    for kind in (UserError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _answer_error)
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    return error_response(error)


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The web page."""
    text = (files("openblip2.apps.serve") / "page.html").read_text(encoding="utf-8")
    return Response(text, media_type="text/html", headers={"Content-Security-Policy": POLICY})


@router.get("/assets/{name}", include_in_schema=False)
async def asset(name: str) -> Response:
    """A file of the page."""
    if name not in ASSETS:
        raise ServeError("no such file", 404)
    return Response((files("openblip2.apps.serve") / name).read_bytes(), media_type=ASSETS[name])


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """That the server is ready, and what it can do."""
    served = request.app.state.served
    can = {"write": "captioner" in served, "match": "matcher" in served, "search": "index" in served}
    return {"status": "ok", "model": next(iter(served.values())), "can": can, "version": openblip2.__version__}


@router.get("/metrics")
async def metrics() -> Response:
    """Metrics for Prometheus."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@router.post("/caption")
async def caption(request: Request, form: Annotated[CaptionForm, MULTIPART]) -> dict[str, str]:
    """A caption of a picture, which begins with `prompt`."""
    job = Write(await form.image.read(), replace(CAPTION, beams=form.beams), prompt=form.prompt)
    return {"caption": (await _answer(request, job, "captioner")).text}


@router.post("/answer")
async def answer(request: Request, form: Annotated[AnswerForm, MULTIPART]) -> dict[str, str]:
    """A short answer to a question about a picture."""
    job = Write(await form.image.read(), ANSWER, form.question, plain=True)
    return {"answer": (await _answer(request, job, "captioner")).text}


@router.post("/match")
async def match(request: Request, form: Annotated[MatchForm, MULTIPART]) -> dict[str, Any]:
    """How well texts fit a picture: the cosine of ITC and the probability of ITM, sorted by the cosine."""
    most = request.app.state.batcher.limits.texts
    if not 0 < len(form.text) <= most:
        raise ServeError(f"{len(form.text)} texts: send 1 to {most}", param="text")
    rows = await _answer(request, Call("match", (await form.image.read(), form.text)), "matcher")
    return {"texts": sorted(rows, key=lambda row: -row["similarity"])}


@router.post("/attend")
async def attend(request: Request, form: Annotated[AttendForm, MULTIPART]) -> Response:
    """The picture with an attention map over it, as PNG: for a text, or of all queries."""
    job = Call("attend", (await form.image.read(), form.text or None, form.by))
    return Response(await _answer(request, job), media_type="image/png")


@router.post("/search")
async def search(request: Request, form: Annotated[SearchForm, MULTIPART]) -> dict[str, Any]:
    """Pictures of the index that fit a text, or that are like a picture."""
    if (form.text is None) == (form.image is None):
        raise ServeError("give either a text or an image")
    query = form.text if form.image is None else await form.image.read()
    return {"pictures": await _answer(request, Call("find", (query, form.best, form.rerank)), "index")}


@router.get("/pictures/{number}")
async def picture(request: Request, number: int, whole: bool = False) -> Response:
    """A picture of the index: its thumbnail, or with `whole` the file itself."""
    index = request.app.state.index
    if index is None or number not in index.rows:
        raise ServeError("no such picture", 404)
    try:
        path = index.path(number) if whole else index.thumbnail(number)
    except UserError as error:
        raise ServeError(str(error), 404) from error
    if not path.is_file():
        raise ServeError("no such picture", 404)
    # A file of the folder could be HTML or SVG: nothing in it may run.
    return FileResponse(path, headers={"Content-Security-Policy": "default-src 'none'; sandbox"})


async def _answer(request: Request, job: Job, needs: str | None = None) -> Any:
    if needs is not None:
        openai.require(request, needs)
    return await request.app.state.batcher.answer(request, job)
