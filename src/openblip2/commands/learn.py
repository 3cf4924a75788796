"""Commands that make runs, features and weights: demo, train, features, convert."""

import math
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from openblip2.commands.shared import (
    WORLDS,
    AsJson,
    Images,
    Overwrite,
    Questions,
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
    require_world,
    show,
    tell,
)
from openblip2.errors import UserError

TRAININGS = ("stage1", "stage2", "caption", "vqa", "instruct", "retrieval")
STORED = ("fp16", "bf16")
TARGETS = ("openblip2", "hf", "lavis", "onnx", "projected")
ARGUMENTS = {  # arguments of `train` that replace these settings
    "stage": "the word after train",
    "task": "the word after train",
    "start": "--start",
    "text_start": "--text-start",
    "data.source": "--data",
    "data.features": "--features",
}


def demo(
    out: Annotated[Path, typer.Option(help="Output folder for the runs, metrics.json and report.html.")],
    world: Annotated[
        str, one_of(WORLDS, f"Kind of scenes: small ({WORLDS['small']} nouns) or full ({WORLDS['full']} nouns).")
    ] = "small",
    budget: Annotated[float, typer.Option(help="Factor for the usual number of steps of both stages.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the scenes and of training.")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train both stages with small real models, and evaluate them on new images."""
    require_world(world)
    if not 0 < budget < math.inf:
        raise UserError(f"--budget {budget:g}: it must be a number above 0; 4 trains for four times the usual steps")
    says = progress("loading the libraries")
    from openblip2.apps.demo import run_demo
    from openblip2.apps.demo.plan import plan_for

    plan = plan_for(world, seed, budget)  # pyright: ignore[reportArgumentType]
    with output(out, "a demo", "checkpoints and finished runs are in", out / "stage1" / "resume"):
        metrics = run_demo(out, plan, says, overwrite)
    report, figures = str(out / "report.html"), str(out / "metrics.json")
    if as_json:
        for example in metrics["examples"]:
            put(example)
        put({"report": report, "metrics": figures})
        return
    tell(f"The first {len(metrics['examples'])} test pictures, none of them seen in training:")
    for example in metrics["examples"]:
        tell(f"\n{example['image']}\n  caption:   {example['caption']}\n  reference: {example['reference']}")
    tell(f"\nreport: {report}\nmetrics: {figures}")


def train(
    what: Annotated[
        str, one_of(TRAININGS, "stage1 or stage2; or fine-tuning: caption, vqa, instruct or retrieval.", typer.Argument)
    ],
    data: Annotated[
        str, typer.Option(help="Images with captions (vqa, instruct: questions): a folder, .csv, shards, ...")
    ],
    out: Annotated[Path, typer.Option(help="Output folder of the run.")],
    images: Images = None,
    split: Split = None,
    questions: Questions = None,
    preset: Annotated[str, one_of(presets, "Name of a complete set of settings.")] = "laptop",
    start: Annotated[Path | None, typer.Option(help="Run to start from (not for stage1).")] = None,
    text_start: Annotated[
        Path | None, typer.Option(help="vqa, instruct: stage-1 run that --start used; default: from its config.")
    ] = None,
    changes: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint, if any.")] = False,
    features: Annotated[Path | None, typer.Option(help="Cache of the same images, written by `features`.")] = None,
    held_out: Annotated[Path | None, typer.Option(help="Images for validation; default: a part of --data.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Train one stage, or fine-tune a run."""
    if resume and overwrite:
        raise UserError("--resume continues a run and --overwrite replaces it: leave one of them out")
    # `_others` is inside `keeping`, because it handles `Stopped` itself and not the exit code made from it.
    with keeping(f"the last checkpoint is in {out}; add --resume to continue", out / "resume"), _others():
        from openblip2.config import change
        from openblip2.presets import FINE_TUNING, PRESETS, fine_tuning
        from openblip2.presets import preset as find
        from openblip2.runs import read_settings
        from openblip2.train.start import with_stage1

        if what in PRESETS:
            settings = find(what, preset)
            if what == "stage2" and start is not None:
                settings = with_stage1(settings, read_settings(start))
        elif what in FINE_TUNING:
            from openblip2.weights.checkpoint import Parts
            from openblip2.weights.run import read_run

            if start is None:
                raise UserError(f"train {what}: give --start, the run to fine-tune")
            settings = fine_tuning(what, preset, read_run(start, Parts()).settings, str(start))
        else:
            raise UserError(f"unknown training {what!r}: it must be one of {', '.join([*PRESETS, *FINE_TUNING])}")
        asked = read_changes(changes)
        for name in ARGUMENTS.keys() & asked:
            raise UserError(f"--set {name}={asked[name]}: give it as {ARGUMENTS[name]}")
        settings = change(settings, asked)
        named = {"start": start, "text_start": text_start, "data.features": features}
        named = {name: str(value) for name, value in named.items() if value}
        settings = change(settings, {"data.source": data, **named})
        from openblip2.distributed.collectives import is_first, world_size
        from openblip2.runs import locked
        from openblip2.train.start import say_without_effect

        says = progress("loading data and models", first=is_first())
        from openblip2.train.recipes import train_stage
        from openblip2.train.resume import require_new

        require_kind(out, "a run or another model", data=data)
        with locked(out):
            if not resume:
                require_new(out, overwrite)
            wanted = "questions" if what in ("vqa", "instruct") else "captions"
            source = read_data(data, wanted, images, split, questions, shards=True)
            where = (bool(source.shards), held_out is not None, world_size())
            say_without_effect(f"train {what}", asked, [settings], says, *where)
            skipped, kept = source.skipped, None
            if held_out is not None:
                validation = read_data(str(held_out), wanted, None, None)
                kept, skipped = validation.records, skipped + validation.skipped
            train_stage(settings, source.records, out, says, resume, None, skipped, kept, source.shards)
        if is_first():
            typer.echo(str(out))


def features(
    data: Annotated[Path, typer.Argument(help="Images with captions: a folder, .jsonl or .csv.")],
    out: Annotated[Path, typer.Option(help="Folder of the cache; an unfinished cache is continued.")],
    preset: Annotated[str, one_of(presets, "Preset whose vision.* settings are used.")] = "laptop",
    changes: Settings = None,
    precision: Annotated[str, one_of(STORED, "fp16 or bf16.")] = "fp16",
    views: Annotated[int, typer.Option(min=1, help="Random crops per image besides the plain one; 1 = none.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Compute the features of images once, for any number of `train --features` runs."""
    from openblip2.config import change
    from openblip2.presets import PRESETS
    from openblip2.presets import preset as find

    changed = read_changes(changes)
    for name in changed:
        if not name.startswith("vision.") and name not in ("train.precision", "train.seed"):
            raise UserError(f"--set {name}: only vision.*, train.precision and train.seed apply here: leave it out")
    stage = next((stage for stage in PRESETS if preset in PRESETS[stage]), "stage1")
    settings = change(find(stage, preset), changed)
    says = progress("loading data and the image encoder")
    from openblip2.data.records import read_records
    from openblip2.hardware import compute_dtype, device, keep_freed_memory
    from openblip2.model.build import build_vision
    from openblip2.train.encode import write_features

    require_kind(out, "a feature cache", data=data)
    records, skipped = read_records(data)
    for line in skipped:
        says.say(f"skipped: {line}")
    keep_freed_memory()
    vision = build_vision(settings, compute_dtype(device(), settings.train.precision)).to(device())
    with keeping(f"the features computed so far are in {out}; run the same command to continue", out):
        numbers = write_features(vision, records, settings, out, precision, views, says)
    show({"out": str(out), **numbers}, [str(out)], as_json)


def convert(
    source: Annotated[str, typer.Argument(help="A run, a LAVIS .pth, or transformers' BLIP-2 (folder or hub name).")],
    out: Annotated[Path, typer.Argument(help="New folder, or new file (lavis: .pth, onnx: .onnx).")],
    to: Annotated[str, one_of(TARGETS, "Format: openblip2, hf, lavis, onnx or projected.")],
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
    progress(f"converting {source}")
    from openblip2.weights.convert import convert as write

    parts = {"vision": vision, "language": language, "tokenizer": tokenizer}
    notes = write(source, out, to, heads=heads, vision_heads=vision_heads, overwrite=overwrite, **parts)
    show({"out": str(out), "notes": notes}, [*(f"note: {note}" for note in notes), str(out)], as_json)


def _others() -> AbstractContextManager[None]:
    """Joins the other processes of the run if torchrun or `accelerate launch` started this one (docs/clusters.md)."""
    if "RANK" not in os.environ:
        return nullcontext()  # returns here without importing torch
    from openblip2.distributed.launch import processes

    return processes()
