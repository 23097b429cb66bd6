"""Validation of arguments, with the same wording of errors in every public function."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np

from embodichain_rl.errors import InvalidArgumentError

__all__ = [
    "checked_bool",
    "checked_compact",
    "checked_float",
    "checked_int",
    "checked_key",
    "keywords_of",
    "refuse_other_keywords",
    "unexpected_keyword",
]


def _requirement(kind: str, minimum: float | None, maximum: float | None) -> str:
    if minimum is not None and maximum is not None:
        return f"{kind} from {minimum} to {maximum}"
    if minimum is not None:
        return f"{kind} of at least {minimum}"
    if maximum is not None:
        return f"{kind} of at most {maximum}"
    return kind


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


def checked_bool(name: str, value: Any) -> bool:
    """Return ``value``, which must be True or False.

    Raises:
        InvalidArgumentError: ``value`` is something else.
    """
    if not isinstance(value, bool):
        raise InvalidArgumentError(f"{name} must be True or False, got {value!r}.")
    return value


def checked_int(name: str, value: Any, *, minimum: int | None = None, maximum: int | None = None) -> int:
    """Return ``value`` as a Python int, or raise an error.

    NumPy integers are accepted. Booleans and floats are not, even if a float has an integral value.

    Args:
        name: the name of the argument, as in the signature of the public function.
        value: the value of the argument.
        minimum: the smallest allowed value. None means no lower bound.
        maximum: the largest allowed value. None means no upper bound.

    Raises:
        InvalidArgumentError: ``value`` is not an integer, or lies outside the bounds.

    Example:
        >>> checked_int("batch_size", 32, minimum=1)
        32
    """
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
        raise InvalidArgumentError(f"{name} must be {_requirement('an integer', minimum, maximum)}, got {value!r}.")
    return int(value)


def checked_float(name: str, value: Any, *, minimum: float | None = None, maximum: float | None = None) -> float:
    """Return ``value`` as a Python float, or raise an error.

    Integers and NumPy numbers are accepted. Booleans, strings, NaN and infinities are not.

    Args:
        name: the name of the argument, as in the signature of the public function.
        value: the value of the argument.
        minimum: the smallest allowed value. None means no lower bound.
        maximum: the largest allowed value. None means no upper bound.

    Raises:
        InvalidArgumentError: ``value`` is not a finite number, or lies outside the bounds.

    Example:
        >>> checked_float("timeout", 5, minimum=0.0)
        5.0
    """
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if (
        not number
        or not _is_finite(value)
        or (minimum is not None and value < minimum)
        or (maximum is not None and value > maximum)
    ):
        raise InvalidArgumentError(
            f"{name} must be {_requirement('a finite number', minimum, maximum)}, got {value!r}."
        )
    return float(value)


def checked_compact(value: Any) -> bool | Literal["views"]:
    """Return the argument ``compact`` of a storage if it is True, False or ``"views"``, else raise.

    Raises:
        InvalidArgumentError: when it is something else.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value == "views":
        return "views"
    raise InvalidArgumentError(f"Got compact={value!r}; it must be True, False or 'views'.")


def checked_key(key: Any) -> tuple[str, ...]:
    """Return a key of a TensorDict as a tuple of strings, or raise an error.

    Args:
        key: a string or a tuple of strings.

    Raises:
        InvalidArgumentError: ``key`` is neither.

    Example:
        >>> checked_key("observation"), checked_key(("next", "reward"))
        (('observation',), ('next', 'reward'))
    """
    parts = (key,) if isinstance(key, str) else key
    if not isinstance(parts, tuple) or not parts or not all(isinstance(part, str) for part in parts):
        raise InvalidArgumentError(f"Got {key!r} as a key; it must be a string or a tuple of strings.")
    return parts


def unexpected_keyword(owner: str, name: str, names: Iterable[str]) -> TypeError:
    """Return the error for a keyword argument that is not taken; it suggests the name that is most like it.

    Args:
        owner: the class or function that was called.
        name: the keyword.
        names: those that it takes.
    """
    close = difflib.get_close_matches(name, [*names], n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return TypeError(f"{owner} got an unexpected keyword argument {name!r}.{hint}")


def keywords_of(*functions: Callable[..., Any]) -> list[str]:
    """Return the names of the parameters of some functions or methods, without ``self``, ``*args`` and ``**kwargs``."""
    return [
        name
        for function in functions
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def refuse_other_keywords(owner: str, given: Iterable[str], names: Iterable[str]) -> None:
    """Refuse keyword arguments that are none of some names, where Python would name a function inside.

    Args:
        owner: the class or function that was called.
        given: the keywords that it got.
        names: those that it takes.

    Raises:
        TypeError: for a keyword that it does not take.
    """
    names = [*names]
    for name in given:
        if name not in names:
            raise unexpected_keyword(owner, name, names)
