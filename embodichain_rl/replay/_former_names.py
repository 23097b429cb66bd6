"""Modules under which earlier versions pickled classes, so that their pickles load.

A pickle names a class by the module that it was defined in. The modules below are made on demand, when a pickle names
one, and hold nothing but these classes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__: list[str] = []

_ROOM = {
    "acceptance": {"writing": "AcceptFilter accept_all accept_success"},
    "chunk_request": {"sampling.requests": "ChunkRequest PaddedRequest WindowRequest"},
    "chunk_sampler": {"sampling": "ChunkSampler"},
    "group_draws": {"sampling.draws.group_draws": "GroupDraws _Members"},
    "one_pass": {"sampling.passes": "OnePassDraws"},
    "sampling.request_options": {"sampling.requests": "RequestOptions"},
    "sampling.windows": {"sampling.requests": "TimedWindows"},
    "texts": {"schema.texts": "TextTable"},
    "trajectory_draws": {"sampling.draws": "TrajectoryDraws PriorityDraws RecencyDraws StepDraws"},
    "transformed": {"batches": "Collate"},
    "weights": {"sampling": "ByGroup ByPriority ByRecency"},
    "writer": {"writing": "TrajectoryWriter"},
}
"""Of each former module of ``replay``, where its classes are now, and which of them pickles name there."""


class _FormerModules(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname.removeprefix(f"{__package__}.") in _ROOM else None

    def exec_module(self, module: ModuleType) -> None:
        for room, names in _ROOM[module.__name__.removeprefix(f"{__package__}.")].items():
            now = importlib.import_module(f"{__package__}.{room}")
            vars(module).update({name: getattr(now, name) for name in names.split()})


sys.meta_path.append(_FormerModules())
