"""What is drawn, and how likely: requests, weights, draws, and the sampler that puts them together.

Imports ``storage`` and what lies below it; knows nothing of writing. Begin with ``chunk_sampler.py``: a *request*
defines where a draw may land, *draws* choose the trajectories, the sampler copies and checks.
"""

from embodichain_rl.replay.sampling.chunk_sampler import ChunkSampler, SamplingOptions
from embodichain_rl.replay.sampling.draws import ChunkQuery
from embodichain_rl.replay.sampling.generators import current_generator, drawing_with
from embodichain_rl.replay.sampling.requests import ChunkRequest
from embodichain_rl.replay.sampling.weights import ByGroup, ByPriority, ByRecency

__all__ = [
    "ByGroup",
    "ByPriority",
    "ByRecency",
    "ChunkQuery",
    "ChunkRequest",
    "ChunkSampler",
    "SamplingOptions",
    "current_generator",
    "drawing_with",
]
