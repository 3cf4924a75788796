"""Commands that use a trained run on pictures: caption, answer, chat, rank, attend."""

import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from openblip2.commands.shared import (
    AsJson,
    Overwrite,
    Run,
    among,
    load_captioner,
    open_single,
    progress,
    put,
    require_all,
    tell,
)
from openblip2.errors import UserError, printable


def caption(
    run: Run,
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    prompt: Annotated[str | None, typer.Option(help="Text that the caption begins with, or an instruction.")] = None,
    beams: Annotated[int | None, typer.Option(min=1, help="Beam width; 1 = greedy; default: 5.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write captions for images: prints `path<TAB>caption` for each."""
    from dataclasses import replace

    model = load_captioner(run)
    from openblip2.inference.captioner import CAPTION
    from openblip2.inference.inputs import GROUP

    how = CAPTION if beams is None else replace(CAPTION, beams=beams)
    open_single(images, {"path": str(images[0]), "caption": None} if as_json else None)
    bad: list[Path] = []
    with progress().steps("captions", len(images)) as bar:
        for start in range(0, len(images), GROUP):
            part = images[start : start + GROUP]
            for image, text in zip(part, model.caption(part, prompt, how), strict=True):
                bad += [image] if text is None else []
                if as_json:
                    put({"path": str(image), "caption": text})
                elif text is not None:
                    tell(f"{printable(str(image))}\t{text}")
            bar.advance(count=len(part))
    require_all(images, bad)


def answer(
    run: Run,
    image: Annotated[Path, typer.Argument(help="Image file.")],
    question: Annotated[str, typer.Argument(help="Question about the image.")],
    as_json: AsJson = False,
) -> None:
    """Answer a question about an image."""
    model = load_captioner(run)
    row = {"path": str(image), "question": question}
    open_single([image], row | {"answer": None} if as_json else None)
    (text,) = model.ask(image, [question])
    put(row | {"answer": text}) if as_json else typer.echo(text)


def chat(
    run: Run,
    image: Annotated[Path, typer.Argument(help="Image file.")],
    question: Annotated[str | None, typer.Option(help="Form of a question, with {} for the text.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Maximum tokens in an answer; default: 30.")] = None,
) -> None:
    """Chat about an image: reads questions line by line and answers them in context."""
    from dataclasses import replace

    model = load_captioner(run)
    from openblip2.inference.captioner import CHAT
    from openblip2.inference.chat import Chat

    talk = Chat(model, image, CHAT if tokens is None else replace(CHAT, max_new_tokens=tokens), question)
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


def rank(
    run: Run,
    text: Annotated[str, typer.Argument(help="Text to compare the images with.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    as_json: AsJson = False,
) -> None:
    """Rank images by similarity to a text: prints `similarity<TAB>path`, best first."""
    says = progress()
    says.doing(f"loading {run}")
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
    by: Annotated[
        str,
        typer.Option(help="Stage-1 runs: score to explain, itc or itm.", autocompletion=among(("itc", "itm"))),
    ] = "itc",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Draw attention maps of the queries, and which image regions a text depends on."""
    progress().doing(f"loading {run}")
    from openblip2.inference.attend import BY, look, overlay, sheet
    from openblip2.inference.load import load
    from openblip2.runs import new_result

    if by not in BY:
        raise UserError(f"--by {by}: it must be one of {', '.join(BY)}")
    with new_result(out / "attention.png", overwrite):
        found = look(load(run), image, text, by)
        drawn = {
            "attention.png": overlay(image, found.average),
            "queries.png": sheet(image, [(f"query {n}", one) for n, one in enumerate(found.queries)]),
        }
        if found.words:
            drawn["text.png"] = sheet(image, found.words, side=320, columns=4, one_scale=False)
        (out / "text.png").unlink(missing_ok=True)  # of an earlier picture
        for name, picture in drawn.items():
            picture.save(out / name)
    if as_json:
        put({"files": [str(out / name) for name in drawn], "text": found.text})
        return
    for name in drawn:
        typer.echo(str(out / name))
    if found.text is not None:
        typer.echo(found.text)
