"""A Prometheus endpoint over an engine or a buffer, by prometheus_client (extra ``prometheus``)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from embodichain_rl.errors import SharingError
from embodichain_rl.monitor.extras import needing
from embodichain_rl.monitor.metrics import Metric, numbers
from embodichain_rl.monitor.source import Source, Watchable, watched

__all__ = ["PrometheusServer", "prometheus_name", "serve_prometheus"]

PREFIX = "embodichain_rl_"
HISTOGRAMS = {
    "sampled_age": "sampled_age_seconds",
    "sampled_policy_lag": "sampled_policy_lag_versions",
    "sample_seconds": "sample_duration_seconds",
}
"""The fixed-bucket histograms, and their names."""

UNITS = {"s": "seconds", "bytes": "bytes", "1": "ratio"}


def prometheus_name(metric: Metric) -> str:
    """Return the name of a metric for Prometheus: with its unit, and ``_total`` if it only grows.

    Args:
        metric: one of ``METRICS``.

    Example:
        >>> from embodichain_rl.monitor import METRICS
        >>> [prometheus_name(metric) for metric in METRICS if metric.name in ("fill", "inserted", "data_s")]
        ['embodichain_rl_fill_ratio', 'embodichain_rl_inserted_total', 'embodichain_rl_data_seconds']
    """
    name = metric.name.replace(".", "_")
    unit = UNITS.get(metric.unit, "")
    name = name.removesuffix("_s")
    if unit and unit not in name:
        name = f"{name}_{unit}"
    if metric.counts and not name.endswith("_total"):
        name = f"{name}_total"
    return PREFIX + name


class _Collector:
    """Reads the source whenever Prometheus asks."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._lock = threading.Lock()

    def describe(self) -> list[Any]:
        return []  # so that registering it reads nothing

    def collect(self) -> Iterator[Any]:
        core = needing("prometheus", "prometheus_client.core")
        up = core.GaugeMetricFamily(PREFIX + "up", "Whether the engine or the buffer can be read.")
        with self._lock:
            try:
                stats = self._source.read().stats
            except SharingError:
                up.add_metric([], 0.0)
                yield up
                return
        up.add_metric([], 1.0)
        yield up
        families: dict[str, Any] = {}
        for metric, labels, value in numbers(stats):
            name = prometheus_name(metric)
            if name not in families:
                kind = core.CounterMetricFamily if metric.counts else core.GaugeMetricFamily
                families[name] = kind(name, metric.meaning, labels=[*labels])
            families[name].add_metric([*labels.values()], value)
        yield from families.values()
        for name, shown in HISTOGRAMS.items():
            yield _histogram(core, PREFIX + shown, stats["histograms"][name])


def _histogram(core: Any, name: str, content: dict[str, list[float]]) -> Any:
    counts = content["counts"]
    edges = content["edges"][-len(counts) + 1 :]  # the upper ones; the last bucket has none
    buckets, total, about = [], 0.0, 0.0
    for edge, count in zip([*map(str, edges), "+Inf"], counts, strict=True):
        total += count
        about += count * (float(edge) if edge != "+Inf" else float(edges[-1]))
        buckets.append((edge, total))
    return core.HistogramMetricFamily(name, "Of the batches that were looked into.", buckets=buckets, sum_value=about)


class PrometheusServer:
    """A running endpoint.

    Attributes:
        port (int): its port.
        url (str): its address.
    """

    def __init__(self, server: Any, thread: threading.Thread, host: str) -> None:
        self._server, self._thread = server, thread
        self.port: int = server.server_port
        self.url = f"http://{host}:{self.port}/metrics"

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> PrometheusServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve_prometheus(
    engine_or_buffer: Watchable | Source, port: int = 9464, host: str = "127.0.0.1"
) -> PrometheusServer:
    """Serve the figures of an engine or a buffer to Prometheus, on a thread. They are read when Prometheus asks.

    Args:
        engine_or_buffer: of this process, or a :class:`Source` that is attached to another one.
        port: the port; 0 for any that is free.
        host: the address to listen on. The default can be reached from this machine only.

    Returns:
        The endpoint, which ends with ``close()`` or with the process.

    Raises:
        MissingPackageError: without prometheus_client.
        OSError: if the port is in use.

    Example:
        >>> rb = TrajectoryReplayBuffer(max_trajectories=2, max_total_steps=100, chunk_size=4)
        >>> with serve_prometheus(rb, port=0) as server:
        ...     server.url.startswith("http://127.0.0.1:")
        True
    """
    client = needing("prometheus", "prometheus_client")
    source = watched(engine_or_buffer)
    registry = client.CollectorRegistry()
    registry.register(_Collector(source))
    server, thread = client.start_http_server(port, addr=host, registry=registry)
    return PrometheusServer(server, thread, host)
