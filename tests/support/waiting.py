"""Waits for what another thread or process brings about: until it is so, not for a time in which it should be."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

PATIENCE = 300.0
"""Seconds after which anything that is waited for counts as hung.

Nothing that is well comes near it, not even where many busy processes share a core; nor must anything take this long
when all is well. The limit of a whole test, in ``pyproject.toml``, is above it, so that a wait says what did not come.
"""

PATIENCE_WITH_SCRIPTS = 2 * PATIENCE
"""The same for a program that imports everything, starts processes that do so too, works, and draws pictures."""

LONGEST_PAUSE = 0.02


def wait_until(
    condition: Callable[[], Any], what: str | Callable[[], str] = "it", *, timeout: float = PATIENCE
) -> None:
    """Polls until ``condition()`` holds.

    Args:
        condition: looked at often; cheap.
        what: what is waited for, or a function that says it at the time when it has not come.
        timeout: seconds after which the test fails.
    """
    deadline, pause = time.monotonic() + timeout, 0.0005
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what if isinstance(what, str) else what()} did not come within {timeout:g} s")
        time.sleep(pause)
        pause = min(1.25 * pause, LONGEST_PAUSE)


def wait_for_children() -> None:
    """Waits until every process that this one has started is gone: one that was killed takes a moment to be."""
    children = multiprocessing.active_children
    wait_until(lambda: not children(), lambda: f"the end of {children()}")
