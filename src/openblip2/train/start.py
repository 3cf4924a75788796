"""The weights that a run starts from: stage 2 uses a stage-1 run's connector, fine-tuning all weights of a run.

For VQA (paper 4.3) and instructions, the Q-Former of the stage-2 run gets its text path back from stage 1, because
stage 2 leaves it out.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openblip2.config import RunSettings
from openblip2.errors import UserError
from openblip2.hardware import device
from openblip2.model.bert import bert_sizes, bert_tokenizer
from openblip2.model.build import build_stage1, build_stage2
from openblip2.model.language import LanguageModel
from openblip2.model.load import is_encoder_decoder
from openblip2.model.lora import adapt_qformer, merge_lora
from openblip2.model.qformer import QFormer
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2
from openblip2.model.vision import FrozenVision
from openblip2.progress import Progress
from openblip2.runs import read_config, read_settings, read_tensors
from openblip2.train.parameters import fill_trained, saved_parameters

# The Q-Former's text path: queries and texts share self-attention but have separate feed-forward layers. Stage 2 has
# no text path unless its Q-Former reads questions.
TEXT_PATH = ("qformer.word_embeddings.", "qformer.positions.", ".text_ffn.")
# The heads of the three stage-1 losses and the temperature, which stage 2 does not use.
HEADS = ("vision_proj.", "text_proj.", "itm_head.", "lm_head.", "temperature")
STARTS = {"retrieval": "stage1", "caption": "stage2", "vqa": "stage2", "instruct": "stage2"}  # by task


def say_without_effect(
    what: str,
    names: Iterable[str],
    trainings: Sequence[RunSettings],
    progress: Progress,
    shards: bool = False,
    held_out: bool = False,
    processes: int = 1,
) -> None:
    """Reports which of the named settings have no effect in any of these trainings, and where they would have one.

    Args:
        what: The command.
        names: The names of the settings that were set.
        trainings: The settings of each training.
        shards: Whether the trainings use shards.
        held_out: Whether validation pictures are given.
        processes: The number of processes.
    """
    every = [_rules(settings, shards, held_out, processes) for settings in trainings]
    found: dict[str, list[str]] = {}
    for name in names:
        of_name = name, name.split(".")[0] + "."
        broken = [[at for rule, (holds, at) in rules.items() if not holds and rule in of_name] for rules in every]
        if all(broken):
            found.setdefault(broken[0][0], []).append(name)
    if found:
        idle = ", ".join(f"{', '.join(of)} (used only in {where})" for where, of in found.items())
        progress.say(f"settings without effect in {what}: {idle}")


def _rules(settings: RunSettings, shards: bool, held_out: bool, processes: int) -> dict[str, tuple[bool, str]]:
    """For each setting, or section with its dot: whether it has an effect, and the trainings in which it has one."""
    stage1, objectives = settings.stage == "stage1", settings.stage1.objectives
    similar = settings.stage1.similar_start_step
    similar_rule = ((similar or 0) < settings.train.steps, f"runs of more than {similar} steps")
    qformer, pretraining = stage1 or settings.connector.name == "qformer", settings.task == "pretraining"
    return {
        "stage1.": (stage1, "stage1 and retrieval"),
        "stage1.itm_start_step": ("itm" in objectives, "runs whose stage1.objectives have itm"),
        "stage1.similar_start_step": (False, "runs without shards") if shards else similar_rule,
        "stage1.label_smoothing": (objectives != ("itm",), "runs whose stage1.objectives have itc or itg"),
        "stage2.": (not stage1, "stage 2"),
        "language.": (not stage1, "trainings with a language model"),
        "language.questions": (settings.task == "instruct", "instruct"),
        "qformer.": (qformer, "runs with connector.name=qformer"),
        "optim.layer_decay": (settings.vision.trained, "runs with vision.trained=true"),
        "data.caption_share": (settings.task == "instruct", "instruct"),
        "data.max_tokens": (settings.reads_text, "runs whose Q-Former reads text"),
        # Fine-tuning takes these from the run that it starts from.
        "stage1.temperature": (pretraining, "stage1"),
        "qformer.start": (pretraining, "stage1 and stage2"),
        "warm_start": (pretraining, "stage1 and stage2"),
        "train.parallel": (processes > 1, "runs of several processes"),
        "data.open_shards": (shards, "runs on shards"),
        "data.held_out": (not held_out, "runs without --held-out"),
        "data.most_held_out": (not held_out, "runs without --held-out"),
    }


def with_stage1(settings: RunSettings, before: RunSettings) -> RunSettings:
    """Stage-2 settings with the image encoder and Q-Former settings of the stage-1 run that training starts from."""
    same = {name: getattr(before.qformer, name) for name in ("start", "queries", "cross_every", "image_norm_eps")}
    return replace(settings, vision=before.vision, qformer=replace(settings.qformer, **same))


def require_start(settings: RunSettings, ready: bool = False) -> None:
    """Checks that the run to start from exists and is of the right kind, and that the models can be used.

    Args:
        ready: Whether the language model is passed as an object, so that its name is not checked.

    Raises:
        UserError: A check fails, or settings such as `stage2.lm_start_step` do not apply to this training.
    """
    if settings.stage2.elastic_tokens and settings.stage == "stage1":
        raise UserError(
            "stage2.elastic_tokens=true belongs to stage 2: stage 1 has no language model that reads tokens"
        )
    if aligned := settings.stage2.lm_start_step:
        if settings.stage == "stage1" or settings.task in ("vqa", "instruct"):
            raise UserError(f"stage2.lm_start_step={aligned} belongs to stage 2 with captions: set it to 0 here")
        if aligned >= settings.train.steps:
            raise UserError(
                f"stage2.lm_start_step={aligned}: with train.steps={settings.train.steps} the language model never runs"
            )
    if settings.text_start and not (settings.qformer.question_in_qformer and settings.stage == "stage2"):
        raise UserError(
            f"text_start={settings.text_start} is for vqa and instruct with qformer.question_in_qformer=true: leave it "
            "out"
        )
    if settings.start:
        _require_stage(Path(settings.start), STARTS.get(settings.task, "stage1"))
    if settings.stage == "stage2" and not ready:
        is_encoder_decoder(settings.language.name)
    if settings.task == "pretraining":
        if settings.connector.name == "qformer":
            bert_sizes(settings.qformer.start)
        if not settings.start:
            return
        if settings.stage == "stage1":
            raise UserError(
                f"start={settings.start}: stage 1 starts from qformer.start; only stage 2 starts from a run"
            )
        before = read_settings(Path(settings.start))
        if before.vision.trained:
            raise UserError(
                f"start={settings.start} contains its own image encoder, which stage 2 would not use: start from a "
                "stage-1 run with a frozen one"
            )
        _require_same_features(settings, before)
        return
    if not settings.start:
        raise UserError(f"{settings.task} starts from a run: give --start, a {STARTS[settings.task]} run")
    before = read_settings(Path(settings.start))
    if before.connector != settings.connector:
        raise UserError(
            f"start={settings.start} has the connector {before.connector.name!r} {before.connector.options or ''}, "
            f"these settings have {settings.connector.name!r} {settings.connector.options or ''}: leave connector out"
        )
    if before.vision.trained and not settings.vision.trained:
        raise UserError(
            f"start={settings.start} contains its own image encoder: keep vision.trained=true, or give a run "
            "without one"
        )
    _require_same_features(settings, before)
    if text_run := _text_run(settings):
        _require_stage(text_run, "stage1")
    # Instructions are longer than questions, so they may exceed the Q-Former's number of positions.
    if settings.reads_prompts and settings.data.max_tokens > (most := sizes_to_start(settings)["positions"]):
        raise UserError(
            f"data.max_tokens={settings.data.max_tokens}: the Q-Former of this run reads at most {most} tokens; set "
            f"data.max_tokens={most}"
        )


def _require_same_features(settings: RunSettings, before: RunSettings) -> None:
    """Compares only layer and whitening: the encoder may have moved, and images may be larger, as in the paper."""
    for name in ("layer", "whiten"):
        now, then = (json.dumps(getattr(some.vision, name)) for some in (settings, before))
        if now != then:
            raise UserError(
                f"vision.{name}={now}, but the run start={settings.start} was trained with vision.{name}={then}, and "
                f"its Q-Former cannot use other features: set vision.{name}={then}"
            )


def sizes_to_start(settings: RunSettings) -> dict[str, int]:
    """The Q-Former's sizes for fine-tuning: those of the stage-1 run if its text path is used, else of the start."""
    return read_config(_text_run(settings) or Path(str(settings.start)))["sizes"]


