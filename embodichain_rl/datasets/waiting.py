"""Waiting for data: a draw that is repeated until the buffer holds what it needs."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable
from typing import Any, TypeVar

from torch.utils.data import get_worker_info

from embodichain_rl._checks import checked_float
from embodichain_rl.errors import (
    ChunkTooLongError,
    DataTimeoutError,
    EmptyBufferError,
    InvalidArgumentError,
    NothingToDrawError,
    OwnerGoneError,
)
from embodichain_rl.shared import Deadline

__all__ = ["checked_wait", "wait_for"]

NOT_YET = (EmptyBufferError, ChunkTooLongError, NothingToDrawError)
"""The errors of draws that later data can satisfy."""

FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.05
"""Seconds between two draws; the pause doubles."""

Drawn = TypeVar("Drawn")


def checked_wait(wait: Any) -> float | None:
    """Return the argument ``wait`` in seconds; None for datasets that do not wait.

    Raises:
        InvalidArgumentError: when it is neither None nor a number that is not negative.
    """
    if wait is None or (isinstance(wait, float) and wait == math.inf):
        return wait
    try:
        return checked_float("wait", wait, minimum=0.0)
    except InvalidArgumentError:
        raise InvalidArgumentError(
            f"Got wait={wait!r}; it must be a number of seconds of at least 0, float('inf'), or None."
        ) from None


def wait_for(draw: Callable[[], Drawn], wait: float | None) -> Drawn:
    """Return the result of ``draw``, which is called again while the buffer does not hold enough for it.

    Args:
        draw: raises one of ``NOT_YET`` then.
        wait: the longest time to wait, in seconds; None: the first error is raised.

    Raises:
        DataTimeoutError: the time is up. Its cause is the last error.
        OwnerGoneError: the process that iterates over the ``DataLoader`` of this worker has ended.
    """
    if wait is None:
        return draw()
    deadline: Deadline | None = None
    pause = FIRST_PAUSE
    while True:
        try:
            return draw()
        except NOT_YET as error:
            deadline = deadline or Deadline(wait)
            left = deadline.left()
            if left <= 0.0:
                raise DataTimeoutError(
                    f"Waited {wait:g} s for data in vain: {error} Raise wait, or see why no data comes."
                ) from error
        _check_parent()
        time.sleep(min(pause, left))
        pause = min(2 * pause, LONGEST_PAUSE)


def _check_parent() -> None:
    parent = multiprocessing.parent_process()
    if get_worker_info() is not None and parent is not None and not parent.is_alive():
        raise OwnerGoneError(f"Process {parent.pid}, which iterates over the DataLoader of this worker, has ended.")
