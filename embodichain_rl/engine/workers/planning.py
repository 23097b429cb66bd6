"""The plan of an engine, made before its first worker starts: probe the environment, and prepare the policy."""

from __future__ import annotations

import copy
import dataclasses
import logging
import multiprocessing
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.data import TensorSpec

from embodichain_rl.engine.config import OnlineDataEngineCfg
from embodichain_rl.engine.demonstrations import takes_env
from embodichain_rl.engine.environments import CallablePolicy, EnvMaker, make_policy
from embodichain_rl.engine.state import EngineChannel
from embodichain_rl.engine.workers.probe import EnvProbe, probe_env
from embodichain_rl.engine.workers.worker import EnterWorker, ProducerWriter, WorkerDemonstrations, WorkerEnvs
from embodichain_rl.errors import ConfigError, InvalidArgumentError
from embodichain_rl.replay.buffer import TrajectoryReplayBuffer
from embodichain_rl.replay.storage import TrajectoryStorage
from embodichain_rl.replay.writing import AcceptFilter

if TYPE_CHECKING:
    from embodichain_rl.engine.remote import RemoteProducers
    from embodichain_rl.replay.rate_limiter import RateLimiter

__all__ = ["Plan", "complete_plan", "probe_for", "weights_of"]

LOGGER = logging.getLogger("embodichain_rl.engine")

STEPS_PER_BATCH = 100
"""Steps of one environment between two checks of TorchRL's collector for complete trajectories."""


@dataclass
class Plan:
    """The settings that all producers of an engine share.

    Args:
        cfg: the configuration of the engine.
        channel: the channel of the engine.
        storage: the storage of the trajectories.
        limiter: the rate limiter; None means no pacing.
        env_maker: the maker of the environments; None if ``cfg.producers`` are given.
        num_envs: number of environments per worker.
        policy: the engine's private copy of the policy, if the policy has weights; else None.
        policy_factory: a function that makes the policy in a worker, if the policy has no weights to update.
        demonstrates: whether the workers roll out the demonstrations of the environments.
        num_threads: the number of torch threads in this process, to restore it after TorchRL changes it.
        remote: the producers on other machines; None if they are processes or threads of this one.
        entropy: the number that all seeds derive from. Without ``cfg.seed`` it comes from the operating system.
        session: the number of the engine among those that go on one after the other, whose seeds differ.
        policy_lock: guards the weights of ``policy``.
    """

    cfg: OnlineDataEngineCfg
    channel: EngineChannel
    storage: TrajectoryStorage
    limiter: RateLimiter | None
    env_maker: EnvMaker | None = None
    num_envs: int = 1
    policy: torch.nn.Module | None = None
    policy_factory: Callable[[], Any] | None = None
    demonstrates: bool = False
    num_threads: int = field(default_factory=torch.get_num_threads)
    remote: RemoteProducers | None = None
    entropy: int = field(init=False)
    session: int = 0
    policy_lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.entropy = secrets.randbits(128) if self.cfg.seed is None else self.cfg.seed

    def copy_policy(self) -> tuple[torch.nn.Module | None, int]:
        """Return a copy of the policy with its newest weights, and their version.

        TorchRL removes the weights from a policy while it starts a process, so every worker gets a separate copy.
        """
        with self.policy_lock:
            return copy.deepcopy(self.policy), self.channel.policy_version

    def set_weights(self, weights: TensorDictBase) -> int:
        """Store new weights and return their version.

        Raises:
            InvalidArgumentError: the weights do not match the policy.
        """
        with self.policy_lock:
            self._update(weights)
            self.channel.policy_version += 1
            return self.channel.policy_version

    def load_weights(self, weights: TensorDictBase) -> None:
        """Store weights that were saved, without a new version; raise what :meth:`set_weights` raises."""
        with self.policy_lock:
            self._update(weights)

    def _update(self, weights: TensorDictBase) -> None:
        current = self.weights()
        given = {key: value.shape for key, value in weights.items(True, True)}
        needed = {key: value.shape for key, value in current.items(True, True)}
        if given != needed:
            differing = sorted(map(str, {*given.items()} ^ {*needed.items()}))[:6]
            raise InvalidArgumentError(
                f"The weights do not match the engine's policy; they differ in {', '.join(differing)}. Pass the "
                "trained policy, with the same structure as the one in the configuration."
            )
        current.update_(weights)

    def weights(self) -> TensorDictBase:
        """Return the weights of the policy, without a copy."""
        assert self.policy is not None
        return TensorDict.from_module(self.policy).data

    def seed(self, index: int, attempt: int) -> int:
        """Return the seed of a worker, which differs at each of its starts.

        A worker needs one even if the configuration has none: a forked process continues the random streams of its
        parent, so all of them would repeat each other.
        """
        key = (index, attempt, self.session) if self.session else (index, attempt)
        sequence = np.random.SeedSequence(self.entropy, spawn_key=key)
        return int(sequence.generate_state(1)[0]) % 2**31

    def buffer(self, index: int, entry: EnterWorker | None = None) -> TrajectoryReplayBuffer:
        """Return a buffer over the engine's storage for the writes of producer ``index``.

        Args:
            index: the index of the producer.
            entry: the initialisation of its process; None for a thread.
        """
        writer = ProducerWriter(
            self.channel.worker(index),
            accept=self.accept_filter(index),
            limiter=self.limiter,
            entry=entry,
            source=self.source,
            equal_shares=self.cfg.equal_shares,
        )
        return TrajectoryReplayBuffer(storage=self.storage, writer=writer, chunk_size=1)

    def accept_filter(self, index: int) -> AcceptFilter | None:
        """Return the filter of the trajectories of worker ``index``; None if its writer keeps all."""
        cfg = self.cfg
        if cfg.accept is None or self.demonstrates:
            return None
        return AcceptFilter(
            cfg.accept,
            max_generation_attempts=cfg.max_generation_attempts,
            environment=f"{self.env_maker.name if self.env_maker else 'Producer'} (worker {index})",
        )

    def envs(self, index: int, attempt: int) -> WorkerEnvs | WorkerDemonstrations:
        """Return the maker of the environments, or of the demonstrations, of a worker."""
        assert self.env_maker is not None
        envs = WorkerEnvs(
            self.env_maker.for_worker(index), self.seed(index, attempt), must_seed=self.cfg.seed is not None
        )
        if not self.demonstrates:
            return envs
        return WorkerDemonstrations(envs, self.cfg.accept, self.cfg.max_generation_attempts)

    @property
    def source(self) -> str | None:
        """Who acts in the environments, as it is written with every step; None if it is not."""
        if not self.cfg.label_source:
            return None
        if self.demonstrates:
            return "expert"
        return "random" if self.policy is None and self.policy_factory is None else "policy"

    @property
    def frames_per_batch(self) -> int:
        """Steps of all environments of a worker between two checks for complete trajectories."""
        return min(STEPS_PER_BATCH, self.cfg.max_episode_steps) * self.num_envs