def tokenizer_to_start(settings: RunSettings) -> Any:
    """The Q-Former's tokenizer for fine-tuning."""
    run = _text_run(settings) or Path(str(settings.start))
    return bert_tokenizer(str(run / "tokenizer"), read_config(run)["sizes"]["vocabulary"])


def build_from_start(
    settings: RunSettings, vision: FrozenVision, language: LanguageModel | None, dtype: torch.dtype, progress: Progress
) -> Stage1 | Stage2:
    """Builds the model and loads its start weights. `language`: a ready model; `dtype`: as for `build_stage2`."""
    fine_tunes = settings.task != "pretraining"
    sizes = sizes_to_start(settings) if fine_tunes else None
    if settings.stage == "stage1":
        progress.doing(f"loading {settings.qformer.start}")
        model = build_stage1(settings, vision, sizes)
    else:
        progress.doing(f"loading {settings.language.name}")
        model = build_stage2(settings, vision, sizes, dtype, device(), language)
    # Loaded before the model is sharded, because a run on disk holds whole tensors.
    if fine_tunes:
        fine_tune_from(model, settings)
    elif isinstance(model, Stage2) and settings.start:
        start_from_stage1(model, Path(settings.start))
    return model


def fine_tune_from(model: Stage1 | Stage2, settings: RunSettings) -> None:
    """Loads the weights of the run that fine-tuning starts from; names and shapes must match exactly."""
    run = Path(str(settings.start))
    weights = read_tensors(run / "model.safetensors")
    # To read questions, the Q-Former gets the text path of the stage-1 run that stage 2 started from (paper 4.3).
    if text_run := _text_run(settings):
        weights |= _text_path(read_tensors(text_run / "model.safetensors"))
    # An encoder that is trained for the first time starts from its pretrained weights, which the model already has.
    if settings.vision.trained and not read_settings(run).vision.trained:
        weights |= {n: p.data for n, p in saved_parameters(model).items() if n.startswith("vision.")}
    fill_trained(model, weights, str(run))


