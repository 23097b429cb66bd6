# What lazy_loader reads: each name, and the module that it is loaded from.

from .flat import (
    flat_dict as flat_dict,
)
from .masks import (
    masked_mean as masked_mean,
)
from .masks import (
    step_weights as step_weights,
)
from .online_data import (
    OnlineDataset as OnlineDataset,
)
from .sampler import (
    ChunkSizeSampler as ChunkSizeSampler,
)
from .sampler import (
    GMMChunkSampler as GMMChunkSampler,
)
from .sampler import (
    UniformChunkSampler as UniformChunkSampler,
)

__all__ = [
    "ChunkSizeSampler",
    "GMMChunkSampler",
    "OnlineDataset",
    "UniformChunkSampler",
    "flat_dict",
    "masked_mean",
    "step_weights",
]
