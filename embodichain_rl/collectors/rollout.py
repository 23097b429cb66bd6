"""Rolls out whole episodes in Gymnasium environments, all rows one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase

from embodichain_rl.collectors.episode import STEP_COUNT, TRAJ_IDS, Episode
from embodichain_rl.collectors.native_env import NativeEnv, NativeEnvs
from embodichain_rl.collectors.policy_call import PolicyCall
from embodichain_rl.replay.schema import Key

__all__ = ["Rollout"]

ENDS: tuple[Key, ...] = (("done",), ("terminated",), ("truncated",))


class Rollout:
    """What TorchRL's collector does one step after the other, without a TensorDict for each.

    Args:
        envs: where to act.
        carrier: what TorchRL's collector starts from: the first observations and the ids of the trajectories.
        policy: who acts.
        new_ids: returns so many new ids for trajectories.
        write: takes each whole trajectory ``[T]``, whose memory is used again when it returns.
    """

    def __init__(
        self,
        envs: NativeEnvs,
        carrier: TensorDictBase,
        policy: PolicyCall,
        new_ids: Callable[[int], list[int]],
        write: Callable[[TensorDict], object],
    ) -> None:
        self._keys = envs.keys
        self._envs = envs.rows
        self._max_steps = envs.max_steps
        self._batch_size = torch.Size([len(envs.rows)] if envs.batched else [])
        self._policy = policy
        self._new_ids = new_ids
        self._write = write
        self._episodes = [
            Episode(envs.keys, policy.writes, STEP_COUNT[0] in carrier, envs.reward_dtype) for _ in envs.rows
        ]
        self._inputs = [self._input(key) for key in policy.reads]
        self._action = policy.writes.index(("action",))
        self._step = self._step_all if envs.batched else self._step_one
        self.begin(carrier, range(len(envs.rows)))

    def begin(self, carrier: TensorDictBase, rows: Iterable[int]) -> None:
        """Begins episodes in ``rows`` with what ``carrier`` says was observed there; forgets those under way."""
        dims = len(self._batch_size)
        observed = [carrier.get(key) for key in self._keys]
        observed = [values.reshape(-1, *values.shape[dims:]) for values in observed]
        traj_ids = carrier.get(TRAJ_IDS).reshape(-1).tolist()
        for row in rows:
            self._episodes[row].begin([values[row].clone() for values in observed], traj_ids[row])

    def take_ids(self, carrier: TensorDictBase) -> None:
        """Gives the episodes under way the ids that ``carrier`` has."""
        for episode, traj_id in zip(self._episodes, carrier.get(TRAJ_IDS).reshape(-1).tolist(), strict=True):
            episode.traj_id = traj_id

    def advance(self, steps: int, stopped: Callable[[], bool] | None) -> int:
        """Takes up to ``steps`` steps in every environment; returns how many in all.

        Args:
            steps: of each environment.
            stopped: asked after each step of them all whether to break off.
        """
        for taken in range(1, steps + 1):
            self._step()
            if stopped is not None and stopped():
                return taken * len(self._envs)
        return steps * len(self._envs)

    def _step_one(self) -> None:
        decided = self._policy([make() for make in self._inputs])
        env, episode = self._envs[0], self._episodes[0]
        if self._step_in(env, episode, decided, _array(decided[self._action])):
            episode.begin(env.reset(), self._new_ids(1)[0])

    def _step_all(self) -> None:
        decided = self._policy([make() for make in self._inputs])
        actions = _array(decided[self._action])
        # All have taken the step before the first one is reset, as in TorchRL's SerialEnv.
        ended = [
            (env, episode)
            for env, episode, action, *own in zip(
                self._envs, self._episodes, actions, *(values.unbind(0) for values in decided), strict=True
            )
            if self._step_in(env, episode, own, action)
        ]
        if ended:
            for (env, episode), traj_id in zip(ended, self._new_ids(len(ended)), strict=True):
                episode.begin(env.reset(), traj_id)

    def _step_in(self, env: NativeEnv, episode: Episode, decided: Sequence[torch.Tensor], action: np.ndarray) -> bool:
        """Takes a step in one environment; writes the trajectory, and returns True, if its episode ends with it."""
        for values, value in zip(episode.decisions, decided, strict=True):
            values.append(value)
        observed, reward, terminated, truncated = env.step(action)
        episode.rewards.append(reward)
        for values, value in zip(episode.observations, observed, strict=True):
            values.append(value)
        if len(episode.rewards) == self._max_steps:
            truncated = True
        if not (terminated or truncated):
            return False
        self._write(episode.trajectory(terminated, truncated))
        return True

    def _input(self, key: Key) -> Callable[[], torch.Tensor]:
        """What makes the tensor that the policy is given as ``key``, ``[*batch, *shape]``."""
        shape, episodes = (*self._batch_size, 1), self._episodes
        if key in ENDS:
            return lambda: torch.zeros(shape, dtype=torch.bool)
        if key == STEP_COUNT:
            return lambda: torch.tensor([len(episode.rewards) for episode in episodes]).reshape(shape)
        if key == TRAJ_IDS:
            return lambda: torch.tensor([episode.traj_id for episode in episodes]).reshape(self._batch_size)
        of_all = [episode.observations[self._keys.index(key)] for episode in episodes]
        if not self._batch_size:
            return lambda: of_all[0][-1]
        return lambda: torch.stack([values[-1] for values in of_all])


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy() if tensor.requires_grad else tensor.numpy()
