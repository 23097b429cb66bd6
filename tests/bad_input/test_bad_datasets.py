"""Datasets and samplers of chunk sizes made of nonsense."""

from __future__ import annotations

import math
from typing import Any

import torch
from nonsense import (
    NO_POSITIVE_INT,
    Case,
    Place,
    Table,
    assert_refused,
)
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, RandomSampler, ReplayBuffer, TensorDictReplayBuffer

from embodichain_rl import (
    TrajectoryReplayBuffer,
)
from embodichain_rl.datasets import GMMChunkSampler, OnlineDataset, UniformChunkSampler, masked_mean
from embodichain_rl.datasets.collate import collate_chunks
from embodichain_rl.errors import (
    ArgumentTypeError,
    ChunkShapeError,
    InvalidArgumentError,
    SchemaMismatchError,
    StateMismatchError,
)
from embodichain_rl.transforms import FlatChunks

TABLE = Table()
refuse, refuse_values = TABLE.refuse, TABLE.refuse_values

refuse_values("chunk_size", lambda p, v: OnlineDataset(p.rb, v), NO_POSITIVE_INT[:-2])
refuse_values("chunk_size", lambda p, v: OnlineDataset(p.rb, v), NO_POSITIVE_INT[-2:], ArgumentTypeError)
refuse_values("batch_size", lambda p, v: OnlineDataset(p.rb, 4, v), NO_POSITIVE_INT)
refuse_values("seed", lambda p, v: OnlineDataset(p.rb, 4, seed=v), [-1, True, 1.0, "0", math.nan])
refuse_values("transform", lambda p, v: OnlineDataset(p.rb, 4, transform=v), [3, "flat", [FlatChunks]])
refuse_values("source", lambda _, v: OnlineDataset(v, 4), [None, 3, "rb", TrajectoryReplayBuffer])
refuse(InvalidArgumentError, "chunk_size", lambda p: OnlineDataset(p.rb, None))
refuse(
    InvalidArgumentError,
    "single steps",
    lambda _: OnlineDataset(ReplayBuffer(storage=LazyTensorStorage(10)), 4),
    lambda _: OnlineDataset(TensorDictReplayBuffer(storage=LazyTensorStorage(10), sampler=RandomSampler()), 4),
)


class Careless:
    """A source that does not do what it is asked."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def sample_chunks(self, batch_size: int, chunk_size: int, *, generator: Any = None) -> Any:
        return self.answer


refuse(
    ChunkShapeError,
    r"Requested 3 chunk\(s\) of 4 steps, but got .* must return a TensorDict",
    lambda _: next(iter(OnlineDataset(Careless(TensorDict({}, [3, 5])), 4, 3))),
    lambda _: next(iter(OnlineDataset(Careless(TensorDict({}, [2, 4])), 4, 3))),
    lambda _: next(iter(OnlineDataset(Careless(TensorDict({}, [])), 4, 3))),
    lambda _: next(iter(OnlineDataset(Careless(None), 4, 3))),
    lambda _: next(iter(OnlineDataset(Careless({"action": torch.zeros(3, 4)}), 4, 3))),
)
refuse(
    StateMismatchError,
    "pass a result of its state_dict",
    lambda p: OnlineDataset(p.rb, 4).load_state_dict({}),
    lambda p: OnlineDataset(p.rb, 4).load_state_dict(None),
    lambda p: iter(OnlineDataset(p.rb, 4)).load_state_dict([1]),
    lambda _: UniformChunkSampler(2, 4).load_state_dict({}),
)
refuse_values("low", lambda _, v: UniformChunkSampler(v, 10), NO_POSITIVE_INT)
refuse_values("high", lambda _, v: UniformChunkSampler(1, v), [*NO_POSITIVE_INT, 2**63])
refuse_values("seed", lambda _, v: UniformChunkSampler(1, 2, seed=v), [-1, True, 0.0, "0"])
refuse_values("seed", lambda _, v: UniformChunkSampler(1, 2).manual_seed(v), [-1, True, 0.0, None])
refuse_values("means", lambda _, v: GMMChunkSampler(v, [1.0]), [3, "16", None])
refuse(InvalidArgumentError, "low must not be above high", lambda _: UniformChunkSampler(4, 3))
refuse(InvalidArgumentError, "means must have at least one", lambda _: GMMChunkSampler([], []))
refuse(InvalidArgumentError, "stds must have one number for each", lambda _: GMMChunkSampler([8, 9], [1]))
refuse(
    InvalidArgumentError,
    r"(means|stds|weights)\[0\] must be a finite",
    lambda _: GMMChunkSampler([math.nan], [1]),
    lambda _: GMMChunkSampler([True], [1]),
    lambda _: GMMChunkSampler([8], [-1]),
    lambda _: GMMChunkSampler([8], [1], weights=[-1]),
)
refuse(InvalidArgumentError, "at least one above 0", lambda _: GMMChunkSampler([8], [1], weights=[0]))
refuse(InvalidArgumentError, "no items", lambda _: collate_chunks([]))
refuse(InvalidArgumentError, "items must be TensorDicts", lambda p: collate_chunks([p.rb[0], torch.zeros(3)]))
refuse(SchemaMismatchError, "same", lambda p: collate_chunks([p.rb[0], p.rb[0].exclude("observation")]))
refuse(
    InvalidArgumentError,
    "bool mask",
    lambda _: masked_mean(3, torch.ones(2, dtype=torch.bool)),
    lambda _: masked_mean(torch.zeros(2), None),
    lambda _: masked_mean(torch.zeros(2, 3), torch.ones(2, 3)),
    lambda _: masked_mean(torch.zeros(2, 3), torch.ones(3, 2, dtype=torch.bool)),
    lambda _: masked_mean(torch.zeros(2), torch.ones(2, 3, dtype=torch.bool)),
)


@TABLE.each
def test_nonsense_is_refused_and_the_buffer_goes_on(place: Place, case: Case) -> None:
    assert_refused(case, place)
