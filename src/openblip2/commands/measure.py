"""Commands that measure: evaluate, compare, doctor, bench, and the studies bench-real and ablate."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openblip2.commands.shared import (
    WORLDS,
    AsJson,
    Images,
    Overwrite,
    Questions,
    Run,
    Settings,
    Split,
    VisualTokens,
    keeping,
    one_of,
    output,
    progress,
    put,
    read_changes,
    read_data,
    require_all,
    require_world,
    show,
    tell,
)
from openblip2.errors import UserError, require

if TYPE_CHECKING:
    from openblip2.evaluate.health import Finding

TASKS = ("caption", "vqa", "retrieval", "pointing")
METRICS = ("vqa", "vqa-lavis", "gqa", "exact")
SIZES = ("tiny", "laptop", "vit-l", "vit-g")
STUDIES = ("stage1", "itg", "queries", "encoder", "connector", "capfilt", "pictures", "elastic")


def evaluate(
    task: Annotated[str, one_of(TASKS, "caption, vqa, retrieval or pointing.", typer.Argument)],
    run: Run,
    data: Annotated[str, typer.Option(help="Test data: as for `train`, an official .json, or easy-vqa.")],
    out: Annotated[Path, typer.Option(help="JSON file for the scores; also writes a .jsonl of the samples.")],
    images: Images = None,
    split: Split = None,
    questions: Questions = None,
    prompt: Annotated[str | None, typer.Option(help="caption: text that every caption begins with.")] = None,
    beams: Annotated[int | None, typer.Option(min=1, help="caption, vqa: beam width, 1 = greedy; default: 5.")] = None,
    metric: Annotated[str | None, one_of(METRICS, "vqa: vqa, vqa-lavis, gqa or exact; default: by data set.")] = None,
    lemmatised: Annotated[bool, typer.Option("--lemmatised", help="vqa: compare dictionary forms, as OK-VQA.")] = False,
    slow: Annotated[bool, typer.Option("--slow", help="caption: also METEOR and SPICE, which need Java.")] = False,
    rerank: Annotated[
        int | None, typer.Option(min=0, help="retrieval: ITM candidates, 0 = none; default: 128.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="retrieval: count only an image's own captions.")] = False,
    by: Annotated[str | None, one_of(("itc", "itm"), "pointing: itc (default) or itm.")] = None,
    features: Annotated[Path | None, typer.Option(help="retrieval: feature cache written by `features`.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this many images, from the beginning.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the confidence intervals.")] = 0,
    visual_tokens: VisualTokens = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a run: scores with 95 % confidence intervals, and the protocol."""
    says = progress(f"loading {run}")
    from openblip2.evaluate.result import Options
    from openblip2.evaluate.run import evaluate as score
    from openblip2.evaluate.run import require_task
    from openblip2.runs import new_result

    options = Options(prompt, beams, metric, lemmatised, slow, rerank, strict, by, features, limit, seed, visual_tokens)
    require_task(task, options)
    texts = f"texts written so far are beside {out}; run the same command to continue"
    with keeping(texts, out.with_suffix(".partial.jsonl")), new_result(out, overwrite):
        wanted = "questions" if task == "vqa" else "captions"
        source = read_data(data, wanted, images, split, questions, withheld=task in ("caption", "vqa"))
        result = score(task, run, source, out, options, says)
    show({"out": str(out), **result.as_json()}, [*result.in_words(), str(out)], as_json)


def compare(
    first: Annotated[Path, typer.Argument(help="JSON file that `evaluate` wrote for the first run.")],
    second: Annotated[Path, typer.Argument(help="JSON file for the second run, on the same data.")],
    as_json: AsJson = False,
) -> None:
    """Compare two evaluation results: differences with 95 % confidence intervals."""
    progress("comparing")
    from openblip2.evaluate.result import compare as differences

    for name, found in differences(first, second).items():
        verdict = "not significant" if not found.excludes(0) else "first" if found.score > 0 else "second"
        values = {"name": name, "difference": found.score, "low": found.low, "high": found.high, "better": verdict}
        line = f"{name:24} {100 * found.score:+7.2f}  [{100 * found.low:+.2f}, {100 * found.high:+.2f}]  {verdict}"
        show(values, [line], as_json)


