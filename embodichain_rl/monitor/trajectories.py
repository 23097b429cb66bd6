"""What there is to see in a trajectory: images, curves, segments and texts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDictBase, is_tensor_collection

from embodichain_rl.replay.storage import TrajectoryStorage

__all__ = ["curves_of", "images_of", "segments_of", "texts_of", "without_padding"]

MASK = ("collector", "mask")
MOST_NUMBERS = 32
"""Numbers a step up to which an entry is drawn as curves."""

TEXTS = ("task", "instruction", "language_instruction")

UNSEEN = (
    "trajectory",
    "collector",
    "index",
    "terminated",
    "truncated",
    "done",
    "segment_id",
    "is_init",
    "policy_version",
    "step_count",
    *TEXTS,
)
"""Parts of keys that are about the order of the steps, not about what happened."""


def without_padding(td: TensorDictBase) -> TensorDictBase:
    """Return the real steps of a chunk ``[T]``."""
    mask = td.get(MASK, None)
    return td if mask is None else td[mask.reshape(len(td), -1)[:, 0]]


def images_of(td: TensorDictBase) -> dict[str, np.ndarray]:
    """Return the images of a trajectory by name, ``uint8`` ``[T, H, W, 3]``; next observations are left out.

    An image is ``uint8`` or float (0 to 1), ``[T, H, W, 1 or 3 or 4]`` or ``[T, 1 or 3, H, W]``.
    """
    found = {}
    for name, value in _tensors(td):
        if name.startswith("next.") or value.ndim != 4 or value.shape[0] == 0:
            continue
        if value.shape[-1] not in (1, 3, 4) and value.shape[1] in (1, 3):
            value = value.permute(0, 2, 3, 1)
        if value.shape[-1] not in (1, 3, 4) or min(value.shape[1:3]) < 4:
            continue
        if value.dtype.is_floating_point:
            value = (value.float().clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
        if value.dtype == torch.uint8:
            array = value.cpu().numpy()[..., :3]
            found[name] = np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array
    return found


def curves_of(td: TensorDictBase, keys: Sequence[Any] | None = None) -> dict[str, np.ndarray]:
    """Return the numbers of a trajectory by name, ``float64`` ``[T, n]``: actions first, then rewards and observations.

    Args:
        td: the trajectory.
        keys: which ones; None for those that have at most 32 numbers a step.
    """
    wanted = None if keys is None else [key if isinstance(key, str) else ".".join(key) for key in keys]
    found = {}
    for name, value in _tensors(td):
        parts = name.split(".")
        numbers = value.reshape(len(td), -1) if len(td) else value.reshape(0, 1)
        if wanted is not None:
            if name not in wanted:
                continue
        elif (
            numbers.shape[1] > MOST_NUMBERS
            or value.dtype.is_complex
            or parts[0] in UNSEEN
            or parts[-1] in UNSEEN
            or (parts[0] == "next" and parts[-1] not in ("reward", "success"))
        ):
            continue
        found[name] = numbers.double().cpu().numpy()
    return dict(sorted(found.items(), key=_order))


def _order(item: tuple[str, Any]) -> tuple[int, str]:
    name = item[0]
    return (0 if "action" in name else 1 if "reward" in name else 2 if "success" in name else 3), name


def segments_of(td: TensorDictBase) -> list[tuple[int, int, int]]:
    """Return the segments of a trajectory: first step, end, exclusive, and ``"segment_id"``; none without that key."""
    value = td.get("segment_id", None)
    if not isinstance(value, torch.Tensor) or not len(td):
        return []
    ids = value.reshape(len(td), -1)[:, 0].cpu().numpy()
    edges = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)]
    return [(begin, end, int(ids[begin])) for begin, end in itertools.pairwise(edges)]


def texts_of(td: TensorDictBase, storage: TrajectoryStorage | None = None) -> dict[str, str]:
    """Return the texts of a trajectory by name: those of its first step.

    Args:
        td: the trajectory, with texts, or with ids of texts.
        storage: what it is from, to look ids up; None: ids are left out.
    """
    schema = None if storage is None else storage.schema
    of_text = set() if schema is None else {field.key for field in schema.all_fields if field.is_text}
    found = {}
    for key in td.keys(True, True, is_leaf=_is_leaf):
        path = (key,) if isinstance(key, str) else key
        value = td.get(key)
        if isinstance(value, (NonTensorData, NonTensorStack)):
            first: Any = value.tolist()
            while isinstance(first, list) and first:
                first = first[0]
            if isinstance(first, str):
                found[".".join(path)] = first
        elif storage is not None and path in of_text and value.numel():
            found[".".join(path)] = storage.texts.resolve(int(value.reshape(-1)[0]))
    return found


def _is_leaf(kind: type) -> bool:
    return issubclass(kind, (NonTensorData, NonTensorStack)) or not is_tensor_collection(kind)


def _tensors(td: TensorDictBase) -> list[tuple[str, torch.Tensor]]:
    found = []
    for key in td.keys(True, True):
        value = td.get(key)
        if isinstance(value, torch.Tensor):
            found.append((key if isinstance(key, str) else ".".join(key), value))
    return found
