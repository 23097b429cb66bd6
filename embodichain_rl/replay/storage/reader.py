"""What it takes to sample a storage, in any process, without TorchRL."""

from __future__ import annotations

from multiprocessing.context import get_spawning_popen
from typing import Any

from embodichain_rl.errors import TrajectoryIndexError, UnsupportedOperationError
from embodichain_rl.replay.device import DeviceArena, DeviceBatches, DeviceTable
from embodichain_rl.replay.host import MOST_STEPS, Arena, ChunkBatches, TrajectoryTable
from embodichain_rl.replay.kernels import PlainChunks
from embodichain_rl.replay.schema import Formats, Schema, SharedSchema, TextTable
from embodichain_rl.replay.storage.memory import Memory
from embodichain_rl.replay.storage.reads import ReadableTrajectories
from embodichain_rl.replay.storage.text_use import texts_in_use

__all__ = ["TrajectoryReader", "reader_of"]

LARGEST_BATCH = 1 << 26
"""The largest number of steps of a batch whose index is in one block with other tensors."""

SHARED = (
    "_limits",
    "_memory",
    "_place",
    "_schema",
    "device",
    "formats",
    "id_shift",
    "ledger",
    "max_size",
    "next_views",
    "staged",
    "texts",
)
"""The attributes of a storage that a reader has, too."""


class TrajectoryReader(ReadableTrajectories):
    """The trajectories of a storage, mapped into this process to be sampled.

    :class:`TrajectoryStorage` is one, and TorchRL's storage besides. A ``DataLoader`` worker that only samples gets a
    plain one (:func:`reader_of`): TorchRL, which takes seconds to load, is not loaded there.

    Attributes:
        ledger (Ledger): the table of trajectories.
        max_size (int): the largest number of live trajectories.
        texts (TextTable): the text of all steps and trajectories.
        staged (bool): whether the trajectories are kept on a device.
        next_views (bool): whether next observations are sampled as views of the memory of the observations.
    """

    texts: TextTable
    formats: Formats
    staged: bool
    next_views: bool
    _schema: SharedSchema
    _memory: Memory
    _limits: tuple[int | None, int | None]

    id_shift = 0
    """How much larger the ids of the trajectories are than in the state that was loaded last, in this process."""

    def __getstate__(self) -> dict[str, Any]:
        if get_spawning_popen() is None:
            raise UnsupportedOperationError(
                "A reader of a buffer is made for one process, and goes on to those that it starts; it is not copied. "
                "Copy the dataset where it was made."
            )
        return {name: self.__dict__[name] for name in SHARED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_unmapped()

    def _start_unmapped(self) -> None:
        self._opened: Memory | None = None
        self._arena: Arena | DeviceArena | None = None
        self._table: TrajectoryTable | DeviceTable | None = None

    @property
    def initialized(self) -> bool:
        """Whether a process has allocated the arena."""
        return self._schema.is_set

    @property
    def schema(self) -> Schema | None:
        """Keys, shapes and dtypes of a step; None before allocation."""
        return self._schema.get()

    @property
    def arena(self) -> Arena | DeviceArena:
        """The memory of the steps. A copy out of it is whole if :meth:`Ledger.still_valid` confirms it *afterwards*.

        Raises:
            TrajectoryIndexError: before allocation.
            SharingError: on a device, in another process than the owner's.
        """
        return self._arena or self._map()

    @property
    def table(self) -> TrajectoryTable | DeviceTable | None:
        """The values of whole trajectories, to be read like the arena; None if no key belongs to whole trajectories.

        Raises:
            TrajectoryIndexError: before allocation.
            SharingError: where the arena lies on a device, in another process than its owner's.
        """
        if self._arena is None:
            self._map()
        return self._table

    def chunk_batches(self, chunks: PlainChunks) -> ChunkBatches | DeviceBatches | None:
        """Return what makes batches of plain chunks in one call; None before allocation.

        Also None for chunks that are longer than any trajectory can be, and for batches with a huge index.
        """
        memory = self._opened or (self.open_memory() if self.initialized else None)
        count, length, _, extra, squeeze = chunks
        if memory is None or 1 - extra > self.max_total_steps or count * length > LARGEST_BATCH:
            return None
        if (squeeze and self.next_views) or memory.arena.blobs is not None:
            return None
        return memory.chunk_batches(chunks, views=self.next_views)

    def open_memory(self) -> Memory:
        """Map the memory into this process; called by whatever needs it.

        Raises:
            TrajectoryIndexError: before allocation.
        """
        schema = self.schema
        if schema is None:
            raise TrajectoryIndexError("Cannot get elements out of a storage that nothing was written to yet.")
        self._memory.open(schema)
        self._opened = self._memory
        self.texts.in_use = texts_in_use(self) if schema.text_keys else None
        return self._opened

    def _map(self) -> Arena | DeviceArena:
        memory = self._opened or self.open_memory()
        self._arena, self._table = memory.arena, memory.table
        return self._arena

    @property
    def max_total_steps(self) -> int:
        """The largest number of live steps. With ``max_bytes``, it is known when the first data has arrived."""
        if not self._memory.sized_by_schema:
            return self.ledger.max_total_steps
        if not self.initialized:
            return self._limits[0] or MOST_STEPS
        if self._opened is None:
            self.open_memory()
        return self.ledger.max_total_steps

    @property
    def num_steps(self) -> int:
        """The number of steps of all live trajectories."""
        return self.ledger.num_steps

    def check_readable(self) -> None:
        """Refuse reads where they are impossible.

        Raises:
            SharingError: on a device, in another process than the owner's.
            UploadError: when uploading to it has failed.
            OwnerGoneError: when it is closed.
        """
        self._memory.check_readable()


def reader_of(storage: TrajectoryReader) -> TrajectoryReader:
    """Return a plain reader of the memory of a storage, for a process that is being started with it."""
    reader = TrajectoryReader()
    reader.__setstate__({name: getattr(storage, name) for name in SHARED})
    return reader
