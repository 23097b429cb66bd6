"""An object that a worker unpickles only if it is asked for."""

from __future__ import annotations

import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any

__all__ = ["Held", "Unread"]


class Held:
    """Holds an object; see :meth:`unread`.

    Args:
        value: the object.
    """

    def __init__(self, value: Any) -> None:
        self._value = value
        self._content: bytes | None = None

    @property
    def value(self) -> Any:
        """The object."""
        if self._content is not None:
            self._value, self._content = pickle.loads(self._content), None
        return self._value

    def unread(self) -> Unread:
        """Return the same for a process that is being started, which unpickles the object when it is first asked for.

        Its class, and all that this imports, is not loaded there before.
        """
        return Unread(self.value)

    @classmethod
    def _received(cls, content: bytes) -> Held:
        held = cls(None)
        held._content = content
        return held

    def __getstate__(self) -> dict[str, Any]:
        # Shared memory is pickled for one process: what has not been unpickled here is, to go on to another one.
        return {"_value": self.value, "_content": None}


class Unread:
    """A :class:`Held` on its way to a process that is being started.

    Args:
        value: the object.
    """

    def __init__(self, value: Any) -> None:
        self._value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return Held._received, (bytes(ForkingPickler.dumps(self._value)),)
