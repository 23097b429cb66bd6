"""Nonsense in, a typed error out that says what to do; and the buffer goes on as before."""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import os
import pickle
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, RandomSampler, ReplayBuffer, TensorDictReplayBuffer
from torchrl.data.replay_buffers.writers import RoundRobinWriter

from embodichain_rl import (
    ByGroup,
    ByPriority,
    ByRecency,
    ChunkSampler,
    TrajectoryReplayBuffer,
    TrajectoryStorage,
    TrajectoryWriter,
    accept_success,
)
from embodichain_rl.datasets import GMMChunkSampler, OnlineDataset, UniformChunkSampler, masked_mean
from embodichain_rl.datasets.collate import collate_chunks
from embodichain_rl.engine.data import OnlineDataEngine, OnlineDataEngineCfg
from embodichain_rl.errors import (
    CheckpointError,
    ChunkShapeError,
    ChunkTooLongError,
    ConfigError,
    ConfigFileNotFoundError,
    EmptyBufferError,
    EngineStateError,
    InvalidArgumentError,
    SchemaMismatchError,
    SharingError,
    StateMismatchError,
    TrajectoryIndexError,
    TrajectoryTooLongError,
    UnsupportedOperationError,
)
from embodichain_rl.replay.rate_limiter import RateLimiter
from embodichain_rl.transforms import FlatChunks

sys.path.insert(0, str(Path(__file__).parent / "replay"))
from steps import check_chunk, small


class Place(NamedTuple):
    """Where nonsense is tried."""

    rb: TrajectoryReplayBuffer
    """Three trajectories of 8 steps, room for 40 steps."""
    engine: OnlineDataEngine
    """One that is not started."""
    folder: Path


Try = Callable[[Place], Any]


class Case(NamedTuple):
    """Something that must be refused."""

    name: str
    attempt: Try
    error: type[Exception]
    message: str


def make_buffer(**kwargs: Any) -> TrajectoryReplayBuffer:
    rb = TrajectoryReplayBuffer(
        **{"max_trajectories": 4, "max_total_steps": 40, "chunk_size": 4, "batch_size": 3, **kwargs}
    )
    for number in range(3):
        rb.extend(small(number, 8))
    return rb


@pytest.fixture(scope="module")
def rb() -> TrajectoryReplayBuffer:
    return make_buffer()


@pytest.fixture(scope="module")
def engine() -> OnlineDataEngine:
    return OnlineDataEngine(configure())


CASES: list[Case] = []


def refuse(error: type[Exception], message: str, *attempts: Try) -> None:
    CASES.extend(Case(f"{message} {number}", attempt, error, message) for number, attempt in enumerate(attempts))


def refuse_values(
    name: str, call: Callable[[Place, Any], Any], values: list[Any], error: Any = InvalidArgumentError
) -> None:
    """Every one of ``values`` is refused by ``call``, by the argument's name and its own."""

    def attempt(value: Any) -> Try:
        return lambda place: call(place, value)

    CASES.extend(
        Case(f"{name}={value!r}", attempt(value), error, f"{name}.*{re.escape(repr(value))}") for value in values
    )


NO_POSITIVE_INT = [0, -1, True, False, 1.5, 2.0, math.nan, "3", [3]]
NO_NUMBER = [True, math.nan, math.inf, "1", [1.0]]


# ------------------------------------------------------------------------------------------------------- the buffer

