"""The state of a storage, as ``state_dict`` returns it: built from what is live, and checked before it is loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from embodichain_rl.errors import CheckpointError
from embodichain_rl.replay.ledger import NO_VERSION
from embodichain_rl.replay.schema import Blobs, Formats, Schema, StepField, TextTable, as_array
from embodichain_rl.replay.storage.policy_versions import version_field, version_of
from embodichain_rl.replay.storage.reads import ReadView, read_live

__all__ = [
    "BLOB_SIZES",
    "IDS",
    "PINNED",
    "POLICY_VERSIONS",
    "PRIORITY_WEIGHTS",
    "SavedPart",
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


class SavedTrajectory(NamedTuple):
    """A saved trajectory, as :meth:`TrajectoryStorage.write` takes it. Its arrays may be views of a file."""

    steps: list[np.ndarray]
    """One array ``[T, *shape]`` per field of a step."""
    of_trajectory: list[np.ndarray]
    """One array ``[*shape]`` per field of a trajectory."""
    policy_version: int


@dataclass(frozen=True)
class SavedPart:
    """Saved trajectories that lie one after the other: of a state, or in the files of one folder of a checkpoint.

    Attributes:
        lengths (torch.Tensor): ``int64`` ``[n]``, the length of each trajectory.
        values (list): one tensor per field, as :meth:`TrajectoryStorage.state_dict` describes them, or blobs. Of a
            shifted field, ``[n, *shape]``: the last step of each trajectory.
        texts (numpy.ndarray): strings, ``[k]``; text fields hold indices into it.
        shifted (Mapping[int, int]): the numbers of the shifted fields, and of those that they are read from.
        policy_versions (list[int] | None): the policy version of each trajectory; None in those of earlier versions.
        ids (list[int] | None): the id of each trajectory; None if they are consecutive and end with the last one.
        pinned (list[bool] | None): whether each trajectory is pinned; None if none is.
        priority_weights (list[float] | None): the positive weight of each trajectory in draws by priority; None if
            there were no priorities, and in checkpoints of earlier versions.
    """

    lengths: torch.Tensor
    values: list[Any]
    texts: np.ndarray
    shifted: Mapping[int, int]
    policy_versions: list[int] | None
    ids: list[int] | None
    pinned: list[bool] | None
    priority_weights: list[float] | None

    @classmethod
    def parse(cls, state: Mapping[str, Any], schema: Schema, lengths: torch.Tensor, shifted: Mapping[int, int]) -> Self:
        """Check a part of a state; its values are in ``state["values"]``.

        Raises:
            CheckpointError: when it is damaged.
        """
        values = _checked_values(schema, state.get("values"), lengths, shifted, state.get(BLOB_SIZES, {}))
        texts = _checked_texts(schema, values, state.get("texts", []))
        weights = _of_each(state, PRIORITY_WEIGHTS, len(lengths), float)
        if weights is not None and not all(0.0 < weight < math.inf for weight in weights):
            raise CheckpointError(f"The checkpoint's {PRIORITY_WEIGHTS!r} are not all positive and finite.")
        versions = _of_each(state, POLICY_VERSIONS, len(lengths), int)
        if versions is not None and not all(NO_VERSION <= version < 2**62 for version in versions):
            raise CheckpointError(f"The checkpoint's {POLICY_VERSIONS!r} are not all policy versions.")
        ids = _of_each(state, IDS, len(lengths), int)
        pinned = _of_each(state, PINNED, len(lengths), bool)
        return cls(lengths, values, texts, shifted, versions, ids, pinned, weights)

    def opened(
        self, saved: Schema, schema: Schema, table: TextTable, formats: Formats
    ) -> Callable[[int], SavedTrajectory]:
        """Return a function that returns the trajectory at a position.

        Args:
            saved: the fields, in the order in which they were saved.
            schema: the same fields, in the order in which the storage that takes them has them.
            table: the table of texts of that storage.
            formats: the formats of that storage.
        """
        stored = {step_field.key: step_field for step_field in schema.all_fields}
        ends = self.lengths.cumsum(0).tolist()
        text_ids = table.ids_of(self.texts, for_good=False)
        arrays = {}
        for number, (field, value) in enumerate(zip(saved.all_fields, self.values, strict=True)):
            if number in self.shifted:
                value = self._unshifted(self.values[self.shifted[number]], value)
            if field.is_text:
                arrays[field.key] = text_ids[as_array(value)]
            else:
                arrays[field.key] = formats.converted(value, field, stored[field.key])
        of_steps = [arrays[field.key] for field in schema.fields]
        of_trajectories = [arrays[field.key] for field in schema.trajectory_fields]
        version_in = version_field(schema)

        def at(number: int) -> SavedTrajectory:
            begin, end = ends[number] - int(self.lengths[number]), ends[number]
            steps = [values[begin:end] for values in of_steps]
            version = NO_VERSION if version_in is None else version_of(steps[version_in][-1])
            if self.policy_versions is not None:
                version = self.policy_versions[number]
            return SavedTrajectory(steps, [values[number, ...] for values in of_trajectories], version)

        return at

    def _unshifted(self, source: Any, last: Any) -> Any:
        """Return all steps of a shifted field."""
        whole = source.clone()
        whole[:-1] = source[1:]
        whole[self.lengths.cumsum(0) - 1] = last
        return whole


@dataclass(frozen=True)
class SavedTrajectories:
    """The checked content of a ``state_dict`` of a storage, or of a checkpoint.

    Attributes:
        next_id (int): the lowest id that was not given out.
        steps_written (int): the count of written steps.
        schema (Schema | None): the fields; None for a storage that was not allocated.
        parts (list[SavedPart]): where the trajectories are.
        order (list[tuple[int, int]]): the part of each trajectory and its position there, oldest first.
        lengths (torch.Tensor): ``int64`` ``[n]``, the length of each trajectory, oldest first.
        ids (list[int] | None): the id of each trajectory; None if they end with ``next_id - 1``, without gaps.
        pinned (list[bool] | None): whether each trajectory is pinned; None if none is.
        priority_weights (list[float] | None): the weight of each trajectory; see :class:`SavedPart`.
    """

    next_id: int
    steps_written: int
    schema: Schema | None = None
    parts: list[SavedPart] = dataclasses.field(default_factory=list)
    order: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    lengths: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    ids: list[int] | None = None
    pinned: list[bool] | None = None
    priority_weights: list[float] | None = None

    @classmethod
    def parse(cls, state: dict[str, Any]) -> SavedTrajectories:
        """Check a ``state_dict``.

        Raises:
            CheckpointError: when it is damaged.
        """
        if "schema" not in state:
            return cls(*counted(state))
        schema, lengths = described(state)
        part = SavedPart.parse(state, schema, lengths, {})
        return cls.of_parts(state, schema, [part], [range(len(lengths))])

    @classmethod
    def of_parts(
        cls, state: dict[str, Any], schema: Schema, parts: list[SavedPart], kept: Sequence[Sequence[int]]
    ) -> SavedTrajectories:
        """Combine parts.

        Args:
            state: the state, for its counts.
            schema: the fields.
            parts: the parts. Several of them must have ids.
            kept: the positions in each part of the trajectories that count.

        Raises:
            CheckpointError: when the ids are damaged.
        """
        next_id, steps_written = counted(state)
        order = [(number, position) for number, positions in enumerate(kept) for position in positions]
        ids: list[int] | None = None
        if len(parts) > 1 or parts[0].ids is not None:
            if any(part.ids is None for part in parts):
                raise CheckpointError(f"The checkpoint has parts without {IDS!r}.")
            order.sort(key=lambda at: parts[at[0]].ids[at[1]])  # type: ignore[index]
            ids = [parts[number].ids[position] for number, position in order]  # type: ignore[index]
            if not all(0 <= a < b for a, b in zip(ids, [*ids, next_id][1:], strict=True)):
                raise CheckpointError(f"The checkpoint's {IDS!r} are not different ids below {next_id}.")
        lengths = torch.tensor([int(parts[n].lengths[k]) for n, k in order], dtype=torch.int64)
        pinned = None
        if any(part.pinned is not None for part in parts):
            pinned = [bool(parts[n].pinned and parts[n].pinned[k]) for n, k in order]  # type: ignore[index]
        weights = None
        if all(part.priority_weights is not None for part in parts):
            weights = [parts[n].priority_weights[k] for n, k in order]  # type: ignore[index]
        return cls(next_id, steps_written, schema, parts, order, lengths, ids, pinned, weights)

    @property
    def longest(self) -> int:
        """The number of steps of the longest trajectory; 0 without any."""
        return int(self.lengths.max()) if len(self.lengths) else 0

    def __len__(self) -> int:
        """Return the number of trajectories."""
        return len(self.order)

    @property
    def example(self) -> list[Any]:
        """The values of the largest part."""
        return max(self.parts, key=lambda part: len(part.lengths)).values

    def trajectories(self, schema: Schema, table: TextTable, formats: Formats) -> Iterator[SavedTrajectory]:
        """Yield the trajectories, oldest first.

        Args:
            schema: the same fields, in the order in which the storage that takes them has them.
            table: the table of texts of that storage.
            formats: the formats of that storage.
        """
        assert self.schema is not None, "nothing was saved"
        opened: dict[int, Callable[[int], SavedTrajectory]] = {}
        for number, position in self.order:
            if number not in opened:
                opened = {number: self.parts[number].opened(self.schema, schema, table, formats)}
            yield opened[number](position)


def counted(state: dict[str, Any]) -> tuple[int, int]:
    """Return the lowest id that was not given out, and the count of written steps, of a state.

    Raises:
        CheckpointError: when they are no counts.
    """
    return _counter(state, "next_id"), _counter(state, "steps_written")


def _counter(state: dict[str, Any], name: str) -> int:
    value = state.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise CheckpointError(f"The checkpoint's {name!r} is {value!r}, not a count.")
    return value


def _of_each(state: Mapping[str, Any], name: str, count: int, kind: type) -> list[Any] | None:
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


def with_shapes(
    schema: Schema, lengths: torch.Tensor, shifted: Mapping[int, int]
) -> Iterator[tuple[StepField, tuple[int, ...]]]:
    """Yield each field with the shape of its values of all trajectories."""
    for number, step_field in enumerate(schema.fields):
        yield step_field, (len(lengths) if number in shifted else int(lengths.sum()), *step_field.shape)
    for step_field in schema.trajectory_fields:
        yield step_field, (len(lengths), *step_field.shape)


def _checked_values(
    schema: Schema, values: Any, lengths: torch.Tensor, shifted: Mapping[int, int], sizes: Any
) -> list[Any]:
    if not isinstance(values, list) or len(values) != len(schema.all_fields):
        raise CheckpointError(f"The checkpoint describes {len(schema.all_fields)} fields, but does not hold as many.")
    checked = []
    for number, ((field, shape), value) in enumerate(zip(with_shapes(schema, lengths, shifted), values, strict=True)):
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
