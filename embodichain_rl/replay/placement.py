"""A buffer that outlives its processes or is reached from outside, and its checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from embodichain_rl._compiling import graph_break
from embodichain_rl.errors import CheckpointError
from embodichain_rl.replay.batches import PrefetchingBuffer
from embodichain_rl.replay.metrics import GateWatch
from embodichain_rl.replay.parts import METADATA, check_checkpoint
from embodichain_rl.replay.storage import (
    PathWithOptions,
    TrajectoryStorage,
    checked_name,
    earlier_at,
    going_on_from,
    new_folder,
    writing_to,
)
from embodichain_rl.shared import write_durably

__all__ = ["PlacedBuffer", "options_to_remember", "path_with_options"]

CHECKPOINT = "checkpoint"
"""First part of the names of the folders of checkpoints."""


class PlacedBuffer(PrefetchingBuffer):
    """What :class:`~embodichain_rl.TrajectoryReplayBuffer` does with files and with other processes."""

    _gate: GateWatch

    @classmethod
    def open(cls, path: str | os.PathLike[str], mode: Literal["r+", "r"] = "r+", **options: Any) -> Self:
        """Open a buffer that was made with ``path=``, in any process of this machine, a child or not.

        Args:
            path: the directory.
            mode: ``"r+"`` to read and write. ``"r"`` only reads: it takes no lock, changes no file, and a process that
                has opened it so delays nobody, whatever happens to it.
            options: arguments of the constructor, such as ``chunk_size``; by default ``chunk_size``, ``batch_size``,
                ``end_key`` and ``traj_key`` are those of the process that made it.

        Raises:
            BufferNotFoundError: if there is none.
            BufferFileError: if it is damaged, of another version, or on a network file system; or, with ``"r"``, if
                the machine was started anew since it was used.
            BufferInUseError: if it is open in another pid namespace, or on another machine.
            ReadOnlyBufferError: with ``"r"``, by every call that would change it.
        """
        return cls._over(TrajectoryStorage.open(path, mode), options)

    @classmethod
    def attach(cls, target: int | str, mode: Literal["r+", "r"] = "r+", **options: Any) -> Self:
        """Return the buffer that another process of this user has in nameless memory.

        It is the same buffer, as in a child of that process, and stays when that process ends.

        Args:
            target: the id of the process, if it has one buffer; or the :attr:`handle` of the buffer there.
            mode: ``"r+"`` to read and write, ``"r"`` to read only; see :meth:`open`.
            options: see :meth:`open`.

        Raises:
            SharingError: if there is no such process or buffer; or if it is of another user, or in another pid
                namespace.

        Example:
            >>> rb = TrajectoryReplayBuffer(max_trajectories=2, max_total_steps=100, chunk_size=4, batch_size=8)
            >>> os.environ["BUFFER"] = rb.handle  # for a process that is started in whatever way
            >>> TrajectoryReplayBuffer.attach(os.environ["BUFFER"]).batch_size
            8
        """
        return cls._over(TrajectoryStorage.attached_to(target, mode), options)

    @classmethod
    def _over(cls, storage: TrajectoryStorage, options: Mapping[str, Any]) -> Self:
        known = {name: _from_json(value) for name, value in storage.remembered_options.items()}
        if "sampler" in options:
            known.pop("chunk_size", None)
        if "writer" in options:
            known = {name: value for name, value in known.items() if name not in ("end_key", "traj_key")}
        return cls(**{"storage": storage, **known, **options})

    @property
    def path(self) -> Path | None:
        """The directory of a buffer in a file; None in nameless memory."""
        found: Path | None = self._storage.path
        return found

    @property
    def handle(self) -> str:
        """Short name of a buffer in nameless memory, with which a process of the same user can :meth:`attach` to it.

        It fits into an environment variable, and is valid while this process lives.

        Raises:
            UnsupportedOperationError: for a buffer in a file, on a device, or that this process is attached to.
        """
        name: str = self._storage.handle
        return name

    @graph_break
    def sync(self) -> None:
        """Wait until all that was published before this call is on the disk, and so survives a power cut.

        What is published survives the death of all processes without it. Processes and threads that call it at the
        same time share one write.

        Raises:
            UnsupportedOperationError: for a buffer that is not in a file.
            DiskFullError: if the disk is full.
            ReadOnlyBufferError: if it was opened with ``mode="r"``.
        """
        self._storage.sync()

    # --------------------------------------------------------------------------------------------- checkpoints

    def dumps(self, path: str | Path) -> None:
        """Save the buffer to the directory ``path``; writers go on meanwhile.

        An earlier checkpoint there is replaced when the new one is whole: if this is broken off, it is kept. What it
        has already, and is unchanged since, is not written again.

        Raises:
            CheckpointWriteError: when the directory can't be written to, or the disk is full.
        """
        self._gate.read()
        path = Path(path).absolute()
        with writing_to(path), new_folder(path, CHECKPOINT, METADATA) as (folder, alone):
            with going_on_from(_storage_of_checkpoint(earlier_at(path)) if alone else folder):
                super().dumps(folder)
            write_durably(path / METADATA, json.dumps({"checkpoint": folder.name}).encode())
        if (path / "storage" / "trajectories.json").exists():  # of an earlier version
            shutil.rmtree(path / "storage", ignore_errors=True)

    def loads(self, path: str | Path) -> None:
        """Replace what the buffer holds by what was saved to the directory ``path``.

        Raises:
            CheckpointError: when the checkpoint is damaged, or was not written to the end; the buffer is as it was.
            SchemaMismatchError: when the buffer was allocated for other steps.
        """
        path = Path(path)
        named = check_checkpoint(path)
        if "checkpoint" in named:
            path = path / checked_name(named["checkpoint"], CHECKPOINT)
            check_checkpoint(path)
        super().loads(path)


def options_to_remember(sampler: Any, **options: Any) -> dict[str, Any]:
    """Return the options of a buffer for those who open it or attach to it; those that are None are left out."""
    chunk_size = getattr(sampler, "chunk_size", None)
    options |= {"chunk_size": None if callable(chunk_size) else chunk_size}
    return {name: value for name, value in options.items() if value is not None}


def path_with_options(path: Any, options: Mapping[str, Any]) -> Any:
    """Return the path of a buffer, with which its directory is made with these options; anything else as it is."""
    return PathWithOptions(path, options) if isinstance(path, (str, os.PathLike)) and str(path) else path


def _storage_of_checkpoint(path: Path) -> Path:
    """Return the directory of the storage in a checkpoint; one that does not exist if there is none."""
    try:
        named = check_checkpoint(path)
        return path / checked_name(named.get("checkpoint"), CHECKPOINT) / "storage"
    except CheckpointError:
        return path / "no checkpoint"


def _from_json(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
