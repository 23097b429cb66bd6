"""``embodichain.agents.datasets``."""

from embodichain_rl.datasets import ChunkSizeSampler, GMMChunkSampler, OnlineDataset, UniformChunkSampler

__all__ = ["ChunkSizeSampler", "GMMChunkSampler", "OnlineDataset", "UniformChunkSampler"]
