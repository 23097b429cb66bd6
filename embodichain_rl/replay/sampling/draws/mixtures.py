"""Which groups a batch consists of: the names of groups in a storage, and draws among them by their weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from embodichain_rl.errors import NothingToDrawError, SchemaMismatchError
from embodichain_rl.replay.sampling.random_streams import RandomSource, random_numbers
from embodichain_rl.replay.schema import Key, StepField
from embodichain_rl.replay.storage import TrajectoryReader

__all__ = ["draw_groups", "group_field", "mixture_drawn"]


def group_field(
    storage: TrajectoryReader, key: Key, mixture: Mapping[int | str, float] | None, *, of_steps: bool
) -> StepField:
    """Return the field whose values are the groups.

    Args:
        storage: where the groups are.
        key: the key of the field. ``("trajectory", *key)`` is found too, unless ``of_steps``.
        mixture: the weights of groups, whose names must be of the field's kind; None: any.
        of_steps: whether the groups are those of single steps.

    Raises:
        SchemaMismatchError: when there is no such field, or it can't be a group.
    """
    schema = storage.arena.schema
    fields = {field.key: field for field in (schema.fields if of_steps else schema.all_fields)}
    field = fields.get(key) or fields.get(("trajectory", *key))
    if field is None:
        raise SchemaMismatchError(
            f"Got weights by the groups of {key}, but {'each step' if of_steps else 'what is stored'} has the keys "
            f"{[*fields]}."
        )
    if field.dtype.is_floating_point or field.dtype.is_complex or torch.Size(field.shape).numel() != 1:
        raise SchemaMismatchError(
            f"Got weights by the groups of {key}, which has {field.shape} elements of {field.dtype} a step; "
            "needed is one integer, or text."
        )
    if mixture is not None and field.is_text != isinstance(next(iter(mixture)), str):
        raise SchemaMismatchError(
            f"Got a mixture of the groups {[*mixture]} of {key}, which are "
            f"{'text' if field.is_text else 'integers'} where they are stored."
        )
    return field


def draw_groups(
    storage: TrajectoryReader,
    field: StepField,
    mixture: Mapping[int | str, float] | None,
    sizes: Mapping[int, int],
    count: int,
    generator: RandomSource,
    drawn: Counter[int | str],
    *,
    unit: str,
) -> np.ndarray | None:
    """Draw groups by their weights.

    Args:
        storage: where the groups are.
        field: the field whose values they are.
        mixture: the weight of each group, by its name; None: all that are there, equally often.
        sizes: how much there is of each group, by its value; not empty groups only.
        count: the number of draws.
        generator: for the random numbers.
        drawn: counts the draws of each group, by its name.
        unit: what a group consists of, for messages.

    Returns:
        The value of the drawn groups, ``int64`` ``[count]``; None if there is no group.

    Raises:
        NothingToDrawError: when a group of the mixture is not there.
    """
    names: dict[int, int | str] = {
        group: storage.texts.resolve(group) if field.is_text else group for group in sorted(sizes)
    }
    there = {name: group for group, name in names.items()}
    weights = mixture or dict.fromkeys(there, 1.0)
    missing = [name for name in weights if name not in there]
    if missing:
        raise NothingToDrawError(
            f"Got a mixture of the groups {[*weights]} of {field.key}, but there is no {unit} of {missing}: what is "
            f"there, by group, is { {names[group]: size for group, size in sizes.items()} }. Wait for each group, or "
            "leave those out that do not come."
        )
    if not weights:
        return None
    groups = np.array([there[name] for name in weights])
    sums = np.cumsum([*weights.values()])
    which = np.searchsorted(sums, random_numbers(count, generator) * sums[-1], side="right")
    chosen = groups[np.minimum(which, len(groups) - 1)]
    for group, times in zip(*np.unique(chosen, return_counts=True), strict=True):
        drawn[names[int(group)]] += int(times)
    return chosen


def mixture_drawn(counts: Iterable[Counter[int | str]]) -> dict[str, Any]:
    """Return ``mixture``, the share of the draws that each group had, 0 to 1."""
    total: Counter[int | str] = Counter()
    for each in counts:
        total.update(each)
    return {"mixture": {group: times / total.total() for group, times in total.items()}}
