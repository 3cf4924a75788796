"""From settings to models: one nested expression for each stage, which is factory and architecture diagram at once."""

from collections.abc import Mapping

import torch
from torch import nn

from openblip2.config import RunSettings
from openblip2.errors import UserError
from openblip2.model.bert import bert_sizes, start_from_bert
from openblip2.model.fast.compiled import compile_blocks
from openblip2.model.language import EncoderDecoderLM, LanguageModel
from openblip2.model.load_language import load_language
from openblip2.model.load_vision import load_vision
from openblip2.model.lora import adapt_qformer, add_lora, has_lora, require_lora
from openblip2.model.precision import DTYPES
from openblip2.model.qformer import QFormer
from openblip2.model.quantised import BITS, require_quantisation
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2
from openblip2.model.vision import Vision


def build_vision(settings: RunSettings, dtype: torch.dtype = torch.float32) -> Vision:
    """The image encoder of the settings; `dtype` of its weights where `vision.dtype` is auto."""
    named = settings.vision
    vision = load_vision(named.name, named.layer, named.image_size, dtype=DTYPES.get(named.dtype, dtype))
    if named.trained:
        vision.unfreeze()
    return vision


def build_language(
    settings: RunSettings, dtype: torch.dtype = torch.float32, place: torch.device | None = None
) -> LanguageModel:
    """The frozen language model of the settings; `dtype` and `place` as for `build_stage2`."""
    language = settings.language
    return load_language(
        language.name,
        language.template,
        language.end,
        DTYPES.get(language.dtype, dtype),
        BITS.get(language.dtype),
        place,
        language.exact_gelu,
    )


def build_qformer(settings: RunSettings, image_width: int, sizes: Mapping[str, int]) -> QFormer:
    """A Q-Former with random weights; `sizes` are those of a BERT or of a finished run."""
    qformer = settings.qformer
    return QFormer(
        **sizes,
        queries=qformer.queries,
        image_width=image_width,
        cross_every=qformer.cross_every,
        dropout=qformer.dropout,
        image_norm_eps=qformer.image_norm_eps,
    )


def build_stage1(
    settings: RunSettings, vision: Vision, sizes: Mapping[str, int] | None = None, writes: bool = True
) -> Stage1:
    """Stage 1 started from BERT; or, with the `sizes` of a finished run, empty and ready to be filled from it."""
    qformer = settings.qformer
    model = Stage1(
        build_qformer(settings, vision.width, sizes or bert_sizes(qformer.start)),
        vision,
        settings.stage1.shared_width,
        settings.stage1.temperature,
        settings.stage1.label_smoothing,
        settings.stage1.detach_gathered,
        writes,
        settings.stage1.contrast,
        settings.stage1.decorrelation,
    )
    if sizes is None:
        start_from_bert(model.qformer, qformer.start, model.lm_head)
    else:
        add_adapters(model, settings)
    return model


def build_stage2(
    settings: RunSettings,
    vision: Vision,
    sizes: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    place: torch.device | None = None,
    language: LanguageModel | None = None,
) -> Stage2:
    """Stage 2 started from BERT (a stage-1 run is put over it); with `sizes`, empty and ready to be filled.

    Args:
        dtype: of the language model's weights where `language.dtype` is auto, and of what int8 and int4 leave.
        place: see `load_language`.
        language: a ready one, instead of the settings'.
    """
    qformer = settings.qformer
    sizes_of = dict(sizes or bert_sizes(qformer.start))
    if not qformer.question_in_qformer:
        sizes_of["vocabulary"] = 0
    model = Stage2(
        build_qformer(settings, vision.width, sizes_of),
        build_language(settings, dtype, place) if language is None else language,
        vision,
    )
    if isinstance(model.language, EncoderDecoderLM):
        model.language.splits = settings.task == "pretraining"
    if sizes is None:
        start_from_bert(model.qformer, qformer.start)
    else:
        add_adapters(model, settings)
    return model


