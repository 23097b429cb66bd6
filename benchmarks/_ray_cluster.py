"""A Ray cluster of several raylets on this machine, on loopback only, and Ray's count of what it spilled to disk."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# The addresses of nodes are those of the loopback interface. Ray reads this when it is imported, which TorchRL does.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
if "ray" in sys.modules:
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = False

__all__ = ["OBJECT_STORE", "local_cluster", "spilled_mebibytes", "start_head"]

OBJECT_STORE = 200 << 20
"""Bytes of the object store of each node."""


@contextmanager
def local_cluster(nodes: int = 2, cpus: int = 2) -> Iterator[Any]:
    """Start a cluster, and end all its processes afterwards."""
    node = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": OBJECT_STORE}
    cluster = start_head({**node, "node_ip_address": "127.0.0.1"})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=cpus, object_store_memory=OBJECT_STORE)
        yield cluster
    finally:
        cluster.shutdown()


def start_head(node: dict[str, Any]) -> Any:
    """Start a cluster of one machine. Ray gives it 30 s, which a busy machine may not have: try again."""
    from ray.cluster_utils import Cluster

    for left in reversed(range(5)):
        try:
            return Cluster(initialize_head=True, head_node_args=node)
        except Exception as error:
            if "timed out during startup" not in str(error) or not left:
                raise
    raise AssertionError


def spilled_mebibytes(address: str) -> float:
    """Return how much the nodes of a cluster have spilled to disk so far, in MiB."""
    from ray._private.internal_api import memory_summary

    found = re.search(r"Spilled (\d+) MiB", memory_summary(address, stats_only=True))
    return 0.0 if found is None else float(found[1])