def doctor(
    run: Annotated[str, typer.Argument(help="A run, finished or not; with images also published weights.")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="At least two images, to measure the effective rank of the model's queries."),
    ] = None,
    question: Annotated[str | None, typer.Option(help="Question about the images, if the Q-Former reads text.")] = None,
    out: Annotated[Path | None, typer.Option(help="HTML file for findings and curves; not with images.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Diagnose a run from its log, or measure on images whether its queries differ."""
    if images:
        if out is not None:
            raise UserError("--out plots the log of a run: leave out --out or the pictures")
        one, measured, bad = _rank(run, images, question)
        show(asdict(one) | measured, [one.in_words()], as_json)
        require_all(images, bad)
        return
    if question is not None:
        raise UserError("--question needs pictures: give them after the run")
    if out is not None:
        require("--out", "plots", "matplotlib")  # checked before the findings are printed
    progress(f"reading {run}")
    from openblip2.apps.report import examine, write_findings
    from openblip2.runs import new_result

    with nullcontext() if out is None else new_result(out, overwrite):
        settings, rows, found = examine(Path(run))
        for one in found:
            show(asdict(one), [one.in_words()], as_json)
        if out is not None:
            write_findings(out, run, settings, rows, found)
    if out is not None and not as_json:
        typer.echo(str(out))


def _rank(run: str, images: Sequence[Path], question: str | None) -> "tuple[Finding, dict[str, Any], list[Path]]":
    """The finding about the effective rank of a loaded model, its value, and the pictures that cannot be read."""
    if len(images) < 2:
        raise UserError("one picture is not enough for an effective rank: give at least two")
    says = progress(f"loading {run}")
    from openblip2.data.images import open_picture
    from openblip2.evaluate.health import rank_finding
    from openblip2.inference.inputs import each_readable
    from openblip2.inference.load import load

    model = load(run)
    says.doing(f"computing the effective rank of {len(images)} pictures")
    opened = each_readable(images, lambda some, _: [image for image in some if open_picture(image)])
    good, bad = [image for image in opened if image], [image for image in images if image not in opened]
    if len(good) < 2:
        require_all(images, bad)
    rank = model.effective_rank(good, None if question is None else [question] * len(good))
    queries = model.model.connector.tokens
    return rank_finding(rank, queries), {"effective_rank": rank, "queries": queries, "pictures": len(good)}, bad


def bench_real(
    out: Annotated[Path, typer.Option(help="Output folder for images, runs, real.json and real.md.")],
    fold: Annotated[list[int] | None, typer.Option(help="Fold to run, 0 to 4; can be repeated; default: all.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the folds and of training.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train and evaluate on real images of four sources; takes hours and can be resumed."""
    says = progress("gathering pictures")
    from openblip2.apps.studies.real import RealPlan
    from openblip2.apps.studies.real import bench_real as run

    plan = RealPlan(folds=tuple(sorted(set(fold or RealPlan.folds))), seed=seed, overwrite=overwrite)
    with output(out, "results of bench-real", "finished runs are in"):
        run(out, plan, says)
    typer.echo((out / "real.md").read_text(encoding="utf-8"))


def bench(
    size: Annotated[str, one_of(SIZES, "tiny, laptop, vit-l or vit-g; weights are random.")] = "laptop",
    case: Annotated[list[str] | None, typer.Option(help="Comparison to run; can be repeated; default: all.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Number of timed runs of each implementation.")] = 3,
    precision: Annotated[str, one_of(("auto", "bf16", "fp32"), "Precision: auto, bf16 or fp32.")] = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Compare speed and memory with naive implementations and transformers' BLIP-2."""
    says = progress("loading torch and transformers")
    from openblip2.apps.bench import run_bench
    from openblip2.runs import new_result

    with (
        keeping(f"the cases timed so far are in {out}" if out else "results are not saved without --out", out),
        nullcontext() if out is None else new_result(out, overwrite),
    ):
        found = run_bench(size, case or [], out, repeats, precision, says.doing if as_json else tell, says)
    if as_json:
        put(found)


def ablate(
    name: Annotated[str, one_of(STUDIES, f"{', '.join(STUDIES)}.", typer.Argument)],
    out: Annotated[Path, typer.Option(help="Output folder for runs, ablation.json, ablation.md and ablation.svg.")],
    seeds: Annotated[str, typer.Option(help="Training seeds, separated by commas.")] = "0",
    world: Annotated[
        str, one_of(WORLDS, f"Kind of scenes: full ({WORLDS['full']} nouns), or small, with the demo's recipe.")
    ] = "full",
    scenes: Annotated[int | None, typer.Option(min=8, help="Training images; default: set by the study.")] = None,
    test_scenes: Annotated[int, typer.Option(min=8, help="Number of test images.")] = 200,
    values: Annotated[str | None, typer.Option(help="Values to compare: queries, images or grid side.")] = None,
    stage1_steps: Annotated[int | None, typer.Option(min=1, help="Steps of stage 1; default: by study.")] = None,
    stage2_steps: Annotated[int | None, typer.Option(min=1, help="Steps of stage 2; default: by study.")] = None,
    changes: Settings = None,
    overwrite: Overwrite = False,
) -> None:
    """Run one of the ablation studies on drawn scenes; can be resumed."""
    require_world(world)
    says = progress("drawing scenes")
    from openblip2.apps.studies import ablate as run
    from openblip2.apps.studies.study import Plan, small_world

    steps = {stage: n for stage, n in (("stage1", stage1_steps), ("stage2", stage2_steps)) if n}
    plan = (small_world if world == "small" else Plan)(
        seeds=_numbers("--seeds", seeds),
        scenes=scenes,
        test_scenes=test_scenes,
        values=_numbers("--values", values) if values else (),
        steps=steps,
        changes=read_changes(changes),
        overwrite=overwrite,
    )
    with output(out, "a study", "finished runs are in"):
        run(name, out, plan, says)
    typer.echo((out / "ablation.md").read_text(encoding="utf-8"))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Reads different whole numbers of 0 or more, separated by commas, and keeps their order."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"{option} {text!r}: give whole numbers with commas between them, for example 0,1,2")
    return tuple(dict.fromkeys(map(int, parts)))
