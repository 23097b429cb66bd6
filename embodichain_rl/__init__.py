"""Live trajectory streaming for robot learning, as a TorchRL replay buffer."""

from embodichain_rl.replay import ChunkSampler, TrajectoryReplayBuffer, TrajectoryStorage, TrajectoryWriter

__all__ = ["ChunkSampler", "TrajectoryReplayBuffer", "TrajectoryStorage", "TrajectoryWriter"]
