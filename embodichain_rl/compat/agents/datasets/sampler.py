"""``embodichain.agents.datasets.sampler``."""

from embodichain_rl.datasets import ChunkSizeSampler, GMMChunkSampler, UniformChunkSampler

__all__ = ["ChunkSizeSampler", "GMMChunkSampler", "UniformChunkSampler"]
