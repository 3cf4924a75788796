"""What several commands take, and how they refuse it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from openblip2.errors import UserError

Run = Annotated[str, typer.Argument(help="A run that `train` or `demo` wrote, or published weights; see `convert`.")]
Images = Annotated[Path | None, typer.Option(help="The pictures' folder, where --data is an official .json.")]
Split = Annotated[str | None, typer.Option(help="Of an official file with many, or of easy-vqa.")]
Questions = Annotated[Path | None, typer.Option(help="The second file of VQAv2 and OK-VQA.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="section.field=value; may be given many times.", metavar="NAME=VALUE"),
]


def read_changes(pairs: list[str] | None) -> dict[str, str]:
    """What `--set` gives, by name."""
    for pair in pairs or ():
        if "=" not in pair:
            raise UserError(f"--set {pair!r}: write it as section.field=value, for example optim.lr=2e-4")
    return dict(pair.split("=", 1) for pair in pairs or ())  # pyright: ignore[reportReturnType]


def load_captioner(run: str) -> Any:
    """A run that can write text: a `Captioner`."""
    from openblip2.captioner import Captioner
    from openblip2.inference import load

    model = load(run)
    if not isinstance(model, Captioner):
        raise UserError(f"{run} is a stage-1 run, which cannot write text; give a stage-2 run")
    return model
