"""Marks of the first step of each chunk, at which recurrent modules reset their state."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase

from embodichain_rl.errors import SchemaMismatchError
from embodichain_rl.replay.schema import Key, key_name

__all__ = ["mark_starts"]


def mark_starts(data: TensorDictBase, key: Key, mask: torch.Tensor | None = None) -> None:
    """Let ``key`` be True at the first step of each chunk, besides the steps at which it is True already.

    Args:
        data: chunks ``[B, L]``; changed in place.
        key: ``bool`` ``[B, L, 1]``, or of the shape that is stored.
        mask: the real steps, ``bool`` ``[B, L]``, of which the first is marked; None: the first of all steps is.

    Raises:
        SchemaMismatchError: when something else than ``bool`` is stored under the key.
    """
    stored = data.get(key, None)
    if stored is None:
        marked = torch.zeros(*data.batch_size, 1, dtype=torch.bool, device=data.device)
    elif isinstance(stored, torch.Tensor) and stored.dtype == torch.bool:
        marked = stored.clone()
    else:
        got = getattr(stored, "dtype", type(stored).__name__)
        raise SchemaMismatchError(
            f"Got init_key={key_name(key)}, but {got} is stored there; it must be torch.bool. Name another key."
        )
    if mask is None:
        marked[:, :1] = True
    else:
        marked[torch.arange(len(mask), device=mask.device), mask.long().argmax(dim=1)] = True
    data.set(key, marked)
