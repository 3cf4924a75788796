"""Builds models from settings: one nested expression for each stage, which also shows its architecture."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import ValidationError, validate_call
from torch import nn

from openblip2.config import RunSettings
from openblip2.errors import UserError
from openblip2.model.bert import bert_sizes, start_from_bert
from openblip2.model.blocks import compile_blocks
from openblip2.model.connector import OTHERS, Connector
from openblip2.model.language import EncoderDecoderLM, LanguageModel
from openblip2.model.load import load_language, load_vision
from openblip2.model.lora import adapt_qformer, add_lora, has_lora, require_lora
from openblip2.model.precision import BITS, DTYPES, require_quantisation
from openblip2.model.qformer import QFormer
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2
from openblip2.model.vision import HANDED_IN, FrozenVision, HFVision

# Modules between image encoder and language model in stage 2, by the value of the setting `connector.name`.
CONNECTORS: dict[str, type[Connector]] = {kind.name: kind for kind in (QFormer, *OTHERS)}


def build_vision(settings: RunSettings, dtype: torch.dtype = torch.float32) -> FrozenVision:
    """Builds the image encoder of the settings; `dtype` is that of its weights if `vision.dtype` is auto."""
    named = settings.vision
    _require_name("vision", named.name)
    vision = load_vision(named.name, named.layer, named.image_size, DTYPES.get(named.dtype, dtype))
    if named.trained:
        vision.unfreeze()
    return vision


def build_language(
    settings: RunSettings, dtype: torch.dtype = torch.float32, place: torch.device | None = None
) -> LanguageModel:
    """Builds the frozen language model of the settings; `dtype` and `place` as for `build_stage2`."""
    language = settings.language
    _require_name("language", language.name)
    return load_language(
        language.name,
        language.template,
        language.end,
        DTYPES.get(language.dtype, dtype),
        BITS.get(language.dtype),
        place,
        language.exact_gelu,
    )


def _require_name(part: str, name: str) -> None:
    """Raises a `UserError` for a part that was passed in by a caller and has no file."""
    if name.startswith(HANDED_IN):
        raise UserError(
            f"{part}.name={name}: this part was passed as an object, which is not saved: pass it again as "
            f"{part}= of openblip2.load or train_stage"
        )


def with_parts(
    settings: RunSettings, vision: FrozenVision | None = None, language: LanguageModel | None = None
) -> RunSettings:
    """The settings, updated with the names, sizes and templates of frozen parts that a caller passed in."""
    if vision is not None:
        if settings.vision.trained:
            raise UserError("vision.trained=true needs an encoder given by vision.name: leave vision= out")
        named = {"name": vision.source, "layer": vision.layers, "image_size": vision.image_size}
        settings = replace(settings, vision=replace(settings.vision, **named, dtype="auto"))
    if language is not None:
        name = str(language.llm.name_or_path) or f"{HANDED_IN}{type(language.llm).__name__}"
        frame = {"template": language.template, "end": str(language.tokenizer.decode(language.end))}
        settings = replace(settings, language=replace(settings.language, name=name, **frame, dtype="auto"))
    return settings


def build_qformer(settings: RunSettings, image_width: int, sizes: Mapping[str, int]) -> QFormer:
    """A Q-Former with random weights; `sizes` are those of a BERT or of a finished run."""
    qformer = settings.qformer
    if "heads" not in sizes:
        raise UserError(f"sizes {', '.join(sizes)} belong to another connector, but the settings name 'qformer'")
    return QFormer(
        **sizes,
        queries=qformer.queries,
        image_width=image_width,
        cross_every=qformer.cross_every,
        dropout=qformer.dropout,
        image_norm_eps=qformer.image_norm_eps,
    )


def connector_class(settings: RunSettings) -> type[Connector]:
    """The class for `connector.name`; a `UserError` if there is none, or a setting does not apply to it."""
    name, qformer = settings.connector.name, settings.qformer
    if (kind := CONNECTORS.get(name)) is None:
        raise UserError(f"connector.name={name!r} is not one of {', '.join(CONNECTORS)}: add it to CONNECTORS")
    if kind is QFormer:
        foreign: dict[str, Any] = {"connector.options": settings.connector.options}
    else:
        foreign = {"qformer.question_in_qformer": qformer.question_in_qformer, "qformer.lora_rank": qformer.lora_rank}
        if settings.stage == "stage1":
            raise UserError(f"connector.name={name}: stage 1 trains the Q-Former; use train stage2 without --start")
        foreign["start"] = settings.task == "pretraining" and not kind.has_stage1 and settings.start
    for setting, value in ((setting, value) for setting, value in foreign.items() if value):
        raise UserError(f"{setting}={value} does not apply to the connector {name!r}: leave it out")
    return kind


def build_connector(settings: RunSettings, vision: FrozenVision, sizes: Mapping[str, int] | None = None) -> Connector:
    """Builds the connector of stage 2; with the `sizes` of a finished run, its weights must be loaded afterwards.

    Raises:
        UserError: as for `connector_class`; or the connector does not accept the options, or has other sizes.
    """
    kind, options = connector_class(settings), settings.connector.options
    if kind is QFormer:
        sizes = dict(sizes or bert_sizes(settings.qformer.start))
        if not settings.qformer.question_in_qformer:
            sizes["vocabulary"] = 0
        return build_qformer(settings, vision.width, sizes)
    connector = kind.__new__(kind)
    try:
        validate_call(kind.__init__)(connector, vision.patches, vision.width, **options)
    except ValidationError as error:
        first, known = error.errors()[0], list(inspect.signature(kind).parameters)[2:]
        raise UserError(
            f"connector.options: {first['loc'][0]}={first['input']!r}: {first['msg'].lower()}; the connector "
            f"{kind.name!r} has {', '.join(known) or 'none'}"
        ) from error
    if sizes is not None and sizes != connector.sizes:
        raise UserError(
            f"the connector {kind.name!r} was trained with {dict(sizes)}, but here it has {connector.sizes}: its "
            "options and the image encoder must be the same as in training"
        )
    return connector


def build_stage1(
    settings: RunSettings, vision: FrozenVision, sizes: Mapping[str, int] | None = None, writes: bool = True
) -> Stage1:
    """Builds stage 1 with BERT's weights; with the `sizes` of a finished run, weights must be loaded afterwards."""
    qformer = settings.qformer
    model = Stage1(
        build_qformer(settings, vision.width, sizes or bert_sizes(qformer.start)),
        vision,
        settings.stage1.shared_width,
        settings.stage1.temperature,
        settings.stage1.label_smoothing,
        settings.stage1.detach_gathered,
        writes,
        settings.stage1.decorrelation,
        settings.stage1.smooth_maximum,
    )
    if sizes is None:
        start_from_bert(model.qformer, qformer.start, model.lm_head)
    else:
        add_adapters(model, settings)
    return model


