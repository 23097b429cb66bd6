"""Optional libraries, each imported when it is needed."""

from __future__ import annotations

import importlib
from typing import Any

from embodichain_rl.errors import MissingPackageError

__all__ = ["needing"]


def needing(extra: str, module: str) -> Any:
    """Import and return a module of an optional library.

    Args:
        extra: the extra of this package that installs it.
        module: the name of the module.

    Raises:
        MissingPackageError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"This needs {module.split('.')[0]}, which can't be imported ({error}). Install it: "
            f"pip install 'embodichain-rl[{extra}]'."
        ) from error
