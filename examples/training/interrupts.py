"""Ctrl-C at a moment that all can stand."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Raises KeyboardInterrupt behind the block, or the function that it decorates, and not within.

    TorchRL's losses put their weights into a module with a `with` over a TensorDict, and that, in tensordict 0.14,
    turns a KeyboardInterrupt into a RuntimeError about its own truth value.
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
