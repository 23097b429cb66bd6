"""Calls of a TorchRL policy with the least overhead that gives the same result; see ``rollout.py``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torchrl.data import BoundedContinuous, Composite, TensorSpec
from torchrl.modules import RandomPolicy

from embodichain_rl.collectors.native_env import NotServedError, as_key
from embodichain_rl.replay.schema import Key

__all__ = ["ByModule", "ByTensorDict", "PolicyCall", "Random", "call_of"]


class PolicyCall(ABC):
    """Base class: a policy that is called with tensors and returns tensors.

    Args:
        reads: the keys of its inputs, in order.
        writes: the keys of its outputs, in order.
    """

    def __init__(self, reads: Sequence[Key], writes: Sequence[Key]) -> None:
        self.reads = list(reads)
        self.writes = list(writes)

    @abstractmethod
    def __call__(self, tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Call the policy once for the whole batch."""


class Random(PolicyCall):
    """Random actions, identical to those that TorchRL draws."""

    def __init__(self, policy: RandomPolicy) -> None:
        spec = policy.action_spec
        items = spec.items(True, True) if isinstance(spec, Composite) else [(policy.action_key, spec)]
        leaves = {as_key(key): leaf for key, leaf in items}
        super().__init__([], list(leaves))
        self._draws = [_draw(leaf) for leaf in leaves.values()]

    def __call__(self, tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        return [draw() for draw in self._draws]


def _draw(spec: TensorSpec) -> Callable[[], torch.Tensor]:
    """Return a function equal to ``spec.rand``. For bounded numbers it takes a third of the time."""
    if type(spec) is not BoundedContinuous or spec.dtype not in (torch.float32, torch.float64):
        return spec.rand
    low, high = spec.space.low, spec.space.high
    span, shape, dtype = high - low, spec.shape, spec.dtype
    return lambda: torch.rand(shape, dtype=dtype).mul_(span).add_(low).clamp_(low, high)


class ByModule(PolicyCall):
    """The module of a plain ``TensorDictModule``, called without a TensorDict."""

    def __init__(self, policy: TensorDictModule) -> None:
        super().__init__([as_key(key) for key in policy.in_keys], [as_key(key) for key in policy.out_keys])
        self._module = policy.module
        self._out_keys = policy.out_keys

    def __call__(self, tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        results = self._module(*tensors)
        if type(results) is torch.Tensor:
            return (results,)
        if isinstance(results, Mapping | TensorDictBase):
            results = tuple(results[key] for key in self._out_keys)
        elif not isinstance(results, tuple):
            results = (results,)
        return [value if isinstance(value, torch.Tensor) else TensorDict.from_any(value) for value in results]


class ByTensorDict(PolicyCall):
    """Any other TorchRL policy, called with a TensorDict as TorchRL does."""

    def __init__(self, policy: TensorDictModuleBase, available: Sequence[Key], batch_size: torch.Size) -> None:
        super().__init__(available, [key for key in map(as_key, policy.out_keys) if not _is_private(key)])
        self._policy = policy
        self._batch_size = batch_size

    def __call__(self, tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        data = TensorDict({}, self._batch_size)
        for key, tensor in zip(self.reads, tensors, strict=True):
            data.set(key, tensor)
        written = self._policy(data)
        return [written.get(key) for key in self.writes]


def call_of(policy: Any, available: Sequence[Key], batch_size: torch.Size) -> PolicyCall:
    """Return the call of a policy with the least overhead that gives the same result.

    Args:
        policy: a policy that a TorchRL collector calls with a TensorDict.
        available: the keys of that TensorDict.
        batch_size: the batch size of that TensorDict.

    Raises:
        NotServedError: the result depends on more than these entries, such as a recurrent state in the data.
    """
    if type(policy) is RandomPolicy:
        return Random(policy)
    if not isinstance(policy, TensorDictModuleBase):
        raise NotServedError(
            f"The policy is a {type(policy).__name__}, which does not declare what it reads and writes."
        )
    if unknown := [key for key in policy.in_keys if as_key(key) not in available]:
        raise NotServedError(f"The policy reads {unknown}, which the environment does not observe.")
    writes = [as_key(key) for key in policy.out_keys]
    if any(key[0] == "next" for key in writes):
        raise NotServedError("The policy is recurrent: it writes a state for the next step.")
    if any(key in available for key in writes):
        raise NotServedError("The policy overwrites an observation.")
    if ("action",) not in writes:
        raise NotServedError("The policy does not name 'action' among its out_keys.")
    if _is_plain(policy):
        return ByModule(policy)
    for module in policy.modules():
        if isinstance(module, TensorDictModuleBase) and not _is_known(module):
            raise NotServedError(f"The policy has a {type(module).__name__}, which may write more than it declares.")
    return ByTensorDict(policy, available, batch_size)


def _is_known(module: TensorDictModuleBase) -> bool:
    """Return whether TorchRL or tensordict defines the module's ``forward`` and so declares its keys correctly."""
    definer = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return definer.__module__.partition(".")[0] in ("tensordict", "torchrl")


def _is_plain(policy: TensorDictModuleBase) -> bool:
    """Return whether the policy only reads its module's arguments from the TensorDict and writes its results."""
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
        and not any(_is_private(as_key(key)) for key in policy.out_keys)
        and not policy._forward_hooks
        and not policy._forward_pre_hooks
    )


def _is_private(key: Key) -> bool:
    return any(part.startswith("_") for part in key)
