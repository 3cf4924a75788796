"""What `openblip2.harness` needs of lmms-eval 0.7.3, written down from it: for machines that do not have it.

Names, arguments and defaults are that release's; nothing is computed here. Where lmms-eval is installed the tests run
against it.
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
    """`lmms_eval.api.instance.Instance`, the fields that are set by whoever makes one."""

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
    """loguru's, as far as a warning goes."""

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
    """Puts the above where lmms-eval and loguru would be, unless they are there."""
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
