"""An object that a worker unpickles only if it is asked for."""

from __future__ import annotations

import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, TypeVar

__all__ = ["Held"]

Value = TypeVar("Value")


class Held(Generic[Value]):
    """Holds an object; see :meth:`unread`.

    Args:
        value: the object.
    """

    def __init__(self, value: Value) -> None:
        self._value: Value | None = value
        self._content: bytes | None = None

    @property
    def value(self) -> Value:
        """The object."""
        if self._content is not None:
            self._value, self._content = pickle.loads(self._content), None
        value: Any = self._value
        return value

    def unread(self) -> _Unread:
        """Return what to pickle for a process that is being started, so that it unpickles the object at the first use.

        Before that, it does not load the class of the object, nor what this imports.
        """
        return _Unread(self.value)

    def __getstate__(self) -> dict[str, Any]:
        # What has not been unpickled is for this process only: shared memory is pickled for one process.
        return {"_value": self.value, "_content": None}


class _Unread:
    def __init__(self, value: Any) -> None:
        self._value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (bytes(ForkingPickler.dumps(self._value)),)


def _received(content: bytes) -> Held[Any]:
    held: Held[Any] = Held(None)
    held._content = content
    return held
