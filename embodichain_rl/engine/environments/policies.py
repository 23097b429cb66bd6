"""Conversion of a policy argument to a TorchRL policy: a module, a plain function, or random actions."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase
from torchrl.modules import RandomPolicy

from embodichain_rl.errors import ActionMismatchError, ConfigError

__all__ = ["DEMO", "RANDOM", "CallablePolicy", "Policy", "checked_action", "make_policy"]

DEMO = "demo"
"""The value of ``policy`` that selects the demonstrations of the environment."""

RANDOM = "random"
"""The value of ``policy`` that selects random actions."""

Policy: TypeAlias = TensorDictModuleBase | Callable[[torch.Tensor], Any] | None
"""The types that :func:`make_policy` accepts."""


def checked_action(action: Any, spec: TensorSpec, *, source: str) -> torch.Tensor:
    """Convert an action to a tensor that matches the environment's action spec, or raise an error.

    Shapes must be equal. Dtypes must be of the same kind: a float64 action is converted to float32 if the spec requires
    it, but a float is never rounded to an integer. Bounds are not checked.

    Args:
        action: an array, a tensor, or (nested sequences of) numbers, in the shape of ``spec``.
        spec: the action spec of the environment.
        source: the origin of the action, as the first words of an error message.

    Returns:
        A new tensor with the shape, dtype and device of ``spec``. It does not share memory with ``action``.

    Raises:
        ActionMismatchError: ``action`` is not numeric, or has another shape or kind of dtype.

    Example:
        >>> from torchrl.data import Bounded
        >>> checked_action([0.5, -0.5], Bounded(-1, 1, shape=(2,)), source="the policy")
        tensor([ 0.5000, -0.5000])
    """
    needed = f"the environment takes {spec.dtype} of shape {list(spec.shape)}"
    try:
        tensor = torch.as_tensor(action)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ActionMismatchError(
            f"{source} gave an action of type {type(action).__name__}; {needed}. Return an array, a tensor or numbers."
        ) from error
    if tensor.shape != spec.shape or not torch.can_cast(tensor.dtype, spec.dtype):
        raise ActionMismatchError(f"{source} gave an action {tensor.dtype} of shape {list(tensor.shape)}; {needed}.")
    return tensor.detach().to(device=spec.device, dtype=spec.dtype, copy=True)


class _PerObservation(torch.nn.Module):
    """A module that calls a function with each observation of a batch and stacks the actions.

    Args:
        function: see :class:`CallablePolicy`.
        event_dims: number of dimensions of one observation.
        spec: the spec of one action.
    """

    def __init__(self, function: Callable[[torch.Tensor], Any], event_dims: int, spec: TensorSpec) -> None:
        super().__init__()
        self.function = function
        self._event_dims = event_dims
        self._spec = spec
        self._source = f"The policy {getattr(function, '__qualname__', type(function).__qualname__)}"

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        batch = observation.shape[: observation.ndim - self._event_dims]
        if not batch:
            return self._action(observation)
        actions = [self._action(one) for one in observation.reshape(-1, *observation.shape[len(batch) :])]
        return torch.stack(actions).reshape(*batch, *self._spec.shape)

    def _action(self, observation: torch.Tensor) -> torch.Tensor:
        return checked_action(self.function(observation), self._spec, source=self._source)


class CallablePolicy(TensorDictModule):
    """A plain function from one observation to one action, as a TorchRL policy.

    The function receives one observation at a time, even if several environments are batched. So its meaning does not
    depend on the number of environments. To process a whole batch at once, or several keys (a goal and an observation),
    wrap it in a ``tensordict.nn.TensorDictModule``. A function that is a ``torch.nn.Module`` becomes a submodule, so
    its parameters are parameters of the policy.

    Args:
        function: a function from a tensor ``[*observation]``, with the environment's dtype and device, to the action of
            that environment: an array, a tensor or a number.
        env: the environment. It must have a single action key.
        state_key: key of the observation that the function receives.

    Raises:
        ConfigError: the environment has no such observation, or more than one action key.
        ActionMismatchError: by a call, if the result of the function does not match the action spec.

    Example:
        >>> from torchrl.envs import GymEnv
        >>> env = GymEnv("Pendulum-v1")
        >>> policy = CallablePolicy(lambda observation: -observation[2:], env)
        >>> env.rollout(5, policy)["action"].shape
        torch.Size([5, 1])
    """

    def __init__(
        self, function: Callable[[torch.Tensor], Any], env: EnvBase, *, state_key: NestedKey = "observation"
    ) -> None:
        observations = {key: spec.ndim for key, spec in env.observation_spec.items(True, True)}
        if state_key not in observations:
            close = difflib.get_close_matches(str(state_key), [str(key) for key in observations], n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"state_key={state_key!r} is not an observation of the environment: {list(observations)}.{hint}"
            )
        if len(env.action_keys) != 1:
            raise ConfigError(
                f"A plain callable returns one action, but the environment takes {env.action_keys}; pass a "
                "tensordict.nn.TensorDictModule with these as out_keys."
            )
        event_dims = observations[state_key] - len(env.observation_spec.shape)
        module = _PerObservation(function, event_dims, env.action_spec_unbatched)
        super().__init__(module, [state_key], [env.action_key])


def make_policy(policy: Policy | str, env: EnvBase, *, state_key: NestedKey = "observation") -> Any:
    """Return a policy that a TorchRL collector accepts.

    Args:
        policy: a TorchRL policy (an object with ``in_keys`` and ``out_keys``, or a ``RandomPolicy``), which is returned
            unchanged; a plain function from one observation to one action, see :class:`CallablePolicy`; or
            ``"random"`` or None for random actions.
        env: the environment.
        state_key: key of the observation that a plain function receives.

    Raises:
        ConfigError: ``policy`` is none of these. ``"demo"`` is not accepted: demonstrations require the environment
            itself, see :class:`~embodichain_rl.engine.demonstrations.DemonstrationRollout`.

    Example:
        >>> from torchrl.envs import GymEnv
        >>> env = GymEnv("Pendulum-v1")
        >>> env.rollout(5, make_policy(None, env))["action"].shape
        torch.Size([5, 1])
    """
    if policy is None or (isinstance(policy, str) and policy == RANDOM):
        return RandomPolicy(env.full_action_spec)
    if isinstance(policy, RandomPolicy) or (hasattr(policy, "in_keys") and hasattr(policy, "out_keys")):
        return policy
    if callable(policy):
        return CallablePolicy(policy, env, state_key=state_key)
    hint = " Demonstrations are rolled out by DemonstrationRollout." if policy == DEMO else ""
    raise ConfigError(
        f"policy must be a TorchRL policy, a function from observation to action, {DEMO!r}, {RANDOM!r} or None; "
        f"got {policy!r}.{hint}"
    )
