"""Commands that measure: evaluate, compare, doctor, bench."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openblip2.commands.shared import AsJson, Images, Questions, Run, Split, among, keeping, progress, put, tell
from openblip2.errors import UserError

if TYPE_CHECKING:
    from openblip2.evaluate.health import Finding

TASKS = ("caption", "vqa", "retrieval", "pointing")
METRICS = ("vqa", "vqa-lavis", "gqa", "exact")
SIZES = ("tiny", "laptop", "vit-l", "vit-g")


def evaluate(
    task: Annotated[str, typer.Argument(help="caption, vqa, retrieval or pointing.", autocompletion=among(TASKS))],
    run: Run,
    data: Annotated[str, typer.Option(help="As for train; or an official .json, or easy-vqa.")],
    out: Annotated[Path, typer.Option(help="A JSON file; one line for each sample goes beside it.")],
    images: Images = None,
    split: Split = None,
    questions: Questions = None,
    prompt: Annotated[str | None, typer.Option(help="caption: how it shall begin.")] = None,
    beams: Annotated[int | None, typer.Option(min=1, help="caption, vqa: 1 = greedy; the paper's 5 otherwise.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="vqa: vqa, vqa-lavis, gqa or exact; else the data's own.", autocompletion=among(METRICS)),
    ] = None,
    lemmatised: Annotated[bool, typer.Option("--lemmatised", help="vqa: as OK-VQA is scored.")] = False,
    slow: Annotated[bool, typer.Option("--slow", help="caption: METEOR and SPICE, too; they need Java.")] = False,
    rerank: Annotated[int | None, typer.Option(min=0, help="retrieval: candidates for ITM; 128, 0 = none.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="retrieval: only a picture's own captions count.")] = False,
    by: Annotated[
        str | None, typer.Option(help="pointing: itc (default) or itm.", autocompletion=among(("itc", "itm")))
    ] = None,
    features: Annotated[Path | None, typer.Option(help="retrieval: a cache that `features` wrote.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many pictures, the first ones.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the confidence intervals.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Score a run: every score with its 95 % interval, and what it depends on."""
    says = progress()
    says.doing(f"loading {run}")
    from openblip2.data.sources import read_source
    from openblip2.score.run import Options, require_task
    from openblip2.score.run import evaluate as score

    options = Options(prompt, beams, metric, lemmatised, slow, rerank, strict, by, features, limit, seed)
    require_task(task, options)
    wanted = "questions" if task == "vqa" else "captions"
    source = read_source(data, wanted, images, split, questions, withheld=task in ("caption", "vqa"))
    texts = f"texts written so far are beside {out}, the same command goes on"
    with keeping(texts if task in ("caption", "vqa") else f"nothing is kept of {task}"):
        result = score(task, run, source, out, options, says)
    if as_json:
        put({"out": str(out), **result.as_json()})
        return
    for line in result.in_words():
        typer.echo(line)
    typer.echo(str(out))


def compare(
    first: Annotated[Path, typer.Argument(help="What `evaluate` wrote of one run.")],
    second: Annotated[Path, typer.Argument(help="And of another, on the same data.")],
    as_json: AsJson = False,
) -> None:
    """Say which of two results is better, and whether by more than luck: differences with 95 % intervals."""
    progress().doing("comparing")
    from openblip2.score.compare import compare as differences

    for name, found in differences(first, second).items():
        verdict = "no more than luck" if not found.excludes(0) else "first" if found.score > 0 else "second"
        if as_json:
            put({"name": name, "difference": found.score, "low": found.low, "high": found.high, "better": verdict})
            continue
        typer.echo(f"{name:24} {100 * found.score:+7.2f}  [{100 * found.low:+.2f}, {100 * found.high:+.2f}]  {verdict}")


def doctor(
    run: Annotated[str, typer.Argument(help="A run, finished or not; with pictures, published weights, too.")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Two pictures or more: the model is loaded, and its effective rank on them is measured."),
    ] = None,
    question: Annotated[str | None, typer.Option(help="With pictures: for a Q-Former that reads questions.")] = None,
    out: Annotated[Path | None, typer.Option(help="An HTML file with findings and curves, without pictures.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say how a run is doing and what to try, by its log; or whether its queries differ, on pictures."""
    from dataclasses import asdict

    if images:
        if out is not None:
            raise UserError("--out draws the log of a run: leave the pictures out")
        one, measured = _rank(run, images, question)
        put(asdict(one) | measured) if as_json else typer.echo(one.in_words())
        return
    if question is not None:
        raise UserError("--question is for pictures: give them after the run")
    if out is not None:
        from openblip2.model.extras import require

        require("--out", "plots", "matplotlib")  # before the findings are printed
    progress().doing(f"reading {run}")
    from openblip2.report.pages import examine, write_findings
    from openblip2.train.checkpoint import make_folder

    settings, rows, found = examine(Path(run))
    for one in found:
        put(asdict(one)) if as_json else typer.echo(one.in_words())
    if out is not None:
        make_folder(out.parent)
        write_findings(out, run, settings, rows, found)
        if not as_json:
            typer.echo(str(out))


def _rank(run: str, images: Sequence[Path], question: str | None) -> "tuple[Finding, dict[str, Any]]":
    """What the effective rank of a loaded model says, and its value."""
    if len(images) < 2:
        raise UserError("one picture has no effective rank: give at least two")
    says = progress()
    says.doing(f"loading {run}")
    from openblip2.evaluate.health import rank_finding
    from openblip2.inference import load

    model = load(run)
    says.doing(f"looking at {len(images)} pictures")
    rank = model.effective_rank(images, None if question is None else [question] * len(images))
    queries = model.model.qformer.queries.shape[1]
    return rank_finding(rank, queries), {"effective_rank": rank, "queries": queries, "pictures": len(images)}


def bench_real(
    out: Annotated[Path, typer.Option(help="Folder for pictures, runs, real.json and real.md.")],
    fold: Annotated[list[int] | None, typer.Option(help="One of the folds 0 to 4; may be given many times.")] = None,
    table: Annotated[Path | None, typer.Option(help="A document to put the table into, between its marks.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the folds and of training.")] = 0,
) -> None:
    """Train and score on real pictures of four sources, fold by fold: hours on a laptop; it goes on where it was."""
    says = progress()
    says.doing("gathering pictures")
    from openblip2.studies.real import Plan
    from openblip2.studies.real import bench_real as run

    plan = Plan(seed=seed) if not fold else Plan(seed=seed, folds=tuple(sorted(set(fold))))
    with keeping(f"finished runs are in {out}, the same command goes on"):
        run(out, plan, says, table)
    typer.echo((out / "real.md").read_text(encoding="utf-8"))


def bench(
    size: Annotated[
        str, typer.Option(help="tiny, laptop, vit-l or vit-g; weights are random.", autocompletion=among(SIZES))
    ] = "laptop",
    case: Annotated[list[str] | None, typer.Option(help="Of one comparison; may be given many times.")] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the figures.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each way, in turn.")] = 3,
    precision: Annotated[
        str, typer.Option(help="auto, bf16 or fp32.", autocompletion=among(("auto", "bf16", "fp32")))
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Time our way beside the naive one and transformers' BLIP-2: same weights, same inputs, outputs checked equal."""
    says = progress()
    says.doing("loading torch and transformers")
    from openblip2.bench.run import run_bench

    with keeping(f"the cases timed so far are in {out}" if out else "nothing is kept without --out"):
        found = run_bench(size, case or [], out, repeats, precision, says.doing if as_json else tell, says)
    if as_json:
        put(found)
