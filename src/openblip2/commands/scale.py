"""Commands for runs and data of web scale: plan (FLOPs, time and memory), prepare, capfilt."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from openblip2.commands.shared import (
    AsJson,
    Images,
    Settings,
    Split,
    keeping,
    one_of,
    output,
    presets,
    progress,
    put,
    read_changes,
    read_data,
    require_kind,
    show,
)
from openblip2.errors import UserError, number_of

FILTERS = ("similarity", "itm")
STAGES = ("stage1", "stage2")
_TIMES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_GIB = 2**30


def plan(
    preset: Annotated[
        str,
        one_of(
            lambda: [f"{stage}-{name}" for stage in STAGES for name in presets(stage)],
            "A stage, a dash and a preset of `train`, for example stage1-vit-g.",
        ),
    ],
    gpus: Annotated[str, typer.Option(help="GPUs, for example 16xA100-40G; also A100-80G, H100, H200, L40S, 4090.")],
    efficiency: Annotated[float, typer.Option(help="Fraction of the GPU's peak that the run reaches.")] = 0.15,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size over all GPUs; default: the preset's.")] = None,
    images: Annotated[str, typer.Option(help="Number of images in the data, for example 129M or 14.5K.")] = "129M",
    parallel: Annotated[
        str | None, one_of(("ddp", "fsdp2"), "ddp, or fsdp2 to shard the frozen layers over the GPUs.")
    ] = None,
    cached: Annotated[
        bool | None, typer.Option("--cached/--no-cached", help="Read features from a cache; default: by data.augment.")
    ] = None,
    text_tokens: Annotated[
        int | None, typer.Option(help="Tokens that captions are padded to; default: data.max_tokens.")
    ] = None,
    as_json: AsJson = False,
    changes: Settings = None,
) -> None:
    """Estimate what a run needs: parameters, FLOPs, days, memory. Nothing is downloaded, and no GPU is needed."""
    says = progress("planning")
    from openblip2.config import change
    from openblip2.plan import make_plan
    from openblip2.presets import PRESETS
    from openblip2.presets import preset as named
    from openblip2.train.start import say_without_effect

    stage, _, name = preset.partition("-")
    if stage not in PRESETS or not name:
        known = ", ".join(f"{stage}-{name}" for stage, names in PRESETS.items() for name in names)
        raise UserError(f"--preset {preset!r}: give one of {known}")
    if not 0 < efficiency <= 1:
        raise UserError(f"--efficiency {efficiency:g}: it must be a fraction of the peak, above 0 and at most 1")
    given = {"train.batch": batch, "train.parallel": parallel}
    given = {**read_changes(changes), **{k: v for k, v in given.items() if v is not None}}
    settings = change(named(stage, name), given)
    number, (gpu, count) = _read_count(images), read_gpus(gpus)
    say_without_effect(f"plan --preset {preset}", given, [settings], says, shards=True, processes=count)
    figures: dict[str, Any] = {"preset": preset}
    figures |= make_plan(settings, gpu, count, efficiency, cached, text_tokens)
    figures["features"] |= {"images": number, "bytes": number * figures["features"]["bytes_of_an_image"]}
    show(figures, _lines(figures), as_json)


def read_gpus(text: str) -> tuple[str, int]:
    """The name and the number in "16xA100-40G" or "H100".

    Raises:
        UserError: The GPU is not in the table, or the number is not 1 to 99,999.
    """
    from openblip2.plan import GPUS

    match = re.fullmatch(r"(?:([1-9]\d{0,4})x)?(.+)", text.strip().lower())
    names = {name.lower(): name for name in GPUS}
    if match is None or match[2] not in names:
        raise UserError(f"--gpus {text!r}: write it as 16xA100-40G; the GPUs are {', '.join(GPUS)}")
    return names[match[2]], int(match[1] or 1)


def _read_count(text: str) -> int:
    """Reads a number such as 129M, 14.5K or 100."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.strip().replace(",", ""), re.IGNORECASE)
    if not match:
        raise UserError(f"--images {text!r}: write it as 129M, 14.5K or 100")
    return round(float(match[1]) * _TIMES[match[2].upper()])


def _lines(figures: dict[str, Any]) -> list[str]:
    """The lines of a plan as text."""
    gpus, step, run, memory = (figures[name] for name in ("gpus", "step", "run", "memory"))
    lines = [
        f"{figures['preset']} on {gpus['count']} x {gpus['kind']}: {run['steps']:,} steps of {step['pairs']:,} pairs",
        "",
        *_table("parameters", {name: f"{count:,}" for name, count in figures["parameters"].items()}),
        "",
        f"{'GFLOP per pair':36}{'forward':>14}{'backward':>14}",
        *(
            f"{part:36}{work['forward'] / 1e9:14.1f}{work['backward'] / 1e9:14.1f}"
            for part, work in figures["flops_of_a_pair"].items()
        ),
        "",
        *_table("memory per GPU, GiB", {name: f"{size / _GIB:.2f}" for name, size in memory["items"].items()}),
        f"{'total':36}{memory['total'] / _GIB:14.2f} of {gpus['memory'] / _GIB:.0f}: "
        + ("fits" if memory["fits"] else "does not fit; try a smaller train.chunk, train.checkpoint_activations=true,"),
    ]
    if not memory["fits"]:
        lines.append("or --parallel fsdp2, which shards the frozen layers")
    seconds, days = step["seconds"], run["days"]
    duration = f"{days:.3g} days" if days >= 2 else f"{days * 24:.3g} hours"
    lines += [
        "",
        f"a step: {step['flops'] / 1e12:,.0f} TFLOP in {seconds:.3g} s at {100 * run['efficiency']:.3g} % of the peak, "
        f"{step['pairs'] / seconds:,.0f} images per second",
        f"{run['steps']:,} steps: {duration}",
        f"a cache of {figures['features']['images']:,} images: {figures['features']['bytes'] / 1e9:,.1f} GB in fp16",
    ]
    if gpus["count"] > 1:
        lines += ["", *_table("sent by each GPU per step, MB", {k: f"{v / 1e6:,.1f}" for k, v in step["sent"].items()})]
    return lines


def _table(title: str, rows: dict[str, str]) -> list[str]:
    return [title, *(f"{name:36}{value:>14}" for name, value in rows.items())]


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
    says = progress(f"reading {data}")
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
    filter: Annotated[str, one_of(FILTERS, "similarity; or itm: drop captions that do not match.")] = "similarity",
    threshold: Annotated[float | None, typer.Option(help="itm: minimum match probability; default: 0.5.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the sampled captions.")] = 0,
    part: Annotated[str, typer.Option(help="K/N: process every Nth shard from the Kth on, for job arrays.")] = "1/1",
    as_json: AsJson = False,
) -> None:
    """CapFilt: sample new captions for the images of shards, and keep the captions that fit best."""
    says = progress(f"loading {captioner} and {ranker}")
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
