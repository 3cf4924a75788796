"""The command line: the list of its commands.

Nothing heavy is imported before one runs, so that `--help` answers at once.

Exit codes: 0 done, 2 something handed in cannot be used (one line says what), 130 interrupted, 143 told to stop
(SIGTERM).
"""

import sys

import typer

from openblip2.commands.convert import convert
from openblip2.commands.find import index, search
from openblip2.commands.learn import demo, features, train
from openblip2.commands.measure import bench, bench_real, compare, doctor, evaluate
from openblip2.commands.planning import plan
from openblip2.commands.scale import capfilt, prepare
from openblip2.commands.serving import bench_serve, serve
from openblip2.commands.study import ablate
from openblip2.commands.use import answer, attend, caption, chat, rank
from openblip2.errors import UserError

app = typer.Typer(
    help="Give any language model eyes: BLIP-2, both stages, any image encoder, any language model.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    demo,
    train,
    features,
    prepare,
    capfilt,
    caption,
    answer,
    chat,
    rank,
    attend,
    index,
    search,
    serve,
    evaluate,
    compare,
    doctor,
    convert,
    bench,
    bench_real,
    bench_serve,
    plan,
    ablate,
):
    app.command()(command)


def main() -> None:
    """The `openblip2` command: what a user handed in wrongly becomes one line and exit code 2."""
    import warnings

    # A bomb-sized picture is refused by its header; Pillow's own warning would only stand before that line.
    warnings.filterwarnings("ignore", message="Image size .* could be decompression bomb")
    try:
        app()
    except UserError as error:
        print(f"openblip2: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
