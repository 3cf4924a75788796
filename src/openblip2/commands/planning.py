"""The command that plans a run: FLOPs, time and memory."""

import re
from typing import Annotated, Any

import typer

from openblip2.commands.shared import AsJson, Settings, among, presets, progress, read_changes, show
from openblip2.errors import UserError

STAGES = ("stage1", "stage2")
_TIMES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_GIB = 2**30


def plan(
    preset: Annotated[
        str,
        typer.Option(
            help="A stage, a dash and a preset of `train`, for example stage1-vit-g.",
            autocompletion=among(lambda: [f"{stage}-{name}" for stage in STAGES for name in presets(stage)]),
        ),
    ],
    gpus: Annotated[str, typer.Option(help="GPUs, for example 16xA100-40G; also A100-80G, H100, H200, L40S, 4090.")],
    efficiency: Annotated[float, typer.Option(help="Fraction of the GPU's peak that the run reaches.")] = 0.15,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size over all GPUs; default: the preset's.")] = None,
    images: Annotated[str, typer.Option(help="Number of images in the data, for example 129M or 14.5K.")] = "129M",
    parallel: Annotated[
        str | None,
        typer.Option(
            help="ddp, or fsdp2 to shard the frozen layers over the GPUs.", autocompletion=among(("ddp", "fsdp2"))
        ),
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
    says = progress()
    says.doing("planning")
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
