"""One way in from outside: the nameless memory of a running process, for a process that is no child of it.

A process that has a buffer in nameless memory has its blocks as open files, ``memfd``s, and one more that describes
them: the *manifest*, with the settings of the storage and the number (inode) of each block. Another process of the same
user finds and opens them in ``/proc/<pid>/fd``. So the process that has the buffer does nothing for it, and nothing is
left behind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embodichain_rl.errors import InvalidArgumentError, SharingError
from embodichain_rl.replay.durable.directory import Mode
from embodichain_rl.shared import BlockSource, FileBlock, SharedBlock, own_process, process_start

__all__ = [
    "MANIFEST_BYTES",
    "AttachedBlocks",
    "Manifest",
    "NamelessBlocks",
    "find_buffers",
    "find_manifests",
    "open_block",
    "parsed_handle",
]

NAME = "embodichain_rl_buffer"
"""Name of the memory of a manifest. It is for those who look; no two are confused by it."""

MANIFEST_BYTES = 1 << 16


class NamelessBlocks(BlockSource):
    """Source of nameless memory that other processes can find by its manifest."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def block(self, name: str, nbytes: int | None = None) -> SharedBlock:
        """Return a new block; see :meth:`BlockSource.block`."""
        block = SharedBlock(nbytes)
        self.numbers[name] = block.number
        return block


class Manifest:
    """The description of a buffer in nameless memory, for processes that attach to it.

    Args:
        blocks: the blocks of the buffer.
        settings: settings of the storage, as JSON.
        layout: description of the arrays of the ledger.
    """

    def __init__(self, blocks: NamelessBlocks, settings: Mapping[str, Any], layout: str) -> None:
        self.blocks, self.options = blocks, dict[str, Any]()
        self._block = SharedBlock(MANIFEST_BYTES, name=NAME)
        self._words = self._block.array(np.uint8, (MANIFEST_BYTES,))
        self._content = {"layout": layout, "settings": dict(settings)}
        self.remember({})

    def remember(self, options: Mapping[str, Any]) -> None:
        """Store the options of a buffer over the storage, and the blocks that it has now."""
        self.options = dict(options)
        content = {**self._content, "blocks": self.blocks.numbers, "options": self.options}
        encoded = json.dumps(content).encode().ljust(MANIFEST_BYTES - 1, b"\0")
        self._words[:-1] = np.frombuffer(encoded, dtype=np.uint8)

    @property
    def is_used(self) -> bool:
        """Whether a process has attached to the buffer, at any time."""
        return bool(self._words[-1])

    @property
    def handle(self) -> str:
        """Name of the buffer for :meth:`TrajectoryReplayBuffer.attach`: ``<pid>:<start time>:<number>``."""
        pid, start = own_process()
        return f"{pid}:{start}:{self._block.number}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_words"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._words = self._block.array(np.uint8, (MANIFEST_BYTES,))


class AttachedBlocks(BlockSource):
    """The blocks of a buffer in the nameless memory of another process.

    Args:
        target: the id of the process, if it has one buffer; or a handle.
        mode: ``"r+"`` to read and write; ``"r"`` to read without any change.
        layout: see :class:`Manifest`.
        noted: whether the process that has the buffer learns of it, so that it keeps its memory when it empties the
            buffer. Otherwise :attr:`is_current` says whether the blocks are still in use.

    Raises:
        SharingError: if there is no such process or buffer; or if the process is of another user or in another pid
            namespace.
    """

    fresh = False

    def __init__(self, target: int | str, mode: Mode, *, layout: str, noted: bool = True) -> None:
        if mode not in ("r+", "r"):
            raise InvalidArgumentError(f'Got mode={mode!r}; it must be "r+", to read and write, or "r", to read only.')
        self.read_only = mode == "r"
        self._pid, number = parsed_handle(target)
        found = find_buffers(self._pid)
        if number is not None:
            found = {key: content for key, content in found.items() if key == number}
        if len(found) != 1:
            handles = [f"{self._pid}:{process_start(self._pid)}:{key}" for key in found]
            raise SharingError(
                f"Process {self._pid} has {len(found)} such buffers in nameless memory"
                + (f"; attach to one of {handles} (rb.handle)." if found else ". One in a file is opened by its path.")
            )
        ((number, content),) = found.items()
        self._number = number
        if noted:
            _note_use(self._pid, number)
            content = find_buffers(self._pid).get(number, content)  # its blocks may have been replaced before the note
        if content["layout"] != layout:
            raise SharingError(f"Process {self._pid} uses another version of the library. Use the same one.")
        self.settings: dict[str, Any] = content["settings"]
        self.options: dict[str, Any] = content["options"]
        self._numbers: dict[str, int] = content["blocks"]

    @property
    def is_current(self) -> bool:
        """Whether the process still has the buffer, with these blocks."""
        try:
            content = find_buffers(self._pid).get(self._number)
        except SharingError:
            return False
        return content is not None and content["blocks"] == self._numbers

    def block(self, name: str, nbytes: int | None = None) -> FileBlock:
        """Return the block ``name`` of the process."""
        return open_block(self._pid, self._numbers.get(name), name, read_only=self.read_only)


