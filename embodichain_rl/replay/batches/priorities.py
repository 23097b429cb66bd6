"""The priorities in a batch that was sampled: of which trajectories they are."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase

from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.replay.schema import INDEX, ORIGIN_KEYS, Key

__all__ = ["priorities_in"]


def priorities_in(data: TensorDictBase, priority_key: NestedKey, index_key: Key) -> tuple[Any, Any]:
    """Return the index and the priorities in a batch, as :meth:`ChunkSampler.update_priority` takes them.

    Args:
        data: a batch, or some of it, also of the batch of an ensemble.
        priority_key: where the priorities are.
        index_key: where samples have the pair of trajectory id and step.

    Raises:
        InvalidArgumentError: when one of the keys is missing, or the batch is of several buffers.
    """
    index, priority = data.get("index", None), data.get(priority_key, None)
    of_ensemble = isinstance(index, TensorDictBase) and "buffer_ids" in index.keys()  # noqa: SIM118
    if index_key != INDEX and not of_ensemble:  # "index" is a column of the user
        origin = [data.get(key, None) for key in ORIGIN_KEYS]
        index = None if any(part is None for part in origin) else torch.stack(origin, dim=-1)
    if index is None or priority is None:
        raise InvalidArgumentError(
            f"Got a batch with the keys {sorted(map(str, data.keys()))}; to set priorities it takes 'index', as it "
            f"was sampled (or 'trajectory', where 'index' is a column of yours), and {priority_key!r}."
        )
    if of_ensemble:
        if len(index["buffer_ids"].unique()) > 1:
            raise InvalidArgumentError(
                "Got a batch of several buffers; give each buffer its own part, such as batch[0] where "
                'batch["index", "buffer_ids"][0] is 0.'
            )
        index = index["index"]
    if index.ndim == 1:  # a single step
        return index[None], priority.reshape(-1).amax()
    return index, priority
