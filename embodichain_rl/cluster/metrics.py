"""The rows of ``stats()["nodes"]`` as metrics of Ray, which its dashboard and Prometheus show."""

from __future__ import annotations

from typing import Any

from embodichain_rl.cluster.status import ClusterStatus

__all__ = ["ClusterMetrics"]


class ClusterMetrics:
    """Reports the status of the workers to Ray, by machine (``peer``).

    Args:
        status: the status of the workers.
    """

    def __init__(self, status: ClusterStatus) -> None:
        from ray.util.metrics import Counter, Gauge

        self._status = status
        tags = ("peer",)
        self._counters = {
            "bytes": Counter("embodichain_rl_received_bytes", "Payload received from a machine.", tags),
            "messages": Counter("embodichain_rl_received_messages", "Messages received from a machine.", tags),
        }
        self._gauges = {
            "in_flight": Gauge("embodichain_rl_in_flight", "Messages that are requested or not written yet.", tags),
            "lag": Gauge("embodichain_rl_lag_seconds", "From the end of an episode to the buffer.", tags),
        }
        self._reported: dict[tuple[str, str], int] = {}

    def report(self) -> None:
        """Report the current values."""
        for row in self._status.nodes():
            tags: dict[str, Any] = {"peer": row["node"]}
            for name, counter in self._counters.items():
                new = row[name] - self._reported.get((row["node"], name), 0)
                if new > 0:
                    counter.inc(new, tags)
                self._reported[row["node"], name] = row[name]
            for name, gauge in self._gauges.items():
                gauge.set(row[name], tags)
