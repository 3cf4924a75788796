"""Reads transformers' BLIP-2: `Blip2ForImageTextRetrieval` (stage 1), `Blip2ForConditionalGeneration` (stage 2).

Also reads `InstructBlipForConditionalGeneration` (Dai et al., 2023), a stage 2 whose Q-Former reads the prompt, too.
Such a folder also contains the frozen parts, which `load_vision` and `load_language` read by the folder's name. It has
no temperature and no head of ITG, so stage 1 cannot be trained further from it.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from openblip2.compat import quiet_transformers
from openblip2.config import LanguageSettings, QFormerSettings, RunSettings, VisionSettings
from openblip2.errors import UserError, one_line
from openblip2.model.bert import bert_tokenizer
from openblip2.model.qformer import NORM_EPS
from openblip2.model.wheels import locate
from openblip2.runs import read_json
from openblip2.weights.checkpoint import HF, INSTRUCTBLIP, OURS, Checkpoint, Parts, describe, listed, rename

GENERATION, RETRIEVAL = "Blip2ForConditionalGeneration", "Blip2ForImageTextRetrieval"
INSTRUCTED = "InstructBlipForConditionalGeneration"
IMAGE_TOKEN = "<image>"
FRAME = "openblip2"  # the key of config.json under which an export stores the text around the soft prompt
FRAMED = ("template", "end", "prompts", "question")
# For InstructBLIP: the paper's prompt for NoCaps and Flickr30K; a question is used as it is written.
INSTRUCTIONS = {"prompts": ("A short image description:",), "question": "{}"}
QFORMER_TOKENIZER = "qformer_tokenizer"  # the subfolder with the second tokenizer of an InstructBLIP

BUFFERS = ("embeddings.position_ids", "qformer.embeddings.position_ids")  # tensors that are not used


def read_huggingface(folder: Path, name: str, parts: Parts) -> Checkpoint:
    """Reads a folder that `save_pretrained` wrote; `name`, a hub name or a folder, tells where its frozen parts are.

    Raises:
        UserError: another architecture, a missing or damaged file, an unknown or missing key, a setting that the
            Q-Former does not support, different numbers of visual tokens and queries, a tokenizer without `<image>`,
            an InstructBLIP without the Q-Former's tokenizer.
    """
    from transformers import Blip2VisionConfig

    path = folder / "config.json"
    config = read_json(path)
    kind = (config.get("architectures") or [None])[0]
    if kind not in (GENERATION, RETRIEVAL, INSTRUCTED):
        raise UserError(f"{path}: architectures is {kind!r}: it must be {GENERATION}, {RETRIEVAL} or {INSTRUCTED}")
    files, column = read_files(folder), INSTRUCTBLIP if kind == INSTRUCTED else HF
    names, others = rename((name for name in files if name not in BUFFERS), column, OURS)
    frozen = ("vision_model.",) if kind == RETRIEVAL else ("vision_model.", "language_model.")
    if unknown := [name for name in others if not name.startswith(frozen)]:
        raise UserError(f"{folder}: {len(unknown)} keys do not belong to a {kind}: {listed(unknown)}")
    vision = config.get("vision_config") or {}  # InstructBLIP has another `model_type` for the same encoder
    tower: Any = Blip2VisionConfig(**{name: value for name, value in vision.items() if name != "model_type"})
    _require_tower(folder, tower, {name for name in others if name.startswith("vision_model.")})
    trained = {ours: _tensor(files[theirs], theirs) for ours, theirs in names.items()}
    left_out = [f"{name}: a buffer: 0, 1, 2, ..." for name in BUFFERS if name in files]
    if kind == GENERATION and (text := [name for name in trained if ".text_ffn." in name]):
        left_out.append(f"the text FFN of the Q-Former, {len(text)} tensors: {kind} does not use it")
        trained = {name: tensor for name, tensor in trained.items() if name not in text}

    # transformers writes no default values.
    qformer = {"num_attention_heads": 12, "hidden_dropout_prob": 0.1} | (config.get("qformer_config") or {})
    heads = qformer["num_attention_heads"]
    if parts.heads not in (None, heads):
        raise UserError(f"{path}: qformer_config.num_attention_heads is {heads}, not {parts.heads}: leave heads out")
    for field, value in {"hidden_act": "gelu", "layer_norm_eps": NORM_EPS}.items():
        if qformer.get(field, value) != value:
            raise UserError(f"{path}: qformer_config.{field} is {qformer[field]!r}: only {value!r} is supported")
    settings = RunSettings(
        vision=VisionSettings(name=name, layer=-1, image_size=tower.image_size),
        qformer=QFormerSettings(
            dropout=float(qformer["hidden_dropout_prob"]),
            image_norm_eps=tower.layer_norm_eps,
            question_in_qformer=kind == INSTRUCTED,
        ),
    )
    if kind != RETRIEVAL:
        settings = replace(settings, stage="stage2", language=_language(folder, name, config, kind))
        if FRAME in config:  # openblip2 exported it
            settings = _from_frame(settings, config[FRAME], path)
    settings, sizes = describe(trained, settings, heads, str(folder), column)
    _require_queries(folder, config, settings.qformer.queries)
    tokenizer = str(folder) if kind == RETRIEVAL else None
    if kind == INSTRUCTED:
        settings = replace(settings, data=replace(settings.data, max_tokens=sizes["positions"]))
        tokenizer = str(folder / QFORMER_TOKENIZER)
        if parts.tokenizer is None:
            _require_qformer_tokenizer(folder, sizes["vocabulary"])
    return Checkpoint(
        source=str(folder),
        settings=settings,
        sizes=sizes,
        trained=trained,
        parts=parts,
        tokenizer=tokenizer,
        carries=frozenset({"vision"} if kind == RETRIEVAL else {"vision", "language"}),
        left_out=tuple(left_out),
    )


def read_files(folder: Path) -> dict[str, Path]:
    """The safetensors file of each tensor in a folder, sharded or not.

    Raises:
        UserError: there is no file, a shard is missing or damaged, or a tensor that the index names is missing.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise UserError(f"{folder}: no model.safetensors in it (.bin files are pickles, which are never loaded)")
        return {name: single for name in _names(single)}
    listing = read_json(index)
    if not isinstance(listing, dict) or not {"metadata", "weight_map"} <= listing.keys():
        raise UserError(f"{index}: must contain metadata and weight_map, as transformers writes them")
    found: dict[str, Path] = {}
    for file in sorted(set(listing["weight_map"].values())):
        path, named = folder / file, sorted(name for name, shard in listing["weight_map"].items() if shard == file)
        if Path(file).name != file:
            raise UserError(f"{index}: names {file!r}, which is not in this folder")
        if not path.is_file():
            raise UserError(f"{path}: missing; {index.name} names it for {listed(named, 2)}")
        names = _names(path)
        if lost := [name for name in named if name not in names]:
            raise UserError(f"{path}: it lacks {listed(lost)}, which {index.name} lists")
        found |= {name: path for name in names}
    return found


