"""The TorchRL samplers, buffers and sample units that work on a storage whose items are whole trajectories."""

from __future__ import annotations

from typing import Any

from torchrl.data.replay_buffers.replay_buffers import (
    RemoteTensorDictReplayBuffer,
    ReplayBuffer,
    TensorDictReplayBuffer,
)
from torchrl.data.replay_buffers.sample_units import SampleUnit, Transition
from torchrl.data.replay_buffers.samplers import RandomSampler, Sampler, SamplerWithoutReplacement

from embodichain_rl.errors import UnsupportedOperationError

__all__ = ["refuse_buffers_of_steps", "refuse_samplers_of_steps"]

DRAW_POSITIONS = {Sampler, RandomSampler, SamplerWithoutReplacement}
"""TorchRL's samplers that use nothing of a storage but its length."""

LEAVE_ITEMS_ALONE = {ReplayBuffer, TensorDictReplayBuffer, RemoteTensorDictReplayBuffer}
"""TorchRL's buffers that hand out what the sampler drew, and look at nothing else of the storage."""

LEAVE_INDICES_ALONE = {SampleUnit, Transition}
"""TorchRL's sample units that do not look for the neighbours of a step."""

WHAT_THEY_DRAW = {
    "SliceSamplerWithoutReplacement": (
        "draws slices of a ring of steps, and finds their trajectories by reading its end flags",
        "Use ChunkSampler(chunk_size, replacement=False): each chunk of each trajectory once.",
    ),
    "PrioritizedSliceSampler": (
        "draws slices of a ring of steps, by the priority of a step",
        "Use ChunkSampler(chunk_size, weights=ByPriority()), by the priority of a trajectory.",
    ),
    "StreamingSliceSampler": (
        "draws consecutive slices of a ring of steps, one stream after the other",
        "Use ChunkSampler(chunk_size), or rb.trajectory(id) for a whole trajectory.",
    ),
    "SliceSampler": (
        "draws slices of a ring of steps, and finds their trajectories by reading its end flags",
        "Use ChunkSampler(chunk_size), whose chunks are slices [B, L]; with the transform FlatChunks they are flat.",
    ),
    "PrioritizedSampler": (
        "keeps a priority for each step of a ring of steps",
        "Use ChunkSampler(chunk_size, weights=ByPriority()), which has a priority for each trajectory.",
    ),
    "ConsumingSampler": (
        "hands out each step a number of times, and then drops it",
        "Use ChunkSampler(chunk_size, replacement=False) to draw every chunk once a pass.",
    ),
    "StalenessAwareSampler": (
        "weighs single steps of a ring by the policy version that made them",
        "Use ChunkSampler(chunk_size, max_policy_lag=...), which leaves out trajectories of old policies.",
    ),
    "PromptGroupSampler": (
        "draws groups of single steps that answer the same prompt",
        "Use ChunkSampler(chunk_size, weights=ByGroup(key)), which draws trajectories by group.",
    ),
    "SamplerEnsemble": (
        "draws from an ensemble of storages",
        "Give each buffer of a ReplayBufferEnsemble a ChunkSampler of its own.",
    ),
}
"""What TorchRL's other samplers draw, and what to use in the place of each; derived classes come first."""

OTHER_SAMPLERS = (
    "takes an item of the storage for a step, or reads its columns",
    "Use ChunkSampler(chunk_size) for chunks, or RandomSampler or SamplerWithoutReplacement for whole trajectories.",
)

INSTEAD = {
    "HERReplayBuffer": "Use a TrajectoryReplayBuffer with rb.append_transform(HindsightRelabel(rb, reward_fn)), from "
    "embodichain_rl.transforms.",
    "PrioritizedReplayBuffer": "Use a TrajectoryReplayBuffer with sampler=ChunkSampler(chunk_size, "
    "weights=ByPriority()).",
    "Sequence": "Use ChunkSampler(chunk_size, pad=...) for consecutive steps, or ChunkSampler(windows=...) for the "
    "steps around one.",
}
"""What to use in the place of a class of TorchRL."""


def refuse_samplers_of_steps(sampler: Any) -> None:
    """Refuse samplers that take an item of the storage for a step: they would return garbage, or fail obscurely.

    They read columns of the storage, or keep numbers by position. User-defined subclasses of a sampler that draws
    positions are accepted.

    Raises:
        UnsupportedOperationError: for TorchRL's other samplers, and those derived from them.
    """
    unknown = _unknown_base(sampler, DRAW_POSITIONS)
    if unknown is None:
        return
    names = [c.__name__ for c in type(sampler).__mro__]
    draws, instead = next((WHAT_THEY_DRAW[name] for name in names if name in WHAT_THEY_DRAW), OTHER_SAMPLERS)
    length = getattr(sampler, "slice_len", None)
    if length is not None:
        instead = instead.replace("chunk_size", str(length), 1)
    raise UnsupportedOperationError(
        f"Got a {type(sampler).__name__}, which {draws}; but the items of a TrajectoryStorage are whole trajectories. "
        f"{instead}"
    )


def refuse_buffers_of_steps(buffer: Any) -> None:
    """Refuse buffers that look for the neighbours of a step in the storage, as in a ring of steps.

    Args:
        buffer: the buffer that is being built; TorchRL has set its constructor's arguments as attributes.

    Raises:
        UnsupportedOperationError: for TorchRL's other buffers, those derived from them, and for arguments that change
            which steps are handed out (``sample_unit``, ``consume_after_n_samples``).
    """
    unknown = _unknown_base(buffer, LEAVE_ITEMS_ALONE)
    if unknown is None:
        unknown = _unknown_base(getattr(buffer, "_sample_unit", None), LEAVE_INDICES_ALONE)
    if unknown is not None:
        instead = (INSTEAD[name] for name in INSTEAD if name in unknown.__name__)
        raise UnsupportedOperationError(
            f"Got a {unknown.__name__} over a TrajectoryStorage. It looks up steps by their position, but the items of "
            "a TrajectoryStorage are whole trajectories, so it would mix the steps of several. "
            f"{next(instead, 'Use a TrajectoryReplayBuffer.')}"
        )
    if getattr(buffer, "_consume_after_n_samples", None) is not None:
        raise UnsupportedOperationError(
            "Got consume_after_n_samples, which overwrites single items; a TrajectoryStorage takes whole trajectories. "
            "Use ChunkSampler(chunk_size, replacement=False) to draw every chunk once a pass."
        )


def _unknown_base(instance: Any, known: set[type]) -> type | None:
    """Return the first class of TorchRL that ``instance`` derives from and that is not one of ``known``."""
    return next((c for c in type(instance).__mro__ if c.__module__.startswith("torchrl.") and c not in known), None)
