"""What a run starts from: stage 2 from a stage-1 run's query path, fine-tuning from a whole run.

For VQA the stage-2 run's Q-Former gets back the text path that stage 2 leaves out (paper 4.3): it is stage 1's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from openblip2.config import RunSettings
from openblip2.errors import UserError
from openblip2.model.bert import bert_tokenizer
from openblip2.model.lora import adapt_qformer, merge_lora
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2
from openblip2.runs import read_config, read_settings, read_tensors
from openblip2.train.parameters import fill_trained, saved_parameters

TEXT_PATH = ("qformer.word_embeddings.", "qformer.positions.", ".text_ffn.")  # of a stage-1 run; stage 2 leaves it out
HEADS = ("vision_proj.", "text_proj.", "itm_head.", "lm_head.", "temperature", "contrast_bias")
STARTS = {"retrieval": "stage1", "caption": "stage2", "vqa": "stage2"}  # what each task starts from


def require_start(settings: RunSettings) -> None:
    """What the settings start from is there and of the right kind; told before minutes are spent on features.

    Raises:
        UserError: it is not.
    """
    if settings.task == "pretraining":
        if not settings.start:
            return
        if settings.stage == "stage1":
            raise UserError(
                f"start={settings.start}: stage 1 starts from qformer.start; only stage 2 starts from a run"
            )
        _require_stage(settings.start, "stage1")
        before = read_settings(Path(settings.start))
        if before.qformer.self_attention_scale != settings.qformer.self_attention_scale:
            raise UserError(
                f"start={settings.start} was trained with qformer.self_attention_scale="
                f"{before.qformer.self_attention_scale:g}, these settings have "
                f"{settings.qformer.self_attention_scale:g}: add --set qformer.self_attention_scale="
                f"{before.qformer.self_attention_scale:g}"
            )
        if before.vision.trained:
            raise UserError(
                f"start={settings.start} holds an image encoder of its own, which stage 2 would not use: start from a "
                "stage-1 run with a frozen one"
            )
        return
    if not settings.start:
        raise UserError(f"{settings.task} starts from a run: give --start, a {STARTS[settings.task]} run")
    _require_stage(settings.start, STARTS[settings.task])
    before = read_settings(Path(settings.start))
    if before.vision.trained and not settings.vision.trained:
        raise UserError(
            f"start={settings.start} holds an image encoder of its own: leave vision.trained at true, or give a run "
            "without one"
        )
    if settings.qformer.reads_question and not before.qformer.reads_question:
        _require_stage(_text_start(settings, before), "stage1")


def sizes_to_start(settings: RunSettings) -> dict[str, int]:
    """The Q-Former's sizes for fine-tuning; those of a text path are the stage-1 run's."""
    assert settings.start is not None
    before = read_settings(Path(settings.start))
    run = settings.start
    if settings.qformer.reads_question and not before.qformer.reads_question:
        run = _text_start(settings, before)
    return read_config(Path(run))["sizes"]


def tokenizer_to_start(settings: RunSettings) -> Any:
    """The Q-Former's tokenizer, for fine-tuning."""
    assert settings.start is not None
    before = read_settings(Path(settings.start))
    has_one = before.stage == "stage1" or before.qformer.reads_question
    run = Path(settings.start if has_one else _text_start(settings, before))
    return bert_tokenizer(str(run / "tokenizer"), read_config(run)["sizes"]["vocabulary"])


def fine_tune_from(model: Stage1 | Stage2, settings: RunSettings) -> None:
    """Fills a model with the run that fine-tuning starts from, strictly."""
    assert settings.start is not None
    run = Path(settings.start)
    before, found = read_settings(run), read_tensors(run / "model.safetensors")
    if settings.qformer.reads_question and not before.qformer.reads_question:
        found |= _text_path(read_tensors(Path(_text_start(settings, before)) / "model.safetensors"))
    if settings.vision.trained and not before.vision.trained:
        found |= {n: p.data for n, p in saved_parameters(model).items() if n.startswith("vision.")}
    fill_trained(model, found, str(run))


def start_from_stage1(model: Stage2, run: Path) -> None:
    """Puts a stage-1 run's query path over stage 2's, strictly; only the text path and the heads are left out.

    Adapters that the stage-1 run trained (`qformer.lora`) are folded into the weights.
    """
    rank = read_settings(run).qformer.lora
    if rank:
        adapt_qformer(model.qformer, rank)
    weights = read_tensors(run / "model.safetensors")
    text = _text_path(weights)
    used = {
        name: value for name, value in weights.items() if name not in text and not name.startswith((*HEADS, "vision."))
    }
    wanted = {name: p for name, p in saved_parameters(model).items() if name.startswith("qformer.")}
    differing = sorted(used.keys() ^ wanted.keys()) or [n for n in used if used[n].shape != wanted[n].shape]
    if differing:
        raise UserError(
            f"start={run} does not fit this stage 2 (first: {differing[0]}): vision and qformer settings must be "
            "those of the stage-1 run"
        )
    for name, value in used.items():
        wanted[name].data.copy_(value)
    if rank:
        merge_lora(model.qformer).requires_grad_(True)


def _text_path(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if any(part in name for part in TEXT_PATH)}


def _text_start(settings: RunSettings, before: RunSettings) -> str:
    found = settings.text_start or before.start
    if found and not settings.text_start and not Path(found).exists():
        found = str(Path(str(settings.start)).parent / Path(found).name)  # runs that were moved together
    if not found:
        raise UserError(
            f"start={settings.start} does not say which stage-1 run it began with, whose text path reads the question: "
            "give --set text_start=RUN, or --set qformer.reads_question=false"
        )
    return found


def _require_stage(run: str, stage: str) -> None:
    if read_settings(Path(run)).stage != stage:
        raise UserError(
            f"start={run} is no {stage[:-1]}-{stage[-1]} run; give the folder that `train {stage} --out` wrote"
        )
