"""The entries that buffers add to their samples, told from the columns of a user by what they contain.

A sample of a buffer of trajectories has the id and the step of each of its rows: ``("trajectory", "id")`` and
``("trajectory", "step")``, and the pair of both, ``int64`` ``[..., 2]``, under ``"index"``. Where the data has a column
``"index"`` of its own, the pair is under ``("trajectory", "index")``. TorchRL's buffers write positions to ``"index"``.
None of these entries is stored. A column of the user that has one of these names is stored, or refused by name:

* ``("trajectory", "id")`` and ``("trajectory", "step")`` are of a buffer if the pair beside them says the same, or if
  they name steps that are live in the buffer that is written to. Otherwise they are refused, because the buffer writes
  its own ids there.
* ``"index"`` is a position if it is a pair ``int64`` ``[..., 2]``; or one ``int64`` per step that mostly counts up and
  jumps back, as in a batch of slices. Otherwise it is a column, such as LeRobot's. It is also a column if
  ``"episode_index"`` or ``"frame_index"`` is beside it, or if the storage has such a column already. A storage that was
  allocated without such a column takes any ``int64`` per step for a position.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch

from embodichain_rl.errors import SchemaMismatchError
from embodichain_rl.replay.schema.arrays import as_array
from embodichain_rl.replay.schema.nest import Key, key_name

__all__ = ["INDEX", "MASK", "ORIGIN_KEYS", "PAIR", "TRAJECTORY", "IsLive", "is_reserved", "take_origin"]

MASK: Key = ("collector", "mask")
"""The mask of a padded batch: True where a step is real."""

TRAJECTORY = "trajectory"
"""Entries below this key belong to the trajectory, not to the step."""

ORIGIN_KEYS = ((TRAJECTORY, "id"), (TRAJECTORY, "step"))
"""The trajectory id and the step of each row of a sample."""

INDEX: Key = ("index",)
"""The pair of both; or a position in a buffer of TorchRL; or a column of the user."""

PAIR: Key = (TRAJECTORY, "index")
"""The pair of both, where ``"index"`` is a column of the user."""

ROUTED = ("index", "index"), ("index", "buffer_ids")
"""The index in a batch of TorchRL's ensemble of buffers."""

BESIDE_FRAMES: tuple[Key, ...] = (("episode_index",), ("frame_index",))
"""Columns of LeRobot's frames, whose ``"index"`` numbers the frames of a dataset."""

IsLive = Callable[[torch.Tensor, torch.Tensor], bool]
"""Returns whether all trajectory ids and steps name live steps of the buffer that is written to."""


def take_origin(
    entries: MutableMapping[Key, Any], shape: torch.Size, stored: Container[Key] | None, is_live: IsLive | None
) -> dict[Key, torch.Tensor]:
    """Remove from some entries what a buffer added to them, and return it.

    Args:
        entries: of steps, by key.
        shape: their batch size.
        stored: the keys of the storage that they are written to; None as long as it has none.
        is_live: checks ids and steps against that storage; None without a storage.

    Returns:
        The ids and steps of a sample; else the ``"index"`` if its jumps say where steps do not follow one another. It
        may be a column nevertheless.

    Raises:
        SchemaMismatchError: when a column of the user has a name at which the buffer writes ids or steps.
    """
    origin: dict[Key, torch.Tensor] = {}
    if any(key in entries for key in ORIGIN_KEYS):
        pairs = _confirming(entries, shape)
        if not pairs and not _name_live_steps(entries, shape, is_live):
            _refuse_ids(entries, shape)
        origin = {key: entries.pop(key) for key in ORIGIN_KEYS}
        for key in pairs:
            del entries[key]
    if all(key in entries for key in ROUTED):
        for key in ROUTED:
            del entries[key]
    index = entries.get(INDEX)
    if index is None or (stored is not None and INDEX in stored) or any(key in entries for key in BESIDE_FRAMES):
        return origin
    if not isinstance(index, torch.Tensor) or index.dtype != torch.int64:
        return origin
    is_pair = index.shape == (*shape, 2)
    if not is_pair and index.shape not in (shape, (*shape, 1)):
        return origin
    jumps_back, mostly_counts = (False, False) if is_pair else _moves(index.reshape(shape), entries.get(MASK))
    if is_pair or stored is not None or (jumps_back and mostly_counts):
        del entries[INDEX]
    if is_pair or jumps_back or mostly_counts:
        origin.setdefault(INDEX, index)
    return origin


