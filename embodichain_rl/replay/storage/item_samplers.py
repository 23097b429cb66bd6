"""The TorchRL samplers that can draw from a storage whose items are whole trajectories."""

from __future__ import annotations

from typing import Any

from torchrl.data.replay_buffers.samplers import RandomSampler, Sampler, SamplerWithoutReplacement

from embodichain_rl.errors import UnsupportedOperationError

__all__ = ["refuse_samplers_of_steps"]

DRAW_POSITIONS = {Sampler, RandomSampler, SamplerWithoutReplacement}
"""TorchRL's samplers that use nothing of a storage but its length."""


def refuse_samplers_of_steps(sampler: Any) -> None:
    """Refuse samplers that take an item of the storage for a step: they would return garbage, or fail obscurely.

    They read columns of the storage, or keep numbers by position. User-defined subclasses of a sampler that draws
    positions are accepted.

    Raises:
        UnsupportedOperationError: for TorchRL's other samplers, and those derived from them.
    """
    for base in type(sampler).__mro__:
        if base.__module__.startswith("torchrl.") and base not in DRAW_POSITIONS:
            raise UnsupportedOperationError(
                f"Got a {type(sampler).__name__}, which draws single steps; the items of a TrajectoryStorage are whole "
                "trajectories. Use ChunkSampler(chunk_size) for chunks of them, or RandomSampler or "
                "SamplerWithoutReplacement for whole ones."
            )
