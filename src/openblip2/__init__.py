"""openblip2: BLIP-2 (Li et al., 2023) with both training stages, for any image encoder and any language model.

All shapes in this package use these letters:

    B images or pairs of this process   G those of all processes   S image side in pixels
    P patch tokens                      V image encoder width      Q queries
    T text tokens                       D Q-Former width           E shared image-text space
    L language model width              W vocabulary               N rows of any other kind

PyTorch and other large libraries are imported only when a name below is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from openblip2.compat import __version__ as __version__
from openblip2.compat import warn_of_versions

if TYPE_CHECKING:
    from openblip2.config import RunSettings as RunSettings
    from openblip2.config import change as change
    from openblip2.data.records import Question as Question
    from openblip2.data.records import Record as Record
    from openblip2.data.records import read_records as read_records
    from openblip2.data.records import write_records as write_records
    from openblip2.errors import UserError as UserError
    from openblip2.inference.captioner import Captioner as Captioner
    from openblip2.inference.chat import Chat as Chat
    from openblip2.inference.load import load as load
    from openblip2.inference.matcher import Matcher as Matcher
    from openblip2.model.connector import Connector as Connector
    from openblip2.model.language import DecoderLM as DecoderLM
    from openblip2.model.language import Decoding as Decoding
    from openblip2.model.language import EncoderDecoderLM as EncoderDecoderLM
    from openblip2.model.load import load_language as load_language
    from openblip2.model.load import load_vision as load_vision
    from openblip2.model.qformer import QFormer as QFormer
    from openblip2.model.stage1 import Stage1 as Stage1
    from openblip2.model.stage2 import Stage2 as Stage2
    from openblip2.model.vision import HFVision as HFVision
    from openblip2.model.vision import Vision as Vision
    from openblip2.presets import preset as preset
    from openblip2.train.recipes import train_stage as train_stage
    from openblip2.weights.convert import convert as convert

_HOME = {
    "Captioner": "inference.captioner",
    "Chat": "inference.chat",
    "Connector": "model.connector",
    "DecoderLM": "model.language",
    "Decoding": "model.language",
    "EncoderDecoderLM": "model.language",
    "HFVision": "model.vision",
    "Matcher": "inference.matcher",
    "QFormer": "model.qformer",
    "Question": "data.records",
    "Record": "data.records",
    "RunSettings": "config",
    "Stage1": "model.stage1",
    "Stage2": "model.stage2",
    "UserError": "errors",
    "Vision": "model.vision",
    "change": "config",
    "convert": "weights.convert",
    "load": "inference.load",
    "load_language": "model.load",
    "load_vision": "model.load",
    "preset": "presets",
    "read_records": "data.records",
    "train_stage": "train.recipes",
    "write_records": "data.records",
}

__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]  (the imports above tell type checkers)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'openblip2' has no attribute {name!r}")
    return getattr(importlib.import_module(f"openblip2.{_HOME[name]}"), name)


warn_of_versions()
