"""How the stored trajectories ended: lengths, returns and successes, by task. Read from the buffer when asked for."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embodichain_rl.replay.ledger import Ledger, Rows
from embodichain_rl.replay.schema import Key, Schema, StepField, as_array
from embodichain_rl.replay.storage import TrajectoryStorage

__all__ = ["Outcome", "histogram", "outcomes", "success_by_task"]

NEWEST = 1000
"""The number of trajectories, the newest, whose outcome is read."""

STEPS_AT_ONCE = 1 << 18
"""The number of steps that are read in one piece."""

REWARDS: tuple[Key, ...] = (("next", "reward"), ("reward",))
SUCCESSES: tuple[Key, ...] = (("trajectory", "success"), ("next", "success"), ("next", "info", "success"), ("success",))
TASKS: tuple[Key, ...] = tuple(
    key
    for name in ("task", "language_instruction", "instruction", "task_index", "task_id")
    for key in (("trajectory", name), (name,))
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One finished trajectory."""

    id: int
    length: int
    total_reward: float | None
    """The sum of its rewards; None if no reward is stored."""
    success: bool | None
    """What is stored as its success, at its last step; None if nothing is."""
    task: str | int | None


_known: weakref.WeakKeyDictionary[Ledger, dict[tuple[int, int], Outcome]] = weakref.WeakKeyDictionary()
_latest: weakref.WeakKeyDictionary[Ledger, tuple[tuple[int, ...], list[Outcome]]] = weakref.WeakKeyDictionary()
"""What was returned last, and which trajectories were live then."""


def outcomes(storage: TrajectoryStorage) -> list[Outcome]:
    """Return the outcomes of the newest live trajectories, at most ``NEWEST``, oldest first.

    Each trajectory is read once per process, without a lock. On a device the lengths only are known, since reading the
    rest would wait for the device.

    Args:
        storage: the storage.
    """
    schema, ledger = storage.schema, storage.ledger
    if schema is None or ledger.closed:
        return []
    live = ledger.live()
    state = (live.oldest, live.end, len(live), *ledger.edits)
    latest = _latest.get(ledger)
    if latest is None or latest[0] != state:
        latest = _latest[ledger] = state, _read_new(storage, schema)
    return latest[1]


def _read_new(storage: TrajectoryStorage, schema: Schema) -> list[Outcome]:
    ledger = storage.ledger
    rows = ledger.live_rows()
    rows = rows.select(np.argsort(rows.ids)[-NEWEST:])
    keys = list(zip(rows.ids.tolist(), rows.changes.tolist(), strict=True))
    if storage.staged:
        return [Outcome(key[0], length, None, None, None) for key, length in zip(keys, rows.lengths, strict=True)]
    known = _known.setdefault(ledger, {})
    unknown = rows.select(np.array([key not in known for key in keys], dtype=bool))
    for piece in _pieces(unknown):
        for outcome, change in zip(_read(storage, schema, piece), piece.changes.tolist(), strict=True):
            known[outcome.id, change] = outcome
    there = set(keys)
    for key in [key for key in known if key not in there]:
        known.pop(key, None)
    return [known[key] for key in keys if key in known]


def success_by_task(found: Sequence[Outcome]) -> dict[str | int, float]:
    """Return the share of successful trajectories of each task."""
    by_task: dict[str | int, list[bool]] = defaultdict(list)
    for outcome in found:
        if outcome.success is not None and outcome.task is not None:
            by_task[outcome.task].append(outcome.success)
    return {task: sum(values) / len(values) for task, values in by_task.items()}


def _pieces(rows: Rows) -> list[Rows]:
    if not len(rows.ids):
        return []
    pieces = (np.cumsum(rows.lengths) - 1) // STEPS_AT_ONCE
    return [rows.select(pieces == number) for number in np.unique(pieces)]


def _read(storage: TrajectoryStorage, schema: Schema, rows: Rows) -> list[Outcome]:
    """Return the outcomes of trajectories; of those that are evicted meanwhile only the length."""
    reward, success, task = (_field(schema, keys) for keys in (REWARDS, SUCCESSES, TASKS))
    number = len(rows.ids)
    unknown: list[Any] = [None] * number
    returns, successes, tasks = unknown, unknown, unknown
    if reward is not None:
        returns = _returns(storage, schema, reward, rows)
    if success is not None:
        values = _values(storage, schema, success, rows, rows.lengths - 1).reshape(number, -1)
        successes = (values != 0).any(axis=1).tolist()
    if task is not None:
        values = _values(storage, schema, task, rows, np.zeros_like(rows.lengths)).reshape(number, -1)[:, 0]
        tasks = [storage.texts.resolve(int(value)) if task.is_text else int(value) for value in values]
    whole = storage.ledger.unchanged(rows).tolist()
    found = []
    for at, (number_of, length) in enumerate(zip(rows.ids.tolist(), rows.lengths.tolist(), strict=True)):
        if whole[at]:
            found.append(Outcome(number_of, length, returns[at], successes[at], tasks[at]))
        else:
            found.append(Outcome(number_of, length, None, None, None))
    return found


def _field(schema: Schema, keys: Sequence[Key]) -> StepField | None:
    fields = {field.key: field for field in schema.all_fields}
    found = (fields[key] for key in keys if key in fields)
    return next((field for field in found if not field.dtype.is_complex), None)


def _returns(storage: TrajectoryStorage, schema: Schema, field: StepField, rows: Rows) -> list[float]:
    number = schema.number_of(field.key)
    ends = np.cumsum(rows.lengths)
    steps = np.repeat(rows.starts - (ends - rows.lengths), rows.lengths) + np.arange(ends[-1])
    assert number is not None, "a reward is a field of steps"
    rewards = _numbers(storage.arena.copy_steps(number, steps)).reshape(len(steps), -1).sum(axis=1)
    return np.add.reduceat(rewards, ends - rows.lengths).tolist()


def _values(storage: TrajectoryStorage, schema: Schema, field: StepField, rows: Rows, steps: np.ndarray) -> np.ndarray:
    """Return the value of each trajectory at one of its steps, or that of the whole trajectory."""
    number = schema.number_of(field.key)
    if number is None:
        return storage.trajectory_values(field.key, rows.ids)
    return as_array(storage.arena.copy_steps(number, rows.starts + steps))


def _numbers(values: Any) -> np.ndarray:
    return values.double().numpy()


def histogram(values: Sequence[float], buckets: int = 20) -> dict[str, list[float]]:
    """Return a histogram with equal buckets: ``edges``, one more than ``counts``.

    Args:
        values: the values.
        buckets: the number of buckets.
    """
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return {"edges": [], "counts": []}
    counts, edges = np.histogram(finite, bins=buckets)
    return {"edges": edges.tolist(), "counts": counts.tolist()}