refuse_values("max_trajectories", lambda _, v: TrajectoryStorage(v, 10), [*NO_POSITIVE_INT, None])
refuse_values("max_total_steps", lambda _, v: TrajectoryStorage(2, v), [*NO_POSITIVE_INT, None])
refuse_values("max_writers", lambda _, v: TrajectoryStorage(2, 10, max_writers=v), NO_POSITIVE_INT)
refuse_values("compact", lambda _, v: TrajectoryStorage(2, 10, compact=v), [1, "yes", None])
refuse_values("device", lambda _, v: TrajectoryStorage(2, 10, device=v), ["cuda:0", "gpu", "meta", ""])
refuse_values("batch_size", lambda _, v: make_buffer(batch_size=v), NO_POSITIVE_INT)
refuse_values("prefetch", lambda _, v: make_buffer(prefetch=v), [-1, True, 1.0, "2"])
refuse_values("generator", lambda _, v: make_buffer(generator=v), [0, "cpu", torch.Generator])
refuse_values("chunk_size", lambda _, v: make_buffer(chunk_size=v), NO_POSITIVE_INT)
refuse_values("sampler", lambda p, v: p.rb.set_sampler(v), [3, None, ChunkSampler])
refuse_values("sampler", lambda _, v: make_buffer(chunk_size=None, sampler=v), [3, "chunks"])
refuse_values("writer", lambda p, v: p.rb.set_writer(v), [3, None])
refuse_values("storage", lambda p, v: p.rb.set_storage(v), [3, None])
refuse_values("transform", lambda _, v: make_buffer(transform=v), [3, "flat"])
refuse_values("pin_memory", lambda _, v: make_buffer(pin_memory=v), [1, "yes", None])
refuse_values("storage", lambda _, v: TrajectoryReplayBuffer(storage=v, chunk_size=2), [3, "arena", TrajectoryStorage])
refuse_values("writer", lambda _, v: make_buffer(writer=v), [3, "writer"])
refuse(
    InvalidArgumentError,
    "max_trajectories and max_total_steps",
    lambda _: TrajectoryReplayBuffer(chunk_size=2),
    lambda _: TrajectoryReplayBuffer(max_trajectories=2, chunk_size=2),
    lambda _: TrajectoryReplayBuffer(max_total_steps=2, chunk_size=2),
)
refuse(
    InvalidArgumentError,
    "the storage has its own",
    lambda _: TrajectoryReplayBuffer(storage=TrajectoryStorage(2, 10), max_trajectories=2, chunk_size=2),
    lambda _: TrajectoryReplayBuffer(storage=TrajectoryStorage(2, 10), compact=True, chunk_size=2),
)
refuse(InvalidArgumentError, "Give chunk_size", lambda _: TrajectoryReplayBuffer(max_trajectories=2, max_total_steps=9))
refuse(InvalidArgumentError, "give the chunk_size to the ChunkSampler", lambda _: make_buffer(sampler=ChunkSampler(3)))
refuse(
    InvalidArgumentError,
    "needs a TrajectoryWriter",
    lambda _: make_buffer(writer=RoundRobinWriter()),
    lambda p: p.rb.set_writer(RoundRobinWriter()),
)
refuse(
    InvalidArgumentError,
    "needs a TrajectoryStorage",
    lambda _: TrajectoryReplayBuffer(storage=LazyTensorStorage(10), chunk_size=2),
    lambda p: p.rb.set_storage(LazyTensorStorage(10)),
)
refuse(InvalidArgumentError, "accept", lambda _: TrajectoryWriter(accept=3), lambda _: TrajectoryWriter(accept="all"))
refuse(
    UnsupportedOperationError,
    "register_storage",
    lambda _: TrajectoryWriter().extend(small(0, 8)),
    lambda _: TrajectoryWriter().add(small(0, 8)[0]),
)
refuse(
    InvalidArgumentError,
    "writes to a TrajectoryStorage",
    lambda _: TrajectoryWriter().register_storage(LazyTensorStorage(10)),
    lambda _: TrajectoryWriter().register_storage(None),
)

# ---------------------------------------------------------------------------------------------------------- sampling

