"""Commands that search a folder of pictures and serve a run: index, search, serve."""

import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from openblip2.commands.shared import AsJson, Run, output, progress, put, show
from openblip2.errors import UserError, number_of, printable

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def index(
    folder: Annotated[Path, typer.Argument(help="Folder of images; subfolders are included.")],
    run: Annotated[str, typer.Option(help="Stage-1 run that encodes the images.")],
    out: Annotated[Path, typer.Option(help="Folder of the index; an existing index is updated.")],
    as_json: AsJson = False,
) -> None:
    """Index a folder of images for search, or update its index."""
    says = progress(f"loading {run}")
    from openblip2.apps.search import update_index

    with output(out, "an index", "the pictures read so far are in"):
        done = update_index(folder, run, out, says)
    for line in done.skipped:
        says.say(f"skipped: {line}")
    line = f"{out}: {number_of(done.pictures, 'picture')}; {done.added:,} read, {done.gone:,} deleted or changed"
    show({"out": str(out), **asdict(done)}, [line], as_json)


def search(
    index: Annotated[Path, typer.Argument(help="Folder written by `index`.")],
    query: Annotated[str, typer.Argument(help="Text, or path of an image.")],
    best: Annotated[int, typer.Option(min=1, max=1000, help="Number of images to print.")] = 10,
    rerank: Annotated[int, typer.Option(min=0, max=1000, help="Text only: best images to re-rank by ITM.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Search an index by a text or an image: prints `similarity<TAB>path`, best first."""
    is_picture = os.path.isfile(query)  # unlike Path.is_file, no error for a text longer than a file name
    if not is_picture and _like_a_path(query):
        raise UserError(
            f"{query!r} looks like a path, but there is no such image file; to search for a text, write it as words"
        )
    progress(f"loading the model of {index}")
    from openblip2.apps.search import ImageSearch

    searcher = ImageSearch(index)
    if is_picture and rerank:
        raise UserError("--rerank is only for a text query: leave it out to search by image")
    hits = searcher.by_picture(Path(query), best) if is_picture else searcher.by_text(query, best, rerank)
    for hit in hits:
        if as_json:
            put({"path": str(hit.path), "similarity": hit.similarity, "match": hit.match})
        else:
            match = "" if hit.match is None else f"\t{hit.match:.3f}"
            typer.echo(f"{hit.similarity:.3f}{match}\t{printable(str(hit.path))}")


def _like_a_path(query: str) -> bool:
    from openblip2.data.images import PICTURE_SUFFIXES

    one_word = len(query.split()) == 1 and re.search(r"[/\\]|\.\w{2,5}$", query) is not None
    folder, suffix = os.path.dirname(query), os.path.splitext(query)[1].lower()
    return one_word or os.path.isdir(folder) or query.startswith(("./", "../", "~/")) or suffix in PICTURE_SUFFIXES


def serve(
    run: Run,
    matcher: Annotated[str | None, typer.Option(help="Stage-1 run; default: the one RUN started from.")] = None,
    index: Annotated[Path | None, typer.Option(help="Folder written by `index`, for search.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; all but 127.0.0.1 need --token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 = any free port.")] = 8000,
    token: Annotated[str | None, typer.Option(envvar="OPENBLIP2_TOKEN", help="Token that clients must send.")] = None,
    name: Annotated[list[str] | None, typer.Option(help="Host name of the server; can be repeated.")] = None,
    queue: Annotated[int, typer.Option(min=1, help="Maximum number of waiting requests; more get status 429.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Maximum number of requests in one batch.")] = 16,
    seconds: Annotated[float, typer.Option(min=1, help="Time limit for one request, in seconds.")] = 60.0,
    megabytes: Annotated[float, typer.Option(min=0.01, max=64, help="Size limit for one request, in MiB.")] = 16.0,
) -> None:
    """Serve a run as a web page and an OpenAI-compatible API."""
    try:
        import python_multipart  # noqa: F401

        from openblip2.apps.serve import app
        from openblip2.apps.serve.batcher import Limits
    except ImportError as error:
        raise UserError(f"the server needs {error.name}: pip install 'openblip2[serve]'") from error
    if host not in LOOPBACK and not token:
        raise UserError(f"--host {host}: other machines can reach it, so set --token (or OPENBLIP2_TOKEN)")
    limits = Limits(int(megabytes * 2**20), queue, batch, seconds=seconds)
    app.serve(app.find_runs(run, matcher, index), host, port, token, name or [], limits)
