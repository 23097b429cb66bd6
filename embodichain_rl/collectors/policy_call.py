"""Calls a TorchRL policy with as little around it as gives the same result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torchrl.data import Composite
from torchrl.modules import RandomPolicy

from embodichain_rl.collectors.native_env import NotServedError
from embodichain_rl.replay.schema import Key, leaves_of

__all__ = ["PolicyCall", "call_of"]

Tensors: TypeAlias = dict[Key, torch.Tensor]

PolicyCall: TypeAlias = Callable[[Tensors], Tensors]
"""From what is observed, ``[*batch, *shape]`` each, to what the policy writes."""


def call_of(policy: Any, observed: set[Key], batch_size: torch.Size) -> tuple[PolicyCall, bool]:
    """Finds how to call a policy.

    Args:
        policy: as a TorchRL collector calls it, with a TensorDict.
        observed: the keys that are there when it is called.
        batch_size: of the TensorDict that it is called with.

    Returns:
        The call, and whether it looks at observations only: not at the ends, counts and ids beside them.

    Raises:
        NotServedError: what the policy does depends on more than is there, such as a state of its own in the data.
    """
    if type(policy) is RandomPolicy:
        return _random(policy), True
    if not isinstance(policy, TensorDictModuleBase):
        raise NotServedError(f"The policy is a {type(policy).__name__}, which does not say what it reads and writes.")
    reads, writes = [_as_key(key) for key in policy.in_keys], [_as_key(key) for key in policy.out_keys]
    if unknown := [key for key in reads if key not in observed]:
        raise NotServedError(f"The policy reads {unknown}, which the environment does not observe.")
    if any(key[0] == "next" for key in writes):
        raise NotServedError("The policy hands a state of its own from step to step.")
    if any(key in observed for key in writes):
        raise NotServedError("The policy writes over what was observed.")
    if _is_plain(policy):
        return _module(policy, reads, writes), True
    return _tensordict(policy, batch_size), False


def _is_plain(policy: TensorDictModuleBase) -> bool:
    """Whether all that the policy does with the TensorDict is to get its module's arguments and set its results."""
    return (
        isinstance(policy, TensorDictModule)
        and type(policy).forward is TensorDictModule.forward
        and type(policy).__call__ is TensorDictModule.__call__
        and policy.method is None
        and policy._kwargs is None
        and not policy._get_kwargs
        and not policy.method_kwargs
        and policy.inplace is True
        and policy.out_keys == policy.out_keys_source
        and "_" not in policy.out_keys
        and not policy._forward_hooks
        and not policy._forward_pre_hooks
    )


def _random(policy: RandomPolicy) -> PolicyCall:
    spec = policy.action_spec
    items = spec.items(True, True) if isinstance(spec, Composite) else [(policy.action_key, spec)]
    draws = [(_as_key(key), leaf.rand) for key, leaf in items]
    return lambda observed: {key: draw() for key, draw in draws}


def _module(policy: TensorDictModule, reads: list[Key], writes: list[Key]) -> PolicyCall:
    module = policy.module

    def call(observed: Tensors) -> Tensors:
        results = module(*[observed[key] for key in reads])
        if isinstance(results, Mapping | TensorDictBase):
            results = tuple(results[key] for key in policy.out_keys)
        elif not isinstance(results, tuple):
            results = (results,)
        return {
            key: result if isinstance(result, torch.Tensor) else TensorDict.from_any(result)
            for key, result in zip(writes, results, strict=True)
        }

    return call


def _tensordict(policy: TensorDictModuleBase, batch_size: torch.Size) -> PolicyCall:
    def call(observed: Tensors) -> Tensors:
        data = TensorDict({}, batch_size)
        for key, value in observed.items():
            data.set(key, value)
        leaves = leaves_of(policy(data))
        return {key: leaf for key, leaf in leaves.items() if key not in observed and not _is_private(key)}

    return call


def _is_private(key: Key) -> bool:
    return any(part.startswith("_") for part in key)


def _as_key(key: Any) -> Key:
    return key if isinstance(key, tuple) else (key,)
