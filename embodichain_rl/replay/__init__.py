"""The TorchRL components: storage, writer, sampler and the replay buffer composed of them."""

from embodichain_rl.replay.acceptance import accept_success
from embodichain_rl.replay.buffer import TrajectoryReplayBuffer
from embodichain_rl.replay.chunk_sampler import ChunkSampler
from embodichain_rl.replay.storage import TrajectoryStorage
from embodichain_rl.replay.weights import ByGroup, ByPriority, ByRecency
from embodichain_rl.replay.writer import TrajectoryWriter

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
