"""Converts checkpoints between all formats. Tensors are copied unchanged, so what is stored is bit-equal."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from openblip2.config import change
from openblip2.errors import UserError
from openblip2.model.language import EncoderDecoderLM, LanguageModel
from openblip2.model.load import is_encoder_decoder
from openblip2.model.lora import merge_lora
from openblip2.model.precision import local_folder
from openblip2.model.stage2 import Stage2
from openblip2.model.vision import HFVision, Vision
from openblip2.runs import locked, require_absent
from openblip2.train.parameters import saved_parameters
from openblip2.weights.assemble import assemble, find_language, find_tokenizer, find_vision, read_checkpoint
from openblip2.weights.checkpoint import Checkpoint, Parts, carried
from openblip2.weights.export import write_huggingface, write_projected
from openblip2.weights.huggingface import dtypes_of
from openblip2.weights.lavis import projection_name, write_lavis
from openblip2.weights.onnx import export_onnx
from openblip2.weights.run import fresh_folder, write_card, write_run

Target = Literal["openblip2", "hf", "lavis", "onnx", "projected"]
CPU = torch.device("cpu")


def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    heads: int | None = None,
    vision: str | Vision | None = None,
    language: str | LanguageModel | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    vision_heads: int | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Writes a checkpoint in another format; returns one line for each thing that was left out or changed.

    Args:
        source, heads, vision, language, tokenizer, revision, vision_heads: as for `load`. Parts passed as objects are
            modified: for hf, `<image>` is added to the tokenizer, and the encoder's positions are resized.
        out: a new folder (openblip2, hf, projected), or a file (lavis: .pth; onnx: .onnx).
        to: "openblip2", "hf", "lavis", "onnx", or "projected": a run that contains the language model, and a script
            that passes projected queries to transformers or vLLM.
        overwrite: whether an earlier result at `out` is replaced.

    Raises:
        UserError: as for `load`; or the target is unknown, exists already, or cannot store this model.
    """
    if to not in get_args(Target):
        raise UserError(f"unknown target {to!r}: it must be one of {', '.join(get_args(Target))}")
    out, suffix = Path(out), {"lavis": ".pth", "onnx": ".onnx"}.get(to, "")
    if suffix and (out.suffix != suffix or out.is_dir()):
        raise UserError(f"{out}: give the name of a file that ends in {suffix}")
    if suffix or not out.is_dir() or any(out.iterdir()):
        require_absent(out, overwrite, "name")
    if out.resolve() == Path(source).resolve():
        raise UserError(f"{out} is the source: give another name")
    parts = Parts(heads, vision, language, tokenizer, vision_heads)
    checkpoint = read_checkpoint(source, parts, revision)
    if (connector := checkpoint.settings.connector.name) != "qformer" and to in ("hf", "lavis"):
        raise UserError(f"{source}: its connector is {connector!r}, but --to {to} can store only a Q-Former")
    if checkpoint.settings.qformer.question_in_qformer and to not in ("openblip2", "hf"):
        raise UserError(f"{source}: its Q-Former reads questions, which --to {to} cannot store")
    with locked(out.parent, f".{out.name}.lock"):
        return _write(checkpoint, out, to)


def _write(checkpoint: Checkpoint, out: Path, to: str) -> list[str]:
    if to == "onnx":
        model, _ = assemble(checkpoint, CPU, "fp32")
        difference = export_onnx(model, out)
        return [
            *checkpoint.left_out,
            f"checked with onnxruntime: the largest difference is {difference:.1e} of the largest value",
        ]
    # Frozen parts are written in the precision in which they are stored.
    settings = change(checkpoint.settings, {"vision.dtype": "auto", "language.dtype": "auto"})
    checkpoint = replace(checkpoint, settings=settings)
    if settings.qformer.lora_rank or settings.language.lora_rank:
        checkpoint = _without_adapters(checkpoint)
    if settings.vision.trained and to != "openblip2":
        checkpoint = _with_ready_encoder(checkpoint)
    if to == "lavis":
        return _to_lavis(checkpoint, out)
    writer = {"openblip2": _to_openblip2, "hf": _to_huggingface, "projected": _to_projected}[to]
    return [*checkpoint.left_out, *writer(checkpoint, out)]


def _to_openblip2(checkpoint: Checkpoint, out: Path) -> list[str]:
    given, checkpoint = checkpoint.parts, replace(checkpoint, carries=carried(checkpoint))
    vision = language = None
    # Parts that are not copied are only named, so they need not be available.
    if "vision" in checkpoint.carries or given.vision is not None:
        vision, checkpoint = _stored(checkpoint, "vision")
    if "language" in checkpoint.carries:
        language, checkpoint = _stored(checkpoint, "language")
    elif isinstance(given.language, str):
        named = replace(checkpoint.settings.language, name=given.language)
        checkpoint = replace(checkpoint, settings=replace(checkpoint.settings, language=named))
    tokenizer = find_tokenizer(checkpoint) if checkpoint.settings.reads_text else None
    with fresh_folder(out, overwrite=True) as folder:
        write_run(checkpoint, folder, vision, language, tokenizer)
        write_card(checkpoint, out.name, folder)
    return []