def add_adapters(model: Stage1 | Stage2, settings: RunSettings) -> None:
    """LoRA where the settings ask for it: in training after the start weights, else before a run's are filled in."""
    if settings.qformer.lora_rank:
        adapt_qformer(model.qformer, settings.qformer.lora_rank)
    if isinstance(model, Stage2) and settings.language.lora_rank:
        add_lora(model.language.llm, settings.language.lora_rank)


def require_extras(settings: RunSettings) -> None:
    """Checks that the settings fit together and their optional packages are installed, before minutes are spent.

    Raises:
        UserError: they do not, or one is not.
    """
    language = settings.language
    if settings.stage1.detach_gathered and settings.stage1.contrast == "sigmoid":
        raise UserError(
            "stage1.detach_gathered=true belongs to the two directions of stage1.contrast=softmax; sigmoid has one: "
            "leave detach_gathered out"
        )
    objectives = settings.stage1.objectives
    if not objectives or (set(objectives) == {"itm"} and settings.stage1.itm_start_step):
        raise UserError(
            f"stage1.objectives={list(objectives)}, stage1.itm_start_step={settings.stage1.itm_start_step}: there are "
            "steps with nothing to train; name one more of itc, itm, itg"
        )
    if settings.vision.trained and settings.vision.dtype not in ("auto", "fp32"):
        raise UserError(
            f"vision.trained=true with vision.dtype={settings.vision.dtype}: weights that train are fp32; leave it "
            "at auto (train.precision says what is computed in)"
        )
    if settings.vision.trained and settings.task == "pretraining":
        raise UserError("vision.trained=true is for fine-tuning (caption, vqa, retrieval): both stages need it frozen")
    if settings.qformer.question_in_qformer and settings.task != "vqa":
        raise UserError(
            f"qformer.question_in_qformer=true is for vqa, here is {settings.task}, which has no question to read; a "
            "run fine-tuned for vqa cannot be fine-tuned for anything else"
        )
    if (settings.data.balance or settings.data.negations < 1) and settings.task != "vqa":
        raise UserError(
            f"data.balance and data.negations choose questions, for vqa; {settings.task} has none: leave them out"
        )
    if settings.vision.trained and settings.train.chunk:
        raise UserError("train.chunk goes with a frozen image encoder: set train.chunk=0, or vision.trained=false")
    generative = settings.stage == "stage2"
    if settings.qformer.lora_rank or (generative and language.lora_rank):
        require_lora()
    if generative and language.dtype in BITS:
        require_quantisation()


def parts_table(model: nn.Module) -> list[tuple[str, int, str]]:
    """(part, parameters, "trained" or "frozen") for each part of a model.

    A part with adapters, and an image encoder that trains, have a row of each. Asserts that no other part is half of
    each.
    """
    rows = []
    for name, part in model.named_children():
        parameters = list(part.parameters())
        if has_lora(part) or (isinstance(part, Vision) and part.trained):
            _add_row(rows, name, [p for p in parameters if p.requires_grad])
            parameters = [p for p in parameters if not p.requires_grad]
        _add_row(rows, name, parameters)
    for name, parameter in model.named_parameters(recurse=False):
        _add_row(rows, name, [parameter])
    return rows


def _add_row(rows: list[tuple[str, int, str]], name: str, parameters: list[nn.Parameter]) -> None:
    if parameters:
        trained = {p.requires_grad for p in parameters}
        assert len(trained) == 1, f"{name} is frozen in part"
        # Two 4-bit weights are stored in one byte.
        count = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in parameters)
        rows.append((name, count, "trained" if trained.pop() else "frozen"))


def set_speed(model: Stage1 | Stage2, settings: RunSettings) -> None:
    """Applies the settings that change time and memory but no result.

    Raises:
        UserError: This machine cannot compile.
    """
    if settings.train.checkpoint_activations:
        if model.vision is not None and model.vision.trained:
            model.vision.checkpoint_activations()
        model.qformer.checkpoint_activations = True
        if isinstance(model, Stage2):
            model.language.checkpoint_activations()
    if settings.train.compile:
        compile_blocks(model.qformer)
