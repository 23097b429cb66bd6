"""Transforms of batches, after which the index is still there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.envs.transforms import Transform

from embodichain_rl.replay.sampling import PRIORITY_WEIGHT
from embodichain_rl.replay.schema import Key

__all__ = ["Collate", "pinned", "transformed"]


class Collate(Transform):
    """The function of a batch that TorchRL's buffers call ``collate_fn``, as the first transform.

    Args:
        function: takes and returns a batch.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, tensordict: TensorDictBase) -> Any:
        """Return what the function returns for a batch."""
        return self.function(tensordict)


def transformed(transform: Any, data: TensorDictBase, index_key: Key) -> Any:
    """Return a batch as a transform returns it, with its index and its importance weights.

    A transform that leaves these out, such as ``SelectTransform``, does not lose them: TorchRL adds them after the
    transforms. They stay as a transform left them if it kept them, or if it returns something else than a TensorDict.

    Args:
        transform: the transforms of a buffer.
        data: the batch.
        index_key: where it has the trajectory id and the step of each of its steps.
    """
    kept = {key: value for key in (index_key, (PRIORITY_WEIGHT,)) if (value := data.get(key, None)) is not None}
    shape = data.batch_size
    result = transform(data)
    if not isinstance(result, TensorDictBase):
        return result
    missing = {key: value for key, value in kept.items() if result.get(key, None) is None}
    if not missing:
        return result
    was_locked = result.is_locked
    if was_locked:
        result.unlock_()
    for key, value in missing.items():
        fitting = _fitting(value, shape, result.batch_size)
        if fitting is not None:
            result.set(key, fitting)
    if was_locked:
        result.lock_()
    return result


def pinned(data: Any) -> Any:
    """Return a batch in pinned memory, if it has memory."""
    return data.pin_memory() if hasattr(data, "pin_memory") else data


def _fitting(value: torch.Tensor, shape: torch.Size, wanted: torch.Size) -> torch.Tensor | None:
    """Return an entry of a batch of some shape for one of another; None where the steps are not the same."""
    if value.shape[: len(wanted)] == wanted:
        return value
    if len(wanted) == 1 and wanted[0] == math.prod(shape):  # flattened
        return value.reshape(-1, *value.shape[len(shape) :])
    return None
