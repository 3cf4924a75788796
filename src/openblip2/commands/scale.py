"""Commands for data of web scale: prepare."""

from pathlib import Path
from typing import Annotated

import typer

from openblip2.commands.shared import Images, Split


def prepare(
    data: Annotated[str, typer.Argument(help="A folder, .jsonl or .csv, an official .json, easy-vqa or stamps.")],
    out: Annotated[Path, typer.Option(help="Folder of the shards; an interrupted run is gone on with.")],
    images: Images = None,
    split: Split = None,
    size: Annotated[int, typer.Option(min=1, help="Samples of a shard.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the samples.")] = 0,
) -> None:
    """Turn pictures with captions into shards for `train --data`: `openblip2 prepare pictures/ --out shards/`."""
    from openblip2.data.sources import read_corpus
    from openblip2.data.write_shards import write_shards
    from openblip2.train.progress import Progress

    progress = Progress()
    source = read_corpus(data, images, split)
    written = write_shards(source.records, out, size, seed, progress.say)
    for line in [*source.skipped, *written.skipped]:
        progress.say(f"skipped: {line}")
    typer.echo(f"{out}: {written.samples:,} samples in {written.shards:,} shards")
