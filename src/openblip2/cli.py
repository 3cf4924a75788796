"""The command line: the list of its commands, each with an example.

Large libraries are imported only when a command runs, so that `--help` is fast.

Results go to standard output; progress and errors go to standard error. Exit codes:

    0    the command is done
    1    an error in openblip2, with a traceback; or the reader of the output has closed it
    2    the input cannot be used; one line says why and what to do
    130  interrupted by Ctrl-C; one line says what was kept
    143  stopped by SIGTERM; one line says what was kept
"""

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from errno import EDQUOT, EFBIG, ENOSPC, EROFS
from typing import Annotated, Any

import typer

from openblip2.commands.learn import convert, demo, features, train
from openblip2.commands.measure import ablate, bench, bench_real, compare, doctor, evaluate
from openblip2.commands.scale import capfilt, plan, prepare
from openblip2.commands.serving import index, search, serve
from openblip2.commands.shared import be_quiet
from openblip2.commands.use import answer, attend, caption, chat, rank
from openblip2.errors import Stopped, UserError

NO_ROOM = (ENOSPC, EDQUOT, EFBIG, EROFS)  # errors of a full or read-only disk

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def everywhere(
    context: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only; put it before the command.")] = False,
    as_json: Annotated[bool, typer.Option("--json", hidden=True)] = False,
) -> None:
    """BLIP-2: connect a frozen image encoder to a frozen language model. Train, evaluate and use it."""
    if as_json:
        raise UserError(f"put --json after the command: openblip2 {context.invoked_subcommand} ... --json")
    be_quiet(quiet)


def interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command so that an interruption prints one line, which also says what was kept (`shared.keeping`)."""

    def stopped(number: int, _: object) -> None:
        raise Stopped(number)

    @functools.wraps(command)
    def run(**given: Any) -> None:
        before = signal.getsignal(signal.SIGTERM)
        # Only for a single process: Python would not run the handler while processes wait for each other.
        alone = threading.current_thread() is threading.main_thread() and os.environ.get("WORLD_SIZE", "1") == "1"
        try:
            if alone:
                signal.signal(signal.SIGTERM, stopped)
            command(**given)
        except KeyboardInterrupt as stop:
            print("; ".join(["openblip2: interrupted", *getattr(stop, "__notes__", [])]), file=sys.stderr)
            raise typer.Exit(stop.code if isinstance(stop, Stopped) else 130) from None
        finally:
            if alone:
                signal.signal(signal.SIGTERM, before)

    return run


for command, example in (
    (demo, "--out runs/demo"),
    (train, "stage1 --data pictures/ --out runs/stage1"),
    (features, "pictures/ --out cache"),
    (prepare, "pictures/ --out shards/"),
    (capfilt, "shards/ --captioner runs/two --ranker runs/one --out new/"),
    (caption, "runs/demo/stage2 a.jpg b.jpg"),
    (answer, 'runs/demo/stage2 a.jpg "what colour is the cat?"'),
    (chat, "runs/demo/stage2 a.jpg"),
    (rank, 'runs/demo/stage1 "a teal cat" a.jpg b.jpg'),
    (attend, 'runs/demo/stage1 a.jpg --text "a teal cat" --out maps'),
    (index, "photos/ --run runs/demo/stage1 --out photos-index"),
    (search, 'photos-index "a teal cat" --best 5 --json'),
    (serve, "runs/demo/stage2 --port 8000"),
    (evaluate, "vqa runs/vqa --data easy-vqa --split test --out vqa.json"),
    (compare, "first.json second.json"),
    (doctor, "runs/demo/stage1 --out doctor.html"),
    (convert, "runs/demo/stage2 exported --to hf"),
    (bench, "--size tiny --case rerank"),
    (bench_real, "--out runs/real --fold 0"),
    (plan, "--preset stage1-vit-g --gpus 16xA100-40G"),
    (ablate, "queries --out runs/queries --values 4,16,32"),
):
    name = command.__name__.replace("_", "-")
    app.command(epilog=f"\b\nExample:\n  openblip2 {name} {example}")(interruptible(command))


def main() -> None:
    """The `openblip2` command. A `UserError` is printed as one line, and the exit code is 2."""
    import warnings

    # Images with too many pixels are refused; Pillow's own warning would only be printed before our message.
    warnings.filterwarnings("ignore", message="Image size .* could be decompression bomb")
    # FutureWarnings are for developers, not for users; the tests still show them.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        app(prog_name="openblip2")  # also for `python -m openblip2`
    except UserError as error:
        print(f"openblip2: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        where = f"{error.filename} cannot be written" if error.filename else "the output cannot be written"
        print(f"openblip2: {where} ({error.strerror}): free disk space and run the same command again", file=sys.stderr)
        sys.exit(2)