def _to_huggingface(checkpoint: Checkpoint, out: Path) -> list[str]:
    vision, checkpoint = _stored(checkpoint, "vision")
    language, reads_question = None, checkpoint.settings.qformer.question_in_qformer
    tokenizer = find_tokenizer(checkpoint) if checkpoint.settings.reads_text else None
    if checkpoint.settings.stage == "stage2":
        language, checkpoint = _stored(checkpoint, "language")
    # Only EVA-CLIP's architecture without whitening, and embeddings that are as wide as the language model's layers.
    fits = vision.kind == "blip_2_vision_model" and vision.whitening is None
    if not fits or (language is not None and language.width != language.llm.config.hidden_size):
        why = "its Q-Former reads questions, and " * reads_question
        family = "InstructBLIP" if reads_question else "BLIP-2"
        others = f", or use --to onnx{' or --to projected' * (language is not None)}" * (not reads_question)
        raise UserError(
            f"{why}transformers' {family} cannot store the image encoder {vision.kind!r}"
            f"{' with whitening' * checkpoint.settings.vision.whiten}, or the width of the language model: serve it "
            f"with openblip2{others}"
        )
    with fresh_folder(out, overwrite=True) as folder:
        notes = write_huggingface(checkpoint, vision, language, tokenizer, folder)
        carries = frozenset({"vision"} if language is None else {"vision", "language"})
        checkpoint = replace(checkpoint, carries=carries, left_out=tuple(notes))
        write_card(checkpoint, out.name, folder, "transformers")
    return notes


def _to_projected(checkpoint: Checkpoint, out: Path) -> list[str]:
    if checkpoint.settings.stage == "stage1":
        raise UserError(f"{checkpoint.source} is a stage-1 run: --to projected needs a language model")
    vision, checkpoint = _stored(checkpoint, "vision")
    language, checkpoint = _stored(checkpoint, "language")
    with fresh_folder(out, overwrite=True) as folder:
        write_projected(checkpoint, vision, language, folder)
    return []


def _to_lavis(checkpoint: Checkpoint, out: Path) -> list[str]:
    tower = None
    if "vision" in checkpoint.carries:
        vision, _ = _stored(checkpoint, "vision")
        tower = vision if isinstance(vision, HFVision) and vision.kind == "blip_2_vision_model" else None
    to_t5, given = False, checkpoint.parts.language
    if isinstance(given, LanguageModel):
        to_t5 = isinstance(given, EncoderDecoderLM)
    elif checkpoint.settings.stage == "stage2":
        name = given or checkpoint.settings.language.name
        known = projection_name(name)
        to_t5 = is_encoder_decoder(name) if known is None else known == "t5_proj"
    return write_lavis(checkpoint, tower, to_t5, out)


def _without_adapters(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with LoRA merged into the weights, because no other format stores it separately."""
    model, settings = assemble(checkpoint, CPU, "fp32")
    merge_lora(model)
    parts = checkpoint.parts
    return replace(
        checkpoint,
        settings=change(settings, {"qformer.lora_rank": 0, "language.lora_rank": 0}),
        trained={name: parameter.detach() for name, parameter in saved_parameters(model).items()},
        parts=replace(parts, language=model.language) if isinstance(model, Stage2) else parts,
        left_out=(*checkpoint.left_out, "LoRA: merged into the weights, in fp32"),
    )


def _with_ready_encoder(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a fine-tuned image encoder as a separate part, as every format stores it."""
    vision, checkpoint = find_vision(checkpoint, torch.float32)
    for name, parameter in vision.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(checkpoint.trained[f"vision.{name}"])
    vision.trained = False
    vision.requires_grad_(False)
    return replace(
        checkpoint,
        settings=change(checkpoint.settings, {"vision.trained": False}),
        trained={name: tensor for name, tensor in checkpoint.trained.items() if not name.startswith("vision.")},
        parts=replace(checkpoint.parts, vision=vision),
    )


def _stored(checkpoint: Checkpoint, part: Literal["vision", "language"]) -> tuple[Any, Checkpoint]:
    """A frozen part, each tensor in the dtype of its file if the source contains it, and a checkpoint that names it."""
    contained = part in checkpoint.carries and getattr(checkpoint.parts, part) is None and checkpoint.tower is None
    folder = local_folder(getattr(checkpoint.settings, part).name) if contained else None
    # An openblip2 run has a folder for each part; in transformers' BLIP-2, all parts are in one model.
    dtypes = {} if folder is None else dtypes_of(folder, f"{part}_model.") or dtypes_of(folder, "")
    found = set(dtypes.values())
    widest: Any = torch.float32 if len(found) > 1 else next(iter(found), "auto")  # represents all of these exactly
    loaded: Any
    if part == "vision":
        loaded, checkpoint = find_vision(checkpoint, widest)
    else:
        loaded, checkpoint = find_language(checkpoint, widest, CPU)
    # Some models are loaded with wider dtypes (T5 in fp16).
    for name, parameter in (loaded.encoder if part == "vision" else loaded.llm).named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
    return loaded, checkpoint
