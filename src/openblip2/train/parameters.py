"""The trained parameters of a model and the whitening of its features, written to files and read back."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from openblip2.distributed.collectives import is_first
from openblip2.distributed.full_tensor import fill, full_tensor
from openblip2.errors import UserError
from openblip2.model.whitening import Whitening
from openblip2.runs import read_tensors, write_tensors


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; a tied one stands once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def saved_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a run keeps, by name: those that train, and all of the Q-Former.

    What adapters (LoRA) freeze in the Q-Former is nowhere else; other frozen parts are where config.json says.
    """
    return {n: p for n, p in model.named_parameters() if p.requires_grad or n.startswith("qformer.")}


def save_trained(model: nn.Module, path: Path) -> None:
    """Writes the kept parameters to one safetensors file, under a temporary name first.

    All processes of a run must call: parameters in pieces are gathered one by one; the first process writes.
    """
    weights = {}
    for name, parameter in saved_parameters(model).items():
        whole = full_tensor(parameter).cpu().contiguous()
        if is_first():
            weights[name] = whole
    if is_first():
        write_tensors(weights, path)


def load_trained(model: nn.Module, path: Path) -> None:
    """Fills the kept parameters from a file, strictly: the same names and shapes on both sides.

    Raises:
        UserError: the file is missing or damaged, or holds other names or shapes; they are listed.
    """
    fill_trained(model, read_tensors(path), str(path))


def fill_trained(model: nn.Module, found: Mapping[str, Tensor], source: str) -> None:
    """Fills the kept parameters from tensors, strictly: the same names and shapes on both sides.

    Raises:
        UserError: `source` holds other names or shapes; they are listed.
    """
    wanted = saved_parameters(model)
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or extra:
        raise UserError(
            f"{source} does not fit this model: {_some('missing', missing)}{_some('unexpected', extra)}"
            "the run's config.json must describe the model that was trained"
        )
    for name, parameter in wanted.items():
        if found[name].shape != parameter.shape:
            raise UserError(
                f"{source} does not fit this model: {name} has shape {list(found[name].shape)}, "
                f"the model wants {list(parameter.shape)}"
            )
        fill(parameter, found[name])


def save_whitening(whitening: Whitening, run: Path) -> None:
    """Writes `RUN/whitening.safetensors`."""
    write_tensors({"mean": whitening.mean.cpu(), "matrix": whitening.matrix.cpu()}, run / "whitening.safetensors")


def read_whitening(run: Path) -> Whitening:
    """The whitening that a run was trained behind.

    Raises:
        UserError: it has none, or a damaged one.
    """
    found = read_tensors(run / "whitening.safetensors")
    if found.keys() != {"mean", "matrix"}:
        raise UserError(f"{run / 'whitening.safetensors'}: holds {sorted(found)}, not mean and matrix")
    return Whitening(found["mean"], found["matrix"])


def _some(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{what}: {', '.join(names[:4])}{more}; " if names else ""
