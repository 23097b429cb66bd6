"""The parts of a buffer in a directory, and what keeps them safe: recovery, commit records, ``sync``."""

from __future__ import annotations

import atexit
import logging
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embodichain_rl.errors import EmbodiChainRLError
from embodichain_rl.replay.durable.commits import CommitLog, Piece
from embodichain_rl.replay.durable.directory import BufferDirectory
from embodichain_rl.replay.durable.recovery import recover
from embodichain_rl.replay.durable.syncing import Syncer, SyncThread
from embodichain_rl.replay.host import HostMemory
from embodichain_rl.replay.schema import SharedSchema, TextTable

__all__ = ["BufferFiles"]

LOGGER = logging.getLogger("embodichain_rl.replay")


class BufferFiles:
    """A buffer in a directory that this process has open.

    Args:
        directory: the open directory.
        memory: arena, table and ledger, from the blocks of the directory.
        schema: the shared schema, likewise.
        texts: the table of texts, likewise.

    Raises:
        BufferFileError: if the files are damaged.
    """

    def __init__(self, directory: BufferDirectory, memory: HostMemory, schema: SharedSchema, texts: TextTable) -> None:
        self._directory, self._memory, self._schema, self._texts = directory, memory, schema, texts
        self._log_files = [directory.blocks.block(name) for name in ("commits.0", "commits.1")]
        self._start()
        if directory.alone:
            recover(memory, schema, texts, self._log, rebooted=directory.rebooted, where=str(self.path))
            directory.admit_others()
        if directory.mode != "r":
            atexit.register(_sync_at_exit, weakref.ref(self))

    def _start(self) -> None:
        self._log = CommitLog(self._memory.ledger, self._log_files)
        self._syncer = Syncer(self._memory, self._schema, self._texts, self._log)
        self._thread: SyncThread | None = None
        self._memory.ledger.name_no_more = self._log.raise_floor

    @property
    def path(self) -> Path:
        """The directory."""
        return self._directory.path

    @property
    def mode(self) -> str:
        """``"r+"`` or ``"r"``."""
        return self._directory.mode

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._memory.ledger.closed

    def sync(self) -> None:
        """Wait until all that was published before is on the disk; see :meth:`Syncer.sync`."""
        self._memory.ledger.check_open()
        self._syncer.sync()

    def relabel(self, changes: Sequence[Piece]) -> int:
        """Replace bytes of trajectories; see :meth:`Syncer.relabel`."""
        self._memory.ledger.check_open()
        return self._syncer.relabel(changes)

    def close(self) -> None:
        """Sync, unmap the files, and end the use of the buffer by this process. The files stay."""
        if self._memory.ledger.closed:
            return
        try:
            if self.mode != "r":
                self.sync()
        finally:
            self._thread = None
            self._memory.close()
            self._directory.close()

    def sync_every(self, seconds: float) -> None:
        """Call :meth:`sync` regularly, on a thread of this process."""
        self._memory.ledger.check_open()
        self._thread = SyncThread(self._syncer, seconds)

    def options(self) -> dict[str, Any]:
        """Return the options of the buffer that was last made over the directory."""
        return self._directory.options()

    def remember(self, options: Mapping[str, Any]) -> None:
        """Store the options of a buffer, for processes that open it."""
        self._directory.remember(options)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_log", "_syncer", "_thread")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


def _sync_at_exit(reference: weakref.ref[BufferFiles]) -> None:
    files = reference()
    if files is not None and not files.is_closed:
        try:
            files.sync()
        except (OSError, EmbodiChainRLError):
            LOGGER.exception("The buffer at %s could not be synced at the end of the process", files.path)
