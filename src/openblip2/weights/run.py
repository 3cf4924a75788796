"""Reads and writes openblip2's own runs, from training or from a conversion, which may contain frozen parts.

RUN/vision/, RUN/language/   frozen parts in transformers' format, if `vision.name` is "./vision"
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from openblip2.compat import quiet_transformers
from openblip2.config import RunSettings, from_dict
from openblip2.errors import UserError, one_line
from openblip2.model.language import LanguageModel
from openblip2.model.lora import plain_state
from openblip2.model.vision import FrozenVision, HFVision, Whitening
from openblip2.runs import atomic_write, make_folder, read_config, read_tensors, write_config, write_json, write_tensors
from openblip2.train.parameters import read_whitening, save_whitening
from openblip2.weights.checkpoint import Checkpoint, Parts

CARRIED = {"vision": "./vision", "language": "./language"}  # the names of parts inside the run


def read_run(folder: Path, parts: Parts) -> Checkpoint:
    """Reads a finished run.

    Raises:
        UserError: it is not a run, it is unfinished or damaged, or `parts.heads` is not the run's number of heads.
    """
    saved = read_config(folder)
    settings, sizes = from_dict(saved["settings"]), saved["sizes"]
    if parts.heads not in (None, sizes.get("heads")):
        raise UserError(
            f"{folder / 'config.json'}: sizes.heads is {sizes.get('heads')}, not {parts.heads}: leave heads out"
        )
    carries = set()
    for part, inside in CARRIED.items():
        named = getattr(settings, part)
        if named.name == inside:
            carries.add(part)
            settings = replace(settings, **{part: replace(named, name=str(folder / part))})
    return Checkpoint(
        source=str(folder / "model.safetensors"),
        settings=settings,
        sizes=sizes,
        trained=read_tensors(folder / "model.safetensors"),
        measured=_last_validation(folder / "log.jsonl"),
        whitening=read_whitening(folder) if settings.vision.whiten else None,
        parts=parts,
        tokenizer=str(folder / "tokenizer") if settings.reads_text else None,
        carries=frozenset(carries),
    )


def _last_validation(log: Path) -> dict[str, Any]:
    # Text after the last line break is an incomplete line of a run that was stopped.
    lines = log.read_text(encoding="utf-8").split("\n")[:-1] if log.is_file() else []
    try:
        rows = [json.loads(line) for line in lines if '"validation"' in line]
        return rows[-1]["validation"] if rows else {}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{log}: not the log of a run ({one_line(error)}): repair it, or remove it") from error


def write_run(
    folder: Path,
    settings: RunSettings,
    sizes: Mapping[str, int],
    trained: Mapping[str, Tensor],
    vision: FrozenVision | None = None,
    language: LanguageModel | None = None,
    tokenizer: Any = None,
    carries: frozenset[str] = frozenset(),
    whitening: Whitening | None = None,
) -> None:
    """Writes a run into a folder: settings, trained tensors, tokenizer, and the frozen parts in `carries`.

    Args:
        vision, language: the frozen parts that are written.
        tokenizer: the tokenizer of a connector that reads text.
        whitening: the whitening of the image features.
    """
    for part in sorted(carries):
        named = replace(getattr(settings, part), name=CARRIED[part])
        if part == "vision" and vision is not None:  # the layers after the chosen one were removed
            named = replace(named, layer=-1, image_size=vision.image_size)
        settings = replace(settings, **{part: named})
    with quiet_transformers():
        if "vision" in carries and vision is not None:
            if not isinstance(vision, HFVision):
                raise UserError(f"{vision.kind} was passed as an object, which cannot be written: leave merge out")
            # Not in the "original" format, in which a part of a BLIP-2 would get that model's prefix back.
            vision.encoder.save_pretrained(folder / "vision", save_original_format=False)
            side = {"height": vision.image_size, "width": vision.image_size}
            published = {"size": side, "image_mean": vision.mean, "image_std": vision.std, "do_normalize": True}
            write_json(published, folder / "vision" / "preprocessor_config.json")
        if "language" in carries and language is not None:
            language.llm.save_pretrained(
                folder / "language", state_dict=plain_state(language.llm), save_original_format=False
            )
            language.tokenizer.save_pretrained(folder / "language")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / "tokenizer")
    if whitening is not None:
        save_whitening(whitening, folder)
    write_tensors(
        {name: tensor.detach().cpu().contiguous() for name, tensor in trained.items()}, folder / "model.safetensors"
    )
    write_config(folder, settings, sizes)


@contextmanager
def fresh_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder to fill, which is renamed to `out` when it is complete.

    Args:
        overwrite: Whether an existing model in `out` is replaced.

    Raises:
        UserError: `out` exists already or cannot be written.
    """
    model = (out / "config.json").exists()
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (overwrite and model):
        raise UserError(
            f"{out} {'contains files that do not belong to a model' if overwrite else 'exists already'}: give a new "
            "name, or an empty folder"
        )
    try:
        with atomic_write(out, concurrent=True) as draft:
            make_folder(draft)
            yield draft
            if model:
                shutil.rmtree(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {one_line(error)}") from error
