"""The statistics of an engine, read from the shared memory of its parts."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from embodichain_rl.engine.state import EngineChannel, Generations
from embodichain_rl.replay.buffer import TrajectoryReplayBuffer
from embodichain_rl.replay.ledger import NO_VERSION
from embodichain_rl.replay.metrics import buffer_metrics
from embodichain_rl.replay.rate_limiter import RateLimiter

__all__ = ["statistics_of"]


def statistics_of(
    channel: EngineChannel, buffer: TrajectoryReplayBuffer, limiter: RateLimiter | None
) -> dict[str, Any]:
    """Return the result of :meth:`OnlineDataEngine.stats <embodichain_rl.engine.data.OnlineDataEngine.stats>`."""
    ledger = buffer.storage.ledger
    generations = Generations(channel)
    counts = ledger.stats()
    # Read before the workers, so that a worker counted as replaced is not shown in its old state.
    restarts = channel.restarts
    workers = [channel.worker(index).stats() for index in range(channel.num_workers)]
    inserted = counts["published"] - channel.inserted_before_ready if channel.seconds_ready else 0
    seconds, samples = channel.seconds_ready, channel.chunks_sampled
    live = ledger.live_rows()
    ages = (time.monotonic_ns() - ledger.published_at(live.ids)) / 1e9
    lags = channel.policy_version - live.policy_versions[live.policy_versions != NO_VERSION]
    return {
        **buffer_metrics(buffer.storage),
        "state": channel.state.name,
        "fill": counts["trajectories"] / buffer.storage.max_size,
        "trajectories": counts["trajectories"],
        "steps": counts["steps"],
        "inserted": counts["published"],
        "evicted": counts["evicted"],
        "inserts_per_second": inserted / seconds if seconds else 0.0,
        "samples": samples,
        "samples_per_second": samples / seconds if seconds else 0.0,
        "samples_per_insert": samples / inserted if inserted else None,
        "retries": channel.chunks_redrawn,
        "rejected": sum(worker["rejected"] for worker in workers),
        "restarts": restarts,
        "generation": generations.completed(counts["published"]),
        "requested_generation": generations.requested,
        "policy_version": channel.policy_version,
        "age_newest": float(ages.min()) if len(ages) else None,
        "age_mean": float(np.mean(ages)) if len(ages) else None,
        "age_oldest": float(ages.max()) if len(ages) else None,
        "policy_lag_mean": float(np.mean(lags)) if len(lags) else None,
        "policy_lag_max": int(lags.max()) if len(lags) else None,
        **buffer.sampler.sampled_ages(buffer.storage),
        "workers": workers,
        "rate_limiter": None if limiter is None else limiter.stats(),
        **({"insert_wait_s": None, "sample_wait_s": None} if limiter is None else limiter.waited()),
    }
