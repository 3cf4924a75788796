"""The command that writes weights in another format."""

from pathlib import Path
from typing import Annotated

import typer

from openblip2.commands.shared import AsJson, among, progress, put

TARGETS = ("openblip2", "hf", "lavis", "onnx", "projected")


def convert(
    source: Annotated[str, typer.Argument(help="A run, a LAVIS .pth, or transformers' BLIP-2 (folder or hub name).")],
    out: Annotated[Path, typer.Argument(help="New folder, or new file (lavis: .pth, onnx: .onnx).")],
    to: Annotated[
        str, typer.Option(help="Format: openblip2, hf, lavis, onnx or projected.", autocompletion=among(TARGETS))
    ],
    heads: Annotated[int | None, typer.Option(help="Attention heads of the Q-Former, if not 12 as in BERT.")] = None,
    vision: Annotated[str | None, typer.Option(help="Image encoder to use instead of the source's.")] = None,
    language: Annotated[str | None, typer.Option(help="Language model to use instead of the source's.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer of the Q-Former, if the source has none.")] = None,
    vision_heads: Annotated[
        int | None, typer.Option(help="Attention heads of the image encoder in a .pth, if it is not ViT-g.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier call wrote to OUT.")] = False,
    as_json: AsJson = False,
) -> None:
    """Convert weights between openblip2, transformers and LAVIS, or export the image path to ONNX."""
    progress().doing(f"converting {source}")
    from openblip2.weights.convert import convert as write

    parts = {"vision": vision, "language": language, "tokenizer": tokenizer}
    notes = write(source, out, to, heads=heads, vision_heads=vision_heads, overwrite=overwrite, **parts)
    if as_json:
        put({"out": str(out), "notes": notes})
        return
    for note in notes:
        typer.echo(f"note: {note}")
    typer.echo(str(out))
