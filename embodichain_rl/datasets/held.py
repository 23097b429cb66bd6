"""An object that a worker unpickles only if it is asked for."""

from __future__ import annotations

import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any

__all__ = ["Held"]


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

    def unread(self) -> Held:
        """Return the same for a process that is being started, which unpickles the object when it is first asked for.

        Its class, and all that this imports, is not loaded there before.
        """
        held = Held(None)
        held._content = bytes(ForkingPickler.dumps(self.value))
        return held

    def __getstate__(self) -> dict[str, Any]:
        # Shared memory is pickled for one process: what was not unpickled yet is, to go on to another one.
        if self._content is not None and not self._is_new:
            return {"_value": self.value, "_content": None}
        return {"_value": self._value, "_content": self._content}
