"""Files that git-LFS has not fetched: every reader names the file and the command that fetches it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny_runs
from openblip2 import load
from openblip2.data.images import PictureFile, open_picture
from openblip2.errors import UserError, refuse_lfs_pointer
from openblip2.model.load import is_encoder_decoder, load_language, load_vision
from openblip2.runs import read_json, read_tensors

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
READERS: dict[str, tuple[Callable[[Any], object], str]] = {
    "a picture": (open_picture, "a.jpg"),
    "a picture in a shard": (lambda path: open_picture(PictureFile(POINTER, str(path))), "a.jpg"),
    "JSON": (read_json, "a.json"),
    "tensors": (read_tensors, "model.safetensors"),
    "a .pth": (load, "a.pth"),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_file_is_named(kind: str, tmp_path: Path) -> None:
    read, name = READERS[kind]
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=rf"/{name}: is a git-LFS pointer, not the file itself: run `git lfs pull`"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("read", [load_language, load_vision, is_encoder_decoder, load])
def test_a_file_of_a_models_folder_is_named(name: str, read: Callable[[str], object], tmp_path: Path) -> None:
    folder = tiny_runs.vision(tmp_path / "model") if read is load_vision else tiny_runs.language(tmp_path / "model")
    (folder / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=rf"model/{name}: is a git-LFS pointer"):
        read(str(folder))


def test_other_files_are_not_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"the " + POINTER)
    refuse_lfs_pointer(tmp_path)
    refuse_lfs_pointer(tmp_path / "missing")
