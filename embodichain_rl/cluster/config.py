"""``RayCluster``: which Ray cluster an engine's workers run on, and what each of them needs there."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from typing import Any

from embodichain_rl.cluster.options import ClusterOptions
from embodichain_rl.cluster.status import ClusterStatus
from embodichain_rl.engine.remote import Cluster, RemoteProducers
from embodichain_rl.errors import MissingPackageError

__all__ = ["RayCluster", "check_ray"]

OLDEST_RAY = (2, 60)
"""The oldest version of Ray that is supported."""


@dataclass(frozen=True)
class RayCluster(ClusterOptions, Cluster):
    """A Ray cluster, on whose machines the workers of an engine run.

    The learner's machine must be a node of the cluster (``ray start``). It connects through the gateway, a child
    process; the learner's own process does not import Ray.

    Args:
        address: the address of the cluster: ``"auto"``, the default, is the one of which this machine is a node, or
            ``RAY_ADDRESS``; ``"host:port"`` that of its head; ``"local"`` starts one for this engine, on this machine.
        worker_options: the options of each worker's actor: ``num_cpus``, ``num_gpus``, ``memory``, ``resources``,
            ``label_selector``, ``scheduling_strategy`` and others of ``ray.remote``. By default ``{"num_cpus": 1}``.
        runtime_env: Ray's runtime environment of the job, such as ``{"working_dir": ".", "pip": [...]}``. The machines
            need this library, and the modules of the environment and the policy. Functions that are defined in the
            main script are sent.
        message_bytes: the size at which a message of trajectories is sent, in bytes. Each has whole trajectories, at
            least one. A message is sent after one second however small it is. Default 1 MiB.
        in_flight: the largest number of messages of each worker that are requested or not written to the buffer yet.
            Default 2.
        init_options: further arguments of ``ray.init`` in the gateway, such as ``object_store_memory`` with
            ``address="local"``.
        autoscaling: whether the cluster adds machines on demand. Then workers for which no machine has the resources
            are waited for until ``initialization_timeout``; else they are refused after some seconds.

    Raises:
        ConfigError: a field is invalid. The message names it.

    Example:
        >>> RayCluster(worker_options={"num_cpus": 1}, message_bytes=1 << 20).address
        'auto'
    """

    def status(self, num_workers: int) -> ClusterStatus:
        """Return the memory for the status of so many workers."""
        return ClusterStatus(num_workers)

    def producers(self, plan: Any, status: Any, seconds: float) -> RemoteProducers:
        """Return the connection for the workers of an engine.

        Raises:
            MissingPackageError: Ray is not installed, or too old.
        """
        check_ray()
        from embodichain_rl.cluster.link import GatewayLink

        return GatewayLink(self, plan, status, seconds)


def check_ray() -> None:
    """Check that Ray is installed, without importing it.

    Raises:
        MissingPackageError: it is not, or is too old.
    """
    needed = ".".join(map(str, OLDEST_RAY))
    install = "Install it with pip install 'embodichain-rl[ray]'."
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        raise MissingPackageError(f"Got no package 'ray', which a RayCluster needs. {install}") from None
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_RAY:
        raise MissingPackageError(f"Got ray {version}; a RayCluster needs {needed} or newer. {install}")