def _confirming(entries: Mapping[Key, Any], shape: torch.Size) -> list[Key]:
    """Return the keys of the pairs that equal the ids and steps of some entries."""
    ids, steps = (entries.get(key) for key in ORIGIN_KEYS)
    if not (_is_number_per_step(ids, shape) and _is_number_per_step(steps, shape)):
        return []
    assert isinstance(ids, torch.Tensor), "checked"
    assert isinstance(steps, torch.Tensor), "checked"
    confirming = []
    for key in (INDEX, PAIR, ROUTED[0]):
        pair = entries.get(key)
        if isinstance(pair, torch.Tensor) and pair.dtype == torch.int64 and pair.shape == (*shape, 2):
            flat = pair.reshape(-1, 2)
            if torch.equal(flat[:, 0], ids.reshape(-1)) and torch.equal(flat[:, 1], steps.reshape(-1)):
                confirming.append(key)
    return confirming


def _is_number_per_step(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.int64 and value.numel() == shape.numel()


def _name_live_steps(entries: Mapping[Key, Any], shape: torch.Size, is_live: IsLive | None) -> bool:
    ids, steps = (entries.get(key) for key in ORIGIN_KEYS)
    if is_live is None or not (_is_number_per_step(ids, shape) and _is_number_per_step(steps, shape)):
        return False
    assert isinstance(ids, torch.Tensor), "checked"
    assert isinstance(steps, torch.Tensor), "checked"
    mask = entries.get(MASK)
    if isinstance(mask, torch.Tensor) and mask.numel() == shape.numel():
        real = mask.reshape(-1).bool()
        return is_live(ids.reshape(-1)[real], steps.reshape(-1)[real])
    return is_live(ids.reshape(-1), steps.reshape(-1))


def _refuse_ids(entries: Mapping[Key, Any], shape: torch.Size) -> None:
    keys = [key for key in ORIGIN_KEYS if key in entries]
    got = [
        f"{key_name(key)} of {list(value.shape) if isinstance(value := entries[key], torch.Tensor) else 'text'}"
        for key in keys
    ]
    raise SchemaMismatchError(
        f"Got {' and '.join(got)} in data of batch size {list(shape)}, but that is where the buffer writes the "
        "trajectory and the step of each sampled row, one integer for each step: a column of your own can't be kept "
        "there. Rename it. If the data is a sample of another buffer, leave its 'index', [..., 2], beside them: it "
        "shows where they come from."
    )


def _moves(index: torch.Tensor, mask: Any) -> tuple[bool, bool]:
    """Return whether numbers, one per step, jump back within a row, and whether they mostly count up by one."""
    if not index.ndim or index.shape[-1] < 2:
        return False, False
    moved = np.diff(as_array(index), axis=-1)
    if isinstance(mask, torch.Tensor) and mask.shape == index.shape:
        real = as_array(mask)
        moved = moved[real[..., 1:] & real[..., :-1]]
    counts = np.count_nonzero(moved == 1)
    return bool((moved < 0).any()) and bool((moved > 0).any()), bool(2 * counts >= moved.size > 0)


def is_reserved(key: Key) -> bool:
    """Return whether the buffer itself writes the origin of a step under ``key``."""
    return key[0] == TRAJECTORY and (len(key) == 1 or key[:2] in ORIGIN_KEYS)
