"""Takes an exception, with its traceback, from one process to another."""

from __future__ import annotations

import pickle
import traceback

import cloudpickle

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
        pickled = cloudpickle.dumps(error)
        pickle.loads(pickled)  # some exceptions can be pickled, but not read back
    except Exception:
        pickled = None
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
    error: BaseException | None = None
    if pickled is not None:
        try:
            error = pickle.loads(pickled)
        except Exception:  # the class lives in a module that only the other process can import
            error = None
    if not isinstance(error, BaseException):
        error = RemoteError(summary)
    error.add_note(f"The traceback in {where}:\n{text.rstrip()}")
    return error
