"""From what a user names to a running server."""

import signal
import socket
import sys
from pathlib import Path

import torch

from openblip2.errors import UserError
from openblip2.serve.limits import Limits
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
    """Serves until it is told to stop.

    Args:
        run: of either stage. matcher: a stage-1 run beside it; None = the one that it was trained from, where it is.
        names: by which the server may be called, beside `host` and this machine's own. threads: of torch; 0 = its own.

    Raises:
        UserError: no such runs, an index without a stage-1 run, an address that cannot be had, a missing package.
    """
    try:
        import multipart  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn

        from openblip2.serve.app import make_app
    except ImportError as error:
        raise UserError(f"the server needs {error.name}: pip install 'openblip2[serve]'") from error
    captioner, matcher = runs_of(run, matcher)
    if index is not None and matcher is None:
        raise UserError("--index needs a stage-1 run: give --matcher")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        line = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be had ({error.strerror}): give another --port or --host") from error
    hosts = [*names, host, "127.0.0.1", "localhost", "[::1]"]
    app = make_app(captioner, matcher, index, limits, token, hosts, threads or torch.get_num_threads())
    shown = f"[{host}]" if ":" in host else host
    print(f"openblip2: http://{shown}:{line.getsockname()[1]}/ when the models are loaded; Ctrl-C ends it", flush=True)
    # uvicorn gives a signal on to who had it before, once all is closed: then we end as other commands do.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, server_header=False))
    server.run(sockets=[line])


def runs_of(run: str, matcher: str | None) -> tuple[str | None, str | None]:
    """Which is the captioner and which the matcher.

    Raises:
        UserError: no runs, or both of one stage.
    """
    first = _stage(run)
    if first == "stage1":
        if matcher is not None:
            raise UserError(f"{run} is a stage-1 run already: --matcher goes with a stage-2 run")
        return None, run
    if matcher is not None:
        if _stage(matcher) != "stage1":
            raise UserError(f"--matcher {matcher}: is a stage-2 run; a stage-1 run")
        return run, matcher
    start = read_checkpoint(run).settings.start
    # Moved together they lie beside each other.
    places = [Path(start), Path(run).parent / Path(start).name] if start else []
    beside = next((str(place) for place in places if (place / "config.json").is_file()), None)
    return run, beside if beside is not None and _stage(beside) == "stage1" else None


def _stage(run: str) -> str:
    return read_checkpoint(run).settings.stage
