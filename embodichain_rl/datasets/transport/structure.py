"""The structure of a batch, as far as it is made of tensors in plain TensorDicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase

from embodichain_rl.replay.schema import Key, Nest, Node, node_of

__all__ = ["Structure", "columns_of", "is_plain", "structure_of"]


class Structure(NamedTuple):
    """The tensors of a batch, and how they are nested."""

    nest: Nest
    """Builds such TensorDicts of any batch size with as many dimensions."""
    leaves: Sequence[torch.Tensor]
    device: torch.device | None
    """The device of all TensorDicts: the CPU, or None where they have none."""


def structure_of(data: TensorDictBase) -> Structure | None:
    """Return the structure of a batch.

    Returns:
        None, if it has anything but tensors in plain TensorDicts: text, a tensorclass, a lazy stack, an empty
        TensorDict, another device than the CPU, names of its own dimensions, a lock.
    """
    device = data.device
    if device is not None and device.type != "cpu":
        return None
    keys: list[Key] = []
    leaves: list[torch.Tensor] = []
    nodes: list[Node] = []
    if not _walk(data, (), (data.batch_dims, device), keys, leaves, nodes):
        return None
    return Structure(Nest(keys, nodes), leaves, device)


def _walk(
    data: Any,
    key: Key,
    of_root: tuple[int, torch.device | None],
    keys: list[Key],
    leaves: list[torch.Tensor],
    nodes: list[Node],
) -> bool:
    batch_dims, device = of_root
    if type(data) is not TensorDict or data._device != device or data._is_locked or not data._tensordict:
        return False
    if data._td_dim_names is not None and any(data._td_dim_names[:batch_dims]):
        return False
    if key and (node := node_of(key, data, batch_dims)) is not None:
        nodes.append(node)
    for name, value in data._tensordict.items():
        if type(value) is torch.Tensor:
            keys.append((*key, name))
            leaves.append(value)
        elif not _walk(value, (*key, name), of_root, keys, leaves, nodes):
            return False
    return True


def columns_of(items: Sequence[TensorDictBase]) -> tuple[Structure, list[list[torch.Tensor]]] | None:
    """Return the structure of the first of several items, which all have, and for each of its tensors those of all.

    Returns:
        None, if one has anything but tensors in plain TensorDicts, or they differ in structure or batch sizes.
    """
    first = structure_of(items[0]) if type(items[0]) is TensorDict else None
    if first is None:
        return None
    columns = [[leaf] for leaf in first.leaves]
    for item in items[1:]:
        leaves: list[torch.Tensor] = []
        if not _gather_alike(item, items[0], leaves):
            return None
        for column, leaf in zip(columns, leaves, strict=True):
            column.append(leaf)
    return first, columns


def _gather_alike(data: Any, like: Any, leaves: list[torch.Tensor]) -> bool:
    if type(data) is not TensorDict or data._batch_size != like._batch_size or data._device != like._device:
        return False
    if data._td_dim_names != like._td_dim_names or data._tensordict.keys() != like._tensordict.keys():
        return False
    for name, part in like._tensordict.items():
        value = data._tensordict[name]
        if type(part) is torch.Tensor:
            if type(value) is not torch.Tensor:
                return False
            leaves.append(value)
        elif not _gather_alike(value, part, leaves):
            return False
    return True


def is_plain(tensor: object) -> bool:
    """Return whether something is an ordinary tensor on the CPU, which its memory, shape and strides describe."""
    return (
        type(tensor) is torch.Tensor
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.requires_grad
        and not tensor.is_nested
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
    )
