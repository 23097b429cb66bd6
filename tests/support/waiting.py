"""Waits until a condition holds that another thread or process makes true, instead of sleeping for a guessed time."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

PATIENCE = 300.0
"""Seconds after which a wait counts as hung.

No wait of a passing test comes near it, even where many busy processes share a core. The timeout of a whole test, in
``pyproject.toml``, is longer, so that the wait can report what did not come.
"""

PATIENCE_WITH_SCRIPTS = 2 * PATIENCE
"""The same for a program that imports everything, starts processes that do too, works, and draws figures."""

LONGEST_PAUSE = 0.02


def wait_until(
    condition: Callable[[], Any], what: str | Callable[[], str] = "it", *, timeout: float = PATIENCE
) -> None:
    """Poll until ``condition()`` holds.

    Args:
        condition: a cheap function that is called often.
        what: what is waited for, for the message; or a function that returns it when the timeout has passed.
        timeout: seconds after which the test fails.
    """
    deadline, pause = time.monotonic() + timeout, 0.0005
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what if isinstance(what, str) else what()} did not come within {timeout:g} s")
        time.sleep(pause)
        pause = min(1.25 * pause, LONGEST_PAUSE)


def wait_for_children() -> None:
    """Wait until all child processes have ended. A process that was killed takes a moment."""
    children = multiprocessing.active_children
    wait_until(lambda: not children(), lambda: f"the end of {children()}")
