"""Delay of Ctrl-C to a safe moment."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Raise KeyboardInterrupt after the block or the decorated function, not inside it.

    TorchRL's losses load their weights into a module with a `with` over a TensorDict. In tensordict 0.14, this turns a
    KeyboardInterrupt into a RuntimeError about the truth value of a TensorDict.
    """
    pressed = False

    def note(*_: object) -> None:
        nonlocal pressed
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
