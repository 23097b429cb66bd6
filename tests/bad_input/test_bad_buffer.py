"""A buffer made of nonsense, read at places where there is nothing, loaded from a damaged checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from nonsense import (
    NO_POSITIVE_INT,
    Case,
    Place,
    Table,
    assert_refused,
    emptied_buffer,
    make_buffer,
)
from steps import small
from torchrl.data import LazyTensorStorage
from torchrl.data.replay_buffers.writers import RoundRobinWriter

from embodichain_rl import (
    ChunkSampler,
    TrajectoryReplayBuffer,
    TrajectoryStorage,
    TrajectoryWriter,
)
from embodichain_rl.errors import (
    CheckpointError,
    InvalidArgumentError,
    TrajectoryIndexError,
    UnsupportedOperationError,
)

TABLE = Table()
refuse, refuse_values = TABLE.refuse, TABLE.refuse_values

# ----------------------------------------------------------------------------------------------------------- the buffer

refuse_values("max_trajectories", lambda _, v: TrajectoryStorage(v, 10), [*NO_POSITIVE_INT, None])
refuse_values("max_total_steps", lambda _, v: TrajectoryStorage(2, v), [*NO_POSITIVE_INT, None])
refuse_values("max_writers", lambda _, v: TrajectoryStorage(2, 10, max_writers=v), NO_POSITIVE_INT)
refuse_values("compact", lambda _, v: TrajectoryStorage(2, 10, compact=v), [1, "yes", None])
refuse_values("device", lambda _, v: TrajectoryStorage(2, 10, device=v), ["cuda:99", "gpu", "meta", ""])
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
refuse(InvalidArgumentError, "Got a sampler and chunk_size", lambda _: make_buffer(sampler=ChunkSampler(3)))
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

# --------------------------------------------------------------------------------------------- what is read by position

for _position in (3, -4, 2**62, -(2**62), None, 1.0, [0, 9], torch.tensor([5]), [0.5], True):
    TABLE.cases.append(
        Case(
            f"rb[{_position!r}]", lambda p, at=_position: p.rb.storage[at], TrajectoryIndexError, "holds 3 trajectories"
        )
    )
refuse(
    TrajectoryIndexError,
    "nothing was written|holds 0",
    lambda _: TrajectoryStorage(2, 10)[0],
    lambda _: emptied_buffer()[0],
)
refuse(
    UnsupportedOperationError,
    "extend",
    lambda p: p.rb.storage.set(0, small(0, 8)),
    lambda p: p.rb.__setitem__(0, small(0, 8)),
)
refuse(UnsupportedOperationError, "flat already", lambda p: p.rb.storage.flatten())
refuse(InvalidArgumentError, "knows its trajectories", lambda p: p.rb.query([0], trajectory_key="episode"))

# ---------------------------------------------------------------------------------------------------------- checkpoints


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


@TABLE.each
def test_nonsense_is_refused_and_the_buffer_goes_on(place: Place, case: Case) -> None:
    assert_refused(case, place)
