"""Commands that use a trained run on pictures: caption, answer, chat, rank, attend."""

import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from openblip2.commands import shared
from openblip2.commands.shared import (
    AsJson,
    Overwrite,
    Run,
    VisualTokens,
    load_captioner,
    one_of,
    open_single,
    progress,
    put,
    require_all,
    show,
    tell,
)
from openblip2.errors import UserError, printable

Tokens = Annotated[int | None, typer.Option(min=1, help="Maximum number of new tokens; default: 30.")]
Beams = Annotated[int | None, typer.Option(min=1, help="Beam width; 1 = greedy; default: 5.")]


def caption(
    run: Run,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of images with their subfolders.")],
    prompt: Annotated[str | None, typer.Option(help="Text that the caption begins with, or an instruction.")] = None,
    beams: Beams = None,
    tokens: Tokens = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: words are repeated less often.")] = 1.0,
    sample: Annotated[bool, typer.Option("--sample", help="Draw each caption at random, without beams.")] = False,
    captions: Annotated[int, typer.Option(min=1, help="Different captions per image; above 1: as with --sample.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Seed of --sample and --captions.", show_default="0")] = None,
    visual_tokens: VisualTokens = None,
    beside: Annotated[
        bool,
        typer.Option("--beside", help="Also write a.txt beside a.jpg; images that have one are skipped."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write captions for images: prints `path<TAB>caption` for each.

    With --json also the log-probability of each caption. With --beside, the same command continues where it stopped.
    """
    drawn = sample or captions > 1
    if drawn and beams is not None:
        raise UserError(f"{'--sample' if sample else '--captions'} draws at random, without beams: leave out --beams")
    if seed is not None and not drawn:
        raise UserError(f"--seed {seed} is for --sample and --captions: add one of them, or leave it out")
    todo = _pictures(images)
    with ExitStack() as locks:
        if beside:
            from openblip2.runs import locked

            for folder in {(path if path.is_dir() else path.parent).resolve() for path in images if path.exists()}:
                locks.enter_context(locked(folder))
            locks.enter_context(shared.keeping("the texts written so far are kept; run the same command to continue"))
            todo = _without_text(todo)
        if not todo:
            return
        model = load_captioner(run, visual_tokens)
        from openblip2.inference.captioner import CAPTION, SAMPLED

        changes = {"beams": beams, "max_new_tokens": tokens, "seed": seed or 0 if drawn else None}
        how = replace(SAMPLED if drawn else CAPTION, repetition_penalty=repetition_penalty, **_given(changes))
        _caption(todo, lambda part: model.captions(part, captions, prompt, how, as_json), captions, beside, as_json)


def _caption(
    images: list[Path], write: Callable[[list[Path]], list[Any]], count: int, beside: bool, as_json: bool
) -> None:
    from openblip2.inference.inputs import GROUP

    none = {"path": str(images[0]), "caption" if count == 1 else "captions": None}
    open_single(images, none if as_json else None)
    bad: list[Path] = []
    with progress().steps("captions", len(images)) as bar:
        for start in range(0, len(images), GROUP):
            part = images[start : start + GROUP]
            for image, written in zip(part, write(part), strict=True):
                bad += [image] if written is None else []
                if beside and written:
                    _write_text(image, [one.text for one in written])
                if as_json:
                    rows = [{"caption": text, "logprob": logprob} for text, logprob in written or [(None, None)]]
                    put({"path": str(image)} | (rows[0] if count == 1 else {"captions": written and rows}))
                for one in () if as_json else written or ():
                    tell(f"{printable(str(image))}\t{printable(one.text)}")
            bar.advance(count=len(part))
    require_all(images, bad)


def _pictures(paths: list[Path]) -> list[Path]:
    """The given files, and the pictures in the given folders and subfolders, except the thumbnails of an index."""
    from openblip2.data.images import PICTURE_SUFFIXES

    found: dict[Path, None] = {}
    for path in paths:
        pictures = [path]
        if path.is_dir():
            inside = sorted(
                one for one in path.rglob("*") if one.suffix.lower() in PICTURE_SUFFIXES and not one.is_dir()
            )
            pictures = [one for one in inside if not any(n.startswith(".") for n in one.relative_to(path).parts)]
            pictures = [one for one in pictures if not (one.parents[1] / "vectors.faiss").exists()]  # not of an index
            if not pictures:
                raise UserError(f"{path}: no pictures in this folder ({', '.join(sorted(PICTURE_SUFFIXES))})")
        found |= dict.fromkeys(pictures)
    return list(found)


def _without_text(pictures: list[Path]) -> list[Path]:
    """The pictures without a text file beside them."""
    todo = [picture for picture in pictures if not picture.with_suffix(".txt").exists()]
    owners: dict[Path, Path] = {}
    for picture in todo:
        if (other := owners.setdefault(text := picture.with_suffix(".txt"), picture)) != picture:
            raise UserError(f"{other} and {picture} would have the same {text.name}: rename one of them")
    if len(todo) < len(pictures):
        progress().say(f"{len(pictures) - len(todo):,} of {len(pictures):,} pictures have a text and are skipped")
    return todo


def _write_text(picture: Path, texts: list[str]) -> None:
    """Writes the texts, one per line, to a file beside the picture."""
    from openblip2.runs import atomic_write

    path = picture.with_suffix(".txt")
    try:
        with atomic_write(path) as draft:
            draft.write_text("".join(" ".join(text.split()) + "\n" for text in texts), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): use a copy of the folder") from error


def answer(
    run: Run,
    image: Annotated[Path, typer.Argument(help="Image file.")],
    question: Annotated[str, typer.Argument(help="Question about the image.")],
    among: Annotated[str | None, typer.Option(help="Possible answers, separated by commas: yes,no.")] = None,
    beams: Beams = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Maximum number of new tokens; default: 10.")] = None,
    visual_tokens: VisualTokens = None,
    as_json: AsJson = False,
) -> None:
    """Answer a question about an image.

    With --among, prints `probability<TAB>answer` for each possible answer, the most likely first.
    """
    if among is not None and (beams or tokens):
        raise UserError("--among compares the answers that you give: leave out --beams and --tokens")
    model = load_captioner(run, visual_tokens)
    from openblip2.inference.captioner import ANSWER

    row = {"path": str(image), "question": question}
    open_single([image], row | {"answer": None} if as_json else None)
    if among is None:
        (text,) = model.ask(image, [question], replace(ANSWER, **_given({"beams": beams, "max_new_tokens": tokens})))
        show(row | {"answer": text}, [text], as_json)
        return
    answers = [one.strip() for one in among.split(",")]
    chances = model.choose([image], [question], answers)[0].tolist()
    best = dict(sorted(zip(answers, chances, strict=True), key=lambda pair: -pair[1]))
    values = row | {"answer": next(iter(best)), "probabilities": best}
    show(values, (f"{chance:.3f}\t{text}" for text, chance in best.items()), as_json)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def chat(
    run: Run,
    image: Annotated[Path, typer.Argument(help="Image file.")],
    question: Annotated[str | None, typer.Option(help="Template of a question; {} is replaced by the text.")] = None,
    tokens: Tokens = None,
) -> None:
    """Chat about an image: reads questions line by line and answers them in context."""
    if sys.stdin is None:
        raise UserError("chat reads questions from standard input, but it is closed: keep it open, or use `answer`")
    model = load_captioner(run)
    from openblip2.inference.captioner import CHAT
    from openblip2.inference.chat import Chat

    talk = Chat(model, image, CHAT if tokens is None else replace(CHAT, max_new_tokens=tokens), question)
    terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if terminal else "")
            line.encode()  # raises for bytes that are not text, which some locales accept as lone surrogates
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
            typer.echo(f"openblip2: {error}", err=True)  # the user may ask again


def rank(
    run: Run,
    text: Annotated[str, typer.Argument(help="Text to compare the images with.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    as_json: AsJson = False,
) -> None:
    """Rank images by similarity to a text: prints `similarity<TAB>path`, best first."""
    says = progress(f"loading {run}")
    from openblip2.inference.inputs import GROUP
    from openblip2.inference.load import load
    from openblip2.inference.matcher import Matcher

    model = load(run)
    if not isinstance(model, Matcher):
        raise UserError(f"{run} is a stage-2 run; rank needs a stage-1 run")
    open_single(images, {"path": str(images[0]), "similarity": None} if as_json else None)
    scores: list[float] = []
    with says.steps("pictures", len(images)) as bar:
        for start in range(0, len(images), GROUP):
            part = images[start : start + GROUP]
            scores += model.similarity(part, [text])[:, 0].tolist()
            bar.advance(count=len(part))
    bad = [image for score, image in zip(scores, images, strict=True) if math.isnan(score)]
    for score, image in sorted(zip(scores, images, strict=True), key=lambda pair: (math.isnan(pair[0]), -pair[0])):
        if as_json:
            put({"path": str(image), "similarity": None if math.isnan(score) else score})
        elif not math.isnan(score):
            typer.echo(f"{score:.3f}\t{printable(str(image))}")
    require_all(images, bad)


def attend(
    run: Run,
    image: Annotated[Path, typer.Argument(help="Image file.")],
    out: Annotated[Path, typer.Option(help="Output folder for the attention maps.")],
    text: Annotated[str | None, typer.Option(help="Text to explain; default for stage 2: its own caption.")] = None,
    by: Annotated[str | None, one_of(("itc", "itm"), "Stage-1 runs: score to explain, itc or itm.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Draw attention maps of the queries, and maps of the image regions that a text depends on."""
    progress(f"loading {run}")
    from openblip2.inference.attend import BY, look, overlay, sheet
    from openblip2.inference.load import load
    from openblip2.inference.matcher import Matcher
    from openblip2.runs import new_result, require_absent

    if by not in (None, *BY):
        raise UserError(f"--by {by}: it must be one of {', '.join(BY)}")
    with new_result(out / "attention.png", overwrite):
        for name in ("queries.png", "text.png"):
            require_absent(out / name, overwrite)
        model = load(run)
        if by and not (text and isinstance(model, Matcher)):
            raise UserError(f"--by {by} needs a stage-1 run and --text: leave it out")
        found = look(model, image, text, by or "itc")  # pyright: ignore[reportArgumentType]
        drawn = {
            "attention.png": overlay(image, found.average),
            "queries.png": sheet(image, [(f"query {n}", one) for n, one in enumerate(found.queries)]),
        }
        if found.words:
            drawn["text.png"] = sheet(image, found.words, side=320, columns=4, one_scale=False)
        (out / "text.png").unlink(missing_ok=True)  # from an earlier image
        for name, picture in drawn.items():
            picture.save(out / name)
    files = [str(out / name) for name in drawn]
    show({"files": files, "text": found.text}, [*files, *([] if found.text is None else [found.text])], as_json)
