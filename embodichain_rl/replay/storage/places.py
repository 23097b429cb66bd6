"""Where the shared memory of a storage is: nameless, in a directory, or in another process."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self, TypeAlias

import numpy as np
import torch

from embodichain_rl._checks import checked_float
from embodichain_rl.errors import BufferFileError, InvalidArgumentError, UnsupportedOperationError
from embodichain_rl.replay.durable import (
    AttachedBlocks,
    BufferDirectory,
    BufferFiles,
    Manifest,
    Mode,
    NamelessBlocks,
    Piece,
)
from embodichain_rl.replay.host import HostMemory
from embodichain_rl.replay.ledger import ledger_layout
from embodichain_rl.replay.schema import Formats, SharedSchema, TextTable
from embodichain_rl.replay.storage.ledger_storage import LedgerStorage
from embodichain_rl.replay.storage.memory import Memory
from embodichain_rl.replay.storage.reader import TrajectoryReader
from embodichain_rl.shared import BlockSource

__all__ = [
    "Parts",
    "PathWithOptions",
    "PlacedStorage",
    "Source",
    "place_of",
    "refuse_formats_on_device",
    "settings_as_json",
]

Source: TypeAlias = str | os.PathLike[str] | BufferDirectory | AttachedBlocks | None
"""What a storage is given as ``path``: that of a directory, an open one, the blocks of another process, or None."""

Parts: TypeAlias = tuple[SharedSchema, Memory, TextTable]

KEPT = ("max_trajectories", "max_total_steps", "max_bytes", "compact", "optional_keys", "max_pinned", "reserve")
"""The settings that a buffer in a directory keeps: who gives others is refused."""

PLAIN = ("max_trajectories", "max_total_steps", "max_writers", "max_pinned", "max_bytes", "reserve")
"""The settings that are numbers."""


class PathWithOptions(os.PathLike[str]):
    """The path of a directory, with the options of the buffer that makes it if there is none.

    The directory is made with them, so whoever finds it has them, even if the process that made it was killed at once.

    Args:
        path: the directory.
        options: see :meth:`PlacedStorage.remember_options`.
    """

    def __init__(self, path: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
        self._path, self.options = os.fspath(path), options

    def __fspath__(self) -> str:
        return self._path

    def __str__(self) -> str:
        return self._path

    def __repr__(self) -> str:
        return repr(self._path)


def place_of(source: Source, settings: Mapping[str, Any], make: Callable[..., Parts], *, on_host: bool) -> Any:
    """Return what a storage gets its blocks from; make the directory if there is none.

    Args:
        source: see :data:`Source`.
        settings: settings of the storage, as JSON.
        make: function that makes the parts of the storage from ``max_writers`` and ``blocks``.
        on_host: whether the storage keeps its trajectories on the host.

    Returns:
        A :class:`BufferDirectory`, :class:`AttachedBlocks`, :class:`NamelessBlocks`, or :class:`BlockSource`.

    Raises:
        InvalidArgumentError: for a storage in a directory that is on a device.
        BufferFileError: if the directory can't be used, or has other settings.
    """
    if source is None:
        return NamelessBlocks() if on_host else BlockSource()
    if isinstance(source, (BufferDirectory, AttachedBlocks)):
        return source
    if not isinstance(source, (str, os.PathLike)) or not str(source):  # type: ignore[redundant-expr]
        raise InvalidArgumentError(f"Got path={source!r}; it must be the path of a directory.")
    if not on_host:
        raise InvalidArgumentError(
            f"Got path={source!r} with a storage on a device; only one on the CPU can be a file."
        )
    if not (Path(source) / "buffer.json").exists():

        def fill(blocks: BlockSource) -> None:
            make(max_writers=settings["max_writers"], blocks=blocks)

        options = source.options if isinstance(source, PathWithOptions) else None
        BufferDirectory.create(source, settings, layout=ledger_layout(), fill=fill, options=options)
    directory = BufferDirectory(source, layout=ledger_layout())
    given, kept = _kept(settings), _kept(directory.settings)
    different = [f"{name}={value!r}" for name, value in given.items() if value != kept[name]]
    if different:
        stored = [f"{name}={value!r}" for name, value in kept.items()]
        raise BufferFileError(
            f"Got {', '.join(different)} for the buffer at {directory.path}, which was made with {', '.join(stored)}. "
            "Give these, or open it as it is: TrajectoryReplayBuffer.open(path)."
        )
    return directory


def _kept(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a buffer in a directory keeps, by the names of the arguments."""
    formats = settings["formats"]
    return {
        **{name: settings.get(name) for name in KEPT},
        "ragged": [_name(key) for key in sorted(formats["ragged"])],
        "compress": {_name(key): codec for key, codec in sorted(formats["compress"])},
        "ragged_bytes": formats["ragged_bytes"],
        "every": {_name(key): steps for key, steps in sorted(formats.get("every", []))},
    }


