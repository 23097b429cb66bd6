"""The storage of a buffer: the one that was given, or one that is made with the buffer's limits."""

from __future__ import annotations

from typing import Any

from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.replay.storage import TrajectoryStorage

__all__ = ["storage_for"]


def storage_for(storage: Any, max_trajectories: int | None, device: Any, **options: Any) -> Any:
    """Return ``storage``, or a storage with these options if it is None.

    Args:
        storage: the storage that was given, of any type; it is not checked.
        max_trajectories: the largest number of trajectories.
        device: the device, of which a given storage has its own.
        options: the other arguments of :class:`TrajectoryStorage`; None, False and empty ones were not given.

    Raises:
        InvalidArgumentError: for a storage and options, for neither, and for options that can't work.
    """
    given = {
        name: value
        for name, value in options.items()
        if value is not None and value is not False and not (isinstance(value, tuple) and not value)
    }
    if storage is None:
        if max_trajectories is None or not {"max_total_steps", "max_bytes"} & set(given):
            raise InvalidArgumentError(
                "Give max_trajectories and max_total_steps, or a storage. Or give max_bytes in place of "
                "max_total_steps."
            )
        return TrajectoryStorage(max_trajectories, device=device, **given)
    if given or max_trajectories is not None:
        both = [*(["max_trajectories"] if max_trajectories is not None else []), *given]
        raise InvalidArgumentError(
            f"Got a storage and {', '.join(both)}: the storage has its own. Give one of the two."
        )
    return storage
