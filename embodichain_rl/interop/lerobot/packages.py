"""The optional packages that LeRobot's files need."""

from __future__ import annotations

import importlib
from typing import Any

from embodichain_rl.errors import MissingPackageError

__all__ = ["package"]


def package(name: str) -> Any:
    """Import an optional package.

    Raises:
        MissingPackageError: when it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(
            f"Got no package {name!r}, which LeRobot's datasets need: {error}. Install it with "
            "pip install 'embodichain-rl[lerobot]'."
        ) from error
