"""From a name to a checkpoint; its format is recognised from the files."""

import re
from pathlib import Path

from openblip2.errors import UserError, one_line, refuse_lfs_pointer
from openblip2.runs import read_json
from openblip2.weights.checkpoint import Checkpoint, Parts
from openblip2.weights.huggingface import read_huggingface
from openblip2.weights.lavis import read_lavis
from openblip2.weights.run import read_run

KINDS = "a run of ours, a LAVIS .pth file, or a folder or hub name of transformers' BLIP-2 or InstructBLIP"
LAVIS_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
# What may come from a hub: JSON, tokenizers, safetensors. No pickles, no code.
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jsonl"]


def read_checkpoint(source: str | Path, parts: Parts | None = None, revision: str | None = None) -> Checkpoint:
    """Reads a run of ours, a LAVIS `.pth`, or transformers' BLIP-2 or InstructBLIP, from a path or by its hub name.

    Args:
        parts: frozen parts instead of those that the source names.
        revision: branch, tag or commit on the hub.

    Raises:
        UserError: it is none of these, or it cannot be read whole.
    """
    parts = parts or Parts()
    path = Path(source).expanduser()
    refuse_lfs_pointer(path)
    if path.is_file():
        if path.suffix not in LAVIS_SUFFIXES:
            raise UserError(f"{path} is not a run and does not end in {', '.join(LAVIS_SUFFIXES)}: give {KINDS}")
        return read_lavis(path, parts)
    if parts.vision_heads is not None:
        raise UserError(f"{source}: vision_heads is for a LAVIS .pth with an image encoder in it: leave it out")
    folder = path if path.is_dir() else fetch_repository(str(source), revision)
    if not (folder / "config.json").is_file():
        raise UserError(f"{source} is not a run (no config.json in it): give {KINDS}")
    config = read_json(folder / "config.json")
    if isinstance(config, dict) and {"settings", "sizes"} <= config.keys():
        return read_run(folder, parts)
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind in ("blip-2", "instructblip"):
        # A name stays good on another machine; of a revision only the folder is known.
        return read_huggingface(folder, str(folder if path.is_dir() or revision else source), parts)
    raise UserError(
        f"{source} is not a run, its config.json has model_type {kind!r}, another architecture: give {KINDS}"
    )


def fetch_repository(name: str, revision: str | None = None) -> Path:
    """The folder of a repository of the hub, downloaded unless it is here: no pickles, no code.

    Raises:
        UserError: it is not here and cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{name} is not a run, there is no such file, folder or hub name: give {KINDS}")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise UserError(f"{name} is not here and cannot be downloaded from the hub: {one_line(error)}") from error
