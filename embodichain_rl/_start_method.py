"""Keeps multiprocessing's start method as the user has it, although TorchRL sets it to spawn when it is imported.

With TorchRL's setting, ``DataLoader`` and every other user of multiprocessing in the process would start its workers in
another way than before, only because this package is used. TorchRL itself does not need the setting: its collectors ask
for spawn where the user has chosen no start method.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from multiprocessing import get_start_method, set_start_method
from types import ModuleType
from typing import Any

__all__: list[str] = []

MODULE = "torchrl"


class _KeepingStartMethod(MetaPathFinder):
    """Finder of one module, whose import does not change the start method."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            before = get_start_method(allow_none=True)
            try:
                load(module)
            finally:
                if get_start_method(allow_none=True) != before:
                    # None means that no start method has been chosen yet.
                    set_start_method(before, force=True)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if MODULE not in sys.modules:
    sys.meta_path.insert(0, _KeepingStartMethod())
