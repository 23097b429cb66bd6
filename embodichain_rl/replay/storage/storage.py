"""The storage: an arena of steps and the ledger that says which trajectory lies where in it, for TorchRL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from multiprocessing.context import get_spawning_popen
from typing import Any, Literal

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase

from embodichain_rl._checks import checked_compact, checked_float, checked_int, checked_key
from embodichain_rl._compiling import graph_break
from embodichain_rl.errors import (
    CheckpointError,
    SchemaMismatchError,
    TrajectoryIndexError,
)
from embodichain_rl.replay.device import DeviceArena, DeviceMemory, DeviceTable
from embodichain_rl.replay.host import Arena, TrajectoryTable
from embodichain_rl.replay.schema import Key, Leaf, Schema, SharedSchema, Shifted, TextTable, refuse_unshifted
from embodichain_rl.replay.storage.checkpoint import SavedTrajectories, TrajectoryCheckpointer, with_own_texts
from embodichain_rl.replay.storage.items import contains, get_items
from embodichain_rl.replay.storage.ledger_storage import LedgerStorage
from embodichain_rl.replay.storage.memory import Memory, make_memory
from embodichain_rl.replay.storage.whole_reads import ReadView, read_live

__all__ = ["TrajectoryStorage"]


class TrajectoryStorage(LedgerStorage):
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
        device: where the trajectories are kept: ``"cpu"``, or a CUDA device, such as ``"cuda"`` or ``"cuda:1"``; see
            below.
        max_writers: how many writers may be in the middle of copying a trajectory of average length without cutting
            into what is kept. It costs address space; memory is taken only when they are.
        compact: whether an observation that stands in two steps is stored once. A key ``("next", *key)`` with a ``key``
            of the same shape and dtype at the root, other than done, terminated, truncated and reward, is then not
            stored, but read from ``key`` of the step after; the last one of a trajectory is kept. What is handed out is
            the same, to the bit, in contiguous memory of its own. What is written is refused where the two differ. A
            collector must hand over both, so build it without its own ``compact_obs``, which drops the last one.
            ``"views"``: the same, and in chunks that are not padded the two are views of one memory of ``L + 1`` steps.
            That saves half of the copying where chunks are long. But ``view`` (of a tensor or a batch) and transforms
            that use it, such as ``VecNorm``, need contiguous memory, and what is changed in place changes in both.

        staging_bytes: with a CUDA device, bytes of the memory on the host through which trajectories get there; by
            default 256 MiB. The longest trajectory must fit in.

    Raises:
        InvalidArgumentError: for arguments that can't work, and devices that there are not.
        BufferMemoryError: at allocation, when the machine or its cgroup, or the device, has not as much memory left.

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
        staged (bool): whether it lies on a device, and what is written goes through a ring.
        compact (bool): whether an observation that stands in two steps is stored once.
        next_views (bool): whether next observations are sampled as views of the memory of the observations.

    **On a CUDA device.** The process that makes the storage is its owner, and the only one that can read: samples are
    gathered on the device and stay there, and no sample waits for the device. All other processes can write, as to any
    storage, and never touch CUDA: what they write, and what the owner writes from the CPU, goes through a ring in
    pinned memory, from which a thread of the owner uploads it. It is live when it is there, and gets its id then:
    ``extend`` returns -1 for it, and :meth:`flush` waits for it. Writers wait while the ring is full, a minute at most.
    Data of the owner that lies on the device already is copied there, and is live at once. On a device the head-room is
    an eighth of the room, since it takes memory: where lengths differ much, the oldest may leave somewhat early
    (``stats()["evicted_early"]``).

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
        compact: bool | Literal["views"] = False,
        staging_bytes: int | None = None,
    ) -> None:
        super().__init__()
        self.max_size = checked_int("max_trajectories", max_trajectories, minimum=1)
        self.max_total_steps = checked_int("max_total_steps", max_total_steps, minimum=1)
        self.max_writers = checked_int("max_writers", max_writers, minimum=1)
        self.next_views = checked_compact(compact) == "views"
        self.compact = bool(compact)
        self._schema = SharedSchema()
        self._memory = make_memory(
            self.max_size,
            self.max_total_steps,
            device=device,
            schema=self._schema,
            max_writers=self.max_writers,
            compact=self.compact,
            staging_bytes=staging_bytes,
        )
        self.device = self._memory.device
        self.staged = self._memory.staging_bytes is not None
        self.ledger = self._memory.ledger
        self.texts = TextTable()
        self._start_unmapped()

    def _start_unmapped(self) -> None:
        self._opened: Memory | None = None
        self._arena: Arena | DeviceArena | None = None
        self._table: TrajectoryTable | DeviceTable | None = None

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
        self._schema.check(schema)
        with self.ledger.frozen():
            if not self._schema.is_set:
                self._memory.allocate(schema)
                self._schema.set(schema)
        allocated = self.schema
        assert allocated is not None, "just set"
        return allocated

    @property
    def initialized(self) -> bool:
        """Whether the arena is allocated, by whichever process."""
        return self._schema.is_set

    @property
    def schema(self) -> Schema | None:
        """Keys, shapes and dtypes of a step; None before allocation."""
        return self._schema.get()

    def shifted_in(self, schema: Schema) -> Shifted:
        """Returns the fields of a schema that are read one step later from another one; none if not ``compact``."""
        return self._memory.shifted_in(schema) if self.compact else {}

    @property
    def arena(self) -> Arena | DeviceArena:
        """The memory. What is copied out of it is whole if :meth:`Ledger.still_valid` says so *afterwards*.

        Raises:
            TrajectoryIndexError: before allocation.
            SharingError: where it lies on a device, in another process than its owner's.
        """
        return self._arena or self._map()

    @property
    def table(self) -> TrajectoryTable | DeviceTable | None:
        """The values of whole trajectories, to be read as the arena; None where no key is of whole trajectories.

        Raises:
            TrajectoryIndexError: before allocation.
            SharingError: where the arena lies on a device, in another process than its owner's.
        """
        if self._arena is None:
            self._map()
        return self._table

    @property
    def view(self) -> ReadView:
        """What it takes to read trajectories: the ledger, the arena and the table.

        Raises:
            TrajectoryIndexError: before allocation.
            SharingError: where the arena lies on a device, in another process than its owner's.
        """
        return ReadView(self.ledger, self.arena, self.table)

    def open(self) -> Memory:
        """Maps the memory into this process; called by whatever needs it.

        Raises:
            TrajectoryIndexError: before allocation.
        """
        schema = self.schema
        if schema is None:
            raise TrajectoryIndexError("Cannot get elements out of a storage that nothing was written to yet.")
        self._memory.open(schema)
        self._opened = self._memory
        return self._opened

    def _map(self) -> Arena | DeviceArena:
        memory = self._opened or self.open()
        self._arena, self._table = memory.arena, memory.table
        return self._arena

    @property
    def _storage(self) -> TensorDictBase | None:
        # Where TorchRL's storages keep their tensors; collectors look at its keys.
        return (self._opened or self.open()).tensordict if self.initialized else None

    # -------------------------------------------------------------------------------------------------- counts

    @property
    def num_steps(self) -> int:
        """Steps of all live trajectories."""
        return self.ledger.num_steps

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
                only the last step is looked at: ask :func:`~embodichain_rl.replay.schema.refuse_unshifted` before.
            of_trajectory: one array ``[*shape]`` a field, in the order of ``schema.trajectory_fields``.
            policy_version: how often the policy had been updated that made the last step.

        Returns:
            The id of the trajectory, unique in this buffer.

        Raises:
            TrajectoryTooLongError: when it is longer than ``max_total_steps``; nothing is written.
        """
        return (self._opened or self.open()).write(pieces, of_trajectory, policy_version)

    def directly(self, leaves: Mapping[Key, Leaf]) -> DeviceMemory | None:
        """Returns the device's memory where some of the data lies on it, in its owner's process; else None."""
        return self._memory.directly(leaves)

    def check_length(self, length: int) -> None:
        """Refuses a trajectory of which so many steps are known, and that will never fit, once there is an arena.

        Raises:
            TrajectoryTooLongError: when it is longer than what it is written to has room for.
        """
        if self._opened is not None:
            self._opened.check_length(length)

    def check_readable(self) -> None:
        """Refuses to be read where it can't be.

        Raises:
            SharingError: when it lies on a device, in another process than its owner's.
            UploadError: when uploading to it has failed.
            OwnerGoneError: when it is closed.
        """
        self._memory.check_readable()

    def flush(self, timeout: float = 60.0) -> None:
        """Waits until every trajectory that was written before is live: on the CPU it is at once.

        Args:
            timeout: seconds to wait at most.

        Raises:
            StagingTimeoutError: when the owner of a storage on a device has not uploaded them by then.
            OwnerGoneError: when it has ended, or closed the storage.
        """
        timeout = checked_float("timeout", timeout, minimum=0.0)
        if self.initialized:
            (self._opened or self.open()).flush(timeout)

    def close(self) -> None:
        """Ends the uploads to a device, for good; writing and reading are refused then. On the CPU it does nothing.

        It is called when the storage is garbage, and at the end of its owner.
        """
        self._memory.close()

    # ------------------------------------------------------------------------------------------------- reading

    @graph_break
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
        return get_items(self.view, index)

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

    def contains(self, item: int | Sequence[int] | torch.Tensor) -> bool | list[bool] | torch.Tensor:
        """Says whether there is a trajectory at each position of ``item``."""
        return contains(len(self), item)

    # ---------------------------------------------------------------------------- emptying, saving, and sharing

    def _empty(self) -> None:
        self._memory.discard()
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
            schema, whole = self.arena.schema, read_live(self.view)
            copies = [value.cpu() for value in (*whole.values, *whole.of_trajectories)]
            values, texts = with_own_texts(schema, copies, self.texts)
            lengths = torch.from_numpy(whole.rows.lengths)
            state |= {"schema": schema.to_json(), "values": values, "lengths": lengths, "texts": texts}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replaces what is live by the trajectories of a state; they get new ids.

        Raises:
            CheckpointError: when the state is damaged.
            SchemaMismatchError: when its steps have other keys than the arena was allocated for.
        """
        saved = SavedTrajectories.parse(state_dict)
        trajectories = [] if saved.schema is None else self._accept_saved(saved.schema, saved)
        self._empty()
        self.ledger.resume_from(next_id=saved.next_id)
        for steps, trajectory_values in trajectories:
            self.write([steps], trajectory_values)
        self.flush()
        self.ledger.count_steps_from(saved.steps_written)

    def _accept_saved(
        self, described: Schema, saved: SavedTrajectories
    ) -> list[tuple[list[np.ndarray], list[np.ndarray]]]:
        """Return what :meth:`write` takes for each saved trajectory; refuse what this storage can't hold."""
        if saved.longest > self.max_total_steps:
            raise CheckpointError(
                f"The checkpoint holds a trajectory of {saved.longest:,} steps, the storage at most "
                f"{self.max_total_steps:,} in all. Load it into a storage with a larger max_total_steps."
            )
        if self.initialized and self.schema != described:
            raise SchemaMismatchError(f"The checkpoint holds {described}, the storage was allocated for {self.schema}.")
        schema = self.allocate_schema(described)
        self.open()
        self.check_length(saved.longest)
        trajectories = saved.trajectories(schema, self.texts.ids_of(saved.texts))
        for steps, _ in trajectories:
            refuse_unshifted(schema, self.shifted_in(schema), steps, before=None, step=0)
        return trajectories

    def __getstate__(self) -> dict[str, Any]:
        if get_spawning_popen() is None:
            return {"settings": self._settings(), "contents": self.state_dict(), "texts": self.texts}
        private = ("_opened", "_arena", "_table", "_attached_entities_list")
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
            "device": self._memory.made_for,
            "max_writers": self.max_writers,
            "compact": "views" if self.next_views else self.compact,
            "staging_bytes": self._memory.staging_bytes,
        }

    def __repr__(self) -> str:
        return (
            f"TrajectoryStorage({len(self):,} of {self.max_size:,} trajectories, {self.num_steps:,} of "
            f"{self.max_total_steps:,} steps, {self.schema if self.initialized else 'not allocated'})"
        )
