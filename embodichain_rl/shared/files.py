"""Blocks of shared memory in files: mapped by any process that opens them, and there when all processes have ended.

The size of a file is address space: it is *sparse*, and room on the disk is taken by :meth:`FileBlock.back` before a
range is written for the first time. A store to a mapped page without room would end the process with SIGBUS if the disk
is full.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embodichain_rl.errors import BufferFileError, DiskFullError, ReadOnlyBufferError
from embodichain_rl.shared.blocks import BlockSource
from embodichain_rl.shared.memory import SharedBlock

__all__ = ["FileBlock", "FileBlocks", "check_disk", "file_system", "sync_folder", "write_durably"]

GRANULE = 1 << 20
"""Room on the disk is taken in multiples of this, in bytes."""

_libc = ctypes.CDLL(None, use_errno=True)


class FileBlock(SharedBlock):
    """Bytes in an open file that several processes share.

    Args:
        fd: descriptor of the file, which the block closes.
        name: name of the file, for messages.
        read_only: whether the bytes are mapped for reading only.
        in_memory: whether it is nameless memory of another process, for which no room on a disk is taken.
    """

    def __init__(self, fd: int, name: str, *, read_only: bool = False, in_memory: bool = False) -> None:
        self._bytes: torch.Tensor | None = None
        self._adopt(fd)
        self.name, self.read_only, self.in_memory = name, read_only, in_memory
        self._backed: tuple[int, int] = (0, 0)

    @property
    def fd(self) -> int:
        """Descriptor of the file."""
        assert self._fd is not None
        return self._fd

    @property
    def nbytes(self) -> int:
        """Size of the file, in bytes; 0 before :meth:`allocate`."""
        return os.fstat(self.fd).st_size

    def check_size(self, nbytes: int) -> None:
        """Refuse a file that does not have exactly so many bytes: a page beyond its end can't be touched.

        Raises:
            BufferFileError: if it has more or fewer.
        """
        if self.nbytes != nbytes:
            raise BufferFileError(
                f"The file {self.name!r} of the buffer has {self.nbytes:,} bytes; {nbytes:,} are needed. The buffer is "
                "damaged."
            )

    def mapped(self) -> torch.Tensor:
        """Return all bytes, ``uint8`` ``[n]``, mapped into this process. The address is the same at every call."""
        if not self.read_only or self._bytes is not None:
            return super().mapped()
        # A private mapping could be written to, but the kernel counts all of it as memory that may be needed.
        view = np.frombuffer(mmap.mmap(self.fd, self.nbytes, mmap.MAP_SHARED, mmap.PROT_READ), dtype=np.uint8)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self._bytes = torch.from_numpy(view)
        return self._bytes

    def array(self, dtype: type[np.generic], shape: tuple[int, ...], offset: int = 0) -> np.ndarray:
        """Return a part of the bytes as an array; see :meth:`SharedBlock.array`."""
        array = super().array(dtype, shape, offset)
        array.flags.writeable = not self.read_only
        return array

    def back(self, offset: int, nbytes: int) -> None:
        """Take room on the disk for a range of the bytes, unless it has room already.

        Raises:
            DiskFullError: if the disk has no room left.
        """
        if self.in_memory:
            return
        begin, end = self._backed
        if begin <= offset and offset + nbytes <= end:
            return
        first = offset // GRANULE * GRANULE
        last = min(-(-(offset + nbytes) // GRANULE) * GRANULE, self.nbytes)
        if not _allocated(self.fd, first, last - first):
            first, last = offset, offset + nbytes  # the last free bytes of the disk
            if not _allocated(self.fd, first, last - first):
                raise DiskFullError(
                    errno.ENOSPC,
                    f"The disk has no room for {nbytes:,} more bytes of {self.name!r} of the buffer. What is stored is "
                    "unchanged. Free some room, or move the buffer to a larger disk",
                )
        joined = begin <= first <= end  # ranges grow upwards, so that one per block is enough to remember
        self._backed = (begin if joined else first, max(last, end) if joined else last)

    def reserve(self, offset: int, nbytes: int) -> None:
        """Take room on the disk now for some bytes, before they are written.

        Raises:
            DiskFullError: if the disk has no room left.
        """
        self.back(offset, nbytes)

    def open_lock_file(self) -> int:
        """Open the file anew for a ``flock``; see :meth:`SharedBlock.open_lock_file`.

        Raises:
            ReadOnlyBufferError: if the block is read-only: who holds a lock makes others wait.
        """
        if self.read_only:
            raise ReadOnlyBufferError(
                'This buffer was opened with mode="r", and can\'t be changed: nothing can be written, no priorities '
                "set, and no pass without replacement begun. Open it without a mode to change it."
            )
        return super().open_lock_file()

    def unmap(self) -> None:
        """Forget the mapping. It ends in this process when no tensor or array over it is left; the file stays."""
        self._bytes = None

    def flush(self) -> None:
        """Wait until all that was written to the block is on the disk."""
        os.fdatasync(self.fd)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "name": self.name, "read_only": self.read_only, "in_memory": self.in_memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.name, self.read_only, self.in_memory = state["name"], state["read_only"], state["in_memory"]
        self._backed = (0, 0)


class FileBlocks(BlockSource):
    """Source of blocks in the files of a directory.

    Args:
        folder: the directory.
        read_only: whether the files are only read.
        fresh: whether the files are new. Otherwise they must exist.
    """

    def __init__(self, folder: Path, *, read_only: bool = False, fresh: bool = False) -> None:
        self.folder, self.read_only, self.fresh = folder, read_only, fresh

    def block(self, name: str, nbytes: int | None = None) -> FileBlock:
        """Return the block in the file ``name``.

        Raises:
            BufferFileError: if the file is missing, or has another size.
        """
        flags = os.O_RDONLY if self.read_only else os.O_RDWR | (os.O_CREAT if self.fresh else 0)
        try:
            block = FileBlock(os.open(self.folder / name, flags | os.O_CLOEXEC, 0o666), name, read_only=self.read_only)
        except OSError as error:
            raise BufferFileError(
                f"The file {name!r} of the buffer at {self.folder} can't be opened: {error}"
            ) from error
        if nbytes is not None:
            if self.fresh:
                block.allocate(nbytes)
            else:
                block.check_size(nbytes)
        return block

    def check_room(self, nbytes: int, what: str, remedy: str) -> None:
        """Refuse an allocation that does not fit on the disk.

        Raises:
            DiskFullError: if the disk has too little room left.
        """
        check_disk(self.folder, nbytes, what, remedy)


def check_disk(folder: Path, nbytes: int, what: str, remedy: str) -> None:
    """Refuse to begin with files that do not fit on the disk.

    Args:
        folder: a directory on the disk.
        nbytes: size of the files, in bytes.
        what: subject of the error message.
        remedy: last sentence of the error message, which says what to change.

    Raises:
        DiskFullError: if the disk has too little room left.
    """
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise DiskFullError(
            errno.ENOSPC,
            f"{what} needs {nbytes:,} bytes ({nbytes / 2**30:.2f} GiB), but the disk of {folder} has {free:,} bytes "
            f"({free / 2**30:.2f} GiB) free. {remedy}",
        )


def _allocated(fd: int, offset: int, nbytes: int) -> bool:
    """Take room on the disk for a range of a file; return False if the disk is full."""
    if nbytes <= 0:
        return True
    # Not os.posix_fallocate: where the file system can't do it, the C library writes zeros, over what others write.
    while _libc.fallocate(fd, 0, ctypes.c_long(offset), ctypes.c_long(nbytes)):
        number = ctypes.get_errno()
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return False
        if number != errno.EINTR:
            raise BufferFileError(
                f"The file system can't reserve room for a file: {os.strerror(number)}. A full disk would end the "
                "process at a write. Put the buffer on another one, such as ext4, XFS, Btrfs or tmpfs."
            )
    return True


def write_durably(file: Path, content: bytes) -> None:
    """Replace a file as a whole, and wait until that is on the disk."""
    new = file.with_name(f".{file.name}.{os.getpid()}.new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    os.replace(new, file)
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_FILE_SYSTEMS = {
    0x6969: "NFS",
    0x517B: "SMB",
    0xFE534D42: "SMB",
    0xFF534D42: "CIFS",
    0x00C36400: "Ceph",
    0x65735546: "FUSE",
    0x01021997: "9P",
    0x5346414F: "AFS",
    0x0BD00BD0: "Lustre",
    0x47504653: "GPFS",
    0x7461636F: "OCFS2",
    0x01161970: "GFS2",
    0x19830326: "BeeGFS",
    0x73757245: "Coda",
    0x20030528: "OrangeFS",
}
"""File systems that several machines can mount at the same time, by the magic number of statfs(2)."""


def file_system(path: Path) -> str | None:
    """Return the name of the file system of ``path`` if it is one that several machines share, otherwise None.

    FUSE counts as one, since the kernel does not know what is behind it.
    """
    buffer = (ctypes.c_long * 32)()
    if _libc.statfs(os.fsencode(path), ctypes.byref(buffer)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return _FILE_SYSTEMS.get(buffer[0] & 0xFFFFFFFF)
