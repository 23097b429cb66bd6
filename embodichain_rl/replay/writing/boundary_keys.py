"""Which entries say where a trajectory ends: end flags, and the ids of trajectories."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tensordict import NestedKey

from embodichain_rl._checks import checked_key
from embodichain_rl.errors import SchemaMismatchError
from embodichain_rl.replay.schema import Key, Schema, key_name
from embodichain_rl.replay.writing.pending import PendingTrajectories
from embodichain_rl.replay.writing.runs import Run

__all__ = ["Boundaries", "BoundaryKeys"]

END_KEYS: tuple[Key, ...] = (("next", "done"), ("next", "terminated"), ("next", "truncated"))
"""The entries that end a trajectory where they are True, unless another one is named."""

TRAJ_IDS: Key = ("collector", "traj_ids")
"""Where TorchRL's collectors write the id of the trajectory that a step belongs to."""


@dataclass(frozen=True, slots=True)
class Boundaries:
    """Where the trajectories of some steps end.

    Attributes:
        ends: ``bool`` ``[B, T]``: the last steps of trajectories.
        flagged: ``bool`` ``[B, T]``: those of them that an end flag marks.
        traj_ids: the id of the trajectory of each step, ``[B, T]``; None where there are none.
        by_id_only: whether there are no end flags, so that a trajectory ends where another id follows in its row.
    """

    ends: np.ndarray
    flagged: np.ndarray
    traj_ids: np.ndarray | None
    by_id_only: bool

    def finish(self, runs: Sequence[Run], producer: int, pending: PendingTrajectories) -> list[Run]:
        """Return runs that end where an id ends them, and end what is pending in their row.

        Args:
            runs: of these steps, not of a sample.
            producer: identifies the calling thread.
            pending: the unfinished trajectories.
        """
        if self.by_id_only:
            return self._in_rows(runs, producer, pending)
        if self.ends is self.flagged:
            return list(runs)
        return [
            dataclasses.replace(run, truncated=True) if run.ends and not self.flagged[run.row, run.stop - 1] else run
            for run in runs
        ]

    def _in_rows(self, runs: Sequence[Run], producer: int, pending: PendingTrajectories) -> list[Run]:
        assert self.traj_ids is not None, "without end flags there are ids"
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

    def boundaries(self, schema: Schema, rows: Sequence[Any], real: np.ndarray | None) -> Boundaries:
        """Return where the trajectories of some steps end.

        Args:
            schema: the fields.
            rows: one array ``[B, T, *shape]`` per field; only those of the keys are read.
            real: which steps are real, ``bool`` ``[B, T]``; None: all.

        Raises:
            SchemaMismatchError: when nothing says where trajectories end, or a named key is missing.
        """
        traj_ids = self._traj_ids(schema, rows)
        flagged = self._flags(schema, rows)
        if flagged is None and traj_ids is None:
            _refuse_without_end(schema)
        by_id_only = flagged is None
        if flagged is None:
            assert traj_ids is not None
            flagged = np.zeros(traj_ids.shape, dtype=bool)
        if traj_ids is None or not (by_id_only or self.traj_key is not None):
            # TorchRL's collectors leave the rows of several environments one behind the other, each to go on in the
            # next call: another id does not end the trajectory before it.
            return Boundaries(flagged, flagged, traj_ids, by_id_only)
        changes = traj_ids[:, 1:] != traj_ids[:, :-1]
        if real is not None:
            changes &= real[:, 1:] & real[:, :-1]
        ends = flagged.copy()
        ends[:, :-1] |= changes
        return Boundaries(ends, flagged, traj_ids, by_id_only)

    def _traj_ids(self, schema: Schema, rows: Sequence[Any]) -> np.ndarray | None:
        key = self.traj_key or TRAJ_IDS
        values = _values(schema, rows, key)
        if values is None:
            if self.traj_key is not None:
                raise SchemaMismatchError(f"Got data without traj_key={key_name(key)}; it has the keys {schema.keys}.")
            return None
        if values.ndim != 2:
            raise SchemaMismatchError(
                f"Got {values.shape[2:]} elements a step as {key_name(key)}; the id of a trajectory is one number a "
                "step. Name another key with traj_key=."
            )
        return values

    def _flags(self, schema: Schema, rows: Sequence[Any]) -> np.ndarray | None:
        """Return the end flags, ``bool`` ``[B, T]``; None where there are none."""
        if self.end_key is not None:
            named = _values(schema, rows, self.end_key, flag=True)
            if named is None:
                raise SchemaMismatchError(
                    f"Got data without end_key={key_name(self.end_key)}; it has the keys {schema.keys}."
                )
            return _as_bool(named) if named.ndim == 2 else np.all(_as_bool(named), axis=-1)
        found = [values for key in END_KEYS if (values := _values(schema, rows, key, flag=True)) is not None]
        # Flags of several agents say which of them are done, and only where nothing else is there that all are.
        found = [values for values in found if values.ndim == 2] or [
            np.any(_as_bool(values), axis=-1) for values in found
        ]
        return functools.reduce(np.logical_or, map(_as_bool, found)) if found else None


def _as_bool(values: np.ndarray) -> np.ndarray:
    return values.astype(bool, copy=False)


def _values(schema: Schema, rows: Sequence[Any], key: Key, *, flag: bool = False) -> np.ndarray | None:
    """Return the values of ``key``, ``[B, T]``, or ``[B, T, n]`` where a step has several; None without the key."""
    number = schema.number_of(key)
    if number is None and not flag:
        keys = [field.key for field in schema.trajectory_fields]
        number = len(schema.fields) + keys.index(key) if key in keys else None
    if number is None:
        return None
    if flag and schema.fields[number].is_text:
        raise SchemaMismatchError(f"Got text as {key}, which says where trajectories end: it must be a tensor.")
    values: np.ndarray = rows[number]
    if values.ndim == 2:
        return values
    return values[:, :, 0] if values.shape[2:] == (1,) else values.reshape(*values.shape[:2], -1)


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
