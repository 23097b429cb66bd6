"""Pickle a ``torch.Generator`` by value when it is sent to a child process that is being started.

The reducer that torch registers sends the state through shared memory, which no longer exists when the child maps it.
Importing this module replaces that reducer for the whole process.
"""

from __future__ import annotations

from multiprocessing import reduction
from typing import Any

import numpy as np
import torch

__all__ = ["reduce_generator"]


def _generator(device: str, state: bytes) -> torch.Generator:
    generator = torch.Generator(device)
    generator.set_state(torch.from_numpy(np.frombuffer(state, dtype=np.uint8).copy()))
    return generator


def reduce_generator(generator: torch.Generator) -> tuple[Any, tuple[str, bytes]]:
    """Return how a generator with its current state is made, for a pickler."""
    return _generator, (str(generator.device), generator.get_state().numpy().tobytes())


reduction.ForkingPickler.register(torch.Generator, reduce_generator)
