"""How code that ``torch.compile`` traces calls what can't be traced."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["graph_break"]

Function = TypeVar("Function", bound=Callable[..., Any])


def graph_break(function: Function) -> Function:
    """Have ``torch.compile`` call a function between two graphs, as it is, instead of tracing it.

    The buffer is shared memory that other processes write while it is read, behind locks and system calls: none of that
    is an operation of a graph. With ``fullgraph=True`` such a call is an error of torch, which names the function. From
    torch 2.8 on it also names the reason.

    Example:
        >>> @graph_break
        ... def read(words):
        ...     return words.tolist()
        >>> read(torch.arange(2))
        [0, 1]
    """
    name = function.__qualname__
    reason = (
        f"{name} reads or writes memory that processes share, which is no part of a graph. Call it outside of the "
        "function that is compiled with fullgraph=True, and pass the batch in; or compile with fullgraph=False."
    )
    disable: Any = torch.compiler.disable
    takes_reason = "reason" in inspect.signature(disable).parameters  # since torch 2.8
    disabled: Function = disable(function, reason=reason) if takes_reason else disable(function)
    return disabled
