"""The storage that a buffer or an engine is over."""

from __future__ import annotations

from typing import Any

from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.replay.storage.storage import TrajectoryStorage

__all__ = ["storage_of"]


def storage_of(source: Any, user: str) -> TrajectoryStorage:
    """Return the storage of a buffer or an engine, or the storage itself.

    Args:
        source: one of them.
        user: what needs it, for the message.

    Raises:
        InvalidArgumentError: when it is something else.
    """
    for candidate in (source, getattr(source, "storage", None), getattr(source, "replay_buffer", None)):
        found = getattr(candidate, "storage", candidate)
        if isinstance(found, TrajectoryStorage):
            return found
    raise InvalidArgumentError(
        f"Got {source!r}; {user} needs the TrajectoryStorage that batches come from, or a buffer or engine over one."
    )
