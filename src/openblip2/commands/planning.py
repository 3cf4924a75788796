"""The command that plans a run: memory, time, disk and network before anything is paid for."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from openblip2.commands.shared import AsJson, Settings, among, presets, progress, put, read_changes
from openblip2.errors import UserError

STAGES = ("stage1", "stage2")
_TIMES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def plan(
    preset: Annotated[
        str,
        typer.Option(
            help="Stage and preset of `train`, for example stage1-vit-g.",
            autocompletion=among(lambda: [f"{stage}-{name}" for stage in STAGES for name in presets(stage)]),
        ),
    ],
    gpus: Annotated[
        str, typer.Option(help="For example 16xA100-40G; A100-80G, H100, H200, V100-32G, L40S, 4090, T4, ...; or cpu.")
    ],
    efficiency: Annotated[float | None, typer.Option(help="Fraction of the peak; default: of published runs.")] = None,
    measured: Annotated[Path | None, typer.Option(help="File of `bench --out` to take the efficiency from.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Pairs over all GPUs; default: the preset's.")] = None,
    images: Annotated[str, typer.Option(help="Number of images in the data, for example 129M or 14.5K.")] = "129M",
    parallel: Annotated[
        str | None,
        typer.Option(
            help="ddp or fsdp2 (shards the frozen layers over the GPUs).", autocompletion=among(("ddp", "fsdp2"))
        ),
    ] = None,
    cached: Annotated[
        bool | None, typer.Option("--cached/--no-cached", help="Read features from a cache; default: by data.augment.")
    ] = None,
    text_tokens: Annotated[
        int | None, typer.Option(help="Tokens that captions are padded to; default: data.max_tokens.")
    ] = None,
    per_machine: Annotated[int, typer.Option(min=1, help="GPUs per machine.")] = 8,
    network: Annotated[float, typer.Option(min=0.001, help="Gbit per second of each machine's network.")] = 100.0,
    as_json: AsJson = False,
    changes: Settings = None,
) -> None:
    """Estimate memory, time, disk and network of a run. Downloads nothing."""
    progress().doing("planning")
    from openblip2.config import change
    from openblip2.plan.gpus import CPU, read_cluster
    from openblip2.plan.measured import measured_efficiency
    from openblip2.plan.plan import make_plan
    from openblip2.plan.words import as_values, in_words
    from openblip2.presets import PRESETS
    from openblip2.presets import preset as named

    stage, _, name = preset.partition("-")
    if stage not in PRESETS or not name:
        known = ", ".join(f"{stage}-{name}" for stage, names in PRESETS.items() for name in names)
        raise UserError(f"--preset {preset!r}: give one of {known}")
    given = {"train.batch": batch, "train.parallel": parallel}
    settings = change(
        named(stage, name), {**read_changes(changes), **{k: v for k, v in given.items() if v is not None}}
    )
    if measured is not None and efficiency is not None:
        raise UserError("--efficiency and --measured: give one of them")
    cluster = read_cluster(gpus, per_machine, network)
    if measured is not None:
        efficiency, peak = measured_efficiency(measured, stage)
        if cluster.kind.name == CPU:  # the peak that it was a share of
            cluster = replace(cluster, kind=replace(cluster.kind, flops=peak))
    found = make_plan(settings, cluster, efficiency, _count(images), cached, text_tokens, measured is not None)
    if as_json:
        put(as_values(found, preset))
    else:
        typer.echo("\n".join(in_words(found, preset)))


def _count(text: str) -> int:
    """129M, 14.5K, 100."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.strip().replace(",", ""), re.IGNORECASE)
    if not found:
        raise UserError(f"--images {text!r}: write it as 129M, 14.5K or 100")
    return round(float(found[1]) * _TIMES[found[2].upper()])
