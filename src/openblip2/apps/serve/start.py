"""Which runs are served, and how the server is started."""

import signal
import socket
import sys
from pathlib import Path

import uvicorn

from openblip2.apps.serve.app import make_app
from openblip2.apps.serve.batcher import Limits
from openblip2.apps.serve.engine import Served
from openblip2.apps.serve.worker import Worker
from openblip2.errors import UserError
from openblip2.weights.assemble import read_checkpoint


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
    # uvicorn passes a signal on to the earlier handler when all is closed: then we end as other commands do.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print("openblip2: loading the models ...", file=sys.stderr, flush=True)
    name = f"[{host}]" if ":" in host else host
    app = make_app(Worker(served, 2 * limits.seconds), limits, token, [*names, name, "127.0.0.1", "localhost", "[::1]"])
    # The socket listens already: who connects from now on is answered.
    print(f"openblip2: http://{name}:{listener.getsockname()[1]}/ is ready; press Ctrl-C to stop", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, server_header=False)
    uvicorn.Server(config).run(sockets=[listener])


def find_runs(run: str, matcher: str | None, index: Path | None) -> Served:
    """What to serve.

    Args:
        run: of either stage.
        matcher: a stage-1 run; None = the one that a stage-2 `run` was trained from, if it is found.
        index: a folder that `openblip2 index` wrote.

    Raises:
        UserError: no runs, both of one stage, or an index without a stage-1 run.
    """
    captioner: str | None = run
    if _stage(run) == "stage1":
        if matcher is not None:
            raise UserError(f"{run} is a stage-1 run: leave out --matcher, or give a stage-2 run in its place")
        captioner, matcher = None, run
    elif matcher is None:
        start = Path(read_checkpoint(run).settings.start or ".")
        # Runs that were moved together are still side by side.
        found = [str(folder) for folder in (start, Path(run).parent / start.name) if (folder / "config.json").is_file()]
        matcher = found[0] if found and _stage(found[0]) == "stage1" else None
    elif _stage(matcher) != "stage1":
        raise UserError(f"--matcher {matcher} is a stage-2 run: give a stage-1 run")
    if index is not None and matcher is None:
        raise UserError("--index needs a stage-1 run: give --matcher")
    return Served(captioner, matcher, None if index is None else str(index))


def _stage(run: str) -> str:
    return read_checkpoint(run).settings.stage
