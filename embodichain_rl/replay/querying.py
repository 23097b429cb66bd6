"""Queries: the live trajectories that meet a condition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tensordict import NestedKey, TensorDictBase
from torchrl.data.replay_buffers.query import Trajectory, _expand_required_keys, _minimal_transform_plan

from embodichain_rl.replay.storage import TrajectoryStorage, read_each

__all__ = ["query_trajectories"]


def query_trajectories(
    storage: TrajectoryStorage, transforms: Sequence[Any], predicate: Callable[[Trajectory], bool] | None
) -> list[Trajectory]:
    """Return the live trajectories that meet a condition, transformed, oldest first.

    A condition that is built from ``torchrl.data.traj`` names the keys that it reads. Then only the transforms that can
    change these are applied to trajectories that do not meet it. Other conditions are given transformed trajectories.

    Args:
        storage: the storage.
        transforms: applied in order.
        predicate: the condition; None: all trajectories meet it.
    """
    plan = _plan(transforms, predicate)
    found = []
    for whole in read_each(storage.view) if storage.initialized else ():
        if plan is not None and predicate is not None:
            needed, keys = plan
            seen = whole.copy() if keys is None else whole.select(*keys, strict=False)
            if not predicate(_trajectory(seen, needed)):
                continue
        result = _trajectory(whole, transforms)
        if plan is not None or predicate is None or predicate(result):
            found.append(result)
    return found


def _plan(
    transforms: Sequence[Any], predicate: Callable[[Trajectory], bool] | None
) -> tuple[list[Any], set[NestedKey] | None] | None:
    """Return the transforms and the keys that a condition needs (None: all); None if it does not tell, or needs all."""
    required_keys = getattr(predicate, "required_keys", None)
    required = required_keys() if callable(required_keys) else None
    if required is None:
        return None
    needed, keys = _minimal_transform_plan(list(transforms), _expand_required_keys(required))
    return None if keys is None and len(needed) == len(transforms) else (needed, keys)


def _trajectory(data: TensorDictBase, transforms: Sequence[Any]) -> Trajectory:
    for transform in transforms:
        data = transform(data)
    return Trajectory(data=data, batch_size=data.batch_size)
