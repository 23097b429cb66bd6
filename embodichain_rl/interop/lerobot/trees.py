"""A directory that is always whole: changes are prepared beside it, and take effect with one rename.

A dataset consists of several files that must agree: the frames, the episodes, the counts. No order in which files are
replaced keeps them in agreement. So there are two trees of directories. Readers see the *shown* one. The *hidden* one
beside it gets the new files; all other files are hard links to those of the shown tree. Then the two exchange their
names, which the kernel does in one step (``renameat2`` with ``RENAME_EXCHANGE``). A process that is killed before has
changed nothing, and one that is killed after it has changed everything.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from embodichain_rl.errors import DatasetWriteError

__all__ = ["TwoTrees"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_libc = ctypes.CDLL(None, use_errno=True)


class TwoTrees:
    """A directory whose changes are atomic and durable.

    Args:
        root: the directory; it need not exist.

    Raises:
        DatasetWriteError: when another process writes it, or its file system can't do what is needed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.hidden = self.root.parent / f".{self.root.name}.next"
        self.root.parent.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.root.parent / f".{self.root.name}.lock", os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise DatasetWriteError(
                f"Got {self.root}, which another process is writing. Stop that recorder first, or give another root."
            ) from None
        shutil.rmtree(self.hidden, ignore_errors=True)  # left by a process that was killed
        self._fresh: set[str] = set()  # of the last commit; the hidden tree lacks them
        if self.root.exists():
            self._link_all()
        else:
            self.hidden.mkdir()

    def write(self, path: str, data: bytes) -> None:
        """Write a file of the hidden tree, durably."""

        def fill(target: Path) -> None:
            target.write_bytes(data)

        self.write_with(path, fill)

    def write_with(self, path: str, fill: Callable[[Path], None]) -> None:
        """Write a file of the hidden tree, durably.

        Args:
            path: within the tree.
            fill: called with the path of a new file.
        """
        target = self.hidden / path
        target.parent.mkdir(parents=True, exist_ok=True)
        # The old file may be a hard link to one that is shown, so it is replaced rather than changed.
        new = target.with_name(f".{target.name}")
        new.unlink(missing_ok=True)
        fill(new)
        _sync(new)
        new.rename(target)
        self._fresh.add(path)

    def commit(self) -> None:
        """Show what was written since the last commit.

        Raises:
            DatasetWriteError: when the file system can't exchange two directories.
        """
        for folder in {(self.hidden / path).parent for path in self._fresh} | {self.hidden}:
            _sync(folder)
        if self.root.exists():
            _exchange(self.hidden, self.root)
        else:
            self.hidden.rename(self.root)
            self.hidden.mkdir()
        _sync(self.root.parent)
        for path in self._fresh:
            target = self.hidden / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            os.link(self.root / path, target)
        self._fresh = set()

    def close(self) -> None:
        """Remove the hidden tree, and let other processes write."""
        shutil.rmtree(self.hidden, ignore_errors=True)
        os.close(self._lock)

    def _link_all(self) -> None:
        try:
            shutil.copytree(self.root, self.hidden, copy_function=os.link)
        except (OSError, shutil.Error) as error:
            raise DatasetWriteError(
                f"Got {self.root}, whose files can't be linked to {self.hidden}: {error}. Give a root on a local file "
                "system with hard links (ext4, XFS, Btrfs, tmpfs)."
            ) from error


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _exchange(first: Path, second: Path) -> None:
    if _libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return
    number = ctypes.get_errno()
    raise DatasetWriteError(
        f"Got {second}, whose file system can't exchange two directories: {errno.errorcode.get(number, number)}. Give "
        "a root on a local file system of Linux (ext4, XFS, Btrfs, tmpfs) that is no mount point."
    )
