"""The list of all figures: the name of each in ``stats()``, its unit and its meaning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

__all__ = ["METRICS", "PROCESS_METRICS", "WORKER_METRICS", "Metric", "numbers"]

Where = Literal["both", "buffer", "engine"]


class Metric(NamedTuple):
    """One figure."""

    name: str
    """Its key in ``stats()``; a dot leads into a nested dict."""
    unit: str
    """Such as ``"s"``, ``"trajectories"`` or ``"1"`` for a share; ``""`` for what is no number."""
    meaning: str
    where: Where = "both"
    """Whether ``rb.stats()``, ``engine.stats()`` or both have it."""
    counts: bool = False
    """Whether it only grows, as a counter of Prometheus."""


METRICS: tuple[Metric, ...] = (
    # What is in the buffer.
    Metric("trajectories", "trajectories", "live trajectories"),
    Metric("steps", "steps", "steps of the live trajectories"),
    Metric("bytes", "bytes", "of these steps, with ragged and encoded values of the expected size"),
    Metric("fill", "1", "live trajectories as a share of max_trajectories"),
    Metric("length_mean", "steps", "mean length of the newest 1,000 live trajectories"),
    Metric("length_min", "steps", "the shortest of them"),
    Metric("length_max", "steps", "the longest of them"),
    Metric("return_mean", "reward", "mean sum of rewards of the newest 1,000 live trajectories"),
    Metric("return_min", "reward", "the smallest of them"),
    Metric("return_max", "reward", "the largest of them"),
    Metric("success_rate", "1", "share of the newest 1,000 live trajectories that succeeded, by their last step"),
    Metric("success_by_task", "1", "the same for each task"),
    # What came in.
    Metric("inserted", "trajectories", "published, by all processes", counts=True),
    Metric("inserted_steps", "steps", "published, by all processes", counts=True),
    Metric("inserted_bytes", "bytes", "published, by all processes", counts=True),
    Metric("evicted", "trajectories", "evicted to make room", counts=True),
    Metric("rejected_total", "trajectories", "not accepted, in all processes", counts=True),
    Metric("truncated_total", "trajectories", "ended without an end flag, in all processes", counts=True),
    Metric("pending_trajectories_total", "trajectories", "unfinished ones that living processes hold"),
    Metric("pending_steps_total", "steps", "steps of these"),
    Metric("inserts_per_second", "trajectories/s", "mean rate since the first one; of an engine, since it was ready"),
    Metric("extend_s", "s", "mean duration of a call of extend()"),
    Metric("seconds_since_insert", "s", "since the last call of extend() of any process"),
    # What was sampled.
    Metric("batches", "batches", "sampled by all processes", counts=True),
    Metric("samples", "chunks", "sampled by all processes", counts=True),
    Metric("samples_per_second", "chunks/s", "mean rate since the first one; of an engine, since it was ready"),
    Metric("samples_per_insert", "chunks", "for each trajectory inserted; of an engine, since it was ready"),
    Metric("data_s", "s", "mean duration of sample(): the learner waits for data"),
    Metric("updt_s", "s", "mean time between two samples of a process: the learner works"),
    Metric("starvation", "1", "the time in sample() as a share of the time since the first one"),
    Metric("sample_seconds_p95", "s", "95 % of the sample() calls that were looked into took at most so long"),
    Metric("seconds_since_sample", "s", "since the last batch of any process"),
    Metric("redrawn_total", "chunks", "drawn again, since their trajectory was evicted meanwhile", counts=True),
    Metric("unfit_total", "draws", "that hit a trajectory without what was asked for", counts=True),
    Metric("padding_fraction", "1", "padding as a share of the sampled steps"),
    Metric("sampled.age_mean", "s", "age of the trajectories of sampled chunks, at the time of sampling"),
    Metric("sampled.age_p95", "s", "95 % of them are at most so old"),
    Metric("sampled.age_max", "s", "the oldest"),
    Metric("sampled.age_span", "s", "between the youngest and the oldest"),
    Metric("sampled.policy_lag_mean", "versions", "policy versions of sampled chunks behind the newest live one"),
    Metric("sampled.policy_lag_p95", "versions", "95 % of them are at most so far behind"),
    Metric("sampled.policy_lag_max", "versions", "the farthest behind"),
    Metric("sampled.policy_lag_span", "versions", "between the least and the farthest behind"),
    Metric("mixture_asked", "1", "share of each group that was asked for"),
    Metric("mixture_drawn", "1", "share of each group that was drawn"),
    Metric("underdrawn", "", "groups drawn less than half their share, after 200 draws: a bias"),
    # Distributions.
    Metric("histograms", "", "edges and counts of sampled_age, sampled_policy_lag, sample_seconds, length and return"),
    Metric("draws_by_place_and_age", "chunks", "20 places in the trajectory, each by 24 ages: where chunks were drawn"),
    # Who.
    Metric("processes", "", "a row for each process that wrote or sampled; see PROCESS_METRICS"),
    # Only of a buffer.
    Metric("published", "trajectories", "the same as inserted", "buffer", True),
    Metric("evicted_early", "trajectories", "evicted within the limits, as the head-room was used up", "buffer", True),
    Metric("pinned", "trajectories", "that are never evicted", "buffer"),
    Metric("discarded", "trajectories", "thrown out by rb.discard()", "buffer", True),
    Metric("reclaimed", "reservations", "of processes that died while they wrote", "buffer", True),
    Metric("writing", "trajectories", "that are being copied into the buffer at this moment", "buffer"),
    Metric("nbytes_per_step", "bytes", "of a stored step", "buffer"),
    Metric("bytes_expected", "bytes", "that a full buffer takes", "buffer"),
    Metric("bytes_at_most", "bytes", "that the buffer can take", "buffer"),
    Metric("bytes_used", "bytes", "that the buffer takes now", "buffer"),
    Metric("pending_steps", "steps", "of unfinished trajectories of this process", "buffer"),
    Metric("pending_trajectories", "trajectories", "unfinished ones of this process", "buffer"),
    Metric("pending_bytes", "bytes", "of unfinished trajectories of this process", "buffer"),
    Metric("truncated", "trajectories", "ended without an end flag by this process", "buffer", True),
    Metric("redrawn", "chunks", "drawn again by this process", "buffer", True),
    Metric("unfit", "draws", "of this process that hit a trajectory without what was asked for", "buffer", True),
    Metric("mixture", "1", "share of the draws of this process that each group had", "buffer"),
    Metric("passes", "passes", "that this process has begun, without replacement", "buffer", True),
    Metric(
        "rejected", "trajectories", "of this process that were not accepted; of an engine, of its workers", counts=True
    ),
    Metric("size", "trajectories", "len(rb), in what the buffer counts", "buffer"),
    Metric("capacity", "trajectories", "the most that size can be", "buffer"),
    Metric("utilization", "1", "size as a share of capacity", "buffer"),
    Metric("write_count", "steps", "rb.write_count", "buffer"),
    Metric("initialized", "", "whether memory is allocated", "buffer"),
    Metric("prefetch_queue_size", "batches", "sampled ahead", "buffer"),
    # Of what this process has sampled, exactly.
    Metric("sampled_age_mean", "s", "mean age of what this process has sampled"),
    Metric("sampled_age_max", "s", "the largest"),
    Metric("sampled_policy_lag_mean", "versions", "mean policy lag of what this process has sampled"),
    Metric("sampled_policy_lag_max", "versions", "the largest"),
    # Only of an engine.
    Metric("state", "", "CREATED, STARTING, READY, STOPPED or FAILED", "engine"),
    Metric("retries", "chunks", "drawn again by consumers of the engine", "engine", True),
    Metric("restarts", "workers", "that were lost and replaced", "engine", True),
    Metric("policy_version", "versions", "weight updates", "engine", True),
    Metric("generation", "generations", "the newest complete one", "engine", True),
    Metric("requested_generation", "generations", "the newest that was requested", "engine", True),
    Metric("age_newest", "s", "age of the newest trajectory in the buffer", "engine"),
    Metric("age_mean", "s", "mean age of the trajectories in the buffer", "engine"),
    Metric("age_oldest", "s", "age of the oldest", "engine"),
    Metric("policy_lag_mean", "versions", "that the trajectories in the buffer are behind", "engine"),
    Metric("policy_lag_max", "versions", "the largest", "engine"),
    Metric("insert_wait_s", "s", "that workers have waited for the learner, in all: back-pressure", "engine", True),
    Metric("sample_wait_s", "s", "that consumers have waited for the rate limiter, in all", "engine", True),
    Metric("rate_limiter", "", "the counters of the rate limiter", "engine"),
    Metric("workers", "", "a row for each worker; see WORKER_METRICS", "engine"),
    Metric("nodes", "", "a row for each node of a cluster", "engine"),
)
"""All figures of ``rb.stats()`` and ``engine.stats()``."""

WORKER_METRICS: tuple[Metric, ...] = (
    Metric("pid", "", "process id; 0 before it runs"),
    Metric("phase", "", "absent (importing), building (its environment), built (first reset), acting"),
    Metric("collector", "", "what collects, and why nothing faster"),
    Metric("steps", "steps", "taken", counts=True),
    Metric("steps_per_second", "steps/s", "since its environment was built"),
    Metric("pending_steps", "steps", "of unfinished trajectories"),
    Metric("trajectories", "episodes", "written", counts=True),
    Metric("rejected", "episodes", "not accepted", counts=True),
    Metric("failed_attempts", "plans", "of demonstrations that failed", counts=True),
    Metric("restarts", "times", "that it was lost and replaced", counts=True),
    Metric("seconds_since_heartbeat", "s", "since it last showed that it is alive"),
    Metric("last_error", "", "why a process of it was lost last"),
    Metric("policy_version", "versions", "of the policy that it received last"),
    Metric("held", "", "whether it pauses, since the engine holds its producers"),
)
"""The figures of one worker of an engine, ``engine.stats()["workers"][i]``."""

PROCESS_METRICS: tuple[Metric, ...] = (
    Metric("pid", "", "process id"),
    Metric("alive", "", "whether it still runs"),
    Metric("inserted", "trajectories", "published", counts=True),
    Metric("inserted_steps", "steps", "published", counts=True),
    Metric("rejected", "trajectories", "not accepted", counts=True),
    Metric("truncated", "trajectories", "ended without an end flag", counts=True),
    Metric("pending_trajectories", "trajectories", "unfinished"),
    Metric("pending_steps", "steps", "of these"),
    Metric("batches", "batches", "sampled", counts=True),
    Metric("samples", "chunks", "sampled", counts=True),
    Metric("redrawn", "chunks", "drawn again", counts=True),
    Metric("data_s", "s", "mean duration of sample()"),
    Metric("updt_s", "s", "mean time between two samples"),
    Metric("starvation", "1", "the time in sample() as a share of the time since the first one"),
    Metric("extend_s", "s", "mean duration of extend()"),
    Metric("seconds_since_use", "s", "since it last wrote or sampled"),
)
"""The figures of one process, ``stats()["processes"][i]``."""


def numbers(stats: Mapping[str, Any]) -> Iterator[tuple[Metric, dict[str, str], float]]:
    """Yield every number in ``stats()``: its metric, its labels, and its value.

    Numbers of a group, a task, a worker or a process have a label that says which. What is None is left out.

    Args:
        stats: of a buffer or an engine.

    Example:
        >>> stats = {"fill": 0.5, "success_by_task": {"lift": 1.0}}
        >>> [(metric.name, labels, value) for metric, labels, value in numbers(stats)]
        [('fill', {}, 0.5), ('success_by_task', {'task': 'lift'}, 1.0)]
    """
    for metric in METRICS:
        value = _at(stats, metric.name)
        if metric.name in ("workers", "processes"):
            rows, label = (WORKER_METRICS, "worker") if metric.name == "workers" else (PROCESS_METRICS, "process")
            for index, row in enumerate(value or ()):
                labels = {label: str(index if label == "worker" else row["pid"])}
                for of_row in rows:
                    if _is_number(row.get(of_row.name)) and of_row.name != "pid":
                        named = of_row._replace(name=f"{label}.{of_row.name}")
                        yield named, labels, float(row[of_row.name])
        elif metric.name == "underdrawn":
            if value is not None:
                yield metric, {}, float(len(value))
        elif isinstance(value, Mapping) and metric.unit == "1":
            label = "task" if metric.name == "success_by_task" else "group"
            for name, share in value.items():
                yield metric, {label: str(name)}, float(share)
        elif _is_number(value):
            yield metric, {}, float(value)


def _at(stats: Mapping[str, Any], name: str) -> Any:
    value: Any = stats
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
