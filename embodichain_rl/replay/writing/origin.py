"""Where a batch comes from: the steps of which trajectory stand in it, as the buffer that it was sampled from wrote.

Every batch of a :class:`~embodichain_rl.TrajectoryReplayBuffer` carries the trajectory id and the step number of each
of its rows. A writer that is handed such a batch cuts it into the pieces that the trajectories were cut into.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from embodichain_rl.errors import SchemaMismatchError
from embodichain_rl.replay.schema import INDEX, ORIGIN_KEYS, TRAJECTORY, Key, Leaves, as_array

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


def origin_of(entries: Mapping[Key, torch.Tensor], shape: torch.Size) -> Origin | None:
    """Return what data says of the order of its steps; None where it says nothing.

    Args:
        entries: what a buffer added to the data; see :func:`~embodichain_rl.replay.schema.leaves_of`.
        shape: the batch size of the data, ``[T]`` or ``[B, T]``.

    Example:
        >>> entries = {("trajectory", "id"): torch.tensor([7, 7, 7]), ("trajectory", "step"): torch.tensor([1, 2, 5])}
        >>> origin_of(entries, torch.Size([3])).breaks
        array([[False,  True]])
    """
    if not entries:
        return None
    if ORIGIN_KEYS[0] in entries:
        ids, steps = (as_array(entries[key]).reshape(-1, shape[-1]) for key in ORIGIN_KEYS)
        return Origin((ids[:, 1:] != ids[:, :-1]) | (steps[:, 1:] != steps[:, :-1] + 1), sampled=True)
    index = entries[INDEX]
    if index.shape == (*shape, 2):
        return Origin(_breaks_of_pairs(as_array(index).reshape(-1, shape[-1], 2)), sampled=True)
    moved = np.diff(as_array(index).reshape(-1, shape[-1]), axis=1)
    return Origin((moved != 0) & (moved != 1), sampled=False)


def _breaks_of_pairs(pairs: np.ndarray) -> np.ndarray:
    """Return the breaks of an index ``[B, T, 2]``: of neighbours one number differs by one, and the other does not.

    The buffers of this library write the step last, TorchRL's buffers of two dimensions write the time first.
    """
    moved = np.diff(pairs, axis=1)
    follows = [(moved[..., step] == 1) & (moved[..., 1 - step] == 0) for step in (1, 0)]
    return ~max(follows, key=np.count_nonzero)


def refuse_windows(leaves: Leaves, origin: Origin, stored: Container[Key]) -> None:
    """Refuse a batch of windows, whose rows are not steps.

    A stored entry ``"<key>_is_pad"`` is no padding mask: the rows of its batch follow one another.

    Args:
        leaves: the entries of a batch that was sampled from a buffer.
        origin: what it says of the order of its steps.
        stored: the keys of the storage that it is written to.

    Raises:
        SchemaMismatchError: when it has windows.
    """
    for mask in leaves:
        key = mask[1:] if mask[0] == TRAJECTORY else mask
        if not key[-1].endswith(PADDED) or mask in stored:
            continue
        key = (*key[:-1], key[-1].removesuffix(PADDED))
        is_pad, values = leaves[mask], leaves.get(key)
        if values is None or is_pad.ndim <= len(leaves.batch_size) or values.shape[: is_pad.ndim] != is_pad.shape:
            continue
        if origin.breaks.size and 2 * np.count_nonzero(origin.breaks) < origin.breaks.size:
            continue
        raise SchemaMismatchError(
            f"Got a batch of windows, by {mask}: of {key} it has several steps in each row, and these are not a "
            "trajectory. Sample chunks from the other buffer to write them here: ChunkSampler(chunk_size), without "
            "windows or delta_timestamps."
        )