def build_stage2(
    settings: RunSettings,
    vision: FrozenVision,
    sizes: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    place: torch.device | None = None,
    language: LanguageModel | None = None,
) -> Stage2:
    """Builds stage 2. Without the `sizes` of a run, a Q-Former starts from BERT; a stage-1 run may be loaded over it.

    Args:
        dtype: of the language model's weights if `language.dtype` is auto; of unquantised ones if it is int8 or int4.
        place: see `load_language`.
        language: a language model to use instead of building the one in the settings.
    """
    model = Stage2(
        build_connector(settings, vision, sizes),
        build_language(settings, dtype, place) if language is None else language,
        vision,
    )
    if isinstance(model.language, EncoderDecoderLM):
        model.language.splits = settings.task == "pretraining"
    if sizes is not None:
        add_adapters(model, settings)
    elif isinstance(model.connector, QFormer):
        start_from_bert(model.connector, settings.qformer.start)
    return model


def add_adapters(model: Stage1 | Stage2, settings: RunSettings) -> None:
    """Adds LoRA if it is set: in training after the initial weights are loaded, else before a run's weights are."""
    if settings.qformer.lora_rank:
        assert isinstance(model.connector, QFormer)
        adapt_qformer(model.connector, settings.qformer.lora_rank)
    if isinstance(model, Stage2) and settings.language.lora_rank:
        add_lora(model.language.llm, settings.language.lora_rank)


