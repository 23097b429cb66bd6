"""The state of a storage, as ``state_dict`` returns it: built from what is live, and checked before it is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from embodichain_rl.errors import CheckpointError
from embodichain_rl.replay.ledger import NO_VERSION
from embodichain_rl.replay.schema import Blobs, Formats, Schema, StepField, TextTable, as_array
from embodichain_rl.replay.storage.policy_versions import version_field, version_of
from embodichain_rl.replay.storage.whole_reads import ReadView, read_live

__all__ = [
    "BLOB_SIZES",
    "IDS",
    "PINNED",
    "POLICY_VERSIONS",
    "PRIORITY_WEIGHTS",
    "SavedTrajectories",
    "described",
    "state_of",
    "with_shapes",
]

PRIORITY_WEIGHTS, POLICY_VERSIONS, IDS, PINNED = "priority_weights", "policy_versions", "ids", "pinned"

BLOB_SIZES = "blob_sizes"
"""By the number of each ragged or compressed field, as a string, the bytes of each value, ``int64`` ``[steps]``."""


def state_of(view: ReadView, texts: TextTable) -> dict[str, Any]:
    """Return the schema, and copies of the live trajectories and of what the ledger records of them.

    See :meth:`TrajectoryStorage.state_dict`.
    """
    with texts.held(all_of_it=True):
        schema, whole = view.arena.schema, read_live(view)
        copies = [value.cpu() for value in (*whole.values, *whole.of_trajectories)]
        values, own_texts = _with_own_texts(schema, copies, texts)
    state: dict[str, Any] = {"schema": schema.to_json(), "values": values, "texts": own_texts}
    for number in schema.blob_numbers:
        values[number], sizes = values[number].packed()  # type: ignore[attr-defined]
        state.setdefault(BLOB_SIZES, {})[str(number)] = sizes
    if len(whole.rows.ids):  # more may have been published since the counters were read
        state["next_id"] = max(view.ledger.next_id, int(whole.rows.ids[-1]) + 1)
    state["lengths"] = torch.from_numpy(whole.rows.lengths)
    state[POLICY_VERSIONS] = whole.rows.policy_versions.tolist()
    ids = whole.rows.ids
    if len(ids) and state["next_id"] - ids[0] != len(ids):
        state[IDS] = ids.tolist()
    pinned = view.ledger.pinned_ids()
    if len(pinned):
        state[PINNED] = np.isin(ids, pinned).tolist()
    weights = view.ledger.live_weights(whole.rows.ids)
    if weights is not None:
        state[PRIORITY_WEIGHTS] = weights.tolist()
    return state


@dataclass(frozen=True)
class SavedTrajectories:
    """The checked content of a ``state_dict`` of a storage.

    Attributes:
        next_id (int): the lowest id that was not given out.
        steps_written (int): the count of written steps.
        schema (Schema | None): the fields; None for a storage that was not allocated.
        lengths (torch.Tensor): ``int64`` ``[n]``, the length of each trajectory, oldest first.
        values (list): one tensor per field, as :meth:`TrajectoryStorage.state_dict` describes them; or blobs.
        texts (numpy.ndarray): strings, ``[k]``; text fields hold indices into it.
        priority_weights (list[float] | None): the positive weight of each trajectory in draws by priority; None if
            there were no priorities, and in checkpoints of earlier versions.
        policy_versions (list[int] | None): the policy version of each trajectory; None in checkpoints of earlier
            versions.
        ids (list[int] | None): the id of each trajectory; None if they end with ``next_id - 1``, without gaps.
        pinned (list[bool] | None): whether each trajectory is pinned; None if none is.
    """

    next_id: int
    steps_written: int
    schema: Schema | None
    lengths: torch.Tensor
    values: list[Any]
    texts: np.ndarray
    priority_weights: list[float] | None = None
    policy_versions: list[int] | None = None
    ids: list[int] | None = None
    pinned: list[bool] | None = None

    @classmethod
    def parse(cls, state: dict[str, Any]) -> SavedTrajectories:
        """Check a ``state_dict``.

        Raises:
            CheckpointError: when it is damaged.
        """
        next_id, steps_written = (_counter(state, name) for name in ("next_id", "steps_written"))
        if "schema" not in state:
            none = torch.zeros(0, dtype=torch.int64)
            return cls(next_id, steps_written, None, none, [], np.empty(0, dtype=object))
        schema, lengths = described(state)
        values = _checked_values(schema, state.get("values"), lengths, state.get(BLOB_SIZES, {}))
        texts = _checked_texts(schema, values, state.get("texts", []))
        weights = _of_each(state, PRIORITY_WEIGHTS, len(lengths), float)
        if weights is not None and not all(0.0 < weight < math.inf for weight in weights):
            raise CheckpointError(f"The checkpoint's {PRIORITY_WEIGHTS!r} are not all positive and finite.")
        versions = _of_each(state, POLICY_VERSIONS, len(lengths), int)
        if versions is not None and not all(NO_VERSION <= version < 2**62 for version in versions):
            raise CheckpointError(f"The checkpoint's {POLICY_VERSIONS!r} are not all policy versions.")
        ids = _of_each(state, IDS, len(lengths), int)
        if ids is not None and not all(0 <= a < b for a, b in zip(ids, [*ids[1:], next_id], strict=True)):
            raise CheckpointError(f"The checkpoint's {IDS!r} are not ascending ids below {next_id}.")
        pinned = _of_each(state, PINNED, len(lengths), bool)
        return cls(next_id, steps_written, schema, lengths, values, texts, weights, versions, ids, pinned)

    @property
    def longest(self) -> int:
        """The number of steps of the longest trajectory; 0 without any."""
        return int(self.lengths.max()) if len(self.lengths) else 0

    def trajectories(
        self, schema: Schema, text_ids: np.ndarray, formats: Formats
    ) -> list[tuple[list[np.ndarray], list[np.ndarray], int]]:
        """Return the trajectories, oldest first.

        Args:
            schema: the same fields, in the order in which the storage that takes them has them.
            text_ids: ``int32`` ``[k]``, the id of each of ``texts`` there.
            formats: of the storage that takes them.

        Returns:
            For each trajectory, one array ``[T, *shape]`` per field of a step, one ``[*shape]`` per field of a
            trajectory, and its policy version. A state of an earlier version has the policy versions in the data only.
        """
        assert self.schema is not None, "nothing was saved"
        stored = {field.key: field for field in schema.all_fields}
        arrays = {
            field.key: text_ids[as_array(value)]
            if field.is_text
            else formats.converted(value, field, stored[field.key])
            for field, value in zip(self.schema.all_fields, self.values, strict=True)
        }
        of_steps = [arrays[field.key] for field in schema.fields]
        of_trajectories = [arrays[field.key] for field in schema.trajectory_fields]
        ends = self.lengths.cumsum(0).tolist()
        starts = [0, *ends][: len(ends)]
        versions = self.policy_versions
        if versions is None:
            field = version_field(schema)
            versions = [NO_VERSION if field is None else version_of(of_steps[field][end - 1]) for end in ends]
        return [
            ([values[start:end] for values in of_steps], [values[number, ...] for values in of_trajectories], version)
            for number, (start, end, version) in enumerate(zip(starts, ends, versions, strict=True))
        ]


def _counter(state: dict[str, Any], name: str) -> int:
    value = state.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise CheckpointError(f"The checkpoint's {name!r} is {value!r}, not a count.")
    return value


def _of_each(state: dict[str, Any], name: str, count: int, kind: type) -> list[Any] | None:
    """Return the numbers, one per trajectory, that a state has under ``name``; None without the name."""
    numbers = state.get(name)
    if numbers is None:
        return None
    if not isinstance(numbers, list) or len(numbers) != count or any(type(number) is not kind for number in numbers):
        raise CheckpointError(f"The checkpoint's {name!r} is not a list of {count:,} numbers, one per trajectory.")
    return numbers


def described(state: dict[str, Any]) -> tuple[Schema, torch.Tensor]:
    """Return the schema of a state and the lengths of its trajectories, ``int64`` ``[n]``.

    Raises:
        CheckpointError: when they can't be read.
    """
    try:
        schema = Schema.from_json(state["schema"])
        schema.tensorclasses()  # known here already: a checkpoint imports nothing
        lengths = torch.as_tensor(state["lengths"], dtype=torch.int64)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"The checkpoint's description can't be read: {error!r}") from error
    if lengths.ndim != 1 or bool((lengths < 1).any()) or bool((lengths > 2**40).any()):
        raise CheckpointError("The checkpoint's lengths are not a list of step counts.")
    return schema, lengths


def with_shapes(schema: Schema, lengths: torch.Tensor) -> Iterator[tuple[StepField, tuple[int, ...]]]:
    """Yield each field with the shape of its values of all trajectories."""
    for field in schema.fields:
        yield field, (int(lengths.sum()), *field.shape)
    for field in schema.trajectory_fields:
        yield field, (len(lengths), *field.shape)


def _checked_values(schema: Schema, values: Any, lengths: torch.Tensor, sizes: Any) -> list[Any]:
    if not isinstance(values, list) or len(values) != len(schema.all_fields):
        raise CheckpointError(f"The checkpoint describes {len(schema.all_fields)} fields, but does not hold as many.")
    checked = []
    for number, ((field, shape), value) in enumerate(zip(with_shapes(schema, lengths), values, strict=True)):
        if field.is_blob:
            checked.append(_checked_blobs(field, shape[0], value, sizes.get(str(number))))
            continue
        checked.append(value)
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"The checkpoint's {field.key} is a {type(value).__name__}, not a tensor.")
        if value.dtype != field.dtype or value.shape != shape:
            raise CheckpointError(
                f"The checkpoint's {field.key} is {tuple(value.shape)} of {value.dtype}, not {shape} of {field.dtype}."
            )
    return checked


def _checked_blobs(field: StepField, steps: int, value: Any, sizes: Any) -> Blobs:
    if not isinstance(value, Blobs):
        is_bytes = isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.ndim == 1
        has_sizes = isinstance(sizes, torch.Tensor) and sizes.dtype == torch.int64 and sizes.shape == (steps,)
        if not is_bytes or not has_sizes or bool((sizes < 0).any()) or int(sizes.sum()) != len(value):
            raise CheckpointError(f"The checkpoint's {field.key} does not hold the bytes of {steps:,} values.")
        value = Blobs.unpacked(value, sizes)
    element = field.dtype.itemsize * math.prod(field.shape[1:])
    if value.shape != (steps,) or (field.is_ragged and bool((value.sizes() % element).any())):
        raise CheckpointError(f"The checkpoint's {field.key} does not hold {steps:,} values of {field.dtype}.")
    return value


def _checked_texts(schema: Schema, values: list[torch.Tensor], texts: Any) -> np.ndarray:
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise CheckpointError("The checkpoint's texts are not a list of strings.")
    for field, value in zip(schema.all_fields, values, strict=True):
        if field.is_text and bool(((value < 0) | (value >= len(texts))).any()):
            raise CheckpointError(f"The checkpoint's {field.key} names a text beyond the {len(texts):,} that it holds.")
    return np.array(texts, dtype=object)


def _with_own_texts(
    schema: Schema, values: Sequence[torch.Tensor], table: TextTable
) -> tuple[list[torch.Tensor], list[str]]:
    """Replace the ids of text by indices into a list of the texts that occur.

    Args:
        schema: the fields.
        values: one tensor per field.
        table: the table that the ids belong to.

    Returns:
        The values, and the list of texts.
    """
    ids = [as_array(value) for field, value in zip(schema.all_fields, values, strict=True) if field.is_text]
    used = np.unique(np.concatenate([array.reshape(-1) for array in ids])) if ids else np.empty(0, np.int32)
    own = [
        torch.from_numpy(np.searchsorted(used, as_array(value)).astype(np.int32)) if field.is_text else value
        for field, value in zip(schema.all_fields, values, strict=True)
    ]
    return own, table.resolve(used)
