"""Samples that can't be."""

from __future__ import annotations

import math

import torch
from nonsense import (
    NO_NUMBER,
    NO_POSITIVE_INT,
    Case,
    Place,
    Table,
    assert_refused,
    emptied_buffer,
    make_buffer,
)
from tensordict import TensorDict
from torchrl.data import RandomSampler

from embodichain_rl import (
    ByGroup,
    ByPriority,
    ByRecency,
    ChunkSampler,
    TrajectoryReplayBuffer,
)
from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.errors import (
    ChunkTooLongError,
    EmptyBufferError,
    InvalidArgumentError,
    SchemaMismatchError,
)
from embodichain_rl.transforms import FlatChunks

TABLE = Table()
refuse, refuse_values = TABLE.refuse, TABLE.refuse_values

refuse_values("batch_size", lambda p, v: p.rb.sample_chunks(v, 4), [*NO_POSITIVE_INT, None])
refuse_values("chunk_size", lambda p, v: p.rb.sample_chunks(2, v), [*NO_POSITIVE_INT, None])
refuse_values("batch_size", lambda p, v: p.rb.sample(v), [-1, True, 1.5, "3"])
refuse(ChunkTooLongError, "Got chunk_size 9, but the longest of 3", lambda p: p.rb.sample_chunks(2, 9))
refuse(ChunkTooLongError, "Ask for at most 8", lambda p: p.rb.sample_chunks(2, 2**40))
refuse(
    EmptyBufferError,
    "Wait until",
    lambda _: TrajectoryReplayBuffer(max_trajectories=2, max_total_steps=9, chunk_size=2, batch_size=2).sample(),
    lambda _: emptied_buffer().sample(),
    lambda _: next(iter(OnlineDataset(emptied_buffer(), 4, 3))),
)
refuse(
    InvalidArgumentError,
    "draws no chunks",
    lambda _: make_buffer(chunk_size=None, sampler=RandomSampler()).sample_chunks(2, 4),
)
refuse(
    InvalidArgumentError,
    "return value of chunk_size",
    lambda _: make_buffer(chunk_size=lambda: 0).sample(),
    lambda _: make_buffer(chunk_size=lambda: 2.0).sample(),
    lambda _: make_buffer(chunk_size=lambda: None).sample(),
    lambda _: make_buffer(chunk_size=lambda: True).sample(),
    lambda p: next(iter(OnlineDataset(p.rb, lambda: -3, 3))),
)
refuse_values("sampling_mode", lambda _, v: ChunkSampler(4, sampling_mode=v), ["step", None, 3])
refuse_values("pad", lambda _, v: ChunkSampler(4, pad=v), ["left", None, True])
refuse_values("pad_before", lambda _, v: ChunkSampler(4, pad_before=v), [-1, True, 0.5, "1", 4])
refuse_values("pad_after", lambda _, v: ChunkSampler(4, pad_after=v), [-1, True, 0.5, "1", 4])
refuse_values("stride", lambda _, v: ChunkSampler(4, stride=v), [0, True, 0.5, "1", None])
refuse_values("drop_n_last_frames", lambda _, v: ChunkSampler(4, drop_n_last_frames=v), [-1, True, 0.5, None])
refuse_values("drop_n_first_frames", lambda _, v: ChunkSampler(4, drop_n_first_frames=v), [-1, True, 0.5, None])
refuse_values(
    "tolerance_s",
    lambda _, v: ChunkSampler(delta_timestamps={"action": [0.0]}, fps=10, tolerance_s=v),
    [-1.0, "1", math.nan, True],
)
refuse_values("windows", lambda _, v: ChunkSampler(windows=v), [{}, 3, [("action", (0, 1))]])
refuse_values("replacement", lambda _, v: ChunkSampler(4, replacement=v), [0, "no", None])
refuse_values("max_age", lambda _, v: ChunkSampler(4, max_age=v), [*NO_NUMBER, -1.0])
refuse_values("max_policy_lag", lambda _, v: ChunkSampler(4, max_policy_lag=v), [-1, True, 0.5, "1"])
refuse_values("weights", lambda _, v: ChunkSampler(4, weights=v), ["loud", 3, ByRecency])
refuse_values("half_life", lambda _, v: ByRecency(v), [*NO_NUMBER, 0.0, -1.0])
refuse_values("alpha", lambda _, v: ByPriority(alpha=v), [*NO_NUMBER, -1.0])
refuse_values("beta", lambda _, v: ByPriority(beta=v), [*NO_NUMBER, -1.0])
refuse_values("mixture", lambda _, v: ByGroup("task", v), [{}, {0: 0.0}, [1, 2], 3])
refuse(
    InvalidArgumentError,
    "give one of them",
    lambda _: ChunkSampler(windows={"action": (0, 1)}, delta_timestamps={"action": [0.0]}, fps=10),
)
refuse(
    InvalidArgumentError,
    "go together",
    lambda _: ChunkSampler(delta_timestamps={"action": [0.0]}),
    lambda _: ChunkSampler(4, fps=10),
)
refuse(
    InvalidArgumentError,
    "needed is a list of seconds",
    lambda _: ChunkSampler(delta_timestamps={"action": "now"}, fps=10),
    lambda _: ChunkSampler(delta_timestamps={"action": []}, fps=10),
    lambda _: ChunkSampler(delta_timestamps={"action": [math.nan]}, fps=10),
    lambda _: ChunkSampler(delta_timestamps={"action": [[0.0]]}, fps=10),
)
refuse(
    InvalidArgumentError, "lie between the steps", lambda _: ChunkSampler(delta_timestamps={"action": [0.05]}, fps=10)
)
refuse_values("fps", lambda _, v: ChunkSampler(delta_timestamps={"action": [0.0]}, fps=v), [0, -1.0, *NO_NUMBER])
refuse(InvalidArgumentError, "1,000,000 steps at most", lambda _: ChunkSampler(windows={"action": (0, 10**12)}))
refuse(
    InvalidArgumentError,
    "a string or a tuple of strings",
    lambda _: ChunkSampler(windows={3: (0, 1)}),
    lambda _: ByGroup(3),
)
refuse(
    InvalidArgumentError,
    "priorities",
    lambda _: by_priority().update_priority(torch.tensor([0]), torch.tensor([math.nan])),
    lambda _: by_priority().update_priority(torch.tensor([0]), torch.tensor([-1.0])),
    lambda _: by_priority().update_priority(torch.tensor([0]), torch.tensor([math.inf])),
    lambda _: by_priority().update_priority(torch.tensor([0, 1]), torch.tensor([1.0, 1.0, 1.0])),
    lambda _: by_priority().update_tensordict_priority(TensorDict({}, [3])),
)
refuse(InvalidArgumentError, "needed are trajectory ids", lambda _: by_priority().update_priority("a", 1.0))
refuse(InvalidArgumentError, "last step is before its first", lambda _: ChunkSampler(windows={"action": (2, 1)}))
refuse(
    InvalidArgumentError,
    "needed is",
    lambda _: ChunkSampler(windows={"action": 3}),
    lambda _: ChunkSampler(windows={"action": (0, 1, 2)}),
    lambda _: ChunkSampler(windows={"action": (0.5, 1)}),
    lambda _: ChunkSampler(windows={"action": (False, True)}),
)
refuse(InvalidArgumentError, "windows say of each key", lambda _: ChunkSampler(4, windows={"action": (0, 1)}))
refuse(
    SchemaMismatchError,
    "torque",
    lambda p: next(iter(OnlineDataset(p.rb, None, 2, windows={"torque": (0, 1)}))),
)
refuse(
    SchemaMismatchError,
    "segment_id",
    lambda p: next(iter(OnlineDataset(p.rb, 4, 2, sampling_mode="segment"))),
    lambda p: next(iter(OnlineDataset(p.rb, 4, 2, sampling_mode="boundary"))),
)
refuse(
    SchemaMismatchError,
    "weights by the groups",
    lambda p: next(iter(OnlineDataset(p.rb, 4, 2, weights=ByGroup("task")))),
    lambda p: next(iter(OnlineDataset(p.rb, 4, 2, weights=ByGroup("observation")))),
)
refuse(
    InvalidArgumentError,
    "needs weights='uniform'",
    lambda _: ChunkSampler(4, replacement=False, weights="steps"),
    lambda _: ChunkSampler(lambda: 4, replacement=False),
)
refuse(
    InvalidArgumentError,
    "FlatChunks needs chunks",
    lambda p: FlatChunks()(p.rb[0]),
    lambda _: FlatChunks()(TensorDict({"a": torch.zeros(2, 3)}, [2, 3])),
)


def by_priority() -> TrajectoryReplayBuffer:
    return make_buffer(sampler=ChunkSampler(4, weights=ByPriority()), chunk_size=None)


@TABLE.each
def test_nonsense_is_refused_and_the_buffer_goes_on(place: Place, case: Case) -> None:
    assert_refused(case, place)
