"""The connection to a Ray cluster: it is made once its head answers, and the head is watched from then on."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from embodichain_rl.cluster.options import ClusterOptions
from embodichain_rl.errors import ClusterConnectionError
from embodichain_rl.shared import Deadline

__all__ = ["FIRST_PATIENCE", "WORKER_NICENESS", "ClusterConnection"]

CHECK_INTERVAL = 0.5
"""Seconds between two connections to the cluster's head."""

CONNECTION_TIMEOUT = 1.0
"""Seconds in which the cluster's head must accept a connection."""

FIRST_PATIENCE = 15.0
"""Seconds in which a cluster must answer at its address for the first time."""

WORKER_NICENESS = "RAY_worker_niceness"
"""The environment variable of a node's Ray for the niceness of its workers, by default 15: all other programs of the
machine come first."""


class ClusterConnection:
    """Connects this process to a Ray cluster, and watches its head: Ray itself would retry for minutes.

    Args:
        cluster: the configuration of the cluster.
        patience: seconds in which the cluster must answer.
        on_wait: called while it waits, several times a second; what it raises ends the wait.

    Attributes:
        ray: the module ``ray``, connected.

    Raises:
        ClusterConnectionError: when the cluster does not answer in time.
    """

    def __init__(self, cluster: ClusterOptions, patience: float, on_wait: Callable[[], None]) -> None:
        self._cluster = cluster
        self._on_wait = on_wait
        self._lost: str | None = None
        deadline, address = Deadline(patience), cluster.address
        if address != "local":
            self._wait_for_head(_own_cluster() if address == "auto" else address, deadline)
        self.ray = self._connected(deadline)
        self._host, self._port = _host_and_port(self.ray.get_runtime_context().gcs_address)
        threading.Thread(target=self._watch_head, name="embodichain-rl-head-watch", daemon=True).start()

    @property
    def head(self) -> str:
        """The address of the cluster's head."""
        return f"{self._host}:{self._port}"

    def lost(self) -> ClusterConnectionError | None:
        """Return the error to raise when the head does not answer any more; None while it does."""
        if self._lost is None:
            return None
        return ClusterConnectionError(
            f"The head of the cluster at {self.head} does not answer any more: {self._lost}. Look whether its process "
            "gcs_server runs, and start it again (`ray start`)."
        )

    def _wait_for_head(self, address: str | None, deadline: Deadline) -> None:
        """Wait until the head of the cluster accepts connections."""
        if address is None:
            return  # Ray says so at once
        host, port = _host_and_port(address)
        while True:
            self._on_wait()
            problem = _refused(host, port)
            if problem is None:
                break
            if deadline.left() <= CHECK_INTERVAL:
                raise ClusterConnectionError(_no_cluster(address, problem))
            time.sleep(CHECK_INTERVAL)
        if host in ("localhost", "127.0.0.1", "::1"):
            # Ray takes it for the address of this machine in the network, at which a cluster on loopback does not
            # answer. It reads this variable when it is imported, which TorchRL may have done.
            found: list[Any] = []
            with contextlib.suppress(OSError):  # it may have no name in the network
                found = socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)
            others = {str(info[4][0]) for info in found}
            if all(_refused(other, port) is not None for other in others if not other.startswith("127.")):
                from ray._private import ray_constants

                ray_constants.ENABLE_RAY_CLUSTER = False
                os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

    def _connected(self, deadline: Deadline) -> ModuleType:
        import ray

        address, runtime_env = self._cluster.address, self._cluster.runtime_env
        options: dict[str, Any] = {"logging_level": logging.WARNING, **self._cluster.init_options}
        if address == "local":
            options.setdefault("include_dashboard", False)
            # A learner that keeps the cores of this machine busy would starve workers with Ray's niceness. Those of an
            # engine without a cluster have the usual one, too.
            os.environ.setdefault(WORKER_NICENESS, "0")
        while True:
            try:
                ray.init(address=address, runtime_env=None if runtime_env is None else dict(runtime_env), **options)
                return ray
            except Exception as error:  # Ray raises all kinds, also plain ones
                if isinstance(error, ValueError) or deadline.left() <= CHECK_INTERVAL:
                    raise ClusterConnectionError(_no_cluster(address, f"{type(error).__name__}: {error}")) from error
                self._on_wait()
                time.sleep(CHECK_INTERVAL)

    def _watch_head(self) -> None:
        failed = 0
        while self._lost is None:
            problem = _refused(self._host, self._port)
            failed = 0 if problem is None else failed + 1
            if failed >= 2:
                self._lost = problem
            time.sleep(CHECK_INTERVAL)


def _no_cluster(address: str, problem: str) -> str:
    return (
        f"Got no Ray cluster at address={address!r}: {problem}. Start one on its head with `ray start --head`, make "
        "this machine a node of it with `ray start --address=host:port`, or correct the address."
    )


def _own_cluster() -> str | None:
    """Return the address of the cluster of which this machine is a node; None if Ray has noted none."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        with contextlib.suppress(OSError):
            folder = os.environ.get("RAY_TMPDIR", "/tmp")
            address = Path(folder, "ray", "ray_current_cluster").read_text().strip()
    return address if address and re.fullmatch(r"[^/]+:\d+", address) else None


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _refused(host: str, port: int) -> str | None:
    """Return why there is no connection to a port; None if there is one."""
    try:
        socket.create_connection((host, port), CONNECTION_TIMEOUT).close()
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return None
