"""The command that runs studies of how training works."""

from pathlib import Path
from typing import Annotated

import typer

from openblip2.commands.shared import Overwrite, Settings, among, keeping, progress, read_changes
from openblip2.errors import UserError

STUDIES = ("stage1", "itg", "queries", "encoder", "connector", "warm-start", "capfilt", "pictures", "elastic")


def ablate(
    name: Annotated[
        str,
        typer.Argument(help=f"{', '.join(STUDIES)}.", autocompletion=among(STUDIES)),
    ],
    out: Annotated[Path, typer.Option(help="Output folder for runs, ablation.json, ablation.md and ablation.svg.")],
    seeds: Annotated[str, typer.Option(help="Training seeds, separated by commas.")] = "0",
    scenes: Annotated[int | None, typer.Option(min=8, help="Training images; default: set by the study.")] = None,
    test_scenes: Annotated[int, typer.Option(min=8, help="Number of test images.")] = 200,
    values: Annotated[str | None, typer.Option(help="Numbers of queries or images; side of a grid.")] = None,
    stage1_steps: Annotated[int | None, typer.Option(min=1, help="Steps of stage 1; default: by study.")] = None,
    stage2_steps: Annotated[int | None, typer.Option(min=1, help="Steps of stage 2; default: by study.")] = None,
    changes: Settings = None,
    overwrite: Overwrite = False,
) -> None:
    """Run one of the ablation studies on drawn scenes; can be resumed."""
    says = progress()
    says.doing("drawing scenes")
    from openblip2.apps.studies.ablations import ablate as run
    from openblip2.apps.studies.study import Plan
    from openblip2.runs import locked

    steps = {stage: n for stage, n in (("stage1", stage1_steps), ("stage2", stage2_steps)) if n}
    plan = Plan(
        seeds=_numbers("--seeds", seeds),
        scenes=scenes,
        test_scenes=test_scenes,
        values=_numbers("--values", values) if values else (),
        steps=steps,
        changes=read_changes(changes),
        overwrite=overwrite,
    )
    with keeping(f"finished runs are in {out}; run the same command to continue"), locked(out):
        run(name, out, plan, says)
    typer.echo((out / "ablation.md").read_text(encoding="utf-8"))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Different whole numbers, 0 or more, with commas between them, in their order."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"{option} {text!r}: give whole numbers with commas between them, for example 0,1,2")
    return tuple(dict.fromkeys(map(int, parts)))