def _name(key: Sequence[str]) -> str | tuple[str, ...]:
    return key[0] if len(key) == 1 else tuple(key)


def refuse_formats_on_device() -> NoReturn:
    """Refuse ragged and compressed fields in a storage on a device.

    Raises:
        UnsupportedOperationError: always.
    """
    raise UnsupportedOperationError(
        "Ragged and compressed values are kept on the CPU only. Use device='cpu', and move the batches."
    )


class PlacedStorage(TrajectoryReader, LedgerStorage):
    """A storage whose shared memory can be in a directory or in another process; see :class:`TrajectoryStorage`."""

    _place: BufferFiles | Manifest | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], mode: Mode = "r+") -> Self:
        """Open a storage that was made with ``path=``, in any process of this machine.

        Args:
            path: the directory.
            mode: ``"r+"`` to read and write. ``"r"`` only reads: it takes no lock, changes no file, and a process that
                has opened it so delays nobody, whatever happens to it.

        Raises:
            BufferNotFoundError: if there is none.
            BufferFileError: if it is damaged, of another version, or on a network file system; or, with ``"r"``, if
                the machine was started anew since it was used.
            BufferInUseError: if it is open in another pid namespace, or on another machine.
        """
        directory = BufferDirectory(path, mode, layout=ledger_layout())
        return cls(**_arguments(directory.settings), path=directory)  # type: ignore[call-arg]

    @classmethod
    def attached_to(cls, target: int | str, mode: Mode = "r+") -> Self:
        """Return the storage that another process has in nameless memory.

        Args:
            target: the id of the process, if it has one storage; or its :attr:`handle`.
            mode: ``"r+"`` to read and write, ``"r"`` to read only; see :meth:`open`.

        Raises:
            SharingError: if there is no such process or storage; or if it is of another user, or in another pid
                namespace.
        """
        blocks = AttachedBlocks(target, mode, layout=ledger_layout())
        return cls(**_arguments(blocks.settings), path=blocks)  # type: ignore[call-arg]

    @classmethod
    def watched(cls, target: int | str) -> tuple[Self, AttachedBlocks]:
        """Return the storage of another process to look at, and its blocks, without a trace in that process.

        When the blocks are no longer current, the storage is what it was then. Watch it anew.

        Args:
            target: see :meth:`attached_to`, which also says what is raised.
        """
        blocks = AttachedBlocks(target, "r", layout=ledger_layout(), noted=False)
        return cls(**_arguments(blocks.settings), path=blocks), blocks  # type: ignore[call-arg]

    def _take_place(self, place: Any, parts: Parts, settings: Mapping[str, Any]) -> None:
        schema, memory, texts = parts
        self._options: dict[str, Any] = getattr(place, "options", {})
        if isinstance(memory, HostMemory) and not getattr(place, "rebooted", False):
            found = schema.get()
            if found is not None:
                memory.resize(found)  # before the ledger is used, whose sizes depend on the schema
        if isinstance(place, BufferDirectory):
            assert isinstance(memory, HostMemory)
            self._place = BufferFiles(place, memory, schema, texts)
            self._options = self._place.options()
        elif isinstance(place, NamelessBlocks):
            self._place = Manifest(place, settings, ledger_layout())
        elif isinstance(place, AttachedBlocks):
            self._place = None

    @property
    def path(self) -> Path | None:
        """The directory of the storage; None in nameless memory."""
        return self._place.path if isinstance(self._place, BufferFiles) else None

    @property
    def handle(self) -> str:
        """Short name of a storage in nameless memory, with which a process of the same user calls :meth:`attached_to`.

        It fits into an environment variable, and is valid while this process lives.

        Raises:
            UnsupportedOperationError: for a storage in a directory, on a device, or that this process is attached to.
        """
        if not isinstance(self._place, Manifest):
            raise UnsupportedOperationError(
                "Only a buffer in nameless memory on the CPU, in the process that made it or a child of it, has a "
                "handle. One in a file is opened by its path: TrajectoryReplayBuffer.open(path)."
            )
        return self._place.handle

    def sync(self) -> None:
        """Wait until all that was published before this call is on the disk, and so survives a power cut.

        Processes and threads that call it at the same time share one write.

        Raises:
            UnsupportedOperationError: for a storage that is not in a directory.
            DiskFullError: if the disk is full.
            ReadOnlyBufferError: if it was opened with ``mode="r"``.
        """
        self._in_directory("sync").sync()

    def sync_every(self, seconds: float) -> None:
        """Call :meth:`sync` every so many seconds, on a thread of this process.

        Raises:
            InvalidArgumentError: if ``seconds`` is not positive.
            UnsupportedOperationError: for a storage that is not in a directory.
        """
        seconds = checked_float("sync_every", seconds, minimum=1e-3)
        self._in_directory("sync_every").sync_every(seconds)

    def _is_alone(self) -> bool:
        """Return whether the storage is in nameless memory that no process has attached to."""
        return isinstance(self._place, Manifest) and not self._place.is_used

    def _made_anew(self, memory: Memory) -> tuple[SharedSchema, Memory]:
        """Return a schema and a memory over the same ledger that are not allocated yet."""
        assert isinstance(self._place, Manifest)
        assert isinstance(memory, HostMemory)
        parts = SharedSchema(self._place.blocks, self.formats), memory.anew()
        self._place.remember(self._place.options)
        return parts

    def change(self, changes: Sequence[Piece]) -> int:
        """Replace bytes of live trajectories, each at once; return how many were live.

        Args:
            changes: the new bytes: the trajectory, the element of :attr:`Ledger.memory`, and the offset there.
        """
        if isinstance(self._place, BufferFiles):
            return self._place.relabel(changes)
        return sum(
            self.ledger.relabel(number, target, offset, np.frombuffer(content, dtype=np.uint8))
            for number, target, offset, content in changes
        )

    def _in_directory(self, what: str) -> BufferFiles:
        if not isinstance(self._place, BufferFiles):
            raise UnsupportedOperationError(
                f"{what} needs a buffer in a file, which outlives its processes: TrajectoryReplayBuffer(path=...)."
            )
        return self._place

    def remember_options(self, options: Mapping[str, Any]) -> None:
        """Store the options of a buffer over the storage, for processes that open or attach to it."""
        if self._place is not None:
            self._place.remember(options)

    @property
    def remembered_options(self) -> dict[str, Any]:
        """The options of the buffer that was last made over the storage when it was opened or attached to."""
        return self._options


