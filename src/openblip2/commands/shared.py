"""Options, checks, progress and output that several commands share."""

import gc
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openblip2.compat import log
from openblip2.errors import UserError

if TYPE_CHECKING:
    from openblip2.data.sources import Source
    from openblip2.progress import Progress

Run = Annotated[str, typer.Argument(help="Run written by `train` or `demo`, or published weights (see `convert`).")]
Images = Annotated[Path | None, typer.Option(help="Folder of the images, if --data is an official .json.")]
Split = Annotated[str | None, typer.Option(help="Split of easy-vqa, or of an official file with several.")]
Questions = Annotated[Path | None, typer.Option(help="File of the questions, for VQAv2 and OK-VQA.")]
VisualTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Use only the first N visual tokens (for a run with stage2.elastic_tokens)."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting, for example optim.lr=2e-4; can be repeated.", metavar="NAME=VALUE"),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier call wrote to --out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON, one object per line.")]

# Possible contents of a folder, and the files by which they are recognized.
HOLDS = {
    "a run or another model": ("config.json", "model.safetensors"),
    "a feature cache": ("features.jsonl",),
    "an index": ("index.json",),
    "captioned shards": ("capfilt.json",),
    "shards": ("*.tar",),
    "a demo": ("metrics.json",),
    "a study": ("ablation.json",),
    "results of bench-real": ("real.json",),
    "images": ("records.jsonl", "metadata.jsonl", "metadata.csv"),
}
WORLDS = {"small": 12, "full": 222}  # kinds of drawn scenes: number of nouns

_asked = {"quiet": False}


def require_world(world: str) -> None:
    """Raises a `UserError` unless `world` is a kind of drawn scenes."""
    if world not in WORLDS:
        raise UserError(f"unknown world {world!r}: it must be {' or '.join(WORLDS)}")


def one_of(known: Collection[str] | Callable[[], Collection[str]], help: str, kind: Any = typer.Option) -> Any:
    """A `typer.Option` or `typer.Argument` with completion of known values, listed when a shell asks for them."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in (known() if callable(known) else known) if name.startswith(incomplete)]

    return kind(help=help, autocompletion=complete)


def presets(stage: str | None = None) -> list[str]:
    """The names of the presets of one stage, or of all stages."""
    from openblip2.presets import FINE_TUNING, PRESETS

    every = PRESETS | FINE_TUNING
    return list(dict.fromkeys(name for one in ([stage] if stage else every) for name in every[one]))


def be_quiet(asked: bool) -> None:
    """Switches progress and warnings off for the command that follows, as `openblip2 --quiet` does."""
    _asked["quiet"] = asked
    log.setLevel(logging.ERROR if asked else logging.NOTSET)


def progress(doing: str = "", first: bool = True) -> "Progress":
    """A `Progress` for the command. It prints nothing after `--quiet`, and in all processes but the first.

    `doing`: what the command does first.
    """
    from openblip2.progress import Progress

    says = Progress(quiet=_asked["quiet"] or not first)
    if doing:
        says.doing(doing)
    return says


def put(values: dict[str, Any]) -> None:
    """Prints an object as one line of JSON on standard output."""
    tell(json.dumps(values, ensure_ascii=False))


def show(values: dict[str, Any], lines: Iterable[str], as_json: bool) -> None:
    """Prints the result of a command: as one object in JSON, or as these lines."""
    if as_json:
        put(values)
        return
    for line in lines:
        tell(line)


def tell(line: str) -> None:
    """Prints a line of the result immediately. `typer.echo` would write into the line of a running progress bar."""
    print(line.encode(errors="backslashreplace").decode(), flush=True)  # file names may have bytes that are not text


@contextmanager
def keeping(what: str, kept: Path | None = None) -> Iterator[None]:
    """If the block is interrupted, the message also says `what`: what was kept, and how to continue.

    It says that nothing was saved if `kept` does not exist or is an empty folder.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        there = kept is None or (any(kept.iterdir()) if kept.is_dir() else kept.exists())
        stop.add_note(what if there else "nothing is saved yet: run the same command again")
        raise


