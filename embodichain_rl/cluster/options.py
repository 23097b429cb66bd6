"""The options of a connection to a Ray cluster, and their checks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from embodichain_rl._checks import checked_int
from embodichain_rl.errors import ConfigError, InvalidArgumentError

__all__ = ["ClusterOptions"]

OPTIONS_OF_THE_ENGINE = (
    "max_restarts",
    "max_task_retries",
    "concurrency_groups",
    "max_concurrency",
    "name",
    "lifetime",
)
"""Options of actors that would break what the engine promises: it replaces lost workers itself, without duplicates."""


@dataclass(frozen=True)
class ClusterOptions:
    """The fields of a :class:`~embodichain_rl.cluster.RayCluster`, which explains them."""

    address: str = "auto"
    worker_options: Mapping[str, Any] = field(default_factory=dict)
    runtime_env: Mapping[str, Any] | None = None
    message_bytes: int = 1 << 20
    in_flight: int = 2
    init_options: Mapping[str, Any] = field(default_factory=dict)
    autoscaling: bool = False

    def __post_init__(self) -> None:
        try:
            checked_int("message_bytes", self.message_bytes, minimum=1)
            checked_int("in_flight", self.in_flight, minimum=1)
        except InvalidArgumentError as error:
            raise ConfigError(str(error)) from None
        address: Any = self.address
        if not isinstance(address, str) or not address:
            raise ConfigError(f"address must be 'auto', 'local' or 'host:port', got {address!r}.")
        if address.startswith("ray://"):
            raise ConfigError(
                f"address={address!r} is a Ray Client, which copies all data through a proxy. Make this machine a node "
                "of the cluster (`ray start --address=host:port`) and give address='auto'."
            )
        if address not in ("auto", "local") and not re.fullmatch(r".+:\d+", address):
            raise ConfigError(f"address must be 'auto', 'local' or 'host:port', got {address!r}.")
        for name in ("worker_options", "init_options"):
            self._check_options(name, getattr(self, name))
        runtime_env: Any = self.runtime_env
        if runtime_env is not None and not isinstance(runtime_env, Mapping):
            raise ConfigError(f"runtime_env must be a mapping, got a {type(runtime_env).__name__}.")
        if not isinstance(self.autoscaling, bool):
            raise ConfigError(f"autoscaling must be True or False, got {self.autoscaling!r}.")
        refused = sorted({*self.worker_options} & {*OPTIONS_OF_THE_ENGINE})
        if refused:
            raise ConfigError(
                f"worker_options contains {', '.join(refused)}, which the engine decides itself: it replaces lost "
                "workers, at most max_worker_restarts of them. Remove it."
            )
        if "runtime_env" in self.worker_options:
            raise ConfigError("worker_options contains runtime_env; give it as runtime_env of the cluster.")
        refused = sorted({*self.init_options} & {"address", "runtime_env"})
        if refused:
            raise ConfigError(
                f"init_options contains {', '.join(refused)}, which is an argument of the cluster itself."
            )

    @staticmethod
    def _check_options(name: str, options: Any) -> None:
        if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
            raise ConfigError(f"{name} must be a mapping from names to values, got {options!r}.")

    @property
    def actor_options(self) -> dict[str, Any]:
        """The options of the actors, with what is theirs by default."""
        return {"num_cpus": 1, **self.worker_options}
