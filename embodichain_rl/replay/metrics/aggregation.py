"""The figures of a buffer that are of all its processes: from the rows in shared memory, and from what it holds."""

from __future__ import annotations

import bisect
import itertools
import time
from typing import Any

import numpy as np

from embodichain_rl.replay.ledger import AGE_EDGES, HEAT_SHAPE, LAG_EDGES, MetricWord
from embodichain_rl.replay.metrics.outcomes import outcome_metrics
from embodichain_rl.replay.storage import TrajectoryStorage
from embodichain_rl.shared import process_is_alive

__all__ = ["buffer_metrics"]

W = MetricWord

UNDERDRAWN = 0.5
"""A group is underdrawn below this part of its share."""

ENOUGH_DRAWS = 200
"""The number of draws from which groups are compared with their shares."""


def buffer_metrics(storage: TrajectoryStorage) -> dict[str, Any]:
    """Return the figures of a buffer that are of all its processes; see ``embodichain_rl.monitor.METRICS``.

    Reading them takes no lock and delays nobody.

    Args:
        storage: that of the buffer, also one that is only read.
    """
    ledger = storage.ledger
    rows, counts, now = ledger.metrics.used(), ledger.stats(), time.monotonic_ns()
    steps_published = ledger.steps_published
    sums = rows.sum(axis=0)
    schema = storage.schema
    step_bytes = schema.nbytes if schema is not None else 0
    if schema is not None and schema.blobs is not None:
        step_bytes += schema.blobs.expected
    inserted, samples = counts["published"], int(sums[W.CHUNKS])
    alive = [process_is_alive(int(row[W.PID]), int(row[W.PROCESS_START])) for row in rows]
    living = rows[np.array(alive, dtype=bool)].sum(axis=0) if any(alive) else np.zeros_like(sums)
    ages, lags = sums[W.AGES : W.LAGS], sums[W.LAGS : W.HEAT]
    sample_times = sums[W.SAMPLE_TIMES : W.GROUP_VALUES]
    outcomes = outcome_metrics(storage)
    of_outcomes = outcomes.pop("histograms")
    updates = sum(_update_ns(row) for row in rows)
    busy = int(sums[W.DATA_NS]) + updates
    return {
        "fill": counts["trajectories"] / storage.max_size,
        "inserted": inserted,
        "inserted_steps": steps_published,
        "inserted_bytes": steps_published * step_bytes,
        "bytes": counts["steps"] * step_bytes,
        "batches": int(sums[W.BATCHES]),
        "samples": samples,
        "inserts_per_second": _rate(rows, W.INSERTED, W.CLAIMED_AT, W.LAST_INSERT_AT),
        "samples_per_second": _rate(rows, W.CHUNKS, W.FIRST_SAMPLE_BEGAN, W.LAST_SAMPLE_AT),
        "samples_per_insert": samples / inserted if inserted else None,
        "data_s": _mean(sums[W.DATA_NS], sums[W.BATCHES]),
        "updt_s": _mean(updates, sums[W.BATCHES] - np.count_nonzero(rows[:, W.BATCHES])),
        "starvation": float(sums[W.DATA_NS] / busy) if busy else None,
        "extend_s": _mean(sums[W.EXTEND_NS], sums[W.EXTENDS]),
        "sample_seconds_p95": _quantile(sample_times, _TIME_EDGES),
        "seconds_since_insert": _since(rows, W.LAST_INSERT_AT, now),
        "seconds_since_sample": _since(rows, W.LAST_SAMPLE_AT, now),
        "rejected_total": int(sums[W.REJECTED]),
        "truncated_total": int(sums[W.TRUNCATED]),
        "pending_trajectories_total": int(living[W.PENDING_TRAJECTORIES]),
        "pending_steps_total": int(living[W.PENDING_STEPS]),
        "redrawn_total": int(sums[W.REDRAWN]),
        "unfit_total": int(sums[W.UNFIT]),
        "padding_fraction": float(sums[W.PADDED_STEPS] / sums[W.SEEN_STEPS]) if sums[W.SEEN_STEPS] else None,
        "sampled": _sampled(rows, sums),
        **outcomes,
        **_mixture(storage, rows),
        "histograms": {
            "sampled_age": {"edges": [*_AGE_EDGES], "counts": ages.tolist()},
            "sampled_policy_lag": {"edges": [*_LAG_EDGES], "counts": lags.tolist()},
            "sample_seconds": {"edges": [*_TIME_EDGES], "counts": sample_times.tolist()},
            **of_outcomes,
        },
        "draws_by_place_and_age": sums[W.HEAT : W.SAMPLE_TIMES].reshape(HEAT_SHAPE).tolist(),
        "processes": [_process(row, lives, now) for row, lives in zip(rows, alive, strict=True)],
    }


_AGE_EDGES, _LAG_EDGES = [0.0, *AGE_EDGES.tolist()], LAG_EDGES.tolist()
_TIME_EDGES = [2.0**power / 1e9 for power in range(-1, W.GROUP_VALUES - W.SAMPLE_TIMES)]
"""The edges of the buckets of durations, in seconds."""


