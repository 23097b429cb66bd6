"""How the stored trajectories ended: lengths, returns and successes, by task. Read from the buffer when asked for."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from embodichain_rl.replay.ledger import Ledger, Rows
from embodichain_rl.replay.schema import Key, Schema, StepField, as_array
from embodichain_rl.replay.storage import TrajectoryStorage

__all__ = ["outcome_metrics"]

NEWEST = 1000
"""The number of trajectories, the newest, whose outcome is read."""

STEPS_AT_ONCE = 1 << 18
"""The number of steps that are read in one piece."""

BUCKETS = 20
"""Buckets of the histograms of lengths and returns."""

REWARDS: tuple[Key, ...] = (("next", "reward"), ("reward",))
SUCCESSES: tuple[Key, ...] = (("trajectory", "success"), ("next", "success"), ("next", "info", "success"), ("success",))
TASKS: tuple[Key, ...] = tuple(
    key
    for name in ("task", "language_instruction", "instruction", "task_index", "task_id")
    for key in (("trajectory", name), (name,))
)


@dataclass(frozen=True, slots=True)
class _Outcomes:
    """Outcomes of trajectories, by ascending id, each array ``[n]``. Where nothing is known, a value means nothing."""

    ids: np.ndarray
    changes: np.ndarray
    lengths: np.ndarray
    returns: np.ndarray
    """The sum of rewards, ``float64``; known if a reward is stored."""
    has_return: np.ndarray
    successes: np.ndarray
    """What is stored as the success, at the last step, ``bool``."""
    has_success: np.ndarray
    tasks: np.ndarray
    """The stored number of the task, or the id of its text, ``int64``."""
    has_task: np.ndarray

    @classmethod
    def unknown(cls, rows: Rows) -> _Outcomes:
        """Return the outcomes of trajectories of which only the length is known."""
        n = len(rows.ids)
        no = [np.zeros(n, dtype=bool) for _ in range(4)]
        numbers = np.zeros(n, dtype=np.float64), np.zeros(n, dtype=np.int64)
        return cls(rows.ids, rows.changes, rows.lengths, numbers[0], no[0], no[1], no[2], numbers[1], no[3])

    def select(self, which: np.ndarray) -> _Outcomes:
        """Return some of them."""
        return _Outcomes(*(getattr(self, field.name)[which] for field in fields(self)))

    def set(self, which: np.ndarray, others: _Outcomes) -> None:
        """Overwrite some of them."""
        for field in fields(self):
            getattr(self, field.name)[which] = getattr(others, field.name)


_known: weakref.WeakKeyDictionary[Ledger, _Outcomes] = weakref.WeakKeyDictionary()
_latest: weakref.WeakKeyDictionary[Ledger, tuple[tuple[int, ...], dict[str, Any]]] = weakref.WeakKeyDictionary()
"""What was returned last, and which trajectories were live then."""


def outcome_metrics(storage: TrajectoryStorage) -> dict[str, Any]:
    """Return lengths, returns and successes of the newest live trajectories, at most ``NEWEST``.

    Each trajectory is read once per process, without a lock. On a device the lengths only are known, since reading the
    rest would wait for the device.

    Args:
        storage: the storage.

    Returns:
        ``length_mean``, ``length_min``, ``length_max``, the same of ``return``, ``success_rate`` and
        ``success_by_task`` as in ``stats()``, and ``histograms`` of ``length`` and ``return``.
    """
    schema, ledger = storage.schema, storage.ledger
    if schema is None or ledger.closed:
        return _summary(storage, schema, _Outcomes.unknown(Rows(*(np.zeros(0, dtype=np.int64) for _ in Rows._fields))))
    live = ledger.live()
    state = (live.oldest, live.end, len(live), *ledger.edits)
    latest = _latest.get(ledger)
    if latest is None or latest[0] != state:
        newest = ledger.existing(live.at(np.arange(max(0, len(live) - NEWEST), len(live))))
        found = _Outcomes.unknown(newest) if storage.staged else _read_new(storage, schema, newest)
        latest = _latest[ledger] = state, _summary(storage, schema, found)
    metrics = dict(latest[1])
    metrics["success_by_task"] = dict(metrics["success_by_task"])
    metrics["histograms"] = {
        name: {key: list(values) for key, values in histogram.items()}
        for name, histogram in metrics["histograms"].items()
    }
    return metrics


def _read_new(storage: TrajectoryStorage, schema: Schema, rows: Rows) -> _Outcomes:
    """Return the outcomes of trajectories, of which those that were returned before are not read again."""
    found, known = _Outcomes.unknown(rows), _known.get(storage.ledger)
    unknown = np.ones(len(rows.ids), dtype=bool)
    if known is not None and len(known.ids) and len(rows.ids):
        at = np.minimum(np.searchsorted(known.ids, rows.ids), len(known.ids) - 1)
        same = (known.ids[at] == rows.ids) & (known.changes[at] == rows.changes)
        found.set(same, known.select(at[same]))
        unknown = ~same
    numbers = np.flatnonzero(unknown)
    for piece in _pieces(rows.lengths[numbers]):
        found.set(numbers[piece], _read(storage, schema, rows.select(numbers[piece])))
    _known[storage.ledger] = found
    return found


def _summary(storage: TrajectoryStorage, schema: Schema | None, found: _Outcomes) -> dict[str, Any]:
    lengths, returns = found.lengths, found.returns[found.has_return]
    successes = found.successes[found.has_success]
    return {
        **_mean_and_range("length", lengths),
        **_mean_and_range("return", returns),
        "success_rate": float(successes.mean()) if len(successes) else None,
        "success_by_task": {} if schema is None else _success_by_task(storage, schema, found),
        "histograms": {"length": _histogram(lengths), "return": _histogram(returns)},
    }


def _mean_and_range(name: str, values: np.ndarray) -> dict[str, Any]:
    if not len(values):
        return {f"{name}_mean": None, f"{name}_min": None, f"{name}_max": None}
    return {
        f"{name}_mean": float(values.mean()),
        f"{name}_min": values.min().item(),
        f"{name}_max": values.max().item(),
    }


def _success_by_task(storage: TrajectoryStorage, schema: Schema, found: _Outcomes) -> dict[str | int, float]:
    """Return the share of successful trajectories of each task, in the order in which the tasks came first."""
    both = found.has_success & found.has_task
    task = _field(schema, TASKS)
    if task is None or not both.any():
        return {}
    numbers, first, of = np.unique(found.tasks[both], return_index=True, return_inverse=True)
    shares = np.bincount(of, weights=found.successes[both]) / np.bincount(of)
    return {
        storage.texts.resolve(int(numbers[at])) if task.is_text else int(numbers[at]): float(shares[at])
        for at in np.argsort(first)
    }


def _pieces(lengths: np.ndarray) -> list[np.ndarray]:
    """Return the places of trajectories whose steps are read at once, ``int64`` ``[n]`` each."""
    if not len(lengths):
        return []
    piece_of = (np.cumsum(lengths) - 1) // STEPS_AT_ONCE
    if not piece_of[-1]:
        return [np.arange(len(lengths))]
    return [np.flatnonzero(piece_of == piece) for piece in range(int(piece_of[-1]) + 1) if (piece_of == piece).any()]


def _read(storage: TrajectoryStorage, schema: Schema, rows: Rows) -> _Outcomes:
    """Return the outcomes of trajectories; of those that are evicted meanwhile only the length."""
    found, number = _Outcomes.unknown(rows), len(rows.ids)
    reward, success, task = (_field(schema, keys) for keys in (REWARDS, SUCCESSES, TASKS))
    if reward is not None:
        found.returns[:] = _returns(storage, schema, reward, rows)
    if success is not None:
        values = _values(storage, schema, success, rows, rows.lengths - 1).reshape(number, -1)
        found.successes[:] = (values != 0).any(axis=1)
    if task is not None:
        values = _values(storage, schema, task, rows, np.zeros_like(rows.lengths)).reshape(number, -1)
        found.tasks[:] = values[:, 0]
    whole = storage.ledger.unchanged(rows)
    for has, field in ((found.has_return, reward), (found.has_success, success), (found.has_task, task)):
        has[:] = whole & (field is not None)
    return found


def _field(schema: Schema, keys: Sequence[Key]) -> StepField | None:
    fields = {field.key: field for field in schema.all_fields}
    found = (fields[key] for key in keys if key in fields)
    return next((field for field in found if not field.dtype.is_complex), None)


def _returns(storage: TrajectoryStorage, schema: Schema, field: StepField, rows: Rows) -> np.ndarray:
    number = schema.number_of(field.key)
    ends = np.cumsum(rows.lengths)
    steps = np.repeat(rows.starts - (ends - rows.lengths), rows.lengths) + np.arange(ends[-1])
    assert number is not None, "a reward is a field of steps"
    rewards = _numbers(storage.arena.copy_steps(number, steps)).reshape(len(steps), -1).sum(axis=1)
    sums: np.ndarray = np.add.reduceat(rewards, ends - rows.lengths)
    return sums


def _values(storage: TrajectoryStorage, schema: Schema, field: StepField, rows: Rows, steps: np.ndarray) -> np.ndarray:
    """Return the value of each trajectory at one of its steps, or that of the whole trajectory."""
    number = schema.number_of(field.key)
    if number is None:
        return storage.trajectory_values(field.key, rows.ids)
    return as_array(storage.arena.copy_steps(number, rows.starts + steps))


def _numbers(values: Any) -> np.ndarray:
    return values.double().numpy()


def _histogram(values: np.ndarray) -> dict[str, list[float]]:
    """Return a histogram with equal buckets: ``edges``, one more than ``counts``; as ``np.histogram``, in less time."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return {"edges": [], "counts": []}
    low, high = float(finite.min()), float(finite.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BUCKETS + 1)
    at = np.searchsorted(edges, finite, side="right") - 1
    counts = np.bincount(np.minimum(at, BUCKETS - 1), minlength=BUCKETS)  # the last bucket includes its upper edge
    return {"edges": edges.tolist(), "counts": counts.tolist()}
