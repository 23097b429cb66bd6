"""Which entries say where a trajectory ends: end flags, and the ids of trajectories."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tensordict import NestedKey

from embodichain_rl._checks import checked_key
from embodichain_rl.errors import SchemaMismatchError
from embodichain_rl.replay.schema import Key, Schema, key_name
from embodichain_rl.replay.writing.pending import PendingSteps
from embodichain_rl.replay.writing.runs import Run

__all__ = ["Boundaries", "BoundaryFields", "BoundaryKeys"]

END_KEYS: tuple[Key, ...] = (("next", "done"), ("next", "terminated"), ("next", "truncated"))
"""The entries that end a trajectory where they are True, unless another one is named."""

FLAT_END_KEYS: tuple[Key, ...] = tuple((".".join(key),) for key in END_KEYS)
"""The same under flat keys, as LeRobot names them; they count where none of ``END_KEYS`` is there."""

TRAJ_IDS: Key = ("collector", "traj_ids")
"""Where TorchRL's collectors write the id of the trajectory that a step belongs to."""


@dataclass(frozen=True, slots=True)
class Boundaries:
    """Where the trajectories of some steps end.

    Attributes:
        ends: ``bool`` ``[B, T]``: the last steps of trajectories.
        flagged: ``bool`` ``[B, T]``: those of them that an end flag marks.
        traj_ids: the id of the trajectory of each step, ``[B, T]``; None where there are none.
        by_id_only: whether there are no end flags.
        by_row: whether a trajectory also ends where the same row of a later call begins with another id.
    """

    ends: np.ndarray
    flagged: np.ndarray
    traj_ids: np.ndarray | None
    by_id_only: bool
    by_row: bool

    def finish(self, runs: Sequence[Run], producer: int, pending: PendingSteps) -> list[Run]:
        """Return runs that end where an id ends them, and end what is pending in their row.

        Args:
            runs: of these steps, not of a sample.
            producer: identifies the calling thread.
            pending: the unfinished trajectories.
        """
        if self.by_row:
            runs = self._in_rows(runs, producer, pending)
        if self.by_id_only or self.ends is self.flagged:
            return list(runs)
        return [
            dataclasses.replace(run, truncated=True) if run.ends and not self.flagged[run.row, run.stop - 1] else run
            for run in runs
        ]

    def _in_rows(self, runs: Sequence[Run], producer: int, pending: PendingSteps) -> list[Run]:
        assert self.traj_ids is not None, "rows are told apart by ids"
        result: list[Run] = []
        last: dict[Hashable, Any] = {}
        for run in runs:
            key, traj_id = (producer, "row", run.row), self.traj_ids[run.row, run.start].item()
            earlier = last.get(key, pending.get(key).traj_id)
            begins = run.begins or (earlier is not None and earlier != traj_id)
            result.append(dataclasses.replace(run, key=key, traj_id=traj_id, begins=begins))
            last[key] = None if run.ends else traj_id
        return result


@dataclass(frozen=True, slots=True)
class BoundaryKeys:
    """The keys that a user names; None for the defaults.

    Attributes:
        end_key: of the end flags.
        traj_key: of the ids of trajectories.
    """

    end_key: Key | None = None
    traj_key: Key | None = None

    @classmethod
    def checked(cls, end_key: NestedKey | None, traj_key: NestedKey | None) -> BoundaryKeys:
        """Return the keys as tuples.

        Raises:
            InvalidArgumentError: when one of them is no key.
        """
        return cls(
            None if end_key is None else checked_key(end_key), None if traj_key is None else checked_key(traj_key)
        )

    def fields_of(self, schema: Schema) -> BoundaryFields:
        """Return the fields of a schema that say where trajectories end.

        Raises:
            SchemaMismatchError: when nothing says where trajectories end, a named key is missing, or it is of the wrong
                kind.
        """
        if self.end_key is not None:
            ends = [_flag(schema, self.end_key)]
            if ends == [None]:
                raise SchemaMismatchError(
                    f"Got data without end_key={key_name(self.end_key)}; it has the keys {schema.keys}."
                )
        else:
            ends = [_flag(schema, key) for key in END_KEYS]
            if ends == [None] * len(END_KEYS):
                ends = [_flag(schema, key) for key in FLAT_END_KEYS]
        numbers = tuple(number for number in ends if number is not None)
        traj_ids = self._traj_ids(schema)
        if not numbers and traj_ids is not None and self.traj_key is None:
            numbers = _flags_of_groups(schema)
        # Flags of several agents say which of them are done, and only where nothing else is there that all are.
        single = tuple(number for number in numbers if math.prod(schema.fields[number].shape) == 1)
        if not numbers and traj_ids is None:
            _refuse_without_end(schema)
        return BoundaryFields(
            single or numbers,
            traj_ids,
            of_agents=not single,
            all_agents=self.end_key is not None,
            # TorchRL's collectors leave the rows of several environments one behind the other, each to go on in the
            # next call: another id does not end the trajectory before it.
            ids_end=not numbers or self.traj_key is not None,
            # Flags of terminations alone are never True where only a time limit ends an episode.
            by_row=not numbers
            or (
                self.traj_key is not None
                and all(schema.fields[number].key[-1].split(".")[-1] == "terminated" for number in numbers)
            ),
        )

    def _traj_ids(self, schema: Schema) -> int | None:
        """Return the number of the field with the ids of trajectories, among all fields."""
        key = self.traj_key or TRAJ_IDS
        number = next((n for n, field in enumerate(schema.all_fields) if field.key == key), None)
        if number is None:
            if self.traj_key is not None:
                raise SchemaMismatchError(f"Got data without traj_key={key_name(key)}; it has the keys {schema.keys}.")
            return None
        shape = schema.all_fields[number].shape
        if math.prod(shape) != 1:
            raise SchemaMismatchError(
                f"Got {shape} elements a step as {key_name(key)}; the id of a trajectory is one number a step. Name "
                "another key with traj_key=."
            )
        return number


