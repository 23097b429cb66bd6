"""Datasets over live trajectories, and how long their chunks are."""

from embodichain_rl.datasets.masks import masked_mean
from embodichain_rl.datasets.online_data import OnlineDataset
from embodichain_rl.datasets.sampler import ChunkSizeSampler, GMMChunkSampler, UniformChunkSampler

__all__ = ["ChunkSizeSampler", "GMMChunkSampler", "OnlineDataset", "UniformChunkSampler", "masked_mean"]
