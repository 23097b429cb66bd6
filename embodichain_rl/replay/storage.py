"""The storage: an arena of steps and the ledger that says which trajectory lies where in it, for TorchRL."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from multiprocessing.context import get_spawning_popen
from typing import Any, NoReturn

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.data.replay_buffers.storages import LazyTensorStorage

from embodichain_rl._checks import checked_int, checked_key
from embodichain_rl.errors import (
    InvalidArgumentError,
    SchemaMismatchError,
    SharingError,
    TrajectoryEvictedError,
    TrajectoryIndexError,
    UnsupportedOperationError,
)
from embodichain_rl.replay.arena import Arena, arena_bytes
from embodichain_rl.replay.checkpoint import TrajectoryCheckpointer, with_own_texts
from embodichain_rl.replay.item_samplers import refuse_samplers_of_steps
from embodichain_rl.replay.ledger import Ledger
from embodichain_rl.replay.ledger_table import Rows
from embodichain_rl.replay.memory_check import check_memory
from embodichain_rl.replay.schema import Schema
from embodichain_rl.replay.shared_memory import SharedBlock
from embodichain_rl.replay.shifted import Shifted, shifted_fields
from embodichain_rl.replay.texts import TextTable
from embodichain_rl.replay.trajectory_table import TrajectoryTable, table_bytes
from embodichain_rl.replay.whole_reads import WholeTrajectories, read_live, read_surely

__all__ = ["TrajectoryStorage"]

SCHEMA_BYTES = 1 << 20
"""Room for the schema, as JSON, in shared memory: some 10,000 keys."""


class TrajectoryStorage(LazyTensorStorage):
    """A TorchRL storage of whole trajectories that many processes write and sample at the same time.

    Trajectories lie one behind the other in flat tensors ``[steps, ...]``, contiguous and unpadded. When there are
    more than ``max_trajectories`` of them, or more than ``max_total_steps`` steps in all, the oldest are evicted,
    always whole. An item of the storage is a trajectory: ``len(storage)`` counts them, ``storage[0]`` is the oldest.

    The memory is allocated when the first data comes, or by :meth:`allocate`, and is shared from the start: hand the
    storage, or a buffer with it, to child processes under fork, spawn or forkserver, before or after allocation.

    Args:
        max_trajectories: at most so many trajectories are kept, the newest; at least 1.
        max_total_steps: at most so many steps are kept in all; also the longest trajectory that can be written.

    Keyword Args:
        device: ``"cpu"``.
        max_writers: how many writers may be in the middle of copying a trajectory of average length without cutting
            into what is kept. It costs address space; memory is taken only when they are.
        compact: whether an observation that stands in two steps is stored once. A key ``("next", *key)`` with a ``key``
            of the same shape and dtype at the root, other than done, terminated, truncated and reward, is then not
            stored, but read from ``key`` of the step after; the last one of a trajectory is kept. What is handed out is
            the same, to the bit; but the two are views of one memory in a chunk that is not padded, so don't change one
            of them in place. What is written is refused where the two differ. A collector must hand over both, so
            build it without its own ``compact_obs``, which drops the last one.

    Raises:
        InvalidArgumentError: for arguments that can't work.
        BufferMemoryError: at allocation, when the machine or its cgroup has not as much memory left.

    What it guarantees:

    * Writing never leaves fewer live trajectories than the limits allow: a buffer of 2 offers 2 while a third is
      written.
    * A trajectory that is read is whole. Reads take no lock that a writer waits for, except reads of whole trajectories
      (``storage[i]``, ``storage[:]``, a checkpoint) under writing so fast that they are evicted time and again before
      they are copied.
    * A process that is killed at any instruction blocks nobody and damages nothing but the trajectory it was writing.

    Text is stored once, in :attr:`texts`, and steps hold its ids. What is the same at every step of a trajectory, text
    or numbers, is stored once a trajectory where it is written under ``"trajectory"``.

    Attributes:
        texts (TextTable): the text of all steps and trajectories.

    A pickled, deep-copied or checkpointed storage, other than one handed to a child that is being started, is a copy
    with memory of its own.

    Example:
        >>> storage = TrajectoryStorage(max_trajectories=100, max_total_steps=30_000)
        >>> storage.allocate(TensorDict({"observation": torch.zeros(3), "next": {"done": torch.zeros(1).bool()}}))
        >>> storage.initialized, len(storage), storage.num_steps
        (True, 0, 0)
    """

    _default_checkpointer = TrajectoryCheckpointer
    supports_conditional_update = False

    def __init__(
        self,
        max_trajectories: int,
        max_total_steps: int,
        *,
        device: torch.device | str = "cpu",
        max_writers: int = 16,
        compact: bool = False,
    ) -> None:
        # TorchRL's constructors are not called: they create locks (multiprocessing.Value) that a killed process keeps,
        # for counters that stand in the ledger here. Everything of theirs that TorchRL reads is set or overridden.
        self.max_size = checked_int("max_trajectories", max_trajectories, minimum=1)
        self.max_total_steps = checked_int("max_total_steps", max_total_steps, minimum=1)
        self.max_writers = checked_int("max_writers", max_writers, minimum=1)
        self.device = _checked_device(device)
        self.ndim = 1
        self.consolidated = self.shared_init = self._compilable = False
        self._attached_entities_list: list[Any] = []
        self.checkpointer = None
        if not isinstance(compact, bool):
            raise InvalidArgumentError(f"Got compact={compact!r}; it must be True or False.")
        self.compact = compact
        # A region has one step more than its trajectory where observations are stored once.
        room = self.max_total_steps + compact * min(self.max_size, self.max_total_steps)
        average = -(-room // self.max_size)
        if room >= 2**63:
            raise InvalidArgumentError(f"Got max_total_steps={max_total_steps:,}, more than can be counted.")
        head_room = min(max(self.max_writers * average, 2 * room), 2**63 - 1 - room)
        # What is held against the memory that is left: the rest is address space, unless many write at once.
        self._expected_steps = room + max(average, room // 16)
        self._schema_block = SharedBlock(SCHEMA_BYTES)
        self._arena_block = SharedBlock()
        self._table_block = SharedBlock()
        self.texts = TextTable()
        self.ledger = Ledger(self.max_size, self.max_total_steps, room + head_room, margin=int(compact))
        self._start_unmapped()

    def _start_unmapped(self) -> None:
        self._schema_size = self._schema_block.array(np.int64, (1,))
        self._arena: Arena | None = None
        self._table: TrajectoryTable | None = None

    # ---------------------------------------------------------------------------------------------- allocation

    def allocate(self, data: TensorDictBase) -> None:
        """Allocates the arena for steps like those in ``data``, which is not written.

        Needed only when the first data that comes does not have all keys; calling it again with the same keys does
        nothing.

        Args:
            data: steps of any batch size, for instance ``env.fake_tensordict()``.

        Raises:
            SchemaMismatchError: when the arena is there already, for other keys, shapes or dtypes; or when there is
                something other than tensors and text in ``data``.
            BufferMemoryError: when it would not fit into memory.
        """
        schema = self.schema or self.allocate_schema(Schema.of(data))
        schema.leaves(data)

    def allocate_schema(self, schema: Schema) -> Schema:
        """Allocates the arena for steps of ``schema``, unless it is allocated; returns the schema it has then."""
        text = schema.to_json().encode()
        if len(text) > SCHEMA_BYTES - 8:
            raise InvalidArgumentError(
                f"Got {len(schema.fields):,} keys; the {len(text):,} bytes of their names exceed {SCHEMA_BYTES:,}."
            )
        shifted = self.shifted_in(schema)
        stored = schema.nbytes - sum(schema.fields[number].nbytes for number in shifted)
        with self.ledger.frozen():
            if not self.initialized:
                check_memory(
                    arena_bytes(schema, self._expected_steps, shifted) + table_bytes(schema, self.ledger.num_rows),
                    f"A buffer of {self.max_total_steps:,} steps of {stored:,} bytes, with head-room,",
                    "Lower max_total_steps, or store less a step (smaller images, fewer keys).",
                )
                self._arena_block.allocate(arena_bytes(schema, self.ledger.arena_steps, shifted))
                self._table_block.allocate(table_bytes(schema, self.ledger.num_rows))
                self._schema_block.array(np.uint8, (len(text),), 8)[:] = np.frombuffer(text, dtype=np.uint8)
                self._schema_size[0] = len(text)
        return self.arena.schema

    def shifted_in(self, schema: Schema) -> Shifted:
        """Returns the fields of a schema that are read one step later from another one; none if not ``compact``."""
        return shifted_fields(schema) if self.compact else {}

    @property
    def initialized(self) -> bool:
        """Whether the arena is allocated, by whichever process."""
        return bool(self._schema_size[0])

    @property
    def arena(self) -> Arena:
        """The memory. What is copied out of it is whole if :meth:`Ledger.still_valid` says so *afterwards*.

        Raises:
            TrajectoryIndexError: before allocation.
        """
        return self._arena or self._map()

    @property
    def table(self) -> TrajectoryTable | None:
        """The values of whole trajectories, to be read as the arena; None where no key is of whole trajectories.

        Raises:
            TrajectoryIndexError: before allocation.
        """
        if self._arena is None:
            self._map()
        return self._table

    def _map(self) -> Arena:
        if not self.initialized:
            raise TrajectoryIndexError("Cannot get elements out of a storage that nothing was written to yet.")
        text = self._schema_block.array(np.uint8, (int(self._schema_size[0]),), 8).tobytes().decode()
        schema = Schema.from_json(text)
        if schema.trajectory_fields:
            self._table = TrajectoryTable(schema, self._table_block, self.ledger.num_rows)
        self._arena = Arena(schema, self._arena_block, self.ledger.arena_steps, self.shifted_in(schema))
        return self._arena

    @property
    def schema(self) -> Schema | None:
        """Keys, shapes and dtypes of a step; None before allocation."""
        return self.arena.schema if self.initialized else None

    @property
    def _storage(self) -> TensorDictBase | None:
        # Where TorchRL's storages keep their tensors; collectors look at its keys.
        return self.arena.tensordict if self.initialized else None

    def _init(self, data: TensorDictBase) -> None:
        self.allocate(data)

    def _make_init_directory(self) -> None:
        """Does nothing: TorchRL would create a directory for workers to share the memory through; here they do."""

    # -------------------------------------------------------------------------------------------------- counts

    def __len__(self) -> int:
        return len(self.ledger)

    @property
    def num_steps(self) -> int:
        """Steps of all live trajectories."""
        return self.ledger.num_steps

    @property
    def _len(self) -> int:
        return len(self.ledger)

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self)])

    @property
    def _total_shape(self) -> torch.Size:
        return torch.Size([self.max_size])

    @property
    def _mutation_revision(self) -> int:
        return self.ledger.next_id

    @property
    def _last_cursor_index(self) -> NoReturn:
        # What TorchRL's query asks for, after it has taken trajectories for steps.
        raise UnsupportedOperationError(
            "TorchRL's query takes the items of a storage for steps; those of a TrajectoryStorage are whole "
            "trajectories. Use TrajectoryReplayBuffer.query."
        )

    def attach(self, buffer: Any) -> None:
        """Called by a buffer that is being built over this storage.

        Raises:
            UnsupportedOperationError: when the buffer's sampler takes trajectories for steps.
        """
        # The only place where a plain TorchRL buffer tells its storage of its sampler, before the first sample.
        refuse_samplers_of_steps(getattr(buffer, "_init_sampler", None))
        super().attach(buffer)

    def _bump_mutation_revision(self) -> None:
        """Does nothing: the revision is read off the ledger."""

    # ------------------------------------------------------------------------------------------------- writing

    def write(
        self,
        pieces: Sequence[Sequence[np.ndarray]],
        of_trajectory: Sequence[np.ndarray] = (),
        *,
        policy_version: int = 0,
    ) -> int:
        """Copies one whole trajectory, given in consecutive pieces, into the arena and publishes it.

        Args:
            pieces: of each, one array ``[n, *shape]`` a field, in the order of ``schema.fields``. Of shifted fields
                only the last step is looked at: ask :func:`~embodichain_rl.replay.shifted.refuse_unshifted` before.
            of_trajectory: one array ``[*shape]`` a field, in the order of ``schema.trajectory_fields``.
            policy_version: how often the policy had been updated that made the last step.

        Returns:
            The id of the trajectory, unique in this buffer.

        Raises:
            TrajectoryTooLongError: when it is longer than ``max_total_steps``; nothing is written.
        """
        arena = self.arena
        region = self.ledger.reserve(sum(len(piece[0]) for piece in pieces))
        try:
            longest_segment = arena.write(region.start, pieces)
        except BaseException:
            self.ledger.give_back(region)
            raise
        table = self.table
        fill = None if table is None else partial(table.write, values=of_trajectory)
        return self.ledger.publish(region, longest_segment, policy_version=policy_version, fill=fill)

    def set(self, cursor: Any, data: Any, *, set_cursor: bool = True) -> NoReturn:
        raise UnsupportedOperationError(
            "Single items of a TrajectoryStorage can't be set: it takes whole trajectories. Write with "
            "rb.extend(data), in a buffer with writer=TrajectoryWriter()."
        )

    # ------------------------------------------------------------------------------------------------- reading

    def get(self, index: Any) -> TensorDict:
        """Returns copies of whole trajectories, or of the steps that a :class:`ChunkSampler` drew.

        Args:
            index: an int: that trajectory, ``[T_i]``, 0 = oldest. A slice, list, tensor or mask of such positions:
                these trajectories, ``[B, T_max]``, zero behind their ends, ``("collector", "mask")`` True = real. A
                pair of tensors of one shape, trajectory ids and steps: these steps.

        Raises:
            TrajectoryIndexError: when there is no trajectory at a position.
            TrajectoryEvictedError: when a trajectory of the given id is not in the buffer any more.
        """
        if isinstance(index, tuple) and len(index) == 2:
            ids, steps = (np.asarray(part, dtype=np.int64) for part in index)
            return self._get_steps(ids, steps)
        if isinstance(index, tuple) and len(index) == 1:
            (index,) = index
        if isinstance(index, slice) and index == slice(None):
            return read_live(self).padded(self.arena.schema)
        positions = self._positions(index)
        whole = self._read_given(positions.reshape(-1))
        return whole.padded(self.arena.schema) if positions.ndim else whole.only(self.arena.schema)

    def trajectory_values(self, key: NestedKey, ids: np.ndarray) -> np.ndarray:
        """Returns the values of a key of whole trajectories; text as its ids.

        Where a trajectory is no longer there, the value is any; ``ledger.still_valid(ids)`` says so afterwards.

        Args:
            key: such as ``("trajectory", "task")``.
            ids: ``int64`` ``[n]``, of trajectories that were published.

        Returns:
            ``[n, *shape]``, one row each; integers where numpy lacks the dtype.

        Raises:
            SchemaMismatchError: when there is no such key.
        """
        table = self.table
        if table is None:
            raise SchemaMismatchError(f"Got {key!r}, but what is stored has no key under 'trajectory': {self.schema}.")
        return table.column(checked_key(key), ids)

    def _positions(self, index: Any) -> np.ndarray:
        count = len(self)
        at = index if isinstance(index, slice) else np.asarray(index)
        if not isinstance(at, slice) and not at.size:
            at = at.astype(np.int64)  # of an empty list numpy makes floats
        try:
            if isinstance(index, bool | tuple | None) or (not isinstance(at, slice) and at.ndim > 1):
                raise IndexError("not positions of trajectories")
            return np.arange(count)[at]
        except (IndexError, ValueError) as error:
            raise TrajectoryIndexError(f"Got index {at}, but the buffer holds {count} trajectories.") from error

    def _read_given(self, positions: np.ndarray) -> WholeTrajectories:
        """The trajectories at ``positions``."""

        def find() -> Rows:
            oldest, end = self.ledger.live_range()
            if len(positions) and positions.max() >= end - oldest:
                raise TrajectoryIndexError(
                    f"Got index {positions.max()}, but the buffer was emptied meanwhile to {end - oldest} trajectories."
                )
            return self.ledger.rows_of(positions + oldest)

        return read_surely(self, find)

    def _get_steps(self, ids: np.ndarray, steps: np.ndarray) -> TensorDict:
        flat_ids, flat_steps = ids.reshape(-1), steps.reshape(-1)
        self._refuse_evicted(flat_ids, self.ledger.published(flat_ids))
        rows = self.ledger.rows_of(flat_ids)
        self._refuse_evicted(flat_ids, (rows.lengths > flat_steps) & (flat_steps >= 0))
        at = rows.starts + flat_steps
        if ids.ndim == 2 and (np.diff(ids) == 0).all() and (np.diff(steps) == 1).all():
            values = self.arena.copy_chunks(at.reshape(ids.shape)[:, 0].copy(), ids.shape[1])
        else:
            values = [self.arena.copy_steps(number, at.reshape(ids.shape)) for number in range(len(self.arena.columns))]
        if self.table is not None:
            values += [value.view(*ids.shape, *value.shape[1:]) for value in self.table.copy(flat_ids)]
        self._refuse_evicted(flat_ids, self.ledger.still_valid(flat_ids))
        return self.arena.schema.build_sample(values, np.stack([ids, steps], axis=-1))

    def _refuse_evicted(self, ids: np.ndarray, there: np.ndarray) -> None:
        if not there.all():
            gone = np.unique(ids[~there])[:5].tolist()
            raise TrajectoryEvictedError(
                f"Steps of the trajectories {gone} are not in the buffer (any more): it holds the newest "
                f"{self.max_size:,} trajectories, {self.max_total_steps:,} steps at most. Sample and read in one call "
                "(TrajectoryReplayBuffer does, and draws again), or make the buffer larger."
            )

    def contains(self, item: int | Sequence[int] | torch.Tensor) -> bool | list[bool] | torch.Tensor:
        """Says whether there is a trajectory at each position of ``item``."""
        count = len(self)
        if isinstance(item, int):
            return -count <= item < count
        there = (torch.as_tensor(item) < count) & (torch.as_tensor(item) >= -count)
        return there if isinstance(item, torch.Tensor) else there.tolist()

    def flatten(self) -> NoReturn:
        raise UnsupportedOperationError("A TrajectoryStorage is flat already; storage[:] returns its trajectories.")

    # ---------------------------------------------------------------------------- emptying, saving, and sharing

    def _empty(self) -> None:
        self.ledger.retire_all()

    def state_dict(self) -> dict[str, Any]:
        """Returns the counters and, once allocated, the schema and copies of the live trajectories.

        ``"values"`` holds one tensor of each field: ``[steps, *shape]``, trajectory behind trajectory, or
        ``[trajectories, *shape]``; and ``"lengths"`` an ``int64`` tensor with their lengths, oldest first. Text is
        numbered by its place in ``"texts"``. Writers go on meanwhile; a trajectory that is evicted while it is copied
        is not in the state, but never so many that less than half is left.
        """
        state: dict[str, Any] = {"next_id": self.ledger.next_id, "steps_written": self.ledger.steps_written}
        if self.initialized:
            schema, whole = self.arena.schema, read_live(self)
            values, texts = with_own_texts(schema, [*whole.values, *whole.of_trajectories], self.texts)
            lengths = torch.from_numpy(whole.rows.lengths)
            state |= {"schema": schema.to_json(), "values": values, "lengths": lengths, "texts": texts}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replaces what is live by the trajectories of a state; they get new ids.

        Raises:
            CheckpointError: when the state is damaged.
            SchemaMismatchError: when its steps have other keys than the arena was allocated for.
        """
        self._default_checkpointer().restore(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        if get_spawning_popen() is None:
            return {"settings": self._settings(), "contents": self.state_dict(), "texts": self.texts}
        if self.device.type != "cpu":
            raise SharingError(f"A storage on {self.device} can't be handed to another process.")
        private = ("_arena", "_table", "_schema_size", "_attached_entities_list")
        return {key: value for key, value in self.__dict__.items() if key not in private}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "settings" in state:
            self.__init__(**state["settings"])  # type: ignore[misc]
            self.texts = state["texts"]  # which transforms may refer to
            self.load_state_dict(state["contents"])
        else:
            self.__dict__.update(state)
            self._attached_entities_list = []
            self._start_unmapped()

    def _settings(self) -> dict[str, Any]:
        return {
            "max_trajectories": self.max_size,
            "max_total_steps": self.max_total_steps,
            "device": self.device,
            "max_writers": self.max_writers,
            "compact": self.compact,
        }

    def __repr__(self) -> str:
        return (
            f"TrajectoryStorage({len(self):,} of {self.max_size:,} trajectories, {self.num_steps:,} of "
            f"{self.max_total_steps:,} steps, {self.schema if self.initialized else 'not allocated'})"
        )


def _checked_device(device: torch.device | str) -> torch.device:
    try:
        checked = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgumentError(f"Got device={device!r}, which torch does not know: {error}") from error
    if checked.type != "cpu":
        raise InvalidArgumentError(f"Got device={device!r}; a TrajectoryStorage lives in shared memory: use 'cpu'.")
    return checked
