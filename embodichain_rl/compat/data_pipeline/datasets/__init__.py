"""``embodichain.data_pipeline.datasets``."""

from embodichain_rl.datasets import ChunkSizeSampler, GMMChunkSampler, OnlineDataset, UniformChunkSampler
from embodichain_rl.errors import DataUnavailableError

__all__ = ["ChunkSizeSampler", "DataUnavailableError", "GMMChunkSampler", "OnlineDataset", "UniformChunkSampler"]