def require_extras(settings: RunSettings) -> None:
    """Raises a `UserError` if settings do not fit together or a package is missing, before anything slow starts."""
    language = settings.language
    objectives = settings.stage1.objectives
    if len(set(objectives)) < len(objectives):
        raise UserError(f"stage1.objectives={list(objectives)} names one twice: name each once")
    if not objectives or (set(objectives) == {"itm"} and settings.stage1.itm_start_step):
        raise UserError(
            f"stage1.objectives={list(objectives)}, stage1.itm_start_step={settings.stage1.itm_start_step}: some "
            "steps have nothing to train; add one more of itc, itm, itg"
        )
    if settings.vision.trained and settings.vision.dtype not in ("auto", "fp32"):
        raise UserError(
            f"vision.trained=true with vision.dtype={settings.vision.dtype}: trained weights are fp32; leave it "
            "at auto (train.precision sets the precision of the computation)"
        )
    if settings.vision.trained and settings.task == "pretraining":
        raise UserError("vision.trained=true is for fine-tuning: stage 1 and stage 2 need a frozen image encoder")
    if settings.qformer.question_in_qformer and settings.task not in ("vqa", "instruct"):
        raise UserError(
            f"qformer.question_in_qformer=true is for vqa and instruct, but the task is {settings.task}, which has "
            "no questions; a run fine-tuned for vqa or instruct can only be fine-tuned for these two"
        )
    if (settings.data.balance or settings.data.negations < 1) and settings.task != "vqa":
        raise UserError(
            f"data.balance and data.negations select questions for vqa; {settings.task} has none: leave them out"
        )
    if settings.vision.trained and settings.train.chunk:
        raise UserError("train.chunk needs a frozen image encoder: set train.chunk=0, or vision.trained=false")
    connector_class(settings)
    generative = settings.stage == "stage2"
    if settings.qformer.lora_rank or (generative and language.lora_rank):
        require_lora()
    if generative and language.dtype in BITS:
        require_quantisation()


def parts_table(model: nn.Module) -> list[tuple[str, int, str]]:
    """(part, parameters, "trained" or "frozen") for each part of a model.

    A part with adapters, and an image encoder that is trained, have one row for trained and one for frozen parameters.
    Asserts that every other part is either entirely trained or entirely frozen.
    """
    rows = []
    parts = [
        (name, list(part.parameters()), has_lora(part) or (isinstance(part, FrozenVision) and part.trained))
        for name, part in model.named_children()
    ]
    parts += [(name, [parameter], False) for name, parameter in model.named_parameters(recurse=False)]
    for name, parameters, mixed in parts:
        trained, frozen = ([p for p in parameters if p.requires_grad is wanted] for wanted in (True, False))
        assert mixed or not (trained and frozen), f"{name} is frozen in part"
        for some, state in ((trained, "trained"), (frozen, "frozen")):
            if some:
                # Two 4-bit weights are stored in one byte.
                rows.append((name, sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in some), state))
    return rows


def set_speed(model: Stage1 | Stage2, settings: RunSettings) -> None:
    """Applies the settings that change time and memory but not the results; a `UserError` if it cannot compile."""
    if settings.train.checkpoint_activations:
        if isinstance(model.vision, HFVision) and model.vision.trained:
            model.vision.checkpoint_activations()
        model.connector.checkpoint_activations = True
        if isinstance(model, Stage2):
            model.language.checkpoint_activations()
    if settings.train.compile:
        compile_blocks(model.connector)
