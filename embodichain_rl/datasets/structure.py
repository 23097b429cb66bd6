"""The structure of a batch, as far as it is made of tensors in plain TensorDicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from tensordict import TensorDict

from embodichain_rl.replay.schema import Key, Nest, Node, node_of

__all__ = ["Structure", "structure_of"]


class Structure(NamedTuple):
    """The tensors of a batch, and how they are nested."""

    nest: Nest
    """Builds such TensorDicts. Batch sizes are relative to the given number of dimensions."""
    leaves: Sequence[torch.Tensor]


def structure_of(data: TensorDict) -> Structure | None:
    """Return the structure of a batch.

    Returns:
        None, if it has anything but tensors in plain TensorDicts: text, a tensorclass, a lazy stack, an empty
        TensorDict, a device, names of its own dimensions, a lock.
    """
    keys: list[Key] = []
    leaves: list[torch.Tensor] = []
    nodes: list[Node] = []
    if not _walk(data, (), data.batch_dims, keys, leaves, nodes):
        return None
    return Structure(Nest(keys, nodes), leaves)


def _walk(
    data: TensorDict, key: Key, batch_dims: int, keys: list[Key], leaves: list[torch.Tensor], nodes: list[Node]
) -> bool:
    if type(data) is not TensorDict or data._device is not None or data._is_locked or not data._tensordict:
        return False
    if data._td_dim_names is not None and any(data._td_dim_names[:batch_dims]):
        return False
    if key and (node := node_of(key, data, batch_dims)) is not None:
        nodes.append(node)
    for name, value in data._tensordict.items():
        if type(value) is torch.Tensor:
            keys.append((*key, name))
            leaves.append(value)
        elif not isinstance(value, TensorDict) or not _walk(value, (*key, name), batch_dims, keys, leaves, nodes):
            return False
    return True
