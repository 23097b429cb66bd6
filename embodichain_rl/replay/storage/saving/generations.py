"""Folders that take each other's place: the new one is written beside the one that counts, which goes last."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from embodichain_rl.errors import CheckpointError
from embodichain_rl.shared import own_process, process_is_alive

__all__ = ["NewFolder", "checked_name", "new_folder"]


class NewFolder(NamedTuple):
    """A folder that is being written."""

    path: Path
    """The folder."""
    alone: bool
    """Whether no other process writes one in the same place, so that what is there stays."""


@contextmanager
def new_folder(path: Path, kind: str, noted_in: str) -> Iterator[NewFolder]:
    """Make a new folder in ``path``. The caller writes to it, and then notes durably that it counts.

    At the end of the block, other folders of this kind are removed, but for those that are noted. If the block raises,
    the new one is. If several processes write at the same time, only the first one removes folders.

    Args:
        path: where to make it; made if it does not exist.
        kind: first part of its name.
        noted_in: the file in ``path`` that says which folder counts.
    """
    path.mkdir(parents=True, exist_ok=True)
    pid, start = own_process()
    new = path / f"{kind}-{pid}-{start}-{os.urandom(4).hex()}"
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        alone = _locked(lock)
        earlier = [*path.glob(f"{kind}-*")]
        noted = (path / noted_in).read_bytes() if (path / noted_in).exists() else b""
        new.mkdir()
        try:
            yield NewFolder(new, alone)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        if alone:
            now = (path / noted_in).read_bytes()
            for folder in earlier:
                name = folder.name.encode()
                if name not in now and (name in noted or not _is_being_written(folder)):
                    shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _locked(fd: int) -> bool:
    """Lock a directory until it is closed; return False if another process has locked it, or there are no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_being_written(folder: Path) -> bool:
    """Return whether another living process may be writing to the folder."""
    parts = folder.name.split("-")
    if len(parts) != 4 or not all(part.isdigit() for part in parts[1:3]):
        return True  # not one of ours
    pid, start = int(parts[1]), int(parts[2])
    return (pid, start) != own_process() and process_is_alive(pid, start)


def checked_name(name: Any, kind: str) -> str:
    """Return the name of a folder that a checkpoint names; "." for None, as in those of earlier versions.

    Raises:
        CheckpointError: if it is no name of such a folder.
    """
    if name is None:
        return "."
    if not isinstance(name, str) or not re.fullmatch(rf"{kind}-\d+-\d+-[0-9a-f]{{8}}", name):
        raise CheckpointError(f"The checkpoint names the folder {name!r}, which is not one of its own.")
    return name
