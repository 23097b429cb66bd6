"""The TorchRL components: storage, writer, sampler and the replay buffer composed of them."""

from embodichain_rl.replay.buffer import TrajectoryReplayBuffer
from embodichain_rl.replay.chunk_sampler import ChunkSampler
from embodichain_rl.replay.storage import TrajectoryStorage
from embodichain_rl.replay.writer import TrajectoryWriter

__all__ = ["ChunkSampler", "TrajectoryReplayBuffer", "TrajectoryStorage", "TrajectoryWriter"]
