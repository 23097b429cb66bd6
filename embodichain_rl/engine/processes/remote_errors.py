"""Transfer of an exception and its traceback from one process to another, as text.

Nothing is unpickled. The class is imported by its name and called with the arguments of the original exception, which
must be numbers and strings.
"""

from __future__ import annotations

import importlib
import json
import traceback
from typing import Any

from embodichain_rl.errors import RemoteError

__all__ = ["pack_exception", "unpack_exception"]


def pack_exception(error: BaseException, *, max_bytes: int | None = None) -> bytes:
    """Serialise an exception and its traceback to bytes that :func:`unpack_exception` reads in any process.

    Args:
        error: the exception.
        max_bytes: the maximum size of the result. If the exception is larger, the beginning of its message and the end
            of its traceback are kept.

    Example:
        >>> try:
        ...     {}["reward"]
        ... except KeyError as error:
        ...     packed = pack_exception(error)
        >>> unpack_exception(packed, where="worker 3")
        KeyError('reward')
    """
    kind = type(error)
    packed = json.dumps(
        {
            "module": kind.__module__,
            "name": kind.__qualname__,
            "args": list(error.args) if all(_is_plain(argument) for argument in error.args) else None,
            "message": str(error),
            "traceback": "".join(traceback.format_exception(error)),
        }
    ).encode()
    if max_bytes is None or len(packed) <= max_bytes:
        return packed
    part = max_bytes // 16  # a character takes six bytes at most, and the traceback repeats the message
    short = RemoteError(f"{kind.__qualname__}: {str(error)[:part]}")
    trace = "".join(traceback.format_exception(error))
    short.add_note(f"The end of its traceback there:\n{trace[-part // 2 :]}")
    return pack_exception(short)


def unpack_exception(packed: bytes, *, where: str) -> BaseException:
    """Restore the exception that :func:`pack_exception` serialised.

    Args:
        packed: the result of :func:`pack_exception`.
        where: the origin of the exception, for the note.

    Returns:
        The exception, with the traceback of the other process as a note. It is a :class:`RemoteError` with the original
        class name and message if the class can't be imported here, or if an argument is not a number or a string.
    """
    content = json.loads(packed)
    error = _restored(content)
    if error is None:
        error = RemoteError(f"{content['name']}: {content['message']}")
    error.add_note(f"The traceback in {where}:\n{content['traceback'].rstrip()}")
    return error


def _is_plain(argument: Any) -> bool:
    return argument is None or type(argument) in (bool, int, float, str)


def _restored(content: dict[str, Any]) -> BaseException | None:
    if content["args"] is None:
        return None
    try:
        kind: Any = importlib.import_module(content["module"])
        for part in content["name"].split("."):
            kind = getattr(kind, part)
        if not issubclass(kind, BaseException):
            return None
        error = kind(*content["args"])
    except Exception:  # importing the module or calling the constructor may fail in any way in this process
        return None
    return error if str(error) == content["message"] else None
