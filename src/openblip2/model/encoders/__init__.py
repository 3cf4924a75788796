"""Our own image encoders for `AutoModel` of transformers: each module here registers its class when it is imported."""

import importlib
import pkgutil


def register() -> None:
    """Registers all encoders in this folder with transformers' `AutoConfig` and `AutoModel`."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
