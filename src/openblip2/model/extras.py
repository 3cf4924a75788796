"""Packages that only some settings need: asked for where they are used, and named in one line where they are not."""

import importlib.util

from openblip2.errors import UserError


def require(what: str, extra: str, *packages: str) -> None:
    """Checks that optional packages are installed, without importing them.

    Args:
        what: the setting that needs them.
        extra: the extra of this package that brings them.

    Raises:
        UserError: one is not installed.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"{what} needs {' and '.join(missing)}: pip install 'openblip2[{extra}]'")
