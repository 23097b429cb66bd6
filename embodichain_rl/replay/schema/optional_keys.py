"""Optional keys: entries that only some trajectories have, such as a wrist camera that not every robot has.

The steps of a trajectory without such an entry are stored with zeros there. Which trajectories have it is a trajectory
value, ``("trajectory", "has", key)``: so samples, windows, checkpoints and devices need nothing of their own for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey

from embodichain_rl._checks import checked_key
from embodichain_rl.errors import InvalidArgumentError, SchemaMismatchError
from embodichain_rl.replay.schema.blobs import Blobs
from embodichain_rl.replay.schema.nest import Key, key_name
from embodichain_rl.replay.schema.origin_entries import TRAJECTORY
from embodichain_rl.replay.schema.ragged import RaggedLeaf

__all__ = ["OptionalKeys", "presence_key", "presence_key_of"]

Kind = tuple[tuple[int, ...], torch.dtype, bool]
"""The shape of a step, its dtype, and whether it is text."""


class OptionalKeys:
    """The keys that a trajectory may have or not.

    A key stands for all entries under it, and for its next values, ``("next", *key)``: a trajectory has all of them, or
    none.

    Args:
        keys: the keys; or a mapping from keys to an example of a step, a tensor ``[*shape]``, which is needed where
            the first data that is written does not have them.

    Raises:
        InvalidArgumentError: when they are something else.
    """

    def __init__(self, keys: Iterable[NestedKey] | Mapping[NestedKey, torch.Tensor]) -> None:
        if isinstance(keys, str) or not isinstance(keys, Iterable):
            raise InvalidArgumentError(f"Got optional_keys={keys!r}; it must be a list of keys.")
        self.given = keys if isinstance(keys, Mapping) else list(keys)
        """The keys as they were given."""
        examples: dict[Key, Any] = {checked_key(key): None for key in self.given}
        if isinstance(keys, Mapping):
            examples = {checked_key(key): value for key, value in keys.items()}
            wrong = [key for key, value in examples.items() if not isinstance(value, torch.Tensor)]
            if wrong:
                raise InvalidArgumentError(f"Got optional_keys whose examples of a step are no tensors: {wrong}.")
        self.keys = [key for key in examples if not (key[0] == "next" and key[1:] in examples)]
        self._examples = {
            key: (tuple(value.shape), value.dtype, False) for key, value in examples.items() if value is not None
        }
        reserved = [key for key in self.keys if key[0] in (TRAJECTORY, "collector")]
        if reserved:
            raise InvalidArgumentError(f"Got optional_keys={reserved}; only keys of steps can be optional.")

    def filler(self, stored: Mapping[Key, Kind] | None) -> Any:
        """Return the function that completes entries of steps: see :meth:`fill`, without its last argument."""
        return partial(self.fill, stored=stored)

    def fill(
        self,
        entries: MutableMapping[Key, Any],
        shape: torch.Size,
        others: Sequence[Mapping[Key, Any]] = (),
        *,
        stored: Mapping[Key, Kind] | None,
    ) -> None:
        """Add zeros for the optional keys that some entries lack, and whether they have them.

        Args:
            entries: of steps, by key.
            shape: their batch size.
            others: entries of other steps with as many batch dimensions.
            stored: what is stored at each key; None as long as nothing is.

        Raises:
            SchemaMismatchError: when a key is missing whose shape is not known.
        """
        for key in self.keys:
            flag = presence_key(key)
            there = any(_is_under(entry, key) for entry in entries)
            if not there:
                known = self._known(key, others, len(shape), stored)
                if not known:
                    raise SchemaMismatchError(
                        f"Got data without the optional key {key_name(key)}, whose shape is not known yet. Write data "
                        "that has it first, call storage.allocate(step) with a step that has it, or give an example of "
                        f"a step: optional_keys={{{key_name(key)}: torch.zeros(shape)}}."
                    )
                device = next((v.device for v in entries.values() if isinstance(v, torch.Tensor)), None)
                for name, (of_step, dtype, is_text) in known.items():
                    size = (*shape, *of_step)
                    if of_step[:1] == (-1,):
                        entries[name] = RaggedLeaf(Blobs.empty(shape), of_step[1:], dtype)
                        continue
                    entries[name] = (
                        np.full(size, "", dtype=object) if is_text else torch.zeros(size, dtype=dtype, device=device)
                    )
            if flag not in entries:
                entries[flag] = torch.full(shape, there)

    def _known(
        self, key: Key, others: Sequence[Mapping[Key, Any]], batch_dims: int, stored: Mapping[Key, Kind] | None
    ) -> dict[Key, Kind]:
        """Return what is known of the entries under a key."""
        if stored is not None:
            return {name: kind for name, kind in stored.items() if _is_under(name, key)}
        for entries in others:
            found: dict[Key, Kind] = {}
            for name, value in entries.items():
                if _is_under(name, key):
                    is_text = isinstance(value, np.ndarray)
                    dtype = torch.int32 if is_text else value.dtype
                    found[name] = (tuple(value.shape[batch_dims:]), dtype, is_text)
            if found:
                return found
        return {name: kind for name, kind in self._examples.items() if _is_under(name, key)}


def presence_key(key: Key) -> Key:
    """Return where the buffer stores whether a trajectory has an optional key."""
    return (TRAJECTORY, "has", *key)


def presence_key_of(key: Key, trajectory_keys: Iterable[Key]) -> Key | None:
    """Return where it is stored whether a trajectory has ``key``; None if every trajectory has it."""
    names = {*trajectory_keys}
    root = key[1:] if key[0] == "next" else key
    for whole in (key, root):
        for length in range(1, len(whole) + 1):
            if presence_key(whole[:length]) in names:
                return presence_key(whole[:length])
    return None


def _is_under(name: Key, key: Key) -> bool:
    return name[: len(key)] == key or (name[0] == "next" and name[1 : 1 + len(key)] == key)