def open_block(pid: int, number: int | None, name: str, *, read_only: bool) -> FileBlock:
    """Return a block in the nameless memory of a process.

    Args:
        pid: the id of the process.
        number: the number of the block.
        name: what it is called in messages.
        read_only: whether it is only read.

    Raises:
        SharingError: if the process does not have it any more.
    """
    fd = _open_by_number(pid, number, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    if fd is None:
        raise SharingError(f"Process {pid} gave up its buffer, or has ended.")
    return FileBlock(fd, name, read_only=read_only, in_memory=True)


def find_buffers(pid: int) -> dict[int, dict[str, Any]]:
    """Return the manifests of the buffers in the nameless memory of a process, by their numbers.

    Raises:
        SharingError: if the process does not exist, or is of another user or in another pid namespace.
    """
    return find_manifests(pid, NAME)


def find_manifests(pid: int, name: str) -> dict[int, dict[str, Any]]:
    """Return the contents of nameless memory that is called ``name``, by its numbers; see :func:`find_buffers`."""
    _check_reachable(pid)
    found = {}
    for file in _open_files(pid, f"/memfd:{name} (deleted)"):
        try:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            content = json.loads(os.pread(fd, MANIFEST_BYTES - 1, 0).rstrip(b"\0"))
            found[os.fstat(fd).st_ino] = content
        except ValueError:
            continue  # it is just being written
        finally:
            os.close(fd)
    return found


def _note_use(pid: int, number: int) -> None:
    """Note in a manifest that a process has attached to the buffer: its owner must not replace the blocks any more."""
    for file in _open_files(pid, f"/memfd:{NAME} (deleted)"):
        try:
            fd = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if os.fstat(fd).st_ino == number:
                os.pwrite(fd, b"\1", MANIFEST_BYTES - 1)
        finally:
            os.close(fd)


def parsed_handle(target: int | str) -> tuple[int, int | None]:
    """Return the process id and the number of a handle; the number of a process id is None.

    Raises:
        SharingError: if the process of the handle has ended.
        InvalidArgumentError: if it is neither.
    """
    if isinstance(target, bool) or not isinstance(target, (int, str)):
        raise InvalidArgumentError(f"Got {target!r}; it must be the id of a process, or a handle (rb.handle).")
    parts = str(target).split(":")
    if len(parts) not in (1, 3) or not all(part.isascii() and part.isdigit() for part in parts):
        raise InvalidArgumentError(f"Got {target!r}; it must be the id of a process, or a handle (rb.handle).")
    pid = int(parts[0])
    if len(parts) == 1:
        return pid, None
    if process_start(pid) != int(parts[1]):
        raise SharingError(f"The process of the handle {target!r} has ended.")
    return pid, int(parts[2])


def _check_reachable(pid: int) -> None:
    if process_start(pid) < 0:
        raise SharingError(
            f"There is no process {pid} in this pid namespace. Only processes that see each other's ids can share a "
            "buffer: run them in one container."
        )
    owner = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Uid:"))
    user = int(owner.split()[2])
    if user != os.geteuid():
        raise SharingError(
            f"Process {pid} is of user {user}, this one is of user {os.geteuid()}. A buffer can be shared between the "
            "processes of one user only."
        )
    try:
        namespaces = [os.readlink(f"/proc/{name}/ns/pid") for name in (pid, "self")]
    except OSError as error:
        raise SharingError(f"Process {pid} can't be looked into: {error}.") from error
    if namespaces[0] != namespaces[1]:
        raise SharingError(
            f"Process {pid} is in another pid namespace ({namespaces[0]}, this one is {namespaces[1]}). Processes that "
            "share a buffer must see each other's ids: run them in one container."
        )


def _open_files(pid: int, link: str) -> list[str]:
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError as error:
        raise SharingError(f"The open files of process {pid} can't be seen: {error}.") from error
    found = []
    for name in names:
        try:
            if os.readlink(f"/proc/{pid}/fd/{name}") == link:
                found.append(f"/proc/{pid}/fd/{name}")
        except OSError:  # closed meanwhile
            continue
    return found


def _open_by_number(pid: int, number: int | None, flags: int) -> int | None:
    for file in _open_files(pid, "/memfd:embodichain_rl (deleted)"):
        try:
            if os.stat(file).st_ino != number:
                continue
            fd = os.open(file, flags)
        except OSError:
            continue
        if os.fstat(fd).st_ino == number:
            return fd
        os.close(fd)
    return None
