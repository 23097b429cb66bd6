"""Where a batch comes from: the steps of which trajectory stand in it, as the buffer that it was sampled from wrote.

Every batch of a :class:`~embodichain_rl.TrajectoryReplayBuffer` carries the trajectory id and the step number of each
of its rows. A writer that is handed such a batch cuts it into the pieces that the trajectories were cut into.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from tensordict import TensorDictBase

from embodichain_rl.errors import SchemaMismatchError
from embodichain_rl.replay.schema import Key, as_array

__all__ = ["PRIORITY_WEIGHT", "Origin", "origin_of", "refuse_windows"]

PRIORITY_WEIGHT: Key = ("priority_weight",)
"""Where samplers write the importance weight of a step, which belongs to the batch and not to the step."""

PADDED = "_is_pad"
"""How the keys end that say which steps of a window are padding."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a batch says of the order of its steps.

    Attributes:
        breaks: ``bool`` ``[B, T - 1]``: True where step ``i + 1`` of a row does not follow step ``i``.
        sampled: whether the batch was sampled from a buffer of trajectories. If not, it has positions in another
            buffer only, and a gap between them is a hint.
    """

    breaks: np.ndarray
    sampled: bool


def origin_of(data: TensorDictBase, shape: torch.Size) -> Origin | None:
    """Return what data says of the order of its steps; None where it says nothing.

    ``("trajectory", "id")`` and ``("trajectory", "step")`` are read, and where both are missing ``"index"``.

    Args:
        data: steps.
        shape: their batch size, ``[T]`` or ``[B, T]``.

    Raises:
        SchemaMismatchError: when one of the entries is no number for each step.

    Example:
        >>> data = TensorDict({"trajectory": {"id": torch.tensor([7, 7, 7]), "step": torch.tensor([1, 2, 5])}}, [3])
        >>> origin_of(data, data.shape).breaks
        array([[False,  True]])
    """
    keys = data.keys()
    if "trajectory" not in keys and "index" not in keys:
        return None
    of_trajectory, index = data.get("trajectory", None), data.get("index", None)
    ids = steps = None
    if isinstance(of_trajectory, TensorDictBase):
        ids, steps = of_trajectory.get("id", None), of_trajectory.get("step", None)
    if ids is not None or steps is not None:
        return Origin(_breaks(_numbers("id", ids, shape), _numbers("step", steps, shape), shape), sampled=True)
    if not isinstance(index, torch.Tensor) or index.is_floating_point():
        return None
    if index.shape == (*shape, 2):
        return Origin(_breaks_of_pairs(as_array(index).reshape(-1, shape[-1], 2)), sampled=True)
    if index.numel() == shape.numel():
        positions = as_array(index).reshape(-1, shape[-1])
        moved = np.diff(positions, axis=1)
        return Origin((moved != 0) & (moved != 1), sampled=False)
    return None


def _numbers(name: str, values: object, shape: torch.Size) -> np.ndarray | None:
    if values is None:
        return None
    if not isinstance(values, torch.Tensor) or values.numel() != shape.numel():
        got = list(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise SchemaMismatchError(
            f"Got ('trajectory', {name!r}) of {got} in data of batch size {list(shape)}, but that is where a buffer "
            "writes which trajectory and which step of it a sample is: one integer for each step. Rename it."
        )
    return as_array(values).reshape(-1, shape[-1])


def _breaks(ids: np.ndarray | None, steps: np.ndarray | None, shape: torch.Size) -> np.ndarray:
    rows = shape.numel() // shape[-1]
    breaks = np.zeros((rows, shape[-1] - 1), dtype=bool)
    if ids is not None:
        breaks |= ids[:, 1:] != ids[:, :-1]
    if steps is not None:
        breaks |= steps[:, 1:] != steps[:, :-1] + 1
    return breaks


def _breaks_of_pairs(pairs: np.ndarray) -> np.ndarray:
    """Return the breaks of an index ``[B, T, 2]``: of neighbours one number differs by one, and the other does not.

    The buffers of this library write the step last, TorchRL's buffers of two dimensions write the time first.
    """
    moved = np.diff(pairs, axis=1)
    follows = [(moved[..., step] == 1) & (moved[..., 1 - step] == 0) for step in (1, 0)]
    return ~max(follows, key=np.count_nonzero)


def refuse_windows(keys: Iterable[Key]) -> None:
    """Refuse a batch of windows, whose rows are not steps.

    Args:
        keys: of a batch that was sampled from a buffer.

    Raises:
        SchemaMismatchError: when it has windows.
    """
    windows = [key for key in keys if key[-1].endswith(PADDED)]
    if windows:
        key = (*windows[0][:-1], windows[0][-1].removesuffix(PADDED))
        raise SchemaMismatchError(
            f"Got a batch of windows, by {windows[0]}: of {key} it has several steps in each row, and these are not a "
            "trajectory. Sample chunks from the other buffer to write them here: ChunkSampler(chunk_size), without "
            "windows or delta_timestamps."
        )