refuse_values("batch_size", lambda p, v: p.rb.sample_chunks(v, 4), [*NO_POSITIVE_INT, None])
refuse_values("chunk_size", lambda p, v: p.rb.sample_chunks(2, v), [*NO_POSITIVE_INT, None])
refuse_values("batch_size", lambda p, v: p.rb.sample(v), [-1, True, 1.5, "3"])
refuse(ChunkTooLongError, "Got chunk_size 9, but the longest of 3", lambda p: p.rb.sample_chunks(2, 9))
refuse(ChunkTooLongError, "Ask for at most 8", lambda p: p.rb.sample_chunks(2, 2**40))
refuse(
    EmptyBufferError,
    "Wait until",
    lambda _: TrajectoryReplayBuffer(max_trajectories=2, max_total_steps=9, chunk_size=2, batch_size=2).sample(),
    lambda _: _emptied().sample(),
    lambda _: next(iter(OnlineDataset(_emptied(), 4, 3))),
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
refuse(UnsupportedOperationError, "does not draw by them", lambda p: p.rb.update_priority(torch.tensor([0]), 1.0))
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


def _emptied() -> TrajectoryReplayBuffer:
    rb = make_buffer()
    rb.empty()
    return rb


# ----------------------------------------------------------------------------------------------------- what is written


def changed(**changes: Any) -> TensorDict:
    """A trajectory with other values; ``next_done`` stands for ``("next", "done")``."""
    data = small(7, 8)
    for key, value in changes.items():
        data[tuple(key.split("_"))] = value
    return data


refuse(
    SchemaMismatchError,
    "observation",
    lambda p: p.rb.extend(small(7, 8).exclude("observation")),
    lambda p: p.rb.extend(changed(observation=torch.zeros(8, 4))),
    lambda p: p.rb.extend(changed(observation=torch.zeros(8, 3, dtype=torch.float64))),
    lambda p: p.rb.extend(changed(observation=torch.zeros(8))),
)
refuse(
    SchemaMismatchError,
    "dense tensors",
    lambda p: p.rb.extend(small(7, 8).to("meta")),
    lambda p: p.rb.extend(changed(observation=torch.zeros(8, 3).to_sparse())),
)
refuse(
    SchemaMismatchError,
    "must be bool",
    lambda p: p.rb.extend(changed(collector_mask=torch.ones(8))),
)
refuse(
    SchemaMismatchError,
    "at least one step|TensorDict of steps|without any tensor",
    lambda p: p.rb.extend(small(7, 8)[:0]),
    lambda p: p.rb.storage.allocate(None),
    lambda p: p.rb.storage.allocate({}),
    lambda _: TrajectoryStorage(2, 10).allocate(TensorDict({}, [])),
)
refuse(SchemaMismatchError, "accept_success", lambda _: accept_success(small(0, 8)), lambda _: accept_success(None))
refuse(SchemaMismatchError, "extra", lambda p: p.rb.extend(changed(extra=torch.zeros(8))))
refuse(SchemaMismatchError, "trajectory", lambda p: p.rb.extend(changed(trajectory=torch.zeros(8))))
refuse(
    SchemaMismatchError,
    "done",
    lambda p: p.rb.extend(small(7, 8).exclude(("next", "done"))),
    lambda p: p.rb.extend(changed(next_done=torch.zeros(8, 2, dtype=torch.bool))),
    lambda p: p.rb.extend(changed(next_done=torch.zeros(8, 1))),
)
refuse(
    SchemaMismatchError,
    r"\[T\]",
    lambda p: p.rb.extend(small(7, 8)[0]),
    lambda p: p.rb.extend(small(7, 8).reshape(2, 2, 2)),
)
refuse(
    SchemaMismatchError,
    "TensorDict",
    lambda p: p.rb.extend({"observation": torch.zeros(8, 3)}),
    lambda p: p.rb.extend(torch.zeros(8, 3)),
    lambda p: p.rb.extend(None),
    lambda p: p.rb.extend([small(7, 8)]),
    lambda p: p.rb.extend(3),
)
refuse(
    TrajectoryTooLongError,
    "max_total_steps=40",
    lambda p: p.rb.extend(small(7, 41)),
    lambda _: [rb := make_buffer(), rb.extend(small(7, 30, ends=False)), rb.extend(small(7, 30, ends=False))],
)

# -------------------------------------------------------------------------------------------- what is read by position

for _position in (3, -4, 2**62, -(2**62), "first", None, 1.0, [0, 9], torch.tensor([5]), [0.5], True):
    CASES.append(
        Case(
            f"rb[{_position!r}]", lambda p, at=_position: p.rb.storage[at], TrajectoryIndexError, "holds 3 trajectories"
        )
    )
refuse(
    TrajectoryIndexError,
    "nothing was written|holds 0",
    lambda _: TrajectoryStorage(2, 10)[0],
    lambda _: _emptied()[0],
)
refuse(
    UnsupportedOperationError,
    "extend",
    lambda p: p.rb.storage.set(0, small(0, 8)),
    lambda p: p.rb.__setitem__(0, small(0, 8)),
)
refuse(UnsupportedOperationError, "flat already", lambda p: p.rb.storage.flatten())
refuse(InvalidArgumentError, "knows its trajectories", lambda p: p.rb.query([0], trajectory_key="episode"))

# -------------------------------------------------------------------------------------------------------- checkpoints


def dumped(place: Place, damage: Callable[[dict[str, Any]], Any]) -> None:
    place.rb.dumps(place.folder)
    description = next(place.folder.rglob("trajectories.json"))
    content = json.loads(description.read_text())
    description.write_text(json.dumps(damage(content)))
    place.rb.loads(place.folder)


refuse(CheckpointError, "No readable", lambda p: p.rb.storage.loads(p.folder / "nowhere"))
refuse(
    CheckpointError,
    "checkpoint",
    lambda p: dumped(p, lambda content: []),
    lambda p: dumped(p, lambda content: None),
    lambda p: dumped(p, lambda content: {}),
    lambda p: dumped(p, lambda content: {**content, "format": 99}),
    lambda p: dumped(p, lambda content: {**content, "lengths": [8, 8]}),
    lambda p: dumped(p, lambda content: {**content, "lengths": [-8, 8, 24]}),
    lambda p: dumped(p, lambda content: {**content, "lengths": ["8", 8, 8]}),
    lambda p: dumped(p, lambda content: {**content, "lengths": [8, 8, 10**15]}),
    lambda p: dumped(p, lambda content: {**content, "next_id": -1}),
    lambda p: dumped(p, lambda content: {**content, "next_id": "3"}),
    lambda p: dumped(p, lambda content: {**content, "steps_written": None}),
)
refuse(
    CheckpointError,
    "state|checkpoint",
    lambda p: p.rb.storage.load_state_dict({}),
    lambda p: p.rb.storage.load_state_dict({**p.rb.storage.state_dict(), "lengths": torch.tensor([8, 8])}),
    lambda p: p.rb.storage.load_state_dict({**p.rb.storage.state_dict(), "values": []}),
)

# ----------------------------------------------------------------------------------------------------------- datasets

refuse_values("chunk_size", lambda p, v: OnlineDataset(p.rb, v), NO_POSITIVE_INT)
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
    r"Asked for 3 chunk\(s\) of 4 steps, and got .* must return a TensorDict",
    lambda _: next(iter(OnlineDataset(Careless(TensorDict({}, [3, 5])), 4, 3))),
    lambda _: next(iter(OnlineDataset(Careless(TensorDict({}, [2, 4])), 4, 3))),
    lambda _: next(iter(OnlineDataset(Careless(TensorDict({}, [])), 4, 3))),
    lambda _: next(iter(OnlineDataset(Careless(None), 4, 3))),
    lambda _: next(iter(OnlineDataset(Careless({"action": torch.zeros(3, 4)}), 4, 3))),
)
refuse(
    StateMismatchError,
    "what its state_dict",
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
refuse(InvalidArgumentError, "needed are TensorDicts", lambda p: collate_chunks([p.rb[0], torch.zeros(3)]))
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

# ------------------------------------------------------------------------------------------------------------- pacing

refuse_values("samples_per_insert", lambda _, v: RateLimiter(v), [*NO_NUMBER[:1], math.nan, "1", 0.0, -1.0])
refuse_values("min_size_to_sample", lambda _, v: RateLimiter(1.0, min_size_to_sample=v), [-1, True, 0.5])

# ------------------------------------------------------------------------------------------------------------- engine

PENDULUM = {"id": "Pendulum-v1"}


def configure(**kwargs: Any) -> OnlineDataEngineCfg:
    return OnlineDataEngineCfg(**{"gym_config": PENDULUM, "progress_bar": False, **kwargs})


for _name in ("buffer_size", "max_episode_steps", "max_generation_attempts", "state_dim"):
    refuse_values(_name, lambda _, v, name=_name: configure(**{name: v}), NO_POSITIVE_INT[:5], ConfigError)
for _name in ("num_workers", "max_worker_restarts", "seed"):
    refuse_values(_name, lambda _, v, name=_name: configure(**{name: v}), [-1, True, 1.5, "2"], ConfigError)
for _name in ("initialization_timeout", "worker_timeout", "shutdown_timeout", "refill_threshold"):
    refuse_values(_name, lambda _, v, name=_name: configure(**{name: v}), [0.0, -1, *NO_NUMBER], ConfigError)
refuse_values("buffer_device", lambda _, v: configure(buffer_device=v), ["cuda", "gpu", 3.5], ConfigError)
refuse_values("start_method", lambda _, v: configure(start_method=v), ["thread", 3, True], ConfigError)
refuse_values("state_key", lambda _, v: configure(state_key=v), ["", (), 3, ("a", 1)], ConfigError)
refuse_values("progress_bar", lambda _, v: configure(progress_bar=v), [1, None], ConfigError)
refuse_values("policy", lambda _, v: configure(policy=v), ["demos"], ConfigError)
refuse(
    ConfigError,
    "must be a function",
    lambda _: configure(accept=3),
    lambda _: configure(policy_factory="make"),
    lambda _: configure(gym_config=None, env_factory=3),
)
refuse(
    ConfigError,
    "gym_config, env_factory and producers",
    lambda _: configure(gym_config=None),
    lambda _: configure(env_factory=int),
    lambda _: configure(producers=[[]]),
)
refuse(
    ConfigError,
    "producers must be",
    lambda _: configure(gym_config=None, producers=[]),
    lambda _: configure(gym_config=None, producers=3),
    lambda _: configure(gym_config=None, producers=[3]),
)
refuse(
    ConfigError,
    "gym_config",
    lambda _: configure(gym_config={}),
    lambda _: configure(gym_config=3),
    lambda _: configure(gym_config={"id": ""}),
    lambda _: configure(gym_config={"id": 3}),
    lambda _: configure(gym_config={**PENDULUM, "num_env": 2}),
    lambda _: configure(gym_config={**PENDULUM, "num_envs": 0}),
    lambda _: configure(gym_config={**PENDULUM, "num_envs": True}),
    lambda _: configure(gym_config={**PENDULUM, "kwargs": 3}),
)
refuse(ConfigFileNotFoundError, r"nowhere\.json", lambda p: configure(gym_config=p.folder / "nowhere.json"))
refuse(
    InvalidArgumentError,
    "OnlineDataEngineCfg",
    lambda _: OnlineDataEngine({}),
    lambda _: OnlineDataEngine(None),
    lambda _: OnlineDataEngine(OnlineDataEngineCfg),
)
refuse(
    EngineStateError,
    r"start\(\)",
    lambda p: p.engine.sample_batch(2, chunk_size=4),
    lambda p: p.engine.sample_chunks(2, 4),
    lambda p: next(iter(OnlineDataset(p.engine, 4, 2))),
)


def stopped() -> OnlineDataEngine:
    engine = OnlineDataEngine(configure())
    engine.stop()
    return engine


refuse(
    EngineStateError,
    "stopped|STOPPED",
    lambda _: stopped().sample_batch(2, chunk_size=4),
    lambda _: stopped().sample_chunks(2, 4),
    lambda _: stopped().start(),
    lambda _: next(iter(OnlineDataset(stopped(), 4, 2))),
)
refuse_values("batch_size", lambda p, v: OnlineDataset(p.engine, 4, v), [0, True])

# ----------------------------------------------------------------------------------- other places, threads, processes


def in_thread(attempt: Try) -> Try:
    def run(place: Place) -> None:
        raised: list[BaseException] = []

        def target() -> None:
            try:
                attempt(place)
            except Exception as error:
                raised.append(error)

        thread = threading.Thread(target=target)
        thread.start()
        thread.join(30)
        raise raised[0]

    return run


def in_fork(attempt: Try) -> Try:
    def run(place: Place) -> None:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        child = os.fork()
        if child == 0:
            try:
                attempt(place)
            except Exception as error:
                sender.send(error)
            finally:
                os._exit(0)
        sender.close()
        assert receiver.poll(30)
        os.waitpid(child, 0)
        raise receiver.recv()

    return run


refuse(
    EngineStateError,
    "process that made",
    in_fork(lambda p: p.engine.start()),
    in_fork(lambda p: p.engine.update_policy_weights_(torch.nn.Linear(1, 1))),
)
refuse(ChunkTooLongError, "longest of 3", in_fork(lambda p: p.rb.sample_chunks(2, 9)))
refuse(SchemaMismatchError, "observation", in_fork(lambda p: p.rb.extend(small(7, 8).exclude("observation"))))
refuse(ChunkTooLongError, "longest of 3", in_thread(lambda p: p.rb.sample_chunks(2, 9)))
refuse(SchemaMismatchError, "observation", in_thread(lambda p: p.rb.extend(small(7, 8).exclude("observation"))))
refuse(
    SharingError,
    "only while that process is started",
    lambda p: pickle.dumps(p.rb.storage.ledger),
    lambda p: pickle.dumps(RateLimiter(1.0)),
    lambda p: pickle.dumps(p.engine),
    lambda p: copy.deepcopy(p.engine),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:Got conflicting batch_sizes")
def test_nonsense_is_refused_and_the_buffer_goes_on(
    rb: TrajectoryReplayBuffer, engine: OnlineDataEngine, tmp_path: Path, case: Case
) -> None:
    before, written = len(rb), rb.storage.ledger.next_id
    with pytest.raises(case.error, match=re.compile(case.message, re.DOTALL)) as refusal:
        case.attempt(Place(rb, engine, tmp_path))
    assert type(refusal.value) is case.error
    assert (len(rb), rb.storage.ledger.next_id) == (before, written), "something was written"
    check_chunk(rb.sample()[0])


def test_there_are_many() -> None:
    assert len(CASES) >= 150
