"""Ragged values as jagged tensors, in place of padded ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.envs.transforms import Transform

from embodichain_rl._checks import checked_key
from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.replay.schema import key_name, lengths_key

__all__ = ["JaggedBatches", "jagged"]


def jagged(batch: TensorDictBase, key: NestedKey) -> torch.Tensor:
    """Return the ragged values of a batch as one jagged tensor, ``[n, j, *element]``.

    Args:
        batch: a batch of any shape, or a trajectory; ``n`` is the number of its elements, in the order of
            ``batch.reshape(-1)``.
        key: a ragged key.

    Raises:
        InvalidArgumentError: when the key is not ragged.

    Example:
        >>> from embodichain_rl.transforms import jagged
        >>> rb = TrajectoryReplayBuffer(max_trajectories=9, max_total_steps=99, chunk_size=2, ragged=["points"])
        >>> points = torch.nested.nested_tensor([torch.ones(1, 3), torch.ones(4, 3)], layout=torch.jagged)
        >>> done = torch.tensor([[0], [1]]).bool()
        >>> _ = rb.extend(TensorDict({"points": points, "next": {"done": done}}, [2]))
        >>> values = jagged(rb.sample(8), "points")
        >>> values.layout, values.size(0), [len(value) for value in values.unbind()[:2]]
        (torch.jagged, 16, [1, 4])
    """
    name = checked_key(key)
    padded, lengths = batch.get(name, None), batch.get(lengths_key(name), None)
    if padded is None or lengths is None or padded.is_nested:
        raise InvalidArgumentError(
            f"Got the key {key!r}; needed are padded values there and their lengths at {lengths_key(name)}, as a "
            f"buffer hands out ragged keys. The batch has {sorted(map(str, batch.keys(True, True)))}."
        )
    counts = lengths.reshape(-1)
    values = padded.reshape(len(counts), *padded.shape[lengths.ndim :])
    real = torch.arange(values.shape[1], device=values.device) < counts[:, None]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return torch.nested.nested_tensor_from_jagged(values[real], offsets)


class JaggedBatches(Transform):
    """Transform of ragged keys to jagged tensors (``torch.nested``, ``layout=torch.jagged``).

    A jagged tensor has one batch dimension. So chunks ``[B, L]`` become flat batches ``[B * L]``, one chunk after the
    other; with padded chunks, ``("collector", "mask")`` tells the real steps. Batches ``[B]`` stay as they are.

    Args:
        keys: the ragged keys, such as ``["points"]``; ``("next", key)`` is meant with each, if it is there.

    Raises:
        InvalidArgumentError: by a sample without one of the keys, and by one with windows of several steps of a key:
            :func:`jagged` returns those of all windows as one tensor.

    Example:
        >>> from embodichain_rl.transforms import JaggedBatches
        >>> rb = TrajectoryReplayBuffer(
        ...     max_trajectories=9, max_total_steps=99, chunk_size=2, batch_size=8, transform=JaggedBatches(["points"])
        ... )
        >>> points = torch.nested.nested_tensor([torch.ones(1, 3), torch.ones(4, 3)], layout=torch.jagged)
        >>> done = torch.tensor([[0], [1]]).bool()
        >>> _ = rb.extend(TensorDict({"points": points, "next": {"done": done}}, [2]))
        >>> batch = rb.sample()
        >>> batch.shape, batch["points"].layout, batch["points"][1].shape
        (torch.Size([16]), torch.jagged, torch.Size([4, 3]))
    """

    def __init__(self, keys: Iterable[NestedKey]) -> None:
        super().__init__()
        if isinstance(keys, str) or not isinstance(keys, Iterable):
            raise InvalidArgumentError(f"Got keys={keys!r}; needed is a list of keys, such as ['points'].")
        self.keys = [checked_key(key) for key in keys]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        made: dict[Any, torch.Tensor] = {}
        for key in self.keys:
            following = ("next", *key)
            for name in (key, following):
                if name is key or tensordict.get(following, None) is not None:
                    made[name] = jagged(tensordict, name)
                    _refuse_several(tensordict, name, made[name].size(0))
        flat = tensordict.exclude(*made)
        flat = flat if flat.ndim == 1 else flat.reshape(-1)
        for name, value in made.items():
            flat.set(name, value)
        return flat

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        return next_tensordict

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict


def _refuse_several(batch: TensorDictBase, key: tuple[str, ...], values: int) -> None:
    if values != batch.numel():
        raise InvalidArgumentError(
            f"Got {values} values of {key_name(key)} in a batch of {batch.numel()}, as windows of several steps have "
            "them; a jagged tensor has one batch dimension. Ask for one step of the key, or leave it out here and call "
            f"jagged(batch, {key_name(key)}) where they are used."
        )