def settings_as_json(
    max_trajectories: int,
    max_total_steps: int | None,
    max_writers: int,
    compact: Any,
    optional_keys: Any,
    **others: Any,
) -> dict[str, Any]:
    """Return the settings of a storage as JSON; see :func:`_arguments`."""
    keys: list[Any] = [key if isinstance(key, str) else list(key) for key in optional_keys]
    examples = None
    if isinstance(optional_keys, Mapping):
        examples = [[list(value.shape), str(value.dtype).removeprefix("torch.")] for value in optional_keys.values()]
    return {
        "max_trajectories": max_trajectories,
        "max_total_steps": max_total_steps,
        "max_writers": max_writers,
        "compact": bool(compact),
        "next_views": compact == "views",
        "optional_keys": {"keys": keys, "examples": examples},
        **others,
    }


def _arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of :class:`TrajectoryStorage` for settings that were stored as JSON."""
    described = settings["optional_keys"]
    keys = [key if isinstance(key, str) else tuple(key) for key in described["keys"]]
    optional: Any = keys
    if described["examples"] is not None:
        examples = (torch.zeros(shape, dtype=getattr(torch, dtype)) for shape, dtype in described["examples"])
        optional = dict(zip(keys, examples, strict=True))
    return {
        **{name: settings[name] for name in PLAIN},
        "compact": "views" if settings["next_views"] else settings["compact"],
        "optional_keys": optional,
        **Formats.from_json(settings["formats"]).given,
    }
