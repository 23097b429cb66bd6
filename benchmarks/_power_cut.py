"""A model of a disk on which a buffer lies when the power fails: pages are written back at any time, in any order.

What ``fdatasync`` or ``fsync`` has returned for is on the disk. Of all other pages, the disk has the bytes of whichever
moment since: the kernel may have written a page back once, several times or never. A write of one page is whole.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Disk"]

PAGE = 4096


class Disk:
    """The disk under the files of a directory.

    Args:
        folder: the directory of a buffer, made by this process.
        seed: seed of what is written back.
        at_cut: called at moments at which the power may fail, with this disk.
    """

    def __init__(self, folder: Path, seed: int, at_cut: Callable[[Disk], None]) -> None:
        self.folder, self.random, self._at_cut = folder, random.Random(seed), at_cut
        self._files = {file.stat().st_ino: file.name for file in folder.iterdir()}
        self._pages: dict[str, dict[int, bytes]] = {}
        self._sizes: dict[str, int] = {}
        for name in self._files.values():
            self._write_back(name, all_pages=True)
        self._real = os.fdatasync, os.fsync

    def __enter__(self) -> Disk:
        os.fdatasync = os.fsync = self._sync
        return self

    def __exit__(self, *_: Any) -> None:
        os.fdatasync, os.fsync = self._real

    def _sync(self, fd: Any) -> None:
        name = self._files.get(os.fstat(fd).st_ino)
        self.moment()
        if name is not None:
            self._write_back(name, all_pages=True)
        self.moment()

    def moment(self) -> None:
        """Write some pages back, and let the power fail perhaps."""
        for name in self._files.values():
            if self.random.random() < 0.3:
                self._write_back(name, all_pages=False)
        self._at_cut(self)

    def _write_back(self, name: str, *, all_pages: bool) -> None:
        share = 1.0 if all_pages else self.random.choice([0.05, 0.5, 0.95])
        kept = self._pages.setdefault(name, {})
        with open(self.folder / name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if all_pages or self.random.random() < 0.5:
                self._sizes[name] = size
            for offset in _pages_with_data(file.fileno(), size):
                if share == 1.0 or self.random.random() < share:
                    kept[offset] = os.pread(file.fileno(), PAGE, offset)

    def fail(self, target: Path) -> None:
        """Make a directory of what the disk has, as the machine finds it when it starts anew."""
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for name, pages in self._pages.items():
            with open(target / name, "wb") as file:
                for offset, content in pages.items():
                    if any(content):
                        os.pwrite(file.fileno(), content, offset)
                os.ftruncate(file.fileno(), self._sizes[name])
        users = json.loads((target / "users.json").read_text())
        (target / "users.json").write_text(json.dumps({**users, "boot": "before the power failed"}))


def _pages_with_data(fd: int, size: int) -> list[int]:
    found, at = [], 0
    while at < size:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # no data behind it
            break
        at = os.lseek(fd, begin, os.SEEK_HOLE)
        found += range(begin // PAGE * PAGE, at, PAGE)
    return found
