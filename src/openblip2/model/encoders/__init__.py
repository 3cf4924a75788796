"""Our own image encoders that `AutoModel` of transformers loads: a module here registers its class by itself."""

import importlib
import pkgutil


def register() -> None:
    """From now on transformers' `AutoConfig` and `AutoModel` know all encoders in this folder."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
