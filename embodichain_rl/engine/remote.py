"""What a cluster provides, so that an engine's workers can run on other machines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

__all__ = ["Cluster", "RemoteProducers", "RemoteStatus"]


class RemoteStatus(ABC):
    """The status of the workers on other machines, in memory that all processes of an engine share."""

    @abstractmethod
    def nodes(self) -> list[dict[str, Any]]:
        """Return one dict for each machine; see ``EngineReader.stats``."""


class RemoteProducers(ABC):
    """The connection of one engine to the machines on which its workers run."""

    @abstractmethod
    def producer(self, index: int, attempt: int, wake: Callable[[], None]) -> Any:
        """Return a :class:`~embodichain_rl.engine.workers.Producer` on another machine, which is not started yet."""

    @abstractmethod
    def close(self) -> None:
        """End the connection, after all producers were closed."""


class Cluster(ABC):
    """Base class of the configuration of a cluster, on whose machines an engine runs its workers."""

    @abstractmethod
    def status(self, num_workers: int) -> RemoteStatus:
        """Return the memory for the status of so many workers. Called when the engine is made."""

    @abstractmethod
    def producers(self, plan: Any, status: Any, seconds: float) -> RemoteProducers:
        """Return the connection for the workers of an engine. Called when the engine starts; it does not wait.

        Args:
            plan: the :class:`~embodichain_rl.engine.workers.Plan` of the engine.
            status: what :meth:`status` returned.
            seconds: time in which the workers must have started.

        Raises:
            MissingPackageError: a package that the cluster needs is not installed.
        """
