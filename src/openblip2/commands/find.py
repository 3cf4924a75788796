"""Commands that find pictures in a folder: index, search."""

from pathlib import Path
from typing import Annotated

import typer


def index(
    folder: Annotated[Path, typer.Argument(help="Pictures, in sub-folders too.")],
    run: Annotated[str, typer.Option(help="A stage-1 run.")],
    out: Annotated[Path, typer.Option(help="Folder of the index; one that is there is brought up to date.")],
) -> None:
    """Make a folder searchable, or bring its index up to date: `openblip2 index photos/ --run RUN --out INDEX`."""
    from openblip2.search.index import update_index
    from openblip2.train.progress import Progress

    progress = Progress()
    done = update_index(folder, run, out, progress)
    for line in done.skipped:
        progress.say(f"skipped: {line}")
    if done.recall is not None:
        progress.say(
            f"recall@10 of 8 bits against exact search, among {done.among:,} pictures: {100 * done.recall:.1f} %"
        )
    typer.echo(f"{out}: {done.pictures:,} pictures; {done.added:,} read, {done.gone:,} gone or changed")


def search(
    index: Annotated[Path, typer.Argument(help="A folder that `index` wrote.")],
    query: Annotated[str, typer.Argument(help="A text, or the path of a picture.")],
    best: Annotated[int, typer.Option(min=1, max=1000, help="So many pictures.")] = 10,
    rerank: Annotated[int, typer.Option(min=0, max=1000, help="By text: ITM looks at so many of the best.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Find pictures by a text, or by a picture like them: `similarity<TAB>path`, the best first."""
    import json

    from openblip2.errors import UserError
    from openblip2.search.find import Finder

    finder = Finder(index)
    is_picture = Path(query).is_file()
    if is_picture and rerank:
        raise UserError("--rerank is for a text: ITM matches texts with pictures")
    hits = finder.by_picture(Path(query), best) if is_picture else finder.by_text(query, best, rerank)
    for hit in hits:
        if as_json:
            found = {"path": str(hit.path), "similarity": hit.similarity, "match": hit.match}
            typer.echo(json.dumps(found, ensure_ascii=False))
        else:
            match = "" if hit.match is None else f"\t{hit.match:.3f}"
            typer.echo(f"{hit.similarity:.3f}{match}\t{hit.path}")
