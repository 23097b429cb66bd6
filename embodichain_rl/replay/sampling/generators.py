"""The random numbers of what is done with a batch after it was drawn, such as by a transform.

Whoever draws a batch with a generator of its own names it around the transforms of that batch. So what they draw is
reproducible as the batch is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

__all__ = ["current_generator", "drawing_with"]

_generator: ContextVar[torch.Generator | Callable[[], torch.Generator] | None] = ContextVar("generator", default=None)


@contextmanager
def drawing_with(generator: torch.Generator | Callable[[], torch.Generator] | None) -> Iterator[None]:
    """Have transforms that this thread calls within the block draw from ``generator``; None changes nothing.

    Args:
        generator: the generator; or a function that returns it, which is called when the first of them draws.

    Example:
        >>> generator = torch.Generator()
        >>> with drawing_with(generator):
        ...     current_generator(None) is generator
        True
    """
    if generator is None:
        yield
        return
    token = _generator.set(generator)
    try:
        yield
    finally:
        _generator.reset(token)


def current_generator(default: torch.Generator | None) -> torch.Generator | None:
    """Return the generator of the innermost :func:`drawing_with`, ``default`` outside of any."""
    generator = _generator.get()
    if generator is None:
        return default
    if not isinstance(generator, torch.Generator):
        generator = generator()
        _generator.set(generator)
    return generator