def require_kind(out: Path, *kinds: str, data: str | Path | None = None) -> None:
    """Checks that an output folder contains no other kind of output than these, so that outputs are never mixed.

    Args:
        out: the folder; it need not exist.
        kinds: keys of `HOLDS` that it may contain.
        data: the folder of the images, which must be another one.

    Raises:
        UserError: it contains something else, or it is `data`.
    """
    if data is not None and Path(data).resolve() == out.resolve():
        raise UserError(f"{out} is the folder of the images: give another --out")
    for kind, marks in HOLDS.items():
        if kind not in kinds and (found := sorted(file.name for mark in marks for file in out.glob(mark))):
            raise UserError(f"{out} contains {kind} ({found[0]}): give another --out")


@contextmanager
def output(out: Path, kind: str, what: str, kept: Path | None = None) -> Iterator[None]:
    """Locks the output folder of a command during the block.

    Args:
        out: the folder.
        kind: the only key of `HOLDS` that it may contain.
        what: as for `keeping`, without the name of the folder.
        kept: as for `keeping`; None = `out`.

    Raises:
        UserError: it contains something else, or another process has locked it.
    """
    from openblip2.runs import locked

    require_kind(out, kind)
    with keeping(f"{what} {out}; run the same command to continue", kept or out), locked(out):
        yield


def read_changes(pairs: list[str] | None) -> dict[str, str]:
    """The values of `--set`, by the name of the setting."""
    for pair in pairs or ():
        if "=" not in pair:
            raise UserError(f"--set {pair!r}: write it as section.field=value, for example optim.lr=2e-4")
    return dict(pair.split("=", 1) for pair in pairs or ())  # pyright: ignore[reportReturnType]


def open_single(images: Sequence[Path], empty: dict[str, Any] | None) -> None:
    """Checks that a picture can be read if it is the only one of a command.

    Args:
        images: the pictures of the command.
        empty: the result that is printed as JSON before the error; None = nothing is printed.

    Raises:
        UserError: the only picture cannot be read.
    """
    from openblip2.data.images import open_picture

    try:
        if len(images) == 1:
            open_picture(images[0])
    except UserError:
        if empty:
            put(empty)
        raise


def require_all(images: Sequence[Path], bad: Sequence[Path]) -> None:
    """Raises a `UserError` if some pictures could not be read, at the end of a command that processed all others."""
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        names = ", ".join(map(str, bad[:3])) + more
        raise UserError(f"{len(bad):,} of {len(images):,} pictures cannot be read and have no result: {names}")


def read_data(
    data: str,
    wanted: Any,
    images: Path | None = None,
    split: str | None = None,
    questions: Path | None = None,
    **options: bool,
) -> "Source":
    """`read_source`, and a corpus that a package contains, by its name: easy-VQA."""
    from openblip2.apps.corpora.easy_vqa import NAME, read_easy_vqa
    from openblip2.data.sources import read_source

    if not data.strip():
        raise UserError("--data is empty (maybe a shell variable is not set): give a folder or a file")
    if data != NAME:
        return read_source(data, wanted, images, split, questions, **options)
    if images or questions or split not in ("train", "test"):
        raise UserError(f"--data {data}: give --split train or --split test, and neither --images nor --questions")
    return read_easy_vqa(split)


def load_captioner(run: str, visual_tokens: int | None = None) -> Any:
    """Loads a run that can generate text, as a `Captioner`; `visual_tokens` as for `load`."""
    progress(f"loading {run}")
    gc.disable()  # imported modules are never freed; garbage collection would take an eighth of the time
    try:
        from openblip2.inference.captioner import Captioner
        from openblip2.inference.load import load

        model = load(run, visual_tokens=visual_tokens)
    finally:
        gc.enable()
    if not isinstance(model, Captioner):
        raise UserError(f"{run} is a stage-1 run, which cannot write text; give a stage-2 run")
    return model
