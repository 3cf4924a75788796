"""Exports a trained model, from pixels to the input of the language model, as one ONNX graph, and tests the graph.

The graph contains normalisation, the frozen image encoder, whitening, the connector without text, and the linear layer
after it. It does not contain texts or the language model, which has its own runtimes and reads `soft_prompt`.

Shapes: B images (any number), S image side in px, Q queries, L LLM width, E shared space.
"""

import copy
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openblip2.data.images import RESIZE
from openblip2.errors import UserError, one_line, require
from openblip2.model.lora import merge_lora
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2

TOLERANCE = 1e-4  # largest difference from torch, relative to the output's largest value
INLINE = 1_500_000_000  # bytes of weights that are stored in the graph's own file; protobuf's limit is 2 GB
TRACED, CHECKED = 2, (1, 3)  # batch sizes: the graph must also work with others than the one it was traced with


class ImagePath(nn.Module):
    """A copy of the layers from pixels to the output, on the CPU in float32; the model itself does not change."""

    def __init__(self, model: Stage1 | Stage2) -> None:
        super().__init__()
        assert model.vision is not None
        self.name = "image_vectors" if isinstance(model, Stage1) else "soft_prompt"
        # Part by part, because a copy of the whole model would include the language model.
        self.vision, self.connector = copy.deepcopy(model.vision), copy.deepcopy(model.connector)
        self.head = copy.deepcopy(model.vision_proj if isinstance(model, Stage1) else model.projection)
        merge_lora(self.to("cpu", torch.float32)).requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """uint8 `[B, 3, S, S]` RGB to `image_vectors [B, Q, E]`, of length 1, or `soft_prompt [B, Q, L]`."""
        queries = self.connector.visual_tokens(self.vision(images))
        found = self.head(queries)
        return F.normalize(found, dim=-1) if self.name == "image_vectors" else found


@torch.no_grad()
@torch.autocast("cpu", enabled=False)  # without this, adapters would also be merged in bf16
def export_onnx(model: Stage1 | Stage2, path: Path) -> float:
    """Writes an ONNX graph for any number of images to `path` and compares it with torch on random pictures.

    The input is `images`, uint8 `[B, 3, S, S]` RGB in [0, 255]; the output is `soft_prompt [B, Q, L]` in stage 2, or
    `image_vectors [B, Q, E]` (length 1) in stage 1. Everything is float32: weights that are stored in fewer bits are
    written with the values that they represent, and adapters are merged. The metadata describe how pictures are
    resized and normalised. More than 1.5 GB of weights are stored next to the graph, in `path` + ".data". Existing
    files with these names are replaced only after the new graph has passed the comparison.

    Returns:
        The largest difference from torch, relative to the output's largest value: at most `TOLERANCE`.

    Raises:
        UserError: a package is missing, the model has no image encoder or one that cannot be exported, or the path
            cannot be written. RuntimeError: the graph's results differ from torch's.
    """
    require("ONNX export", "onnx", "onnx", "onnxscript", "onnxruntime")
    if model.vision is None:
        raise UserError("this model was built without an image encoder: an ONNX export needs one")
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of the file to write, for example {path / 'model.onnx'}")
    image_path, side = ImagePath(model), model.vision.image_size
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A temporary folder and not another file name, because the graph contains the file name of its weights.
        with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as draft:
            file = Path(draft) / path.name
            _write(image_path, side, file)
            difference = _compare(image_path, side, file)
            for written in sorted(Path(draft).iterdir(), reverse=True):  # the weights first, then the graph
                os.replace(written, path.parent / written.name)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {one_line(error)}") from error
    return difference


def _write(image_path: ImagePath, side: int, file: Path) -> None:
    """Writes the graph, whose metadata say how pictures must be resized, and the normalisation that it contains."""
    weights, vision = sum(p.numel() * p.element_size() for p in image_path.parameters()), image_path.vision
    with _quiet():
        try:
            program = torch.onnx.export(
                image_path,
                (_pictures(TRACED, side),),
                input_names=["images"],
                output_names=[image_path.name],
                dynamic_shapes={"images": {0: torch.export.Dim("B")}},
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            # The cause is the actual error; the exporter's own message is advice about its internals.
            reason = one_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
            raise UserError(f"image encoder {vision.kind!r} cannot be exported to ONNX: {reason}") from error
        assert program is not None
        program.model.metadata_props.update(
            resize=RESIZE,
            image_size=str(side),
            normalization="in the graph",
            image_mean=json.dumps(list(vision.mean)),
            image_std=json.dumps(list(vision.std)),
        )
        program.save(file, external_data=weights > INLINE)


def _compare(image_path: ImagePath, side: int, file: Path) -> float:
    """The largest difference between graph and module, relative to the output's largest value."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    worst = 0.0
    for count in CHECKED:
        images = _pictures(count, side)
        expected = image_path(images)
        found = torch.from_numpy(session.run([image_path.name], {"images": images.numpy()})[0])
        assert found.shape == expected.shape, f"{list(found.shape)} in ONNX, {list(expected.shape)} in torch"
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= TOLERANCE:  # also true for NaN
            raise RuntimeError(
                f"the ONNX graph differs from torch by {difference:.1e} of the largest value with {count} pictures; "
                f"at most {TOLERANCE:.0e} is rounding, so nothing was written"
            )
        worst = max(worst, difference)
    return worst


def _pictures(count: int, side: int) -> Tensor:
    random = torch.Generator().manual_seed(count)
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=random)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the exporter's remarks on its internals, and the long output that it prints before an error."""
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.ERROR))
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
