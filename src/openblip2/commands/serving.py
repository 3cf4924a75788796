"""Commands that serve a run and measure the server under load: serve, bench-serve."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from openblip2.commands.shared import AsJson, Overwrite, Run, progress, put, tell
from openblip2.errors import UserError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


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


def bench_serve(
    run: Run,
    pictures: Annotated[Path, typer.Argument(help="Folder of images for the requests.")],
    clients: Annotated[int, typer.Option(min=1, help="Number of clients that send requests at once.")] = 200,
    seconds: Annotated[float, typer.Option(min=1, help="Duration for each batch size, in seconds.")] = 120.0,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch size; can be repeated; default: 16.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Load test of the server: throughput, latency and memory with many clients."""
    from openblip2.apps.bench.load import bench_serve as press
    from openblip2.runs import new_result, write_json

    with nullcontext() if out is None else new_result(out, overwrite):
        found = press(run, pictures, clients, seconds, batch or [16], progress())
        if out is not None:
            write_json(found, out)
    for one in found:
        if as_json:
            put(one)
            continue
        tell(
            f"batches of {one['batch']:2}: {one['per_second']:.1f} answers a second, half within {one['p50']:.1f} s, "
            f"95 % within {one['p95']:.1f} s; {one['statuses'].get('429', 0):,} told to wait, {one['errors']} errors; "
            f"{one['memory'] / 2**30:.2f} GiB, grew by {100 * one['memory_grew']:.1f} % after warming up"
        )