def probe_for(cfg: OnlineDataEngineCfg, timeout: float) -> EnvProbe:
    """Probe the environment of ``cfg`` in a separate process; see :func:`probe_env`."""
    assert cfg.env_maker is not None
    start_method = cfg.start_method or multiprocessing.get_start_method(allow_none=True)
    return probe_env(
        cfg.env_maker,
        policy=cfg.policy,
        policy_factory=cfg.policy_factory,
        state_key=cfg.state_key,
        timeout=max(0.0, timeout),
        start_method="forkserver" if start_method == "forkserver" else "spawn",
    )


@dataclass(frozen=True)
class _Specs:
    """The specs of an environment that are needed to make a policy for it."""

    observation_spec: Any
    action_keys: list[NestedKey]
    action_spec_unbatched: TensorSpec
    full_action_spec: Any

    @property
    def action_key(self) -> NestedKey:
        return self.action_keys[0]

    @classmethod
    def of(cls, probe: EnvProbe) -> _Specs:
        keys = list(probe.action_spec.keys(True, True))
        action = probe.action_spec[keys[0]]
        for _ in probe.batch_size:
            action = action[0]
        return cls(probe.observation_spec, keys, action, probe.action_spec)


def complete_plan(plan: Plan, probe: EnvProbe) -> None:
    """Complete ``plan`` with the settings that depend on the probe of the environment."""
    cfg = plan.cfg
    env_maker = cfg.env_maker
    assert env_maker is not None
    if env_maker.gym_config is not None:
        env_maker = dataclasses.replace(env_maker, reports_success=probe.reports_success)
    plan.env_maker = env_maker
    plan.num_envs = max(1, probe.batch_size.numel())
    plan.demonstrates = probe.demonstrates
    if not probe.demonstrates and cfg.accept is not None and takes_env(cfg.accept):
        raise ConfigError(
            "accept takes two arguments, the trajectory and the environment, which only demonstrations pass. Give a "
            "function of the trajectory alone, or policy='demo'."
        )
    if cfg.policy is None and cfg.policy_factory is None:
        _say_who_acts(probe.demonstrates, env_maker.name)
    if probe.demonstrates or (cfg.policy_factory is None and (cfg.policy is None or isinstance(cfg.policy, str))):
        return
    specs = _Specs.of(probe)
    if cfg.policy_factory is not None:
        plan.policy_factory = partial(_make, cfg.policy_factory, specs, cfg.state_key)
        return
    policy = make_policy(cfg.policy, specs, state_key=cfg.state_key)
    if isinstance(policy, torch.nn.Module) and any(True for _ in policy.state_dict()):
        plan.policy = copy.deepcopy(policy)
    else:
        plan.policy_factory = partial(_same, policy)


def _say_who_acts(demonstrates: bool, name: str) -> None:
    if demonstrates:
        LOGGER.warning(
            "No policy is given, and %s offers demonstrations: the engine streams these. Give policy='demo' to say so, "
            "or policy='random' for random actions.",
            name,
        )
    else:
        LOGGER.info("No policy is given, and %s offers no demonstrations: its actions are random.", name)


def _make(factory: Callable[[], Any], specs: _Specs, state_key: NestedKey) -> Any:
    return make_policy(factory(), specs, state_key=state_key)


def _same(policy: Any) -> Any:
    return policy


def weights_of(policy: torch.nn.Module | TensorDictBase, own: torch.nn.Module) -> TensorDictBase:
    """Return the weights of ``policy`` under the names that they have in ``own``, the engine's copy of the policy.

    Raises:
        InvalidArgumentError: ``policy`` is neither a module nor a TensorDict.
    """
    if isinstance(policy, TensorDictBase):
        weights = policy.data
    elif isinstance(policy, torch.nn.Module):
        weights = TensorDict.from_module(policy).data
    else:
        raise InvalidArgumentError(
            f"Got a {type(policy).__name__}; update_policy_weights_ needs a torch.nn.Module, or its weights as a "
            "TensorDict."
        )
    named = set(TensorDict.from_module(own).keys(True, True))
    if isinstance(own, CallablePolicy) and set(weights.keys(True, True)) != named:
        return TensorDict({"module": {"function": weights}})  # the configuration's policy was a plain module
    return weights
