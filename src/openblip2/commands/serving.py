"""The command that puts a run behind a page and an API: serve."""

import os
from pathlib import Path
from typing import Annotated

import typer

from openblip2.commands.shared import Run
from openblip2.errors import UserError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    run: Run,
    matcher: Annotated[str | None, typer.Option(help="A stage-1 run, too; else the one that RUN came from.")] = None,
    index: Annotated[Path | None, typer.Option(help="A folder that `index` wrote, to search.")] = None,
    host: Annotated[str, typer.Option(help="An address other than this machine's own wants a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 = any that is free.")] = 8000,
    token: Annotated[str | None, typer.Option(envvar="OPENBLIP2_TOKEN", help="What clients must show.")] = None,
    name: Annotated[list[str] | None, typer.Option(help="A name the server is called by; may be repeated.")] = None,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are told 429.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Requests that run together, at most.")] = 16,
    seconds: Annotated[float, typer.Option(min=1, help="That a request may take.")] = 60.0,
    megabytes: Annotated[float, typer.Option(min=0.01, max=64, help="Of a request.")] = 16.0,
    remote: Annotated[bool, typer.Option("--remote-images", help="Fetch pictures from public addresses.")] = False,
) -> None:
    """A page and an API before a run, on this machine."""
    from openblip2.serve.limits import Limits
    from openblip2.serve.start import serve as start

    if host not in LOOPBACK and not token:
        raise UserError(
            f"--host {host}: others can reach it, so it wants a --token (or OPENBLIP2_TOKEN) for them to show"
        )
    limits = Limits(int(megabytes * 2**20), queue, batch, seconds=seconds, remote=remote)
    start(run, matcher, index, host, port, token, name or [], limits, int(os.environ.get("OMP_NUM_THREADS", 0)))