@dataclass(frozen=True, slots=True)
class BoundaryFields:
    """The fields of a schema that say where trajectories end.

    Attributes:
        flags: numbers of the fields with end flags.
        traj_ids: number of the field with the ids of trajectories; None where there is none.
        of_agents: whether a step has several flags, one for each agent.
        all_agents: whether a trajectory ends where the flags of all agents are True, rather than one of them.
        ids_end: whether a trajectory ends where another id follows in its row.
        by_row: whether it also ends where the same row of a later call begins with another id.
    """

    flags: tuple[int, ...]
    traj_ids: int | None
    of_agents: bool
    all_agents: bool
    ids_end: bool
    by_row: bool

    def flagged(self, rows: Sequence[Any]) -> np.ndarray:
        """Return the steps that an end flag marks, ``bool`` ``[B, T]``; there must be flags.

        Args:
            rows: one array ``[B, T, *shape]`` per field; only those of the flags are read.
        """
        found = [self._flag(rows[number]) for number in self.flags]
        return found[0] if len(found) == 1 else functools.reduce(np.logical_or, found)

    def _flag(self, values: np.ndarray) -> np.ndarray:
        if not self.of_agents:
            values = values.reshape(values.shape[:2])
            return values if values.dtype == np.bool_ else values.astype(bool)
        values = values.reshape(*values.shape[:2], -1).astype(bool, copy=False)
        return np.all(values, axis=-1) if self.all_agents else np.any(values, axis=-1)

    def ids(self, rows: Sequence[Any]) -> np.ndarray | None:
        """Return the ids of the trajectories of steps, ``[B, T]``; None where there are none.

        Args:
            rows: one array ``[B, T, *shape]`` per field; only that of the ids is read.
        """
        if self.traj_ids is None:
            return None
        values: np.ndarray = rows[self.traj_ids]
        return values.reshape(values.shape[:2])

    def boundaries(self, rows: Sequence[Any], real: np.ndarray | None) -> Boundaries:
        """Return where the trajectories of some steps end.

        Args:
            rows: one array ``[B, T, *shape]`` per field; only those of the keys are read.
            real: which steps are real, ``bool`` ``[B, T]``; None: all.
        """
        traj_ids, by_id_only = self.ids(rows), not self.flags
        if by_id_only:
            assert traj_ids is not None, "something says where trajectories end"
            flagged = np.zeros(traj_ids.shape, dtype=bool)
        else:
            flagged = self.flagged(rows)
        if traj_ids is None or not self.ids_end:
            return Boundaries(flagged, flagged, traj_ids, by_id_only, self.by_row)
        changes = traj_ids[:, 1:] != traj_ids[:, :-1]
        if real is not None:
            changes &= real[:, 1:] & real[:, :-1]
        ends = flagged.copy()
        ends[:, :-1] |= changes
        return Boundaries(ends, flagged, traj_ids, by_id_only, self.by_row)


def _flag(schema: Schema, key: Key) -> int | None:
    """Return the number of a field with end flags; None where the schema has none of that key."""
    number = schema.number_of(key)
    if number is not None and schema.fields[number].is_text:
        raise SchemaMismatchError(f"Got text as {key}, which says where trajectories end: it must be a tensor.")
    return number


def _flags_of_groups(schema: Schema) -> tuple[int, ...]:
    """Return the numbers of the fields ``("next", group, ..., "done")``: TorchRL's collectors go by them.

    With them, an id that changes does not end a trajectory: it may go on in the next call, as the last one of each row
    of several environments does.
    """
    keys = [key for key in schema.keys if key[0] == "next" and key[-1] == "done"]
    return tuple(number for key in keys if (number := _flag(schema, key)) is not None)


def _refuse_without_end(schema: Schema) -> None:
    named = [key for key in schema.keys if key[-1] in ("done", "terminated", "truncated")]
    ids = [key for key in schema.keys if any(name in key[-1] for name in ("episode", "traj"))]
    hints = [
        *(f"end_key={key_name(key)}" for key in named[:1]),
        *(f"traj_key={key_name(key)}" for key in ids[:1]),
    ]
    hint = " or ".join(hints) or "end_key= (of end flags) or traj_key= (of the ids of trajectories)"
    raise SchemaMismatchError(
        "Got data without ('next', 'done'), ('next', 'terminated') or ('next', 'truncated'): nothing says where a "
        "trajectory ends. TorchRL's environments and collectors write it; set it on data of your own, or give the "
        f"writer, or the buffer, {hint}."
    )
