"""Commands for data of web scale: prepare, capfilt."""

import re
from pathlib import Path
from typing import Annotated

import typer

from openblip2.commands.shared import (
    AsJson,
    Images,
    Split,
    among,
    keeping,
    output,
    progress,
    put,
    read_data,
    require_kind,
    show,
)
from openblip2.errors import UserError, number_of

FILTERS = ("similarity", "itm")


def prepare(
    data: Annotated[str, typer.Argument(help="A folder, .jsonl or .csv, an official .json, or easy-vqa.")],
    out: Annotated[Path, typer.Option(help="Output folder of the shards; an interrupted run is continued.")],
    images: Images = None,
    split: Split = None,
    size: Annotated[int, typer.Option(min=1, help="Samples per shard.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the order of the samples.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Convert images with captions into shards for `train --data`."""
    says = progress()
    says.doing(f"reading {data}")
    from openblip2.data.web.write_shards import write_shards

    require_kind(out, "shards", data=data)
    source = read_data(data, "captions", images, split)
    with (
        output(out, "shards", "complete shards are in"),
        says.steps("pictures", len(source.records)) as bar,
    ):
        shards, samples, bad = write_shards(source.records, out, size, seed, lambda count: bar.advance(count=count))
    skipped = [*source.skipped, *bad]
    for line in skipped:
        says.say(f"skipped: {line}")
    values = {"out": str(out), "samples": samples, "shards": shards, "skipped": skipped}
    show(values, [f"{out}: {number_of(samples, 'sample')} in {number_of(shards, 'shard')}"], as_json)


def capfilt(
    shards: Annotated[str, typer.Argument(help="Folder of .tar files, 'web/{00000..00099}.tar', or URLs.")],
    captioner: Annotated[str, typer.Option(help="Stage-2 run that writes captions.")],
    ranker: Annotated[str, typer.Option(help="Stage-1 run, or a CLIP of transformers (folder or hub name).")],
    out: Annotated[Path, typer.Option(help="Output folder of the new shards; an interrupted run is continued.")],
    captions: Annotated[int | None, typer.Option(min=1, help="Captions to sample; default: 10, with itm 1.")] = None,
    top_p: Annotated[float, typer.Option(help="Probability mass for nucleus sampling.")] = 0.9,
    keep: Annotated[int, typer.Option(min=1, help="Captions to keep per image.")] = 2,
    filter: Annotated[
        str,
        typer.Option(help="similarity; or itm: drop captions that do not match.", autocompletion=among(FILTERS)),
    ] = "similarity",
    threshold: Annotated[float | None, typer.Option(help="itm: minimum match probability; default: 0.5.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the sampled captions.")] = 0,
    part: Annotated[str, typer.Option(help="K/N: process every Nth shard from the Kth on, for job arrays.")] = "1/1",
    as_json: AsJson = False,
) -> None:
    """CapFilt: sample new captions for the images of shards, and keep the captions that fit best."""
    says = progress()
    says.doing(f"loading {captioner} and {ranker}")
    from openblip2.capfilt import capfilt as run
    from openblip2.capfilt.shard import How

    require_kind(out, "captioned shards", "shards")
    if threshold is not None and filter != "itm":
        raise UserError("--threshold is only for --filter itm: leave it out, or add --filter itm")
    how = How(
        captions=(1 if filter == "itm" else 10) if captions is None else captions,
        top_p=top_p,
        keep=keep,
        filter=filter,  # pyright: ignore[reportArgumentType]
        threshold=0.5 if threshold is None else threshold,
        seed=seed,
    )
    with keeping(f"finished shards are in {out}; run the same command to continue", out):
        written = run(shards, captioner, ranker, out, how, says, _part(part))
    counts = written.counts
    if as_json:
        put({"out": str(out), "shards": written.shards, "counts": counts, "dead": written.dead})
        return
    if written.dead:
        says.say(f"{number_of(len(written.dead), 'shard')} could not be read: run the same command to try again")
    typer.echo(
        f"{out}: {number_of(counts['pictures'], 'picture')} in {number_of(written.shards, 'shard')}, "
        f"{counts['captions by the captioner']:,} of {counts['captions']:,} captions by the captioner"
    )


def _part(text: str) -> tuple[int, int]:
    """K and N of "K/N", 1 <= K <= N."""
    if match := re.fullmatch(r"(\d{1,6})/(\d{1,6})", text):
        number, parts = int(match[1]), int(match[2])
        if 1 <= number <= parts:
            return number, parts
    raise UserError(f"--part {text!r}: write it as K/N, from 1/N to N/N")
