"""Progress bars: in place on a terminal, a widget in a notebook, a line every ten seconds in a log file."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from typing import Any

__all__ = ["LOG_EVERY", "in_notebook", "is_in_place", "progress_bar"]

LOG_EVERY = 10.0
"""Seconds between two lines in a log file."""


class _Lines:
    """A stream in which each state of a bar is a line, instead of being written over the one before."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        line = text.replace("\r", "").rstrip()
        if line:
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(iterable: Iterable[Any] | None = None, *, shown: bool = True, **options: Any) -> Any:
    """Return a bar of tqdm on stderr.

    Args:
        iterable: what is iterated over; None: the caller calls ``update``.
        shown: whether there is a bar at all.
        options: other arguments of ``tqdm``, such as ``total``, ``desc`` and ``unit``.
    """
    shown = shown and sys.stderr is not None  # it is None if the stream is closed
    if shown and not is_in_place():
        options |= {"file": _Lines(sys.stderr), "mininterval": LOG_EVERY, "maxinterval": LOG_EVERY, "miniters": 1}
        options |= {"ascii": True, "delay": LOG_EVERY}
    kind: Any = importlib.import_module("tqdm.auto" if shown and in_notebook() else "tqdm").tqdm
    return kind(iterable, disable=not shown, **options)


def is_in_place() -> bool:
    """Return whether what is shown on stderr can be replaced: on a terminal, and in a notebook."""
    return in_notebook() or sys.stderr.isatty()


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    shell = sys.modules.get("IPython")
    running = None if shell is None else shell.get_ipython()
    return running is not None and type(running).__name__ == "ZMQInteractiveShell"
