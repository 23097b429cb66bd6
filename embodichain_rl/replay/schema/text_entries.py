"""Text in TensorDicts: strings as entries, and the ids of a :class:`TextTable` in their place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, NonTensorData, NonTensorStack, TensorDictBase

from embodichain_rl.replay.schema.texts import TextTable

__all__ = ["as_non_tensor", "resolve_texts", "text_array"]


def text_array(value: Any) -> np.ndarray | None:
    """Return the strings of a ``NonTensorData`` or ``NonTensorStack``, an array of objects of its batch size.

    Return None when it holds something other than strings.
    """
    if isinstance(value, NonTensorStack):
        parts = [text_array(part) for part in value.tensordicts]
        if any(part is None for part in parts):
            return None
        return np.stack(parts, axis=value.stack_dim) if parts else None  # type: ignore[arg-type]
    text = getattr(value, "data", None)
    if not isinstance(text, str):
        return None
    return np.full(tuple(value.batch_size), str.__str__(text), dtype=object)


def as_non_tensor(texts: Any, device: torch.device | None = None) -> NonTensorData | NonTensorStack:
    """Return a string, or nested lists of strings, as an entry of a TensorDict.

    Args:
        texts: the string or the lists.
        device: the device of the TensorDict. One on another device copies each string when the entry is set.

    Example:
        >>> as_non_tensor([["lift", "lift"], ["push", "lift"]]).tolist()
        [['lift', 'lift'], ['push', 'lift']]
    """
    made: dict[str, NonTensorData] = {}

    def entry(part: Any) -> NonTensorData | NonTensorStack:
        if isinstance(part, list):
            return NonTensorStack(*map(entry, part))
        # One object per string, wherever it occurs: creating the objects is most of the work.
        if part not in made:
            made[part] = NonTensorData(part, device=device)
        return made[part]

    return entry(texts)


def resolve_texts(data: TensorDictBase, keys: Iterable[NestedKey], texts: TextTable) -> TensorDictBase:
    """Replace the ids at ``keys`` by their strings, in place; return the data."""
    for key in keys:
        data.set(key, as_non_tensor(texts.resolve(data.get(key)), data.device))
    return data
