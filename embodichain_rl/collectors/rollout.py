"""Rolls out whole episodes in Gymnasium environments, all rows one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NoReturn

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase

from embodichain_rl.collectors.episode import Episode
from embodichain_rl.collectors.native_env import STEP_COUNT, NativeEnvs
from embodichain_rl.collectors.policy_call import PolicyCall
from embodichain_rl.errors import ActionMismatchError, SchemaMismatchError
from embodichain_rl.replay.schema import Key, StepField
from embodichain_rl.replay.windows import as_array, as_tensor

__all__ = ["BESIDE_OBSERVATIONS", "Rollout"]

ACTION: Key = ("action",)

TRAJ_IDS: Key = ("collector", "traj_ids")

ENDS: tuple[Key, ...] = (("done",), ("terminated",), ("truncated",))

BESIDE_OBSERVATIONS: frozenset[Key] = frozenset({*ENDS, STEP_COUNT, TRAJ_IDS})
"""What a policy may read beside what the environment observes."""


class Rollout:
    """What TorchRL's collector does one step after the other, without a TensorDict for each.

    Args:
        envs: where to act.
        carrier: what TorchRL's collector starts from: the first observations and the ids of the trajectories.
        call: how the policy is called, and whether it reads nothing beside observations; see
            :func:`~embodichain_rl.collectors.policy_call.call_of`.
        new_ids: returns so many new ids for trajectories.
        write: takes each whole trajectory ``[T]``, a view that is valid until it returns.
    """

    def __init__(
        self,
        envs: NativeEnvs,
        carrier: TensorDictBase,
        call: tuple[PolicyCall, bool],
        new_ids: Callable[[int], list[int]],
        write: Callable[[TensorDict], object],
    ) -> None:
        self._rows = envs.rows
        self._max_steps = envs.max_steps
        self._batch_size = torch.Size([len(envs.rows)] if envs.batched else [])
        self._call, self._observations_only = call
        self._new_ids = new_ids
        self._write = write
        self._counts_steps = STEP_COUNT[0] in carrier.keys()
        leaves = {key: carrier.get(key) for key in envs.keys}
        dims = len(self._batch_size)
        self._observed = [StepField(key, tuple(leaf.shape[dims:]), leaf.dtype) for key, leaf in leaves.items()]
        self._decided: list[StepField] = []
        self._episodes = [Episode(self._observed, self._counts_steps, envs.reward_dtype) for _ in envs.rows]
        self.begin(carrier, range(len(envs.rows)))

    def begin(self, carrier: TensorDictBase, rows: Iterable[int]) -> None:
        """Begins episodes in ``rows`` with what ``carrier`` says was observed there; forgets those under way."""
        observed = [as_array(carrier.get(field.key)).reshape(-1, *field.shape) for field in self._observed]
        traj_ids = carrier.get(TRAJ_IDS).reshape(-1).tolist()
        for row in rows:
            self._episodes[row].begin([array[row] for array in observed], traj_ids[row])

    def take_ids(self, carrier: TensorDictBase) -> None:
        """Gives the episodes under way the ids that ``carrier`` has."""
        for episode, traj_id in zip(self._episodes, carrier.get(TRAJ_IDS).reshape(-1).tolist(), strict=True):
            episode.traj_id = traj_id

    def advance(self, steps: int, stopped: Callable[[], bool]) -> int:
        """Takes up to ``steps`` steps in every environment; returns how many in all.

        Args:
            steps: of each environment.
            stopped: asked after each step of them all whether to break off.
        """
        taken = 0
        for taken in range(1, steps + 1):
            self._step()
            if stopped():
                break
        return taken * len(self._rows)

    def _step(self) -> None:
        decided = self._decide()
        ended = []
        for row, (env, episode) in enumerate(zip(self._rows, self._episodes, strict=True)):
            own = [array[row] for array in decided] if self._batch_size else decided
            episode.decide(own)
            observed, reward, terminated, truncated = env.step(env.to_native(own[0]))
            episode.take(observed, reward)
            truncated = truncated or episode.steps == self._max_steps
            if terminated or truncated:
                ended.append((env, episode))
                self._write(episode.trajectory(terminated, truncated))
        if ended:
            for (env, episode), traj_id in zip(ended, self._new_ids(len(ended)), strict=True):
                episode.begin(env.reset(), traj_id)

    def _decide(self) -> list[np.ndarray]:
        """What the policy writes, ``[*batch, *shape]`` each, the action first."""
        tensors = self._call(self._inputs())
        if not self._decided:
            self._expect(tensors)
        decided = []
        for field in self._decided:
            value = tensors.get(field.key)
            if value is None or value.dtype != field.dtype or value.shape != (*self._batch_size, *field.shape):
                self._refuse(field, value)
            decided.append(as_array(value))
        return decided

    def _inputs(self) -> dict[Key, torch.Tensor]:
        """What is observed now, in memory of its own: a policy may keep it, or hand it on as an action."""
        episodes = self._episodes
        inputs = {}
        for number, field in enumerate(self._observed):
            if self._batch_size:
                array = np.stack([episode.observations[number][episode.steps] for episode in episodes])
            else:
                array = episodes[0].observations[number][episodes[0].steps, ...].copy()
            inputs[field.key] = as_tensor(array, field.dtype)
        if not self._observations_only:
            self._add_beside(inputs)
        return inputs

    def _add_beside(self, inputs: dict[Key, torch.Tensor]) -> None:
        shape = (*self._batch_size, 1)
        for key in ENDS:
            inputs[key] = torch.zeros(shape, dtype=torch.bool)
        if self._counts_steps:
            inputs[STEP_COUNT] = torch.tensor([episode.steps for episode in self._episodes]).reshape(shape)
        inputs[TRAJ_IDS] = torch.tensor([episode.traj_id for episode in self._episodes]).reshape(self._batch_size)

    def _expect(self, tensors: dict[Key, torch.Tensor]) -> None:
        if ACTION not in tensors:
            raise ActionMismatchError(f"The policy wrote {list(tensors)}, and no 'action'; name it in its out_keys.")
        dims = len(self._batch_size)
        keys = [ACTION, *(key for key in tensors if key != ACTION)]
        self._decided = [StepField(key, tuple(tensors[key].shape[dims:]), tensors[key].dtype) for key in keys]
        for episode in self._episodes:
            episode.expect(self._decided)

    def _refuse(self, field: StepField, value: torch.Tensor | None) -> NoReturn:
        got = "nothing" if value is None else f"{value.dtype} of shape {list(value.shape)}"
        raise SchemaMismatchError(
            f"The policy wrote {got} as {field.key}, and at its first step {field.dtype} of shape "
            f"{[*self._batch_size, *field.shape]}. A policy must write the same at every step."
        )
