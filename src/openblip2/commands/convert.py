"""The command that writes weights in another format."""

from pathlib import Path
from typing import Annotated

import typer

from openblip2.commands.shared import AsJson, among, progress, put

TARGETS = ("openblip2", "hf", "lavis", "onnx")


def convert(
    source: Annotated[str, typer.Argument(help="A run of ours, a LAVIS .pth, or transformers' BLIP-2 (folder, hub).")],
    out: Annotated[Path, typer.Argument(help="A new folder (openblip2, hf) or file (lavis: .pth, onnx: .onnx).")],
    to: Annotated[str, typer.Option(help="openblip2, hf, lavis or onnx.", autocompletion=among(TARGETS))],
    heads: Annotated[int | None, typer.Option(help="Heads of the Q-Former, if not BERT's 12.")] = None,
    vision: Annotated[str | None, typer.Option(help="The image encoder, instead of the source's.")] = None,
    language: Annotated[str | None, typer.Option(help="The language model, instead of the source's.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="The Q-Former's tokenizer, if the source has none.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write published weights as ours, ours as transformers' or LAVIS', or an image path as an ONNX graph."""
    progress().doing(f"converting {source}")
    from openblip2.weights.convert import convert as write

    notes = write(source, out, to, heads=heads, vision=vision, language=language, tokenizer=tokenizer)
    if as_json:
        put({"out": str(out), "notes": notes})
        return
    for note in notes:
        typer.echo(f"note: {note}")
    typer.echo(str(out))
