"""What is drawn, and how likely: requests, weights, draws, and the sampler that combines them.

Imports ``storage`` and the rooms below it; knows nothing of writing. Begin with ``chunk_sampler.py``: a *request*
defines which offsets may be drawn, *draws* choose the trajectories, the sampler copies and checks.
"""

from embodichain_rl.replay.sampling.chunk_sampler import PRIORITY_WEIGHT, ChunkSampler
from embodichain_rl.replay.sampling.chunk_starts import mark_starts
from embodichain_rl.replay.sampling.dealing import Deal, PassEndedError, PassPosition
from embodichain_rl.replay.sampling.draws import ChunkQuery
from embodichain_rl.replay.sampling.generators import current_generator, drawing_with
from embodichain_rl.replay.sampling.one_pass import Turn
from embodichain_rl.replay.sampling.options import MixtureOptions, SamplingOptions, option_name
from embodichain_rl.replay.sampling.random_streams import (
    RandomSource,
    RandomStreams,
    first_numbers,
    part_of,
    random_numbers,
)
from embodichain_rl.replay.sampling.requests import ChunkRequest
from embodichain_rl.replay.sampling.subsets import Subset
from embodichain_rl.replay.sampling.weights import ByGroup, ByPriority, ByRecency, ByStep, Weights

__all__ = [
    "PRIORITY_WEIGHT",
    "ByGroup",
    "ByPriority",
    "ByRecency",
    "ByStep",
    "ChunkQuery",
    "ChunkRequest",
    "ChunkSampler",
    "Deal",
    "MixtureOptions",
    "PassEndedError",
    "PassPosition",
    "RandomSource",
    "RandomStreams",
    "SamplingOptions",
    "Subset",
    "Turn",
    "Weights",
    "current_generator",
    "drawing_with",
    "first_numbers",
    "mark_starts",
    "option_name",
    "part_of",
    "random_numbers",
]
