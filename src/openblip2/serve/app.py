"""The web application: routes, limits and errors around a `Service`."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

import openblip2
from openblip2.captioner import ANSWER, CAPTION, greedy
from openblip2.errors import UserError
from openblip2.search.index import open_index
from openblip2.serve import openai
from openblip2.serve.batcher import Batcher, Full, Late
from openblip2.serve.guard import Counted, Guard
from openblip2.serve.jobs import Attend, Match, Search, Write
from openblip2.serve.limits import Limits
from openblip2.serve.metrics import Metrics
from openblip2.serve.service import Died, Gone, Service
from openblip2.serve.worker import Worker

ASSETS = {"page.js": "text/javascript", "page.css": "text/css"}
# Nothing comes from elsewhere and nothing that is shown can run.
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
POLICY += "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"

Picture = Annotated[UploadFile, File(description="A picture's file.")]
Words = Annotated[str, Form(max_length=4000)]


def make_app(
    captioner: str | None,
    matcher: str | None,
    index: Path | None,
    limits: Limits,
    token: str | None,
    hosts: list[str],
    threads: int,
) -> FastAPI:
    """The application. Models are loaded when it starts.

    Args:
        captioner, matcher: runs, one of them at least. token: that clients must show; None = none. hosts: names by
            which the server may be called. threads: of torch.
    """
    metrics = Metrics()
    folder = open_index(index) if index is not None else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        told: list[Callable[[int, str | None], object]] = []
        worker = await asyncio.get_running_loop().run_in_executor(
            None,
            lambda: Worker(
                (captioner, matcher, str(index) if index is not None else None),
                threads,
                2 * limits.seconds,
                lambda number, text: told[0](number, text),
                metrics.restarts.inc,
            ),
        )
        batcher = Batcher(worker, limits, metrics.batch.observe)
        told.append(batcher.said)
        metrics.queue.set_function(lambda: len(batcher.waiting) + len(batcher.running))
        name = Path(captioner or matcher or "").name or "openblip2"
        has = (captioner is not None, matcher is not None, folder is not None)
        app.state.service = Service(batcher, limits, metrics, name, *has)
        yield
        await batcher.close()
        worker.close()

    app = FastAPI(
        title="openblip2",
        version=openblip2.__version__,
        lifespan=lifespan,
        docs_url=None,  # their pages fetch scripts from elsewhere; the document itself is at /openapi.json
        redoc_url=None,
    )
    app.include_router(openai.router)

    def wait() -> int:
        batcher = app.state.service.batcher
        return batcher.patience if batcher.full else 0

    app.add_middleware(Guard, limits=limits, token=token, wait=wait)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    app.add_middleware(Counted, metrics=metrics)
    _errors(app)

    def service() -> Service:
        return app.state.service

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        text = (files("openblip2.serve") / "page.html").read_text(encoding="utf-8")
        return Response(text, media_type="text/html", headers={"Content-Security-Policy": POLICY})

    @app.get("/assets/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in ASSETS:
            return JSONResponse({"error": {"message": "no such file"}}, 404)
        return Response((files("openblip2.serve") / name).read_bytes(), media_type=ASSETS[name])

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """That the server is up, and what it can do."""
        found = service()
        can = {"write": found.writes, "match": found.matches, "search": found.searches}
        return {"status": "ok", "model": found.name, "can": can, "version": openblip2.__version__}

    @app.get("/metrics")
    async def counters() -> Response:
        """Prometheus metrics."""
        return Response(metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/caption")
    async def caption(
        request: Request,
        image: Picture,
        prompt: Annotated[str | None, Form(max_length=1000)] = None,
        beams: Annotated[int, Form(ge=1, le=5)] = 1,
    ) -> dict[str, str]:
        """One sentence about a picture; `prompt`: how it begins."""
        service().require_writer()
        how = replace(CAPTION, beams=beams)
        written = await service().do(Write(await image.read(), how, prompt=prompt), request)
        return {"caption": written.text}

    @app.post("/answer")
    async def answer(request: Request, image: Picture, question: Words) -> dict[str, str]:
        """A short answer to a question about a picture."""
        service().require_writer()
        written = await service().do(Write(await image.read(), greedy(ANSWER), question, plain=True), request)
        return {"answer": written.text}

    @app.post("/match")
    async def match(request: Request, image: Picture, text: Annotated[list[str], Form()]) -> dict[str, Any]:
        """How well texts fit a picture: the cosine of ITC, the probability of ITM; the best first by the cosine."""
        if not 0 < len(text) <= limits.texts:
            raise UserError(f"{len(text)} texts; 1 to {limits.texts}")
        found = await service().do(Match(await image.read(), tuple(text)), request)
        rows = [
            {"text": one, "similarity": cosine, "match": chance}
            for one, (cosine, chance) in zip(text, found, strict=True)
        ]
        return {"texts": sorted(rows, key=lambda row: -row["similarity"])}

    @app.post("/attend")
    async def attend(
        request: Request,
        image: Picture,
        text: Annotated[str | None, Form(max_length=4000)] = None,
        by: Annotated[str, Form(pattern="^(itc|itm)$")] = "itc",
    ) -> Response:
        """The picture with a map over it, as PNG: what a text rests on, or where all queries look."""
        job = Attend(await image.read(), text or None, "itm" if by == "itm" else "itc")
        return Response(await service().do(job, request), media_type="image/png")

    @app.post("/search")
    async def search(
        request: Request,
        text: Annotated[str | None, Form(max_length=4000)] = None,
        image: Annotated[UploadFile | None, File()] = None,
        best: Annotated[int, Form(ge=1, le=100)] = 12,
        rerank: Annotated[int, Form(ge=0, le=64)] = 0,
    ) -> dict[str, Any]:
        """Pictures of the index by a text, or by one like them."""
        if (text is None) == (image is None):
            raise UserError("give a text or an image, one of the two")
        picture = await image.read() if image is not None else None
        found = await service().do(Search(text, picture, best, rerank), request)
        rows = [
            {"id": number, "path": path, "similarity": cosine, "match": chance}
            for number, path, cosine, chance in found
        ]
        return {"pictures": rows}

    @app.get("/pictures/{number}")
    async def picture(number: int, whole: Annotated[bool, Query()] = False) -> Response:
        """A picture of the index: its thumbnail, or `whole`, the file itself."""
        if folder is None or number not in folder.rows:
            return JSONResponse({"error": {"message": "no such picture"}}, 404)
        try:
            path = folder.path(number) if whole else folder.thumbnail(number)
        except UserError as error:
            return JSONResponse({"error": {"message": str(error)}}, 404)
        if not path.is_file():
            return JSONResponse({"error": {"message": "no such picture"}}, 404)
        # Never as what a browser would run: the policy forbids it, and a download has no page.
        return FileResponse(path, headers={"Content-Security-Policy": "default-src 'none'; sandbox"})

    return app


def _errors(app: FastAPI) -> None:
    async def told(request: Request, error: Exception) -> JSONResponse:
        status = Service.status_of(error)
        kind = {400: "invalid_request_error", 429: "rate_limit_error"}.get(status, "server_error")
        wait = {429: request.app.state.service.batcher.patience, 503: 1}.get(status)
        headers = {"Retry-After": str(wait)} if wait else {}
        return JSONResponse({"error": {"message": Service.said_of(error), "type": kind}}, status, headers)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        return JSONResponse({"error": {"message": f"{where}: {first['msg']}", "type": "invalid_request_error"}}, 422)

    for kind in (UserError, Full, Late, Died, Gone, Exception):
        app.add_exception_handler(kind, told)
    app.add_exception_handler(RequestValidationError, invalid)
