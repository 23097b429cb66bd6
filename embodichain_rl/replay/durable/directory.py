"""A buffer in a directory: its files, who uses it, and what is refused when it is opened.

The directory of a buffer holds

* ``buffer.json``: the format, the layout of the ledger and the settings of the storage, with a checksum. It never
  changes.
* ``options.json``: the options of the buffer that was last made over it, which :meth:`open` uses.
* ``ledger``, ``arena``, ``table``, ``texts``, ``schema``: the blocks of shared memory; see :class:`FileBlocks`.
* ``commits.0``, ``commits.1``: the commit records; see :mod:`.commits`.
* ``in_use``: a lock that every process holds that may write.
* ``users.json``: the machine, boot and pid namespace of these processes.

A new directory is made under another name and renamed when it is whole. Two processes that make the same one both get
that of the first.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from embodichain_rl.errors import (
    BufferFileError,
    BufferInUseError,
    BufferNotFoundError,
    DiskFullError,
    InvalidArgumentError,
)
from embodichain_rl.shared import (
    BlockSource,
    FileBlocks,
    descriptor_for_child,
    file_system,
    own_process,
    process_is_alive,
    sync_folder,
    write_durably,
)

__all__ = ["HEADER", "BufferDirectory", "Mode", "boot_id"]

Mode = Literal["r+", "r"]

FORMAT = 1
HEADER, OPTIONS, IN_USE, USERS = "buffer.json", "options.json", "in_use", "users.json"


def boot_id() -> str:
    """Return an identifier of the current boot of this machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class BufferDirectory:
    """An open directory of a buffer.

    Args:
        path: the directory.
        mode: ``"r+"`` to read and write; ``"r"`` to read without any change to the files.
        layout: description of the arrays of the ledger in this version of the library.

    Raises:
        BufferNotFoundError: if there is no buffer.
        BufferFileError: if the files are damaged, of another version, or on a network file system.
        BufferInUseError: if other processes have it open on another machine, or in another pid namespace.

    Attributes:
        path (Path): the directory, absolute.
        mode (str): see above.
        settings (dict): the settings of the storage, as they were given to :meth:`create`.
        blocks (FileBlocks): the files.
        alone (bool): whether no other process had the buffer open for writing, so that all reservations are of
            processes that have ended.
        rebooted (bool): whether the machine was started anew since the buffer was last open for writing.
    """

    _use = -1

    def __init__(self, path: str | os.PathLike[str], mode: Mode = "r+", *, layout: str) -> None:
        if mode not in ("r+", "r"):
            raise InvalidArgumentError(f'Got mode={mode!r}; it must be "r+", to read and write, or "r", to read only.')
        self.path, self.mode = Path(path).absolute(), mode
        header = _read_header(self.path)
        if header.get("layout") != layout:
            raise BufferFileError(
                f"The buffer at {self.path} was made by a version of the library with another memory layout. Save a "
                "checkpoint with that version (rb.dumps), and load it into a new buffer."
            )
        self.settings: dict[str, Any] = header["settings"]
        _refuse_network(self.path)
        self.alone = self.rebooted = False
        if mode == "r":
            self._check_recovered()
        else:
            self._enter()
        self.blocks = FileBlocks(self.path, read_only=mode == "r")

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        settings: Mapping[str, Any],
        *,
        layout: str,
        fill: Callable[[BlockSource], object],
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the directory of a new buffer. If another process is faster, its directory is kept.

        Args:
            path: the directory. It must not exist, or be empty.
            settings: settings of the storage, as JSON.
            layout: see the class.
            fill: function that makes the parts of a storage from new blocks.
            options: the options of the buffer over the storage, if there is one; see :meth:`remember`.

        Raises:
            BufferFileError: if ``path`` is something else, or on a network file system.
            DiskFullError: if the disk is full.
        """
        path = Path(path).absolute()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise BufferFileError(
                f"{path} exists, but is no buffer: it has no {HEADER}. Give the path of a new directory, which "
                "is created."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_network(path.parent)
        _remove_unfinished(path)
        pid, start = own_process()
        new = path.with_name(f".{path.name}.new-{pid}-{start}-{os.urandom(4).hex()}")
        new.mkdir()
        try:
            fill(FileBlocks(new, fresh=True))
            for name in ("commits.0", "commits.1", IN_USE):
                (new / name).touch()
            write_durably(new / USERS, json.dumps(_identity()).encode())
            if options is not None:
                write_durably(new / OPTIONS, json.dumps(dict(options)).encode())
            body = {"format": FORMAT, "layout": layout, "settings": dict(settings)}
            write_durably(new / HEADER, json.dumps({**body, "checksum": _checksum(body)}, indent=1).encode())
            for file in new.iterdir():
                fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                os.fsync(fd)
                os.close(fd)
            os.rename(new, path)
            sync_folder(path.parent)
        except OSError as error:
            if not (path / HEADER).exists():
                if isinstance(error, DiskFullError):
                    raise
                raise BufferFileError(f"The buffer at {path} could not be made: {error}.") from error
        finally:
            shutil.rmtree(new, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------------- users

    def _enter(self) -> None:
        """Note that this process uses the buffer, until it ends; refuse if processes elsewhere do."""
        try:
            self._use = os.open(self.path / IN_USE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise BufferFileError(f"The buffer at {self.path} can't be opened for writing: {error}.") from error
        try:
            try:
                fcntl.flock(self._use, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.alone = True
            except BlockingIOError:
                fcntl.flock(self._use, fcntl.LOCK_SH)  # waits for a process that is just recovering it
            users = self._users()
            if self.alone:
                self.rebooted = users["boot"] != boot_id()
            else:
                _refuse_elsewhere(self.path, users)
        except BaseException:
            self.close()
            raise

    def admit_others(self) -> None:
        """Let other processes open the buffer, after a recovery; they wait until then."""
        if self.alone:
            if self._users() != _identity():
                write_durably(self.path / USERS, json.dumps(_identity()).encode())
            fcntl.flock(self._use, fcntl.LOCK_SH)

    def _users(self) -> dict[str, Any]:
        try:
            users = json.loads((self.path / USERS).read_text())
            return {name: users[name] for name in ("boot", "namespace", "host")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BufferFileError(f"{self.path / USERS} is damaged: {error!r}.") from error

    def _check_recovered(self) -> None:
        users = self._users()
        if users["boot"] != boot_id():
            raise BufferFileError(
                f"The buffer at {self.path} was last used before this machine was started, or on another machine "
                f'({users["host"]}), and opening it with mode="r" changes nothing. Open it once without a mode, or '
                f"call `embodichain-rl buffer sync {self.path}`."
            )

    def close(self) -> None:
        """End the use of the buffer by this process."""
        if self._use >= 0:
            os.close(self._use)
            self._use = -1

    __del__ = close

    # ----------------------------------------------------------------------------------------------------- options

    def options(self) -> dict[str, Any]:
        """Return the options of the buffer that was last made over the directory."""
        try:
            options = json.loads((self.path / OPTIONS).read_text())
        except (OSError, ValueError):
            return {}
        return options if isinstance(options, dict) else {}

    def remember(self, options: Mapping[str, Any]) -> None:
        """Store the options of a buffer, for processes that open it."""
        if self.mode != "r" and self.options() != options:
            write_durably(self.path / OPTIONS, json.dumps(dict(options)).encode())

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "_use"}
        return {**state, "use": None if self._use < 0 else descriptor_for_child(self._use)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        use = state.pop("use")
        self.__dict__.update(state)
        self._use = -1 if use is None else use.detach()


def _identity() -> dict[str, Any]:
    namespace = os.readlink("/proc/self/ns/pid")
    return {"boot": boot_id(), "namespace": namespace, "host": socket.gethostname()}


def _refuse_elsewhere(path: Path, users: Mapping[str, Any]) -> None:
    here = _identity()
    if users["boot"] != here["boot"]:
        raise BufferInUseError(
            f"The buffer at {path} is open on another machine, {users['host']}. Only processes of one machine can "
            "share it. End those processes, or give this one a buffer of its own."
        )
    if users["namespace"] != here["namespace"]:
        raise BufferInUseError(
            f"The buffer at {path} is open in another pid namespace ({users['namespace']}, this one is "
            f"{here['namespace']}). All processes that write to a buffer must see each other's process ids: run them "
            'in one container, or open it with mode="r".'
        )


def _refuse_network(path: Path) -> None:
    name = file_system(path)
    if name is not None:
        raise BufferFileError(
            f"{path} is on a file system of type {name}, on which processes do not see each other's writes to mapped "
            "files at once. Put the buffer on a local disk, or in /dev/shm where nothing must reach a disk."
        )


def _read_header(path: Path) -> dict[str, Any]:
    file = path / HEADER
    try:
        text = file.read_text()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BufferNotFoundError(
            f"There is no buffer at {path}: it has no {HEADER}. Make one with TrajectoryReplayBuffer(path=...)."
        ) from error
    except (OSError, ValueError) as error:
        raise BufferFileError(f"{file} can't be read: {error}.") from error
    try:
        header = json.loads(text)
        found, checksum = header["format"], header.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BufferFileError(f"{file} is damaged: {error!r}.") from error
    if found != FORMAT:
        raise BufferFileError(
            f"The buffer at {path} has the format {found!r}, this version of the library has {FORMAT}. Save a "
            "checkpoint with the version that made it (rb.dumps), and load it into a new buffer."
        )
    if checksum != _checksum(header) or not isinstance(header.get("settings"), dict):
        raise BufferFileError(f"{file} is damaged: its checksum does not match.")
    return header


def _checksum(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _remove_unfinished(path: Path) -> None:
    """Remove what processes that were killed while they made this buffer have left."""
    for left in path.parent.glob(f".{path.name}.new-*"):
        try:
            pid, start = map(int, left.name.rsplit("new-", 1)[1].split("-")[:2])
        except ValueError:
            continue
        if not process_is_alive(pid, start):
            shutil.rmtree(left, ignore_errors=True)
