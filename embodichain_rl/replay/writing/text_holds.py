"""The texts of what is being written, kept in their table until it is published."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

from embodichain_rl.replay.schema import TextTable
from embodichain_rl.replay.writing.pending import PendingSteps

__all__ = ["TextsHeld"]


class TextsHeld:
    """A context in which data with text is written: the texts of it, and of what is pending, stay in the table.

    Several threads may be in it. The hold ends when none is, and nothing is pending. It ends with this object, too.

    Args:
        texts: returns the table.
        pending: the unfinished trajectories of the writer.
    """

    def __init__(self, texts: Callable[[], TextTable], pending: PendingSteps) -> None:
        self._texts_of, self._pending = texts, pending
        self._lock = threading.Lock()
        self._threads = 0
        self._hold: int | None = None
        self._since = 0
        self._finalizer: Any = None

    def __enter__(self) -> None:
        texts = self._texts_of()
        with self._lock:
            self._threads += 1
            if self._hold is None:
                self._hold = texts.hold()
                self._since = texts.generation
                self._finalizer = weakref.finalize(self, _release, texts, self._hold, os.getpid())
                self._finalizer.atexit = False
            self._pending.texts_since = texts.generation

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._threads -= 1
        self.settle()

    def settle(self) -> None:
        """Hold no more than what is pending needs."""
        with self._lock:
            if self._threads or self._hold is None:
                return
            texts = self._texts_of()
            since = self._pending.oldest_texts
            if since is not None:
                if since > self._since:
                    texts.advance(self._hold, since)
                    self._since = since
                return
            self._finalizer.detach()
            texts.release(self._hold)
            self._hold = self._finalizer = None


def _release(texts: TextTable, hold: int, owner: int) -> None:
    if os.getpid() == owner:
        texts.release(hold)
