"""What a producer on another machine is given: everything of an engine's plan that does not lie in shared memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from embodichain_rl.engine.environments import EnvMaker
from embodichain_rl.engine.workers import Plan, WorkerDemonstrations, WorkerEnvs
from embodichain_rl.replay.schema import Schema
from embodichain_rl.replay.storage import TrajectoryStorage
from embodichain_rl.replay.writing import Accept, AcceptFilter

__all__ = ["ProducerSpec"]


@dataclass
class ProducerSpec:
    """The part of a :class:`~embodichain_rl.engine.workers.Plan` that is the same for all producers of an engine.

    Args:
        schema: the schema of the engine's storage, as JSON.
        compact: whether that storage is compact.
        formats: the fields of that storage that are ragged or encoded, as it takes them: a schema as JSON has no codecs
            of the user's own.
        max_episode_steps: the most steps of an episode.
        env_maker: the maker of the environments.
        must_seed: whether an environment that can't be seeded is an error.
        accept: the filter of trajectories of the configuration.
        max_generation_attempts: failures in a row after which a producer fails.
        demonstrates: whether it rolls out demonstrations.
        policy: the policy with its newest weights; None without weights.
        policy_version: the version of these weights.
        policy_factory: a function that makes the policy instead.
        frames_per_batch: steps of all environments between two checks.
        message_bytes: the size at which a message is complete.
        source: who acts, which is written with every step; None: it is not.
    """

    schema: str
    compact: bool
    formats: dict[str, Any]
    max_episode_steps: int
    env_maker: EnvMaker
    must_seed: bool
    accept: Accept | None
    max_generation_attempts: int
    demonstrates: bool
    policy: torch.nn.Module | None
    policy_version: int
    policy_factory: Callable[[], Any] | None
    frames_per_batch: int
    message_bytes: int
    source: str | None

    @classmethod
    def of(cls, plan: Plan, message_bytes: int) -> ProducerSpec:
        """Return the specification of the producers of a plan."""
        policy, version = plan.copy_policy()
        schema = plan.storage.schema
        assert schema is not None, "the engine has allocated its storage"
        assert plan.env_maker is not None, "a cluster makes environments"
        cfg = plan.cfg
        return cls(
            schema=schema.to_json(),
            compact=plan.storage.compact,
            formats=plan.storage.formats.given,
            max_episode_steps=cfg.max_episode_steps,
            env_maker=plan.env_maker,
            must_seed=cfg.seed is not None,
            accept=cfg.accept,
            max_generation_attempts=cfg.max_generation_attempts,
            demonstrates=plan.demonstrates,
            policy=None if policy is None else policy.to("cpu"),
            policy_version=version,
            policy_factory=plan.policy_factory,
            frames_per_batch=plan.frames_per_batch,
            message_bytes=message_bytes,
            source=plan.source,
        )

    def make_storage(self) -> TrajectoryStorage:
        """Return a storage to which nothing is written: the steps of the environments are held against it."""
        storage = TrajectoryStorage(1, self.max_episode_steps, compact=self.compact, **self.formats)
        storage.allocate_schema(Schema.from_json(self.schema))
        storage.open_memory()  # from then on its table of texts knows that no trajectory has them
        return storage

    def accept_filter(self, index: int) -> AcceptFilter | None:
        """Return the filter of the trajectories of producer ``index``; None if its writer keeps all."""
        if self.accept is None or self.demonstrates:
            return None
        return AcceptFilter(
            self.accept,
            max_generation_attempts=self.max_generation_attempts,
            environment=f"{self.env_maker.name} (worker {index})",
        )

    def envs(self, index: int, seed: int) -> WorkerEnvs | WorkerDemonstrations:
        """Return the maker of the environments, or of the demonstrations, of producer ``index``."""
        envs = WorkerEnvs(self.env_maker.for_worker(index), seed, must_seed=self.must_seed)
        if not self.demonstrates:
            return envs
        return WorkerDemonstrations(envs, self.accept, self.max_generation_attempts)