def _sampled(rows: np.ndarray, sums: np.ndarray) -> dict[str, Any]:
    """Return how old what was sampled was, in seconds and in policy versions; None where nothing was."""
    chunks, versioned = int(sums[W.SEEN_CHUNKS]), int(sums[W.VERSIONED])
    oldest = float(rows[:, W.AGE_MAX].max() / 1e9) if chunks else None
    farthest = int(rows[:, W.LAG_MAX].max()) if versioned else None
    # The bucket of a quantile may reach beyond the largest value.
    age, lag = _quantile(sums[W.AGES : W.LAGS], _AGE_EDGES), _quantile(sums[W.LAGS : W.HEAT], _LAG_EDGES, exact=True)
    return {
        "age_mean": float(sums[W.AGE_SUM] / chunks / 1e9) if chunks else None,
        "age_p95": age if age is None or oldest is None else min(age, oldest),
        "age_max": oldest,
        "age_span": _span(rows, W.SEEN_CHUNKS, W.AGE_MIN, W.AGE_MAX, 1e-9),
        "policy_lag_mean": float(sums[W.LAG_SUM] / versioned) if versioned else None,
        "policy_lag_p95": lag if lag is None or farthest is None else min(lag, float(farthest)),
        "policy_lag_max": farthest,
        "policy_lag_span": _span(rows, W.VERSIONED, W.LAG_MIN, W.LAG_MAX, 1),
    }


def _process(row: np.ndarray, alive: bool, now: int) -> dict[str, Any]:
    """Return what one process has done with the buffer."""
    update = _update_ns(row)
    busy = int(row[W.DATA_NS]) + update
    last = max(int(row[W.LAST_INSERT_AT]), int(row[W.LAST_SAMPLE_AT]))
    return {
        "pid": int(row[W.PID]),
        "alive": alive,
        "inserted": int(row[W.INSERTED]),
        "inserted_steps": int(row[W.INSERTED_STEPS]),
        "rejected": int(row[W.REJECTED]),
        "truncated": int(row[W.TRUNCATED]),
        "pending_trajectories": int(row[W.PENDING_TRAJECTORIES]),
        "pending_steps": int(row[W.PENDING_STEPS]),
        "batches": int(row[W.BATCHES]),
        "samples": int(row[W.CHUNKS]),
        "redrawn": int(row[W.REDRAWN]),
        "data_s": _mean(row[W.DATA_NS], row[W.BATCHES]),
        "updt_s": _mean(update, row[W.BATCHES] - 1),
        "starvation": int(row[W.DATA_NS]) / busy if busy else None,
        "extend_s": _mean(row[W.EXTEND_NS], row[W.EXTENDS]),
        "seconds_since_use": (now - last) / 1e9 if last else None,
    }


def _update_ns(row: np.ndarray) -> int:
    """Return the time of a process between its samples: what it did with them."""
    if not row[W.FIRST_SAMPLE_BEGAN]:
        return 0
    return max(0, int(row[W.LAST_SAMPLE_AT] - row[W.FIRST_SAMPLE_BEGAN] - row[W.DATA_NS]))


def _mean(nanoseconds: Any, times: Any) -> float | None:
    return float(nanoseconds) / float(times) / 1e9 if times > 0 else None


def _rate(rows: np.ndarray, count: int, first: int, last: int) -> float:
    used = rows[(rows[:, first] > 0) & (rows[:, last] > 0)]
    if not len(used):
        return 0.0
    seconds = (int(used[:, last].max()) - int(used[:, first].min())) / 1e9
    return float(used[:, count].sum() / seconds) if seconds > 0 else 0.0


def _since(rows: np.ndarray, last: int, now: int) -> float | None:
    newest = int(rows[:, last].max(initial=0))
    return (now - newest) / 1e9 if newest else None


def _span(rows: np.ndarray, count: int, low: int, high: int, unit: float) -> float | None:
    used = rows[rows[:, count] > 0]
    return float((used[:, high].max() - used[:, low].min()) * unit) if len(used) else None


def _quantile(counts: np.ndarray, edges: list[float], quantile: float = 0.95, *, exact: bool = False) -> float | None:
    """Return a quantile of a histogram, from the bucket that it is in.

    Args:
        counts: of each bucket; the last one has no upper edge.
        edges: the edges of the buckets, from the lower one of the first; if ``exact``, their values.
        quantile: 0 to 1.
        exact: whether buckets are values. Otherwise values are taken as evenly spread in their bucket.
    """
    sums = list(itertools.accumulate(counts.tolist()))
    total = sums[-1]
    if not total:
        return None
    bucket = bisect.bisect_left(sums, quantile * total)
    if exact or bucket + 1 >= len(edges):
        return edges[min(bucket, len(edges) - 1)]
    before = sums[bucket - 1] if bucket else 0
    part = (quantile * total - before) / (sums[bucket] - before)
    return edges[bucket] + part * (edges[bucket + 1] - edges[bucket])


def _mixture(storage: TrajectoryStorage, rows: np.ndarray) -> dict[str, Any]:
    """Return the shares of the groups that were asked for and drawn, and the groups that got less than half of it."""
    drawn: dict[str | int, int] = {}
    asked: dict[str | int, float] = {}
    for row in rows:
        for at in range(int(row[W.GROUPS_USED])):
            value = int(row[W.GROUP_VALUES + at])
            name = storage.texts.get(value) if row[W.GROUPS_ARE_TEXT] else value
            if name is None:  # its text has left with the last trajectory
                continue
            drawn[name] = drawn.get(name, 0) + int(row[W.GROUP_DRAWN + at])
            if row[W.GROUP_ASKED + at] >= 0:
                asked[name] = int(row[W.GROUP_ASKED + at]) / 1e6
    total = sum(drawn.values())
    shares = asked or {name: 1.0 / len(drawn) for name in drawn}
    got = {name: times / total for name, times in drawn.items()} if total else {}
    less = [name for name, share in shares.items() if got.get(name, 0.0) < UNDERDRAWN * share]
    return {"mixture_asked": shares, "mixture_drawn": got, "underdrawn": less if total >= ENOUGH_DRAWS else []}
