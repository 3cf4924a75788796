"""The command line. Nothing heavy is imported before a command runs, so that `--help` answers at once.

Exit codes: 0 done, 2 something handed in cannot be used (one line says what), 130 interrupted.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from openblip2.errors import UserError

app = typer.Typer(
    help="Give any language model eyes: BLIP-2, both stages, any image encoder, any language model.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Run = Annotated[str, typer.Argument(help="A run that `train` or `demo` wrote, or published weights; see `convert`.")]
Images = Annotated[Path | None, typer.Option(help="The pictures' folder, where --data is an official .json.")]
Split = Annotated[str | None, typer.Option(help="Of an official file with many, or of easy-vqa.")]
Questions = Annotated[Path | None, typer.Option(help="The second file of VQAv2 and OK-VQA.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="section.field=value; may be given many times.", metavar="NAME=VALUE"),
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for runs, metrics.json and report.html.")],
    corpus: Annotated[str, typer.Option(help="scenes (drawn here) or stamps (Tux Paint's, if installed).")] = "scenes",
    seed: Annotated[int, typer.Option(min=0, help="Of the scenes and of training.")] = 0,
) -> None:
    """Train both stages on small real models and score them on pictures they have never seen (about 20 minutes)."""
    if corpus not in ("scenes", "stamps"):
        raise UserError(f"unknown corpus {corpus!r}: it must be scenes or stamps")
    from openblip2.demo import Plan, run_demo
    from openblip2.train.progress import Progress

    with _interruptible(out):
        run_demo(out, Plan(corpus, seed), Progress())  # pyright: ignore[reportArgumentType]
    typer.echo(f"report: {out / 'report.html'}\nmetrics: {out / 'metrics.json'}")


@app.command()
def train(
    what: Annotated[str, typer.Argument(help="stage1 or stage2; or caption, vqa, retrieval: fine-tune a run.")],
    data: Annotated[str, typer.Option(help="Pictures with captions (vqa: questions): a folder, .jsonl, .csv, ...")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    images: Images = None,
    split: Split = None,
    questions: Questions = None,
    preset: Annotated[str, typer.Option(help="Whole settings to begin with.")] = "laptop",
    start: Annotated[Path | None, typer.Option(help="The run to start from: all but stage1 need one.")] = None,
    changes: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    features: Annotated[Path | None, typer.Option(help="A cache that `features` wrote of the same pictures.")] = None,
) -> None:
    """Train one stage, or fine-tune: `openblip2 train stage1 --data pictures/ --out runs/stage1`."""
    from openblip2.config import change
    from openblip2.presets import FINE_TUNING, PRESETS, fine_tuning
    from openblip2.presets import preset as find

    if what in PRESETS:
        settings = find(what, preset)
    elif what in FINE_TUNING:
        from openblip2.weights.checkpoint import Parts
        from openblip2.weights.run import read_run

        if start is None:
            raise UserError(f"train {what}: give --start, the run to fine-tune")
        settings = fine_tuning(what, preset, read_run(start, Parts()).settings, str(start))
    else:
        raise UserError(f"unknown training {what!r}: it must be one of {', '.join([*PRESETS, *FINE_TUNING])}")
    settings = change(settings, _changes(changes or []))
    settings = change(settings, {"data.source": data} | ({"start": str(start)} if start else {}))
    settings = change(settings, {"data.features": str(features)} if features else {})
    from openblip2.data.sources import read_source
    from openblip2.train.progress import Progress
    from openblip2.train.recipes import train_stage

    progress = Progress()
    source = read_source(data, "questions" if what == "vqa" else "captions", images, split, questions)
    with _interruptible(out):
        train_stage(settings, source.records, out, progress, resume, skipped=source.skipped)
    typer.echo(str(out))


@app.command()
def features(
    data: Annotated[Path, typer.Argument(help="A folder, .jsonl or .csv of pictures with captions.")],
    out: Annotated[Path, typer.Option(help="Folder of the cache; an interrupted one is gone on with.")],
    preset: Annotated[str, typer.Option(help="Settings that vision.* comes from.")] = "laptop",
    changes: Settings = None,
    precision: Annotated[str, typer.Option(help="fp16, bf16 or int8 (half the size).")] = "fp16",
    views: Annotated[int, typer.Option(min=1, help="2 and more: random crops of each picture, beside it.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and stop.")] = False,
) -> None:
    """Run the frozen image encoder over pictures once, for any number of `train --features`."""
    from openblip2.config import change
    from openblip2.presets import PRESETS
    from openblip2.presets import preset as find

    changed = _changes(changes or [])
    for name in changed:
        if not name.startswith("vision.") and name not in ("train.precision", "train.seed"):
            raise UserError(f"--set {name}: features depend on vision.*, train.precision and train.seed alone")
    stage = next((stage for stage in PRESETS if preset in PRESETS[stage]), "stage1")
    settings = change(find(stage, preset), changed)
    from openblip2.data.records import read_records
    from openblip2.model.build import build_vision
    from openblip2.train.encode import write_features
    from openblip2.train.hardware import compute_dtype, device, keep_freed_memory
    from openblip2.train.progress import Progress

    progress = Progress()
    records, skipped = read_records(data)
    for line in skipped:
        progress.say(f"skipped: {line}")
    keep_freed_memory()
    vision = build_vision(settings, compute_dtype(device(), settings.train.precision)).to(device())
    try:
        write_features(vision, records, settings, out, precision, views, progress, dry_run)
    except KeyboardInterrupt:
        print(f"openblip2: interrupted; whole shards are in {out}, the same command goes on", file=sys.stderr)
        raise typer.Exit(130) from None
    typer.echo(str(out))


@app.command()
def caption(
    run: Run,
    images: Annotated[list[Path], typer.Argument(help="Pictures.")],
    prompt: Annotated[str | None, typer.Option(help="How the caption shall begin, or what is asked for.")] = None,
    beams: Annotated[int, typer.Option(min=1, help="1 = greedy.")] = 5,
) -> None:
    """Describe pictures: one line each, `path<TAB>caption`."""
    from dataclasses import replace

    from openblip2.inference import CAPTION

    model = _stage2(run)
    for image, text in zip(images, model.caption(images, prompt, replace(CAPTION, beams=beams)), strict=True):
        typer.echo(f"{image}\t{text}")


@app.command()
def answer(
    run: Run,
    image: Annotated[Path, typer.Argument(help="A picture.")],
    question: Annotated[str, typer.Argument(help="A question about it.")],
) -> None:
    """Answer a question about a picture."""
    typer.echo(_stage2(run).answer([image], [question])[0])


@app.command()
def chat(
    run: Run,
    image: Annotated[Path, typer.Argument(help="A picture.")],
    question: Annotated[str | None, typer.Option(help="How a line is put, {} being it, if not the run's way.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of an answer, at most.")] = 30,
) -> None:
    """Talk about a picture: a line in, an answer out, each behind the earlier ones, until the input ends."""
    from dataclasses import replace

    from openblip2.chat import Chat
    from openblip2.inference import ANSWER

    talk = Chat(_stage2(run), image, replace(ANSWER, max_new_tokens=tokens), question)
    terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if terminal else "")
            line.encode()  # a byte that is no text passes in some locales, as half a character
        except EOFError:
            return
        except UnicodeError as error:
            raise UserError(f"standard input is not text: {error}") from error
        try:
            if line.strip():
                typer.echo(talk.ask(line))
        except UserError as error:
            if not terminal:
                raise
            typer.echo(f"openblip2: {error}", err=True)  # and one may ask again


@app.command()
def rank(
    run: Run,
    text: Annotated[str, typer.Argument(help="What to look for.")],
    images: Annotated[list[Path], typer.Argument(help="Pictures.")],
) -> None:
    """Order pictures by how well they fit a text, the best first: `similarity<TAB>path`."""
    from openblip2.inference import Matcher, load

    model = load(run)
    if not isinstance(model, Matcher):
        raise UserError(f"{run} is a stage-2 run; rank needs a stage-1 run")
    scores = model.similarity(images, [text])[:, 0].tolist()
    for score, image in sorted(zip(scores, images, strict=True), key=lambda pair: -pair[0]):
        typer.echo(f"{score:.3f}\t{image}")


@app.command()
def evaluate(
    task: Annotated[str, typer.Argument(help="caption, vqa or retrieval.")],
    run: Run,
    data: Annotated[str, typer.Option(help="As for train; or an official .json, or easy-vqa.")],
    out: Annotated[Path, typer.Option(help="A JSON file; one line for each sample goes beside it.")],
    images: Images = None,
    split: Split = None,
    questions: Questions = None,
    prompt: Annotated[str | None, typer.Option(help="caption: how it shall begin.")] = None,
    beams: Annotated[int | None, typer.Option(min=1, help="caption, vqa: 1 = greedy; the paper's 5 otherwise.")] = None,
    metric: Annotated[str | None, typer.Option(help="vqa: vqa, vqa-lavis, gqa or exact; else the data's own.")] = None,
    lemmatised: Annotated[bool, typer.Option("--lemmatised", help="vqa: as OK-VQA is scored.")] = False,
    slow: Annotated[bool, typer.Option("--slow", help="caption: METEOR and SPICE, too; they need Java.")] = False,
    rerank: Annotated[int | None, typer.Option(min=0, help="retrieval: candidates for ITM; 128, 0 = none.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="retrieval: only a picture's own captions count.")] = False,
    features: Annotated[Path | None, typer.Option(help="retrieval: a cache that `features` wrote.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many pictures, the first ones.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the confidence intervals.")] = 0,
) -> None:
    """Score a run: `openblip2 evaluate vqa RUN --data easy-vqa --split test --out results.json`."""
    from openblip2.data.sources import read_source
    from openblip2.score.run import Options, require_task
    from openblip2.score.run import evaluate as score
    from openblip2.train.progress import Progress

    options = Options(prompt, beams, metric, lemmatised, slow, rerank, strict, features, limit, seed)
    require_task(task, options)
    wanted = "questions" if task == "vqa" else "captions"
    source = read_source(data, wanted, images, split, questions, withheld=task != "retrieval")
    result = score(task, run, source, out, options, Progress())
    for line in result.in_words():
        typer.echo(line)
    typer.echo(str(out))


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="What `evaluate` wrote of one run.")],
    second: Annotated[Path, typer.Argument(help="And of another, on the same data.")],
) -> None:
    """Say which of two results is better, and whether by more than luck: differences with 95 % intervals."""
    from openblip2.score.compare import compare as differences

    for name, found in differences(first, second).items():
        verdict = "no more than luck" if not found.excludes(0) else "first" if found.score > 0 else "second"
        typer.echo(f"{name:24} {100 * found.score:+7.2f}  [{100 * found.low:+.2f}, {100 * found.high:+.2f}]  {verdict}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A run of ours, a LAVIS .pth, or transformers' BLIP-2 (folder, hub).")],
    out: Annotated[Path, typer.Argument(help="A new folder (openblip2, hf) or file (lavis: .pth, onnx: .onnx).")],
    to: Annotated[str, typer.Option(help="openblip2, hf, lavis or onnx.")],
    heads: Annotated[int | None, typer.Option(help="Heads of the Q-Former, if not BERT's 12.")] = None,
    vision: Annotated[str | None, typer.Option(help="The image encoder, instead of the source's.")] = None,
    language: Annotated[str | None, typer.Option(help="The language model, instead of the source's.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="The Q-Former's tokenizer, if the source has none.")] = None,
) -> None:
    """Write published weights as ours, ours as transformers' or LAVIS', or an image path as an ONNX graph."""
    from openblip2.weights.convert import convert as write

    notes = write(source, out, to, heads=heads, vision=vision, language=language, tokenizer=tokenizer)
    for note in notes:
        typer.echo(f"note: {note}")
    typer.echo(str(out))


@app.command()
def bench(
    size: Annotated[str, typer.Option(help="tiny, laptop, vit-l or vit-g; weights are random.")] = "laptop",
    case: Annotated[list[str] | None, typer.Option(help="Of one comparison; may be given many times.")] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the figures.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each way, in turn.")] = 3,
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
) -> None:
    """Time our way beside the naive one and transformers' BLIP-2: same weights, same inputs, outputs checked equal."""
    from openblip2.bench.run import run_bench

    run_bench(size, case or [], out, repeats, precision, typer.echo)


@contextmanager
def _interruptible(out: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(
            f"openblip2: interrupted; what was finished is in {out}, training goes on with --resume",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None


def _stage2(run: str) -> Any:
    from openblip2.inference import Captioner, load

    model = load(run)
    if not isinstance(model, Captioner):
        raise UserError(f"{run} is a stage-1 run, which cannot write text; give a stage-2 run")
    return model


def _changes(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"--set {pair!r}: write it as section.field=value, for example optim.lr=2e-4")
    return dict(pair.split("=", 1) for pair in pairs)  # pyright: ignore[reportReturnType]


def main() -> None:
    """The `openblip2` command: what a user handed in wrongly becomes one line and exit code 2."""
    import warnings

    # A bomb-sized picture is refused by its header; Pillow's own warning would only stand before that line.
    warnings.filterwarnings("ignore", message="Image size .* could be decompression bomb")
    try:
        app()
    except UserError as error:
        print(f"openblip2: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
