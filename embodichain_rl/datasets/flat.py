"""Plain dicts with flat keys, for training loops that know no TensorDict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, is_leaf_nontensor

from embodichain_rl.errors import InvalidArgumentError, SchemaMismatchError
from embodichain_rl.replay.schema import MASK, as_non_tensor

__all__ = ["flat_dict", "length_of", "nested_chunk"]


def flat_dict(data: TensorDictBase) -> dict[str, Any]:
    """Return the entries of a TensorDict as a plain dict with flat keys, named as LeRobot names them.

    Args:
        data: an item or a batch of a dataset.

    Returns:
        The entry at ``("next", "reward")`` is ``"next.reward"``, and so on. Tensors are the same objects, and text is a
        string or a list of strings. Batch sizes, names of dimensions and tensorclasses are not kept.

    Raises:
        SchemaMismatchError: when two entries would have one name, such as ``("next", "done")`` and ``"next.done"``.

    Example:
        >>> data = TensorDict({"action": torch.zeros(4, 2), "next": {"reward": torch.zeros(4, 1)}}, [4])
        >>> {key: value.shape for key, value in flat_dict(data).items()}
        {'action': torch.Size([4, 2]), 'next.reward': torch.Size([4, 1])}
    """
    flat: dict[str, Any] = {}
    for key in data.keys(True, True, is_leaf_nontensor):
        name = key if isinstance(key, str) else ".".join(key)
        if name in flat:
            raise SchemaMismatchError(
                f"Got two entries that a flat dict names {name!r}: {name!r} itself and {tuple(name.split('.'))}. "
                "Rename one of them, or leave out as_dict=True."
            )
        value = data.get(key)
        flat[name] = value if isinstance(value, torch.Tensor) else value.tolist()
    return flat


def length_of(value: Any) -> int | None:
    """Return the number of steps of an entry of a flat item; None where it has one value for the whole item."""
    if isinstance(value, torch.Tensor):
        return len(value) if value.ndim else None
    return len(value) if isinstance(value, list) else None


def nested_chunk(item: Mapping[str, Any]) -> TensorDict:
    """Return a chunk that is a flat dict as a TensorDict ``[L]``, whose keys are the flat ones, but for the mask.

    Args:
        item: tensors ``[L, *shape]``, and text as lists of ``L`` strings.

    Raises:
        InvalidArgumentError: when its entries have different lengths, or one is neither a tensor nor text.
    """
    lengths = {length for value in item.values() if (length := length_of(value)) is not None}
    if len(lengths) != 1:
        raise InvalidArgumentError(
            f"Got an item whose entries have the lengths {sorted(lengths)}; chunks of unequal length are padded only "
            "if all their entries have one value a step."
        )
    chunk = TensorDict(batch_size=[*lengths])
    for name, value in item.items():
        key = MASK if name == ".".join(MASK) else name
        chunk.set(key, as_non_tensor(value) if isinstance(value, list) else value)
    return chunk
