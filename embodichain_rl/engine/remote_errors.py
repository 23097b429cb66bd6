"""Takes an exception, with its traceback, from one process to another."""

from __future__ import annotations

import pickle
import traceback

from embodichain_rl.errors import RemoteError

__all__ = ["pack_exception", "unpack_exception"]


def pack_exception(error: BaseException) -> bytes:
    """Put an exception and its traceback into bytes that :func:`unpack_exception` reads in any process.

    Example:
        >>> try:
        ...     {}["reward"]
        ... except KeyError as error:
        ...     packed = pack_exception(error)
        >>> unpack_exception(packed, where="worker 3")
        KeyError('reward')
    """
    text = "".join(traceback.format_exception(error))
    try:
        pickled = pickle.dumps(error)
    except Exception:
        pickled = b""
    return pickle.dumps((pickled, f"{type(error).__qualname__}: {error}", text))


def unpack_exception(packed: bytes, *, where: str) -> BaseException:
    """Restore the exception that :func:`pack_exception` put into bytes.

    Args:
        packed: what :func:`pack_exception` returned.
        where: the place it comes from, for the note.

    Returns:
        The exception, with the traceback of the other process as a note; a :class:`RemoteError` with the same message
        where the exception itself can't be pickled, or its class can't be imported here.
    """
    pickled, summary, text = pickle.loads(packed)
    try:
        error = pickle.loads(pickled)
    except Exception:  # it could not be pickled, can't be read back, or only the other process can import its class
        error = RemoteError(summary)
    error.add_note(f"The traceback in {where}:\n{text.rstrip()}")
    return error
