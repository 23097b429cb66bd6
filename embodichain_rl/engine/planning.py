"""What an engine settles before its first worker: what the environment is like, and who acts in it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.data import TensorSpec

from embodichain_rl.engine.config import OnlineDataEngineCfg
from embodichain_rl.engine.policies import CallablePolicy, make_policy
from embodichain_rl.engine.probe import EnvProbe, probe_env
from embodichain_rl.engine.producers import Plan
from embodichain_rl.errors import InvalidArgumentError

__all__ = ["complete", "look_at", "weights_of"]


def look_at(cfg: OnlineDataEngineCfg, timeout: float) -> EnvProbe:
    """Looks at the environment of ``cfg`` in a process of its own; see :func:`probe_env`."""
    assert cfg.env_maker is not None
    return probe_env(
        cfg.env_maker,
        policy=cfg.policy,
        policy_factory=cfg.policy_factory,
        state_key=cfg.state_key,
        timeout=max(0.0, timeout),
    )


@dataclasses.dataclass(frozen=True)
class _Specs:
    """As much of an environment as a policy needs to be made, without the environment."""

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


def complete(plan: Plan, probe: EnvProbe) -> None:
    """Writes to ``plan`` what could not be known before the environment was looked at."""
    cfg = plan.cfg
    env_maker = cfg.env_maker
    assert env_maker is not None
    if env_maker.gym_config is not None:
        env_maker = dataclasses.replace(env_maker, reports_success=probe.reports_success)
    plan.env_maker = env_maker
    plan.num_envs = max(1, probe.batch_size.numel())
    if cfg.demonstrates or (cfg.policy is None and cfg.policy_factory is None):
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


def _make(factory: Callable[[], Any], specs: _Specs, state_key: NestedKey) -> Any:
    return make_policy(factory(), specs, state_key=state_key)


def _same(policy: Any) -> Any:
    return policy


def weights_of(policy: torch.nn.Module | TensorDictBase, own: torch.nn.Module) -> TensorDictBase:
    """Returns the weights of ``policy``, named as in ``own``, the engine's copy of the policy.

    Raises:
        InvalidArgumentError: ``policy`` is neither a module nor weights.
    """
    if isinstance(policy, TensorDictBase):
        weights = policy.data
    elif isinstance(policy, torch.nn.Module):
        weights = TensorDict.from_module(policy).data
    else:
        raise InvalidArgumentError(
            f"Got a {type(policy).__name__}; update_policy_weights_ takes a torch.nn.Module, or its weights as a "
            "TensorDict."
        )
    named = set(TensorDict.from_module(own).keys(True, True))
    if isinstance(own, CallablePolicy) and set(weights.keys(True, True)) != named:
        return TensorDict({"function": weights})  # the configuration's policy was a plain module
    return weights
