"""The storage for TorchRL: an arena of steps, and the ledger that records which trajectory lies where in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase

from embodichain_rl._checks import checked_bool, checked_compact, checked_float, checked_int
from embodichain_rl.errors import SchemaMismatchError
from embodichain_rl.replay.device import DeviceMemory
from embodichain_rl.replay.durable import BufferDirectory, BufferFiles
from embodichain_rl.replay.host import RegionInPieces
from embodichain_rl.replay.ledger import NO_VERSION
from embodichain_rl.replay.schema import (
    MASK,
    Codec,
    Formats,
    Key,
    Leaf,
    OptionalKeys,
    Schema,
    Shifted,
    leaves_of,
)
from embodichain_rl.replay.storage.handed_over import HandedOver
from embodichain_rl.replay.storage.memory import checked_limits, in_mebibytes, is_host, make_parts
from embodichain_rl.replay.storage.places import Source, place_of, refuse_formats_on_device, settings_as_json
from embodichain_rl.replay.storage.restorable import RestorableStorage
from embodichain_rl.replay.storage.saving import TrajectoryCheckpointer

__all__ = ["TrajectoryStorage"]


class TrajectoryStorage(RestorableStorage):
    """A TorchRL storage of whole trajectories that many processes write and sample at the same time.

    Trajectories are stored in flat tensors ``[steps, ...]``, one after the other, contiguous and unpadded. When there
    are more than ``max_trajectories`` of them, or more than ``max_total_steps`` steps in total, the oldest are evicted,
    always whole. An item of the storage is a trajectory: ``len(storage)`` counts them, ``storage[0]`` is the oldest.

    The memory is allocated when the first data arrives, or by :meth:`allocate`, and is shared from the start: hand the
    storage, or a buffer with it, to child processes under fork, spawn or forkserver, before or after allocation.

    Args:
        max_trajectories: the largest number of trajectories that are kept, at least 1; the newest are kept.
        max_total_steps: the largest number of steps that are kept in total; also the longest trajectory that can be
            written. None: as many as fit into ``max_bytes``.

    Keyword Args:
        max_bytes: the largest number of bytes that the buffer takes, head-room and ledger included, beside or in place
            of ``max_total_steps``. How many steps these are is known when the first data arrives.
        reserve: whether the memory is taken as soon as the first data arrives, so that nothing else can take it. Else a
            page is taken when it is first written.
        device: where the trajectories are kept: ``"cpu"``, or a CUDA device, such as ``"cuda"`` or ``"cuda:1"``; see
            below.
        max_writers: the number of writers that can copy a trajectory of average length at the same moment without
            evicting anything early. It reserves address space; memory is taken only when they do.
        compact: whether an observation that occurs in two consecutive steps is stored once. If a key ``("next", *key)``
            has a ``key`` of the same shape and dtype at the root, it is not stored, but read from ``key`` of the
            following step; the last one of a trajectory is kept. Done, terminated, truncated and reward are always
            stored. Reads return the same bits, in contiguous memory. Data in which the two differ is refused. A
            collector must write both: build it without its own ``compact_obs``, which drops the last one.
            With ``"views"``, the two entries of a chunk without padding are views of one memory of ``L + 1`` steps.
            This halves the copying of long chunks. But ``view`` (of a tensor or a batch), and transforms that use it,
            such as ``VecNorm``, need contiguous memory, and a change in place changes both entries.
        optional_keys: keys that only some trajectories have, such as the wrist camera of some robots; or a mapping from
            keys to an example of a step, a tensor, which is needed where the first data does not have them. A key
            stands for all entries under it, and for ``("next", key)``. A trajectory without it is stored with zeros
            there, and ``("trajectory", "has", key)``, ``bool``, says of each sampled step whether its trajectory has
            it. Other keys must be in all data.
        max_pinned: the share of both limits, 0 to 1, that pinned trajectories may take; see
            :meth:`TrajectoryReplayBuffer.pin`.
        ragged: keys of values whose size changes from step to step: ``[n, *element]``, of which only ``n`` changes,
            such as point clouds and tokens. ``("next", key)`` is ragged too. They are recognised without it where the
            first data has them as jagged tensors (``torch.nested``), stacks of tensors, or a lazy stack of unequal
            sizes.
            Samples have them padded with zeros to the longest of the batch, ``[*batch, longest, *element]``, and their
            lengths, ``int64`` ``[*batch]``, under ``"<key>_lengths"``; see :class:`JaggedBatches` for jagged tensors.
        compress: keys of images that are kept encoded, each with its codec: ``"png"``, which is bit-equal, ``"jpeg"``,
            or an object, such as ``JpegCodec(quality=95)``; see :class:`Codec`. They are encoded by the process that
            writes them, and decoded by the one that samples, only the frames that are drawn. ``("next", key)`` is
            encoded as well, and frames that occur twice in a trajectory are stored once. Needs the extra ``images``.
        ragged_bytes: the bytes that all ragged and compressed values of a step are expected to take. By default a
            quarter more than those of the first data. Where they take more, the oldest trajectories are evicted early.
        every: keys that change at every so-many-th step only, such as ``{"camera": 8}`` for a camera of 25 Hz beside a
            state of 200 Hz. Write the value that is valid at each step. Each is stored once, also as
            ``("next", key)``, and samples have it at every step. What changes more often is stored too, and takes more
            than expected. With ``compress``, the values are encoded besides.
        path: a directory in which the storage is kept, and found again when it is made with the same arguments; see
            :meth:`open`. In ``/dev/shm`` it is shared by path and never written to a disk.
        staging_bytes: with a CUDA device, the size in bytes of the staging ring on the host, through which trajectories
            get to the device; by default 256 MiB. The longest trajectory must fit into it.

    Raises:
        InvalidArgumentError: for arguments that can't work, and devices that don't exist.
        BufferMemoryError: at allocation, when the machine, its cgroup or the device has too little memory left.

    It guarantees:

    * Writing never leaves fewer live trajectories than the limits allow: a buffer of 2 offers 2 while a third is
      written.
    * A trajectory that is read is whole. Reads take no lock that a writer waits for. The only exception are reads of
      whole trajectories (``storage[i]``, ``storage[:]``, a checkpoint) that were evicted several times in a row before
      they were copied.
    * A process that is killed at any instruction blocks nobody and damages nothing but the trajectory it was writing.

    Each text is stored once, in :attr:`texts`, and steps hold its id. A value that is the same at every step of a
    trajectory, a text or numbers, is stored once per trajectory if it is written under ``"trajectory"``.

    Attributes:
        texts (TextTable): the text of all steps and trajectories.
        staged (bool): whether the trajectories are kept on a device, and written through a staging ring.
        compact (bool): whether an observation that occurs in two consecutive steps is stored once.
        next_views (bool): whether next observations are sampled as views of the memory of the observations.
        handed_over (HandedOver): the child processes that were started with the storage.

    **On a CUDA device.** The process that creates the storage is its owner, and the only one that can read: samples are
    gathered on the device and stay there, and no sample waits for the device. All other processes can write, as to any
    storage, and never touch CUDA: what they write, and what the owner writes from the CPU, goes to a staging ring in
    pinned memory, from which a thread of the owner uploads it. A trajectory is live, and gets its id, when it is
    uploaded: ``extend`` returns -1 for it, and :meth:`flush` waits for it. Writers wait while the ring is full, at most
    a minute. Data of the owner that is on the device already is copied there, and is live at once. On a device the
    head-room is an eighth of the room, since it takes memory: if lengths differ much, the oldest trajectories may be
    evicted somewhat early (``stats()["evicted_early"]``).

    A pickled, deep-copied or checkpointed storage is a copy with its own memory, except when it is pickled into a child
    that is being started: then the memory is shared.

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
        max_total_steps: int | None = None,
        *,
        max_bytes: int | None = None,
        reserve: bool = False,
        device: torch.device | str = "cpu",
        max_writers: int = 16,
        compact: bool | Literal["views"] = False,
        staging_bytes: int | None = None,
        optional_keys: Iterable[NestedKey] | Mapping[NestedKey, torch.Tensor] = (),
        max_pinned: float = 0.5,
        ragged: Iterable[NestedKey] = (),
        compress: Mapping[NestedKey, str | Codec] | None = None,
        ragged_bytes: int | None = None,
        every: Mapping[NestedKey, int] | None = None,
        path: Source = None,
    ) -> None:
        super().__init__()
        self.optional = OptionalKeys(optional_keys)
        self.formats = Formats(ragged, compress, ragged_bytes, every)
        self.max_size = checked_int("max_trajectories", max_trajectories, minimum=1)
        self._limits = checked_limits(max_total_steps, max_bytes)
        self.reserve = checked_bool("reserve", reserve)
        self.max_writers = checked_int("max_writers", max_writers, minimum=1)
        self.next_views = checked_compact(compact) == "views"
        self.compact = bool(compact)
        self.max_pinned = checked_float("max_pinned", max_pinned, minimum=0.0, maximum=1.0)
        make = partial(
            make_parts,
            self.max_size,
            self._limits[0],
            device=device,
            compact=self.compact,
            staging_bytes=staging_bytes,
            max_pinned=self.max_pinned,
            max_bytes=self._limits[1],
            reserve=self.reserve,
            formats=self.formats,
        )
        settings = settings_as_json(
            self.max_size,
            self._limits[0],
            self.max_writers,
            compact,
            self.optional.given,
            max_pinned=self.max_pinned,
            max_bytes=self._limits[1],
            reserve=self.reserve,
            formats=self.formats.to_json(),
        )
        if self.formats and not is_host(device):
            refuse_formats_on_device()
        place = place_of(path, settings, make, on_host=is_host(device))
        if isinstance(place, BufferDirectory):
            self.max_writers = place.settings["max_writers"]
        parts = make(max_writers=self.max_writers, blocks=getattr(place, "blocks", place))
        self._schema, self._memory, self.texts = parts
        self._take_place(place, parts, settings)
        self.device = self._memory.device
        self.staged = self._memory.staging_bytes is not None
        self.ledger = self._memory.ledger
        self.handed_over = HandedOver(self)
        self._start_unmapped()

    times_replaced = 0
    """How often the memory was replaced by another one, in this process; see :meth:`_empty`."""

    # ---------------------------------------------------------------------------------------------- allocation

    def allocate(self, data: TensorDictBase, *, beside: int = 0) -> None:
        """Allocate the arena for steps like those in ``data``, without writing them.

        This is needed only if the first data that is written does not have all keys. Another call with the same keys
        does nothing.

        Args:
            data: steps of any batch size, for instance ``env.fake_tensordict()``.
            beside: bytes that must be left beside the buffer, such as for what its writers hold.

        Raises:
            SchemaMismatchError: when the arena is allocated already, for other keys, shapes or dtypes; or when ``data``
                holds something other than tensors and text.
            BufferMemoryError: when it would not fit into memory.
        """
        leaves = leaves_of(data, stored=self.schema, fill=self.fill)
        leaves.pop(MASK, None)
        self.formats.take(leaves, self.schema)
        batch_dims = len(leaves.batch_size)
        schema = self.schema or self.allocate_schema(
            self.formats.applied(Schema.of_leaves(leaves), leaves, batch_dims), beside=beside
        )
        schema.in_order(leaves, batch_dims)

    @property
    def fill(self) -> Any:
        """The function that adds the optional keys that data lacks; None if no key is optional."""
        if not self.optional.keys:
            return None
        schema = self.schema
        return self.optional.filler(None if schema is None else schema.kinds)

    def allocate_schema(self, schema: Schema, *, beside: int = 0) -> Schema:
        """Allocate the arena for steps of ``schema``, unless it is allocated; return the schema that it has."""
        self._schema.check(schema)
        if schema.blob_numbers:
            self._accept_blobs(schema)
        with self.ledger.frozen():
            if not self._schema.is_set:
                self._memory.allocate(schema, beside=beside)
                self._schema.set(schema)
        allocated = self.schema
        assert allocated is not None, "just set"
        return allocated

    def _accept_blobs(self, schema: Schema) -> None:
        """Refuse ragged and compressed fields where they can't be stored."""
        if self.staged:
            refuse_formats_on_device()
        if schema.blobs is None:
            raise SchemaMismatchError("Got a schema with ragged values whose sizes are not known; write data instead.")

    def shifted_in(self, schema: Schema) -> Shifted:
        """Return the fields of a schema that are read from another field, one step later; none unless ``compact``."""
        return self._memory.shifted_in(schema) if self.compact else {}

    def stored_bytes(self, schema: Schema) -> int:
        """Return the bytes of a stored step of a schema."""
        return schema.nbytes - sum(schema.fields[number].nbytes for number in self.shifted_in(schema))

    @property
    def _storage(self) -> TensorDictBase | None:
        # Where TorchRL's storages keep their tensors; collectors look at its keys.
        return (self._opened or self.open_memory()).tensordict if self.initialized else None

    # -------------------------------------------------------------------------------------------------- counts

    @property
    def nbytes_per_step(self) -> int:
        """Bytes of a stored step; 0 before allocation."""
        return self.bytes()["nbytes_per_step"]

    def bytes(self) -> dict[str, int]:
        """Return how much memory the storage takes, in bytes.

        Returns:
            ``nbytes_per_step``: of a stored step; ``bytes_expected``: of the full buffer; ``bytes_at_most``: with all
            head-room, for lengths that differ and for ``max_writers`` that write at once; ``bytes_used``:
            of the pages that were written so far. Before allocation, the first three are 0. On a device there is
            ``nbytes_per_step`` only.
        """
        sizes = self._memory.sizes_in_bytes(self.schema)
        if "bytes_used" in sizes:
            sizes["bytes_used"] += self.texts.nbytes_used
        return sizes

    # ------------------------------------------------------------------------------------------------- writing

    def write(
        self,
        pieces: Sequence[Sequence[np.ndarray]],
        of_trajectory: Sequence[np.ndarray] = (),
        *,
        policy_version: int = NO_VERSION,
    ) -> int:
        """Copy one whole trajectory, given in consecutive pieces, into the arena and publish it.

        Args:
            pieces: each has one array ``[n, *shape]`` per field, in the order of ``schema.fields``. Of shifted fields
                only the last step is read: call :func:`~embodichain_rl.replay.schema.refuse_unshifted` before.
            of_trajectory: one array ``[*shape]`` per field, in the order of ``schema.trajectory_fields``.
            policy_version: the number of updates of the policy that made the last step; ``NO_VERSION`` if unknown.

        Returns:
            The id of the trajectory, unique in this buffer; -1 if it is on its way to a device.

        Raises:
            TrajectoryTooLongError: when it is longer than ``max_total_steps``; nothing is written.
        """
        return (self._opened or self.open_memory()).write(pieces, of_trajectory, policy_version)

    def begin_pieces(self, length: int) -> RegionInPieces | None:
        """Reserve a region for a trajectory of about ``length`` steps that comes in pieces; None without room for it.

        Where only bytes are limited, and on a device, there is none.
        """
        return (self._opened or self.open_memory()).begin_pieces(length)

    def publish_pieces(
        self, region: RegionInPieces, of_trajectory: Sequence[np.ndarray] = (), *, policy_version: int = NO_VERSION
    ) -> int | None:
        """Publish the trajectory that was written to a region, as :meth:`write` does.

        Returns:
            Its id; None if the memory was replaced meanwhile.
        """
        memory = self._opened or self.open_memory()
        return (
            None if isinstance(memory, DeviceMemory) else memory.publish_pieces(region, of_trajectory, policy_version)
        )

    def directly(self, leaves: Mapping[Key, Leaf]) -> DeviceMemory | None:
        """Return the memory on the device if some of the data is there, in the owner's process; else None."""
        return self._memory.directly(leaves)

    def check_length(self, length: int) -> None:
        """Refuse a trajectory of at least ``length`` steps if there is no room for it in the allocated arena.

        Raises:
            TrajectoryTooLongError: when it is longer than the arena, or the staging ring, has room for.
            PinLimitError: when the pinned trajectories leave no room for it.
        """
        self.ledger.check_room(length)
        if self._opened is not None:
            self._opened.check_length(length)

    def flush(self, timeout: float = 60.0) -> None:
        """Wait until every trajectory that was written before is live. On the CPU it is live at once.

        Args:
            timeout: the longest time to wait, in seconds.

        Raises:
            StagingTimeoutError: when the owner of a storage on a device has not uploaded them in time.
            OwnerGoneError: when the owner has ended, or closed the storage.
        """
        timeout = checked_float("timeout", timeout, minimum=0.0)
        if self.initialized:
            (self._opened or self.open_memory()).flush(timeout)

    def close(self) -> None:
        """Give the memory back at once, also where something still refers to the storage; a new one must be made then.

        Writes and samples are refused from then on, in every process. In a process that did not make the storage, this
        does nothing. A storage in a directory is synced and closed in this process only, and its files stay. On a
        device it ends the uploads for good; there it is called when the storage is
        garbage-collected, and when its owner exits.
        """
        if isinstance(self._place, BufferFiles):
            self._place.close()
            self._start_unmapped()
        else:
            self._memory.close()

    # ------------------------------------------------------------------------------------ emptying and settings

    def _empty(self) -> None:
        self._retire()
        if not self.handed_over.is_set and self._is_alone():
            # Nobody else can have mapped the memory, so the next data may have other keys.
            self._schema, self._memory = self._made_anew(self._memory)
            self.times_replaced += 1
            self._start_unmapped()

    def _retire(self) -> None:
        self._memory.discard()
        self.ledger.retire_all()

    def _settings(self) -> dict[str, Any]:
        return {
            "max_trajectories": self.max_size,
            "max_total_steps": self._limits[0],
            "max_bytes": self._limits[1],
            "reserve": self.reserve,
            "device": self._memory.made_for,
            "max_writers": self.max_writers,
            "compact": "views" if self.next_views else self.compact,
            "staging_bytes": self._memory.staging_bytes,
            "optional_keys": self.optional.given,
            "max_pinned": self.max_pinned,
            **self.formats.given,
        }

    def _bytes_in_words(self) -> str:
        sizes = self.bytes()
        if not sizes.get("bytes_expected"):
            return ""
        used, expected = (in_mebibytes(sizes[name]) for name in ("bytes_used", "bytes_expected"))
        return f", {used} of {expected} MiB"

    def __repr__(self) -> str:
        return (
            f"TrajectoryStorage({len(self):,} of {self.max_size:,} trajectories, {self.num_steps:,} of "
            f"{self.max_total_steps:,} steps, {self.schema if self.initialized else 'not allocated'}"
            f"{self._bytes_in_words()})"
        )
