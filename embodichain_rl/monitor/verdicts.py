"""What the figures mean: is the learner starving, is the data stale, which worker is sick, is the mixture biased."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from embodichain_rl.monitor.source import Reading

__all__ = ["Verdict", "duration", "verdicts"]

Level = Literal["good", "warning", "bad"]

STARVING, HUNGRY = 0.5, 0.2
"""The learner starves, or is held up, if it waits more than this share of its time for data."""

SILENT, LATE = 10.0, 2.0
"""Seconds without a heartbeat after which a worker is sick, or suspicious."""


class Verdict(NamedTuple):
    """One answer."""

    subject: str
    level: Level
    text: str


def verdicts(reading: Reading) -> list[Verdict]:
    """Return the answers to what one asks first: learner, workers, data, draws.

    Args:
        reading: what was seen.
    """
    stats = reading.stats
    found = [_learner(reading), *_workers(stats), _data(stats)]
    if stats["underdrawn"]:
        groups = ", ".join(map(str, stats["underdrawn"]))
        found.append(Verdict("draws", "warning", f"biased: less than half its share for {groups}"))
    elif stats["mixture_drawn"]:
        found.append(Verdict("draws", "good", "every group gets its share"))
    return found


def _learner(reading: Reading) -> Verdict:
    stats = reading.stats
    if not stats["batches"]:
        return Verdict("learner", "warning", "nothing was sampled yet")
    since = stats["seconds_since_sample"] or 0.0
    if since > max(10.0, 20 * (stats["updt_s"] or 0.0)):
        return Verdict("learner", "warning", f"the last batch was {duration(since)} ago")
    starvation = reading.rates.get("starvation", stats["starvation"])
    text = f"waits {starvation:.0%} of its time for data"
    if stats.get("insert_wait_s") is not None and stats["rate_limiter"]["waiting_producers"]:
        text += f"; {stats['rate_limiter']['waiting_producers']} workers wait for it"
    level: Level = "bad" if starvation > STARVING else "warning" if starvation > HUNGRY else "good"
    return Verdict("learner", level, text)


def _workers(stats: dict[str, Any]) -> list[Verdict]:
    if "workers" not in stats:
        return []
    if stats["state"] == "FAILED":
        return [Verdict("workers", "bad", "the engine has failed")]
    sick = []
    for index, worker in enumerate(stats["workers"]):
        silent = worker["seconds_since_heartbeat"]
        if worker["phase"] == "absent":
            sick.append(f"worker {index} " + ("was lost, and starts again" if worker["restarts"] else "is starting"))
        elif silent > LATE and not worker["held"] and worker["phase"] == "acting":
            sick.append(f"worker {index} is silent for {duration(silent)}")
    lost = [index for index, worker in enumerate(stats["workers"]) if worker["last_error"]]
    silent = any(worker["seconds_since_heartbeat"] > SILENT for worker in stats["workers"])
    if sick:
        return [Verdict("workers", "bad" if silent else "warning", "; ".join(sick))]
    number = len(stats["workers"])
    acting = sum(worker["phase"] == "acting" for worker in stats["workers"])
    text = f"{acting} of {number} collect"
    if lost:
        text += f"; replaced: {stats['restarts']} (last: worker {lost[-1]})"
    return [Verdict("workers", "good" if acting == number and not lost else "warning", text)]


def _data(stats: dict[str, Any]) -> Verdict:
    sampled = stats["sampled"]
    if not stats["trajectories"]:
        return Verdict("data", "warning", "the buffer is empty")
    if sampled["age_mean"] is None:
        return Verdict("data", "good", f"{stats['trajectories']:,} trajectories")
    text = f"sampled at an age of {duration(sampled['age_mean'])}, 95 % up to {duration(sampled['age_p95'])}"
    if sampled["policy_lag_max"]:
        text += f", {sampled['policy_lag_mean']:.1f} policy versions behind (at most {sampled['policy_lag_max']})"
    since = stats["seconds_since_insert"]
    if since is not None and since > 60.0:
        return Verdict("data", "warning", f"nothing new for {duration(since)}; {text}")
    return Verdict("data", "good", text)


def duration(seconds: float | None) -> str:
    """Return a time in the unit that reads best.

    Example:
        >>> duration(0.0021), duration(3.0), duration(200.0), duration(None)
        ('2.1 ms', '3.0 s', '3.3 min', '–')
    """
    if seconds is None:
        return "–"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1.0:
        return f"{seconds * 1e3:.{1 if seconds < 0.01 else 0}f} ms"
    if seconds < 120.0:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200.0 else f"{seconds / 3600:.1f} h"
