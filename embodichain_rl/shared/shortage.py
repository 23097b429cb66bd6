"""Tells from an exception which resource of the operating system was short, and how its limit is raised.

Python reports most shortages as an errno, whatever the resource: "No space left on device" may come from a lock, and
"Resource temporarily unavailable" from a process that can't be started.
"""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager

from embodichain_rl.errors import EmbodiChainRLError, ResourceShortageError

__all__ = ["naming_shortage", "shortage_of"]

SHM = "/dev/shm"

_SPACE = (
    f"{SHM} is full (`df -h {SHM}`): Python's locks and semaphores are files there, and so is torch's shared memory. "
    "Free some space, or make it larger: `docker run --shm-size=1g`, or an emptyDir with `medium: Memory` in Kubernetes"
)
_PROCESSES = (
    "no further process or thread may be started. Raise `ulimit -u` (now {RLIMIT_NPROC}), which counts all processes "
    "and threads of the user, or the pids limit of the container (`docker run --pids-limit`)"
)
_MEMORY = (
    "there is not enough memory, or address space. Look at `ulimit -v` (now {RLIMIT_AS}), at the memory limit of the "
    "job or container, and at vm.overcommit_memory. The buffer and its batches need more address space than memory"
)
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EAGAIN: _PROCESSES,
    errno.ENOMEM: _MEMORY,
    errno.EMFILE: "this process can open no more files. Raise `ulimit -n` (now {RLIMIT_NOFILE})",
    errno.ENFILE: "the machine can open no more files. Raise the sysctl fs.file-max",
    errno.EFBIG: "the size of a file is limited to less than a shared block needs. Raise `ulimit -f` (now "
    "{RLIMIT_FSIZE}), which applies to shared memory too",
}

_UNUSABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOSYS, errno.ENOTDIR)

_NO_SERVER = (
    "multiprocessing's fork server, or the process itself, ended while the process was being started. Their output on "
    "stderr may say more"
)


def shortage_of(error: BaseException) -> str | None:
    """Return what was short, as part of a sentence, if an exception or one of its causes reports a shortage.

    Args:
        error: the exception that was raised where a process, a thread, a lock or shared memory was created.

    Returns:
        None if the exception has another reason.

    Example:
        >>> shortage_of(OSError(24, "Too many open files")).partition(". ")[0]
        'this process can open no more files'
        >>> shortage_of(ValueError("a negative length")) is None
        True
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ResourceShortageError):
            return str(seen.strerror)
        number = errno_of(seen)
        if number in _REMEDIES:
            return _REMEDIES[number].format_map(_Limits())
        if number in _UNUSABLE and not _directory_exists():
            return "the working directory of this process does not exist any more. Create it again, or start elsewhere"
        if number in _UNUSABLE and not os.access(SHM, os.W_OK):
            return (
                f"{SHM} can't be written ({os.strerror(number or 0)}): Python's locks and semaphores are files there. "
                f"Mount a tmpfs at {SHM} that is writable (`docker run --tmpfs {SHM}` or `--shm-size`)"
            )
        if isinstance(seen, EOFError | ConnectionError):
            return _NO_SERVER
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None


def errno_of(error: BaseException) -> int | None:
    """Return the number of the error of the operating system that an exception reports; None if it reports none."""
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if not isinstance(error, RuntimeError) or isinstance(error, EmbodiChainRLError):
        return None
    text = str(error)
    if "can't start new thread" in text:
        return errno.EAGAIN
    if "can't allocate memory" in text or "not enough memory" in text:
        return errno.ENOMEM
    number = re.search(r": [A-Z][^:()\n]+ \((\d+)\)\s*$", text.splitlines()[0] if text else "")  # torch's
    return int(number[1]) if number else None


@contextmanager
def naming_shortage(what: str) -> Iterator[None]:
    """Name the resource that was short, if the ``with`` block fails for lack of one.

    Args:
        what: what the block does, as the subject of a sentence.

    Raises:
        ResourceShortageError: in place of the exception that reports the shortage, which is its cause.
    """
    try:
        yield
    except ResourceShortageError:
        raise
    except (OSError, MemoryError, RuntimeError, EOFError) as error:
        shortage = None if isinstance(error, EmbodiChainRLError) else shortage_of(error)
        if shortage is None:
            raise
        message = f"{what} failed, because {shortage}. ({type(error).__name__}: {error})"
        raise ResourceShortageError(errno_of(error) or errno.EIO, message) from error


class _Limits(dict[str, str]):
    """The limits of this process, by the names of their constants."""

    def __missing__(self, name: str) -> str:
        soft, _ = resource.getrlimit(getattr(resource, name))
        return "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,}"


def _directory_exists() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True
