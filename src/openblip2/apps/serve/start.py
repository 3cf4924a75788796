"""Start a server from what the command line gives."""

import signal
import socket
import sys
from pathlib import Path

from openblip2.apps.serve.batcher import Limits
from openblip2.errors import UserError
from openblip2.weights.source import read_checkpoint


def serve(
    run: str,
    matcher: str | None,
    index: Path | None,
    host: str,
    port: int,
    token: str | None,
    names: list[str],
    limits: Limits,
    threads: int = 0,
) -> None:
    """Serves until it is stopped.

    Args:
        run: of either stage.
        matcher: a stage-1 run to serve as well; None = the one that `run` was trained from, if it is found.
        index: a folder that `openblip2 index` wrote.
        host: address to listen on.
        port: 0 = any free one.
        token: that clients must send; None = none.
        names: in the Host header, besides `host` and the names of this machine.
        limits: of requests.
        threads: of torch; 0 = torch's default.

    Raises:
        UserError: no such runs, an index without a stage-1 run, an address that cannot be used, a missing package.
    """
    try:
        import multipart  # noqa: F401
        import uvicorn

        from openblip2.apps.serve.app import make_app
        from openblip2.apps.serve.worker import Worker
    except ImportError as error:
        raise UserError(f"the server needs {error.name}: pip install 'openblip2[serve]'") from error
    captioner, matcher = runs_of(run, matcher)
    if index is not None and matcher is None:
        raise UserError("--index needs a stage-1 run: give --matcher")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port} ({error.strerror}): give another --port or --host") from error
    # uvicorn passes a signal on to the earlier handler when all is closed: then we end as other commands do.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    shown = f"[{host}]" if ":" in host else host
    print("openblip2: loading the models ...", file=sys.stderr, flush=True)
    worker = Worker(captioner, matcher, None if index is None else str(index), threads, 2 * limits.seconds)
    hosts = [*names, shown, "127.0.0.1", "localhost", "[::1]"]
    app = make_app(worker, index, limits, token, hosts)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            address = f"http://{shown}:{listener.getsockname()[1]}/"
            print(f"openblip2: {address} is ready; press Ctrl-C to stop", flush=True)

    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, server_header=False)
    Server(config).run(sockets=[listener])


def runs_of(run: str, matcher: str | None) -> tuple[str | None, str | None]:
    """The captioner and the matcher to serve.

    Args:
        run: of either stage.
        matcher: a stage-1 run; None = the one that a stage-2 `run` was trained from, if it is found.

    Raises:
        UserError: no runs, or both of one stage.
    """
    if _stage(run) == "stage1":
        if matcher is not None:
            raise UserError(f"{run} is a stage-1 run: leave out --matcher, or give a stage-2 run in its place")
        return None, run
    if matcher is not None:
        if _stage(matcher) != "stage1":
            raise UserError(f"--matcher {matcher} is a stage-2 run: give a stage-1 run")
        return run, matcher
    start = read_checkpoint(run).settings.start
    # Runs that were moved together are still side by side.
    places = [Path(start), Path(run).parent / Path(start).name] if start else []
    nearby = next((str(place) for place in places if (place / "config.json").is_file()), None)
    return run, nearby if nearby is not None and _stage(nearby) == "stage1" else None


def _stage(run: str) -> str:
    return read_checkpoint(run).settings.stage