def start_from_stage1(model: Stage2, run: Path) -> None:
    """Copies a stage-1 run's connector, without text path and heads, into stage 2; all names and shapes must match.

    Adapters that the stage-1 run trained (`qformer.lora_rank`) are merged into the weights.
    """
    # The saved weights have the names of a Q-Former with adapters, so this one gets adapters until they are merged.
    rank, connector = read_settings(run).qformer.lora_rank, model.connector
    if rank and isinstance(connector, QFormer):
        adapt_qformer(connector, rank)
    weights = read_tensors(run / "model.safetensors")
    text = _text_path(weights)
    kept = (name for name in weights if name not in text and not name.startswith((*HEADS, "vision.")))
    used = {connector.name + name.removeprefix(QFormer.name): weights[name] for name in kept}
    wanted = {name: p for name, p in saved_parameters(model).items() if name.startswith(f"{connector.name}.")}
    differing = sorted(used.keys() ^ wanted.keys()) or [n for n in used if used[n].shape != wanted[n].shape]
    if differing:
        raise UserError(
            f"start={run} does not fit this stage 2 (first difference: {differing[0]}): vision and qformer settings "
            "must be the same as in the stage-1 run"
        )
    for name, value in used.items():
        wanted[name].data.copy_(value)
    if rank:
        merge_lora(connector).requires_grad_(True)


def _text_path(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if any(part in name for part in TEXT_PATH)}


def _text_run(settings: RunSettings) -> Path | None:
    """The stage-1 run that provides the Q-Former's text path; None if it is not needed or is already in the start."""
    before = read_settings(Path(str(settings.start)))
    if before.qformer.question_in_qformer or not settings.qformer.question_in_qformer:
        return None
    run = settings.text_start or before.start
    if not run:
        raise UserError(
            f"start={settings.start} does not name its stage-1 run, whose text path is needed to read questions: "
            "give --text-start RUN, or --set qformer.question_in_qformer=false"
        )
    if not settings.text_start and not Path(run).exists():
        return Path(str(settings.start)).parent / Path(run).name  # both runs were moved to another folder
    return Path(run)


def _require_stage(run: Path, stage: str) -> None:
    if read_settings(run).stage != stage:
        raise UserError(
            f"start={run} is not a {stage[:-1]}-{stage[-1]} run: give the folder that `train {stage} --out` wrote"
        )