def dtypes_of(folder: Path, prefix: str) -> dict[str, torch.dtype]:
    """The dtype of each tensor whose name begins with `prefix`, by the rest of its name."""
    files = {name: file for name, file in read_files(folder).items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): _tensor(file, name).dtype for name, file in files.items()}


def _require_tower(folder: Path, tower: Any, found: set[str]) -> None:
    """Checks that the keys of the image encoder are those of its configuration."""
    from transformers import Blip2VisionModel

    with torch.device("meta"):
        names = Blip2VisionModel(tower).state_dict()
    # The last norm is part of the Q-Former here, and trained.
    wanted = {f"vision_model.{name}" for name in names if "post_layernorm" not in name}
    for what, keys in (("missing", wanted - found), ("unexpected", found - wanted)):
        if keys:
            raise UserError(f"{folder}: {len(keys)} keys are {what}: {listed(sorted(keys))}")


def _language(folder: Path, name: str, config: Mapping[str, Any], kind: str) -> LanguageSettings:
    """The language settings: the template of its processor's prompts and the token that ends its texts."""
    again = f"save the folder again with the {'InstructBlipProcessor' if kind == INSTRUCTED else 'Blip2Processor'}"
    tokenizer = load_tokenizer(str(folder), again)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        where = folder / "tokenizer.json"
        raise UserError(f"{where}: no token {IMAGE_TOKEN!r} in it for the pictures: {again}, which adds it")
    # The token with which generation ends in transformers.
    end = read_json(path).get("eos_token_id") if (path := folder / "generation_config.json").is_file() else None
    end = (config.get("text_config") or {}).get("eos_token_id") if end is None else end
    end = end[0] if isinstance(end, list) else end
    return LanguageSettings(
        name=name,
        template=usual_template(tokenizer),
        end=None if end in (None, tokenizer.eos_token_id) else tokenizer.decode([end]),
        **(INSTRUCTIONS if kind == INSTRUCTED else {}),
    )


def usual_template(tokenizer: Any) -> str:
    """The template of transformers' processor; it contains `{bos}` if the tokenizer adds this token."""
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "{image}{bos}{prompt}" if begins else "{image}{prompt}"


def _from_frame(settings: RunSettings, frame: Any, path: Path) -> RunSettings:
    """The settings, updated with the prompts and the task that an openblip2 export wrote into `config.json`."""
    if not isinstance(frame, dict) or not frame.keys() <= {*FRAMED, "task"}:
        raise UserError(f"{path}: {FRAME} may contain only {', '.join(FRAMED)}, task")
    words = {name: value for name, value in frame.items() if name != "task"}
    try:
        language = replace(settings.language, **words)
        return replace(settings, language=language, task=frame.get("task", settings.task))
    except ValueError as error:
        raise UserError(f"{path}: {FRAME} is not valid: {one_line(error)}") from error


def load_tokenizer(name: str, advice: str) -> Any:
    """A tokenizer of `transformers`, or a `UserError` with this advice."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(locate(name), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{name}: no tokenizer ({one_line(error)}): {advice}") from error


def _require_queries(folder: Path, config: Mapping[str, Any], queries: int) -> None:
    """Checks that a picture takes as many tokens in a prompt as there are queries."""
    told = {"config.json": config.get("num_query_tokens", 32)}  # transformers writes no default values
    if (path := folder / "processor_config.json").is_file():
        told[path.name] = read_json(path).get("num_query_tokens")
    for file, count in told.items():
        if count not in (None, queries):
            raise UserError(f"{folder / file}: num_query_tokens is {count}, but query_tokens has {queries} queries")


def _require_qformer_tokenizer(folder: Path, vocabulary: int) -> None:
    where = folder / QFORMER_TOKENIZER
    if not any((where / file).is_file() for file in ("tokenizer.json", "vocab.txt")):
        raise UserError(
            f"{folder}: no tokenizer in {QFORMER_TOKENIZER}/, which the Q-Former of an InstructBLIP needs to read "
            "the prompt: save the folder again with an InstructBlipProcessor, or give one with tokenizer="
        )
    bert_tokenizer(str(where), vocabulary)


def _names(file: Path) -> set[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a complete safetensors file ({one_line(error)}); it may be truncated") from error


def _tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)
