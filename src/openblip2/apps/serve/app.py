"""The server: the choice of runs, the start, the web page, and all routes except OpenAI's."""

import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi import Form as FormField
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from starlette.exceptions import HTTPException

import openblip2
from openblip2.apps.search.index import open_index
from openblip2.apps.serve import openai
from openblip2.apps.serve.batcher import Batcher, Limits, Worker
from openblip2.apps.serve.engine import Engine, Job, Served, Write
from openblip2.apps.serve.http import Guard, ServeError, error_response
from openblip2.apps.serve.requests import AnswerForm, AttendForm, CaptionForm, MatchForm, SearchForm
from openblip2.errors import UserError
from openblip2.inference.captioner import ANSWER, CAPTION
from openblip2.weights.assemble import read_checkpoint

FOLDER = Path(__file__).parent
MULTIPART = FormField(media_type="multipart/form-data")

router = APIRouter()


def serve(served: Served, host: str, port: int, token: str | None, names: list[str], limits: Limits) -> None:
    """Serves until it is stopped. The arguments are the options of `openblip2 serve`.

    Raises:
        UserError: models that cannot be loaded, or an address that cannot be used.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port} ({error.strerror}): give another --port or --host") from error
    print("openblip2: loading the models ...", file=sys.stderr, flush=True)
    name = f"[{host}]" if ":" in host else host
    app = make_app(Worker(served, 2 * limits.seconds), limits, token, [*names, name, "127.0.0.1", "localhost", "[::1]"])
    # The socket already listens, so every client that connects from now on gets an answer.
    print(f"openblip2: http://{name}:{listener.getsockname()[1]}/ is ready; press Ctrl-C to stop", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, server_header=False)
    # After the shutdown, uvicorn passes the signal to the earlier handler, so this ends as other commands do.
    uvicorn.Server(config).run(sockets=[listener])


def find_runs(run: str, matcher: str | None, index: Path | None) -> Served:
    """Finds the runs and the index to serve.

    Args:
        run: a run of either stage.
        matcher: a stage-1 run; None = the one that a stage-2 `run` was trained from, if it is found.
        index: a folder that `openblip2 index` wrote.

    Raises:
        UserError: a run is missing, both runs are of one stage, or there is an index but no stage-1 run.
    """
    captioner: str | None = run
    if _stage(run) == "stage1":
        if matcher is not None:
            raise UserError(f"{run} is a stage-1 run: leave out --matcher, or give a stage-2 run as RUN")
        captioner, matcher = None, run
    elif matcher is None:
        start = Path(read_checkpoint(run).settings.start or ".")
        # If both runs were moved together, they are still in one folder.
        found = [str(folder) for folder in (start, Path(run).parent / start.name) if (folder / "config.json").is_file()]
        matcher = found[0] if found and _stage(found[0]) == "stage1" else None
    elif _stage(matcher) != "stage1":
        raise UserError(f"--matcher {matcher} is a stage-2 run: give a stage-1 run")
    if index is not None and matcher is None:
        raise UserError("--index needs a stage-1 run: give --matcher")
    return Served(captioner, matcher, None if index is None else str(index))


def _stage(run: str) -> str:
    return read_checkpoint(run).settings.stage


def make_app(worker: Worker, limits: Limits, token: str | None, hosts: list[str]) -> FastAPI:
    """Creates the application.

    Args:
        worker: the worker, with the models loaded; it is closed with the application.
        token: the token that clients must send; None = no token.
        hosts: names by which clients may call the server.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.batcher = Batcher(worker, limits)
        yield
        app.state.batcher.close()

    # The pages at docs_url and redoc_url are off because they load scripts from other sites. /openapi.json is served.
    app = FastAPI(title="openblip2", version=openblip2.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.served = {kind: Path(path).name or "openblip2" for kind, path in vars(worker.served).items() if path}
    app.state.index = None
    if worker.served.index is not None:
        app.state.index = open_index(Path(worker.served.index))
        del app.state.index.vectors  # they take most of the memory, and only the worker process searches them
    app.include_router(router)
    app.include_router(openai.router)
    app.add_middleware(Guard, hosts=hosts, token=token, limit=limits.bytes)
    for kind in (UserError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, lambda _, error: error_response(error))
    return app


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The web page."""
    return FileResponse(FOLDER / "page.html")


@router.get("/assets/{name}", include_in_schema=False)
async def asset(name: str) -> Response:
    """A file of the page."""
    if name not in ("page.js", "page.css"):
        raise ServeError("no such file", 404)
    return FileResponse(FOLDER / name)


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """Reports that the server is ready, and what it can do."""
    served = request.app.state.served
    can = {"write": "captioner" in served, "match": "matcher" in served, "search": "index" in served}
    return {"status": "ok", "model": next(iter(served.values())), "can": can, "version": openblip2.__version__}


@router.post("/caption")
async def caption(request: Request, form: Annotated[CaptionForm, MULTIPART]) -> dict[str, Any]:
    """A caption of a picture, which begins with `prompt`; `captions` if `n` is above 1."""
    picture = await form.image.read()
    jobs = [Write(picture, how, prompt=form.prompt) for how in form.decodings(CAPTION)]
    texts = [written.text for written in await _answers(request, "captioner", *jobs)]
    return {"caption": texts[0]} if form.n == 1 else {"captions": texts}


@router.post("/answer")
async def answer(request: Request, form: Annotated[AnswerForm, MULTIPART]) -> dict[str, Any]:
    """A short answer to a question about a picture; `answers` if `n` is above 1."""
    picture = await form.image.read()
    jobs = [Write(picture, how, form.question, plain=True) for how in form.decodings(ANSWER)]
    texts = [written.text for written in await _answers(request, "captioner", *jobs)]
    return {"answer": texts[0]} if form.n == 1 else {"answers": texts}


@router.post("/match")
async def match(request: Request, form: Annotated[MatchForm, MULTIPART]) -> dict[str, Any]:
    """How well texts fit a picture: the cosine of ITC and the probability of ITM, sorted by the cosine."""
    job = partial(Engine.match, picture=await form.image.read(), texts=form.text)
    (rows,) = await _answers(request, "matcher", job)
    return {"texts": sorted(rows, key=lambda row: -row["similarity"])}


@router.post("/attend")
async def attend(request: Request, form: Annotated[AttendForm, MULTIPART]) -> Response:
    """The picture with an attention map over it, as PNG: the map of a text, or of all queries."""
    job = partial(Engine.attend, picture=await form.image.read(), text=form.text or None, by=form.by)
    (png,) = await _answers(request, None, job)
    return Response(png, media_type="image/png")


@router.post("/search")
async def search(request: Request, form: Annotated[SearchForm, MULTIPART]) -> dict[str, Any]:
    """Pictures of the index that fit a text, or that are similar to a picture."""
    query = form.text or "" if form.image is None else await form.image.read()
    job = partial(Engine.find, query=query, best=form.best, rerank=form.rerank)
    (pictures,) = await _answers(request, "index", job)
    return {"pictures": pictures}


@router.get("/pictures/{number}")
async def picture(request: Request, number: int, whole: bool = False) -> Response:
    """A picture of the index: its thumbnail, or with `whole` the file itself."""
    index = request.app.state.index
    if index is None or number not in index.rows:
        raise ServeError("no such picture", 404)
    path = index.path(number) if whole else index.thumbnail(number)
    if path is None or not path.is_file():
        raise ServeError("this picture no longer exists: run `openblip2 index` again", 404)
    # A file in the folder could be HTML or SVG: no script in it may run.
    return FileResponse(path, headers={"Content-Security-Policy": "default-src 'none'; sandbox"})


async def _answers(request: Request, needs: str | None, *jobs: Job) -> list[Any]:
    """The results of jobs. `needs`: the `captioner`, `matcher` or `index` that they use; None = any model."""
    if needs is not None:
        openai.require_served(request, needs)
    return await request.app.state.batcher.answers(request, jobs)
