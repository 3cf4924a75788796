"""The rows of `log.jsonl`, told to a tracker as they are written: TensorBoard, Weights & Biases or trackio.

A resumed run goes on in the same place; steps behind its checkpoint, which are taken again, are told again.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from openblip2.errors import UserError

Tracker = Literal["", "tensorboard", "wandb", "trackio"]
PROJECT = "openblip2"


def tell(kind: Tracker, run: Path, settings: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], None]:
    """What is called with each row; "" = nothing listens.

    Args:
        settings: of the run, for trackers that show them.

    Raises:
        UserError: the tracker is not installed.
    """
    if not kind:
        return lambda row: None
    try:
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(run / "tensorboard"))

            def write(row: Mapping[str, Any]) -> None:
                for name, value in numbers(row).items():
                    writer.add_scalar(name, value, row["step"])
                writer.flush()

            return write
        if kind == "wandb":
            import wandb as module  # pyright: ignore[reportMissingImports]  (not among what the developers install)

            module.init(
                project=PROJECT, name=run.name, dir=str(run), id=run.name, resume="allow", config=dict(settings)
            )
        else:
            import trackio as module  # pyright: ignore[reportMissingImports]  (not among what the developers install)

            module.init(project=PROJECT, name=run.name, resume="allow", config=dict(settings))
    except ImportError as error:
        raise UserError(f"train.track={kind}: pip install {kind} ({error.name} is missing)") from error
    return lambda row: module.log(numbers(row), step=row["step"])


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """What of a row is a number, by name: "training/itc", "held out/tr@1"."""
    held_out = row.get("validation", {})
    return {f"training/{name}": value for name, value in row.items() if _is_number(value) and name != "step"} | {
        f"held out/{name}": value for name, value in held_out.items() if _is_number(value)
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
