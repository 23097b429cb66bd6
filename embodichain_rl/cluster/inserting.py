"""Writing of trajectories that another machine has produced: the rate limiter acts here, for each of them."""

from __future__ import annotations

from embodichain_rl.cluster.messages import Received
from embodichain_rl.engine.state import Generations, WorkerRecord
from embodichain_rl.replay.rate_limiter import RateLimiter
from embodichain_rl.replay.storage import TrajectoryStorage

__all__ = ["MessageWriter"]


class MessageWriter:
    """Writes the trajectories of one producer to the engine's storage.

    Args:
        record: the record of the producer.
        limiter: the rate limiter; None means no pacing.
        storage: the storage.
    """

    def __init__(self, record: WorkerRecord, limiter: RateLimiter | None, storage: TrajectoryStorage) -> None:
        self._record = record
        self._limiter = limiter
        self._storage = storage

    def has_turn(self) -> bool:
        """Return whether a trajectory may be written now."""
        channel = self._record.channel
        if channel.held:
            return False
        generations = Generations(channel)
        if generations.manual:
            return self._record.claim_turn(self._published, generations.target)
        if self._limiter is None or self._published() < generations.target:
            return True
        return self._limiter.wait_to_insert(0.0)

    def insert(self, trajectory: Received) -> None:
        """Write a trajectory, and count it."""
        self._storage.write([trajectory.piece], trajectory.of_trajectory, policy_version=trajectory.policy_version)
        if self._limiter is not None:
            self._limiter.count_insert(1)
        self._record.count_written(trajectory.steps)

    def _published(self) -> int:
        return self._storage.ledger.live_range()[1]
