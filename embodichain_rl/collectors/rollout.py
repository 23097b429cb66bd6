"""The step loop of ``GymnasiumCollector``: records whole episodes of Gymnasium environments, all rows in lockstep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase

from embodichain_rl.collectors.episode import STEP_COUNT, TRAJ_IDS, Episode
from embodichain_rl.collectors.native_rows import NativeRows
from embodichain_rl.collectors.policy_call import PolicyCall
from embodichain_rl.errors import SchemaMismatchError
from embodichain_rl.replay.schema import Key, StepField, as_array, as_tensor

__all__ = ["Rollout"]

ENDS: tuple[Key, ...] = (("done",), ("terminated",), ("truncated",))


class Rollout:
    """The step loop of TorchRL's collector, without a TensorDict for each step.

    Args:
        envs: the environments.
        carrier: the TensorDict from which TorchRL's collector starts: first observations and trajectory ids.
        policy: the policy.
        new_ids: a function from a count to that many new trajectory ids.
        write: a function that stores a whole trajectory, ``[T]``. The memory is reused after it returns.
    """

    def __init__(
        self,
        envs: NativeRows,
        carrier: TensorDictBase,
        policy: PolicyCall,
        new_ids: Callable[[int], list[int]],
        write: Callable[[TensorDict], object],
    ) -> None:
        self._envs = envs
        self._max_steps = envs.max_steps
        self._batch_size = envs.batch_size
        self._policy = policy
        self._new_ids = new_ids
        self._write = write
        leaves = [(key, carrier.get(key)) for key in envs.keys]
        self._observed = [self._field(key, leaf) for key, leaf in leaves]
        counts_steps = STEP_COUNT[0] in carrier
        self._episodes = [Episode(self._observed, counts_steps, envs.reward_dtype) for _ in range(len(envs))]
        self._inputs = [self._input(key) for key in policy.reads]
        self._action = policy.writes.index(("action",))
        self._shapes: list[tuple[int, ...]] = []
        self._dtypes: list[np.dtype[Any]] = []
        self.begin(carrier, range(len(envs)))

    def _field(self, key: Key, values: torch.Tensor) -> StepField:
        return StepField(key, tuple(values.shape[len(self._batch_size) :]), values.dtype)

    def begin(self, carrier: TensorDictBase, rows: Iterable[int]) -> None:
        """Start episodes in ``rows`` with the observations in ``carrier``, and discard unfinished episodes there."""
        observed = [as_array(carrier.get(field.key)).reshape(-1, *field.shape) for field in self._observed]
        traj_ids = carrier.get(TRAJ_IDS).reshape(-1).tolist()
        for row in rows:
            self._episodes[row].begin([array[row, ...].copy() for array in observed], traj_ids[row])

    def set_trajectory_ids(self, carrier: TensorDictBase) -> None:
        """Set the trajectory ids of the unfinished episodes to those in ``carrier``."""
        for episode, traj_id in zip(self._episodes, carrier.get(TRAJ_IDS).reshape(-1).tolist(), strict=True):
            episode.traj_id = traj_id

    def advance(self, steps: int, stopped: Callable[[], bool] | None) -> int:
        """Take up to ``steps`` steps in every environment and return the total number of steps.

        Args:
            steps: the number of steps for each environment.
            stopped: a function that is called after each step of all environments. The loop ends if it returns True.
        """
        for taken in range(1, steps + 1):
            self._step()
            if stopped is not None and stopped():
                return taken * len(self._envs)
        return steps * len(self._envs)

    def _step(self) -> None:
        decided = self._decide()
        ended = []
        outcomes = self._envs.step(decided[self._action])
        for row, (episode, outcome) in enumerate(zip(self._episodes, outcomes, strict=True)):
            observed, reward, terminated, truncated = outcome
            row_decided = [array[row] for array in decided] if self._batch_size else decided
            episode.add(row_decided, observed, reward)
            if episode.steps == self._max_steps:
                truncated = True
            if terminated or truncated:
                self._write(episode.trajectory(terminated, truncated))
                ended.append(row)
        if ended:  # after all rows have taken the step, as in TorchRL's SerialEnv
            for row, observed, traj_id in zip(ended, self._envs.reset(ended), self._new_ids(len(ended)), strict=True):
                self._episodes[row].begin(observed, traj_id)

    def _decide(self) -> list[np.ndarray]:
        """Return the outputs of the policy, ``[*batch, *shape]`` each."""
        tensors = self._policy([make() for make in self._inputs])
        if not self._shapes:
            self._learn_outputs(tensors)
        arrays = [as_array(tensor) for tensor in tensors]
        if [array.shape for array in arrays] != self._shapes or [array.dtype for array in arrays] != self._dtypes:
            self._refuse(arrays)
        return arrays

    def _learn_outputs(self, tensors: Sequence[torch.Tensor]) -> None:
        if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
            raise SchemaMismatchError(
                f"The policy wrote {self._policy.writes} as {[type(tensor).__name__ for tensor in tensors]}, but only "
                "tensors are supported here. Use torchrl.collectors.Collector for this policy."
            )
        self._shapes = [tuple(tensor.shape) for tensor in tensors]
        self._dtypes = [as_array(tensor).dtype for tensor in tensors]
        for episode in self._episodes:
            episode.set_policy_fields(
                [self._field(key, x) for key, x in zip(self._policy.writes, tensors, strict=True)]
            )

    def _refuse(self, arrays: Sequence[np.ndarray]) -> NoReturn:
        got = [(array.dtype, array.shape) for array in arrays]
        needed = list(zip(self._dtypes, self._shapes, strict=True))
        raise SchemaMismatchError(
            f"The policy wrote {self._policy.writes} as {got}, but at its first step as {needed}. It must write the "
            "same dtypes and shapes at every step."
        )

    def _input(self, key: Key) -> Callable[[], torch.Tensor]:
        """Return a function that makes the policy's input ``key``, a tensor ``[*batch, *shape]``."""
        shape, episodes = (*self._batch_size, 1), self._episodes
        if key in ENDS:
            return lambda: torch.zeros(shape, dtype=torch.bool)
        if key == STEP_COUNT:
            return lambda: torch.tensor([episode.steps for episode in episodes]).reshape(shape)
        if key == TRAJ_IDS:
            return lambda: torch.tensor([episode.traj_id for episode in episodes]).reshape(self._batch_size)
        number = next(number for number, field in enumerate(self._observed) if field.key == key)
        dtype = self._observed[number].dtype
        if self._batch_size:
            return lambda: as_tensor(np.stack([episode.newest[number] for episode in episodes]), dtype)
        return lambda: as_tensor(episodes[0].newest[number], dtype)
