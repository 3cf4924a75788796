"""The parts of lmms-eval 0.7.3 that `openblip2.harness` needs, for machines on which it is not installed.

Names, arguments and defaults are copied from that release; nothing is computed here. If lmms-eval is installed, the
tests use it instead.
"""

import importlib.util
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


@dataclass
class GenerationResult:
    """`lmms_eval.api.instance.GenerationResult`."""

    text: Any
    token_counts: Any = None


@dataclass
class Instance:
    """`lmms_eval.api.instance.Instance`, the fields that its creator sets."""

    request_type: str
    arguments: tuple[Any, ...]
    idx: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


class lmms:
    """`lmms_eval.api.model.lmms`."""

    is_simple = True

    def __init__(self) -> None:
        self._rank = 0
        self._world_size = 1
        self.task_dict: dict[str, Any] = {}

    @property
    def rank(self) -> int:
        return self._rank

    def clean(self) -> None:
        pass


@dataclass(frozen=True)
class ModelManifest:
    """`lmms_eval.models.registry_v2.ModelManifest`."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class Logger:
    """loguru's logger, only with what warnings need."""

    def __init__(self) -> None:
        self.handlers: dict[int, Any] = {}

    def add(self, handler: Any, **_: Any) -> int:
        self.handlers[len(self.handlers)] = handler
        return len(self.handlers) - 1

    def remove(self, number: int) -> None:
        del self.handlers[number]

    def warning(self, text: str) -> None:
        for handler in self.handlers.values():
            handler(text)


def stand_in() -> None:
    """Registers the above as modules of lmms-eval and loguru, unless lmms-eval is installed."""
    if importlib.util.find_spec("lmms_eval") is not None:
        return
    contents: dict[str, dict[str, Any]] = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"GenerationResult": GenerationResult, "Instance": Instance},
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "loguru": {"logger": Logger()},
    }
    for name, names in contents.items():
        module = ModuleType(name)
        vars(module).update(names)
        sys.modules.setdefault(name, module)
