"""From settings to models: one nested expression for each stage, which is factory and architecture diagram at once."""

from collections.abc import Mapping

import torch
from torch import nn

from openblip2.config import RunSettings
from openblip2.model.bert import bert_sizes, start_from_bert
from openblip2.model.language import load_language
from openblip2.model.qformer import QFormer
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2
from openblip2.model.vision import Vision, load_vision


def build_vision(settings: RunSettings, dtype: torch.dtype = torch.float32) -> Vision:
    """The frozen image encoder of the settings, its weights in `dtype`."""
    vision = settings.vision
    return load_vision(vision.name, vision.layer, vision.image_size, dtype=dtype)


def build_stage1(settings: RunSettings, vision: Vision, sizes: Mapping[str, int] | None = None) -> Stage1:
    """Stage 1 started from BERT; or, with the `sizes` of a finished run, empty and ready to be filled from it."""
    qformer = settings.qformer
    model = Stage1(
        QFormer(
            **(sizes or bert_sizes(qformer.start)),
            queries=qformer.queries,
            image_width=vision.width,
            cross_every=qformer.cross_every,
            dropout=qformer.dropout,
        ),
        vision,
        settings.stage1.shared_width,
        settings.stage1.temperature,
        settings.stage1.label_smoothing,
        settings.stage1.one_sided,
    )
    if sizes is None:
        start_from_bert(model.qformer, qformer.start, model.word_head)
    return model


def build_stage2(
    settings: RunSettings,
    vision: Vision,
    sizes: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Stage2:
    """Stage 2 started from BERT (a stage-1 run is put over it); with `sizes`, empty. `dtype`: the LLM's weights."""
    qformer, language = settings.qformer, settings.language
    model = Stage2(
        QFormer(
            **{**(sizes or bert_sizes(qformer.start)), "vocabulary": 0},
            queries=qformer.queries,
            image_width=vision.width,
            cross_every=qformer.cross_every,
            dropout=qformer.dropout,
        ),
        load_language(language.name, language.template, language.end, dtype),
        vision,
    )
    if sizes is None:
        start_from_bert(model.qformer, qformer.start)
    return model


def parts_table(model: nn.Module) -> list[tuple[str, int, str]]:
    """(part, parameters, "trained" or "frozen") for each part of a model; asserts that no part is half of each."""
    rows = []
    for name, part in model.named_children():
        _add_row(rows, name, list(part.parameters()))
    _add_row(rows, "temperature", list(model.parameters(recurse=False)))
    return rows


def _add_row(rows: list[tuple[str, int, str]], name: str, parameters: list[nn.Parameter]) -> None:
    if parameters:
        trained = {p.requires_grad for p in parameters}
        assert len(trained) == 1, f"{name} is frozen in part"
        rows.append((name, sum(p.numel() for p in parameters), "trained" if trained.pop() else "frozen"))
