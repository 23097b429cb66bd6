"""Live trajectory streaming for robot learning, as a TorchRL replay buffer."""

from embodichain_rl.replay import (
    ByGroup,
    ByPriority,
    ByRecency,
    ChunkSampler,
    TrajectoryReplayBuffer,
    TrajectoryStorage,
    TrajectoryWriter,
    accept_success,
)

__all__ = [
    "ByGroup",
    "ByPriority",
    "ByRecency",
    "ChunkSampler",
    "TrajectoryReplayBuffer",
    "TrajectoryStorage",
    "TrajectoryWriter",
    "accept_success",
]
