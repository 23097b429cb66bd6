"""``GymnasiumCollector``: TorchRL's one-process collector with a faster step loop for Gymnasium environments."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs.utils import set_exploration_type

from embodichain_rl.collectors.native_env import NotServedError, as_key
from embodichain_rl.collectors.native_rows import rows_of
from embodichain_rl.collectors.policy_call import call_of
from embodichain_rl.collectors.rollout import Rollout
from embodichain_rl.replay.buffer import TrajectoryReplayBuffer

__all__ = ["GymnasiumCollector"]

LOGGER = logging.getLogger("embodichain_rl.collectors")


class GymnasiumCollector(Collector):
    """A TorchRL :class:`~torchrl.collectors.Collector` that steps Gymnasium environments without TensorDicts.

    It accepts the arguments of TorchRL's collector and writes the same data: with the same seeds the same trajectories,
    key for key and bit for bit, in less time per step. A trajectory is written when its episode ends.

    If the results would not be exactly the same, it behaves as TorchRL's collector, and ``fallback_reason`` says why.
    The faster step loop supports:

    * ``GymEnv`` and ``GymWrapper`` around one Gymnasium environment; a ``SerialEnv`` of them; ``GymWrapper`` around a
      vector of environments (``gymnasium.vector.VectorEnv``) with ``autoreset_mode=AutoresetMode.DISABLED``, TorchRL's
      choice. The policy is called once per step for all environments. ``StepCounter`` and ``DoubleToFloat`` are the
      supported transforms;
    * policies that are functions of the observation (and of the step count) and write tensors: no recurrent state, no
      text, no ``compile_policy``;
    * collection on the CPU into a :class:`~embodichain_rl.replay.TrajectoryReplayBuffer`, passed as ``replay_buffer``,
      with ``trajs_per_batch`` set, which makes TorchRL's collector write whole trajectories too.

    Pass the class to TorchRL's multi-process collectors as ``collector_class``. After ``frames_per_batch`` steps of all
    environments, such a collector checks for messages, such as the one to stop.

    Attributes:
        fallback_reason (str | None): why TorchRL's step loop is used; None if the faster one is.

    Example:
        >>> from torchrl.collectors import MultiAsyncCollector
        >>> from torchrl.envs import GymEnv
        >>> def make_env():
        ...     return GymEnv("Pendulum-v1")
        >>> rb = TrajectoryReplayBuffer(max_trajectories=64, max_total_steps=64 * 200, chunk_size=16, batch_size=32)
        >>> collector = GymnasiumCollector(
        ...     make_env, frames_per_batch=200, total_frames=400, replay_buffer=rb, trajs_per_batch=1
        ... )
        >>> for _ in collector:
        ...     pass
        >>> rb.sample()["next", "reward"].shape
        torch.Size([32, 16, 1])
        >>> if __name__ == "__main__":  # the same in separate processes
        ...     collector = MultiAsyncCollector(
        ...         [make_env] * 2,
        ...         frames_per_batch=200,
        ...         total_frames=-1,
        ...         replay_buffer=rb,
        ...         trajs_per_batch=1,
        ...         collector_class=GymnasiumCollector,
        ...     )  # doctest: +SKIP
        ...     collector.start()  # doctest: +SKIP
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("auto_register_policy_transforms") is None:
            # What None does in TorchRL 0.14 too, but with a warning that another version will do otherwise.
            kwargs["auto_register_policy_transforms"] = False
        super().__init__(*args, **kwargs)
        self.fallback_reason: str | None = None
        self._rollout: Rollout | None = None
        try:
            self._rollout = self._make_rollout()
        except NotServedError as reason:
            self.fallback_reason = str(reason)
            LOGGER.debug("TorchRL's collector rolls out %s: %s", self.env, reason)

    def _make_rollout(self) -> Rollout:
        self._check_options()
        envs = rows_of(self.env)
        available = [as_key(key) for key in self._carrier.keys(True, True)]
        policy = call_of(self._wrapped_policy, available, self.env.batch_size)
        schema = self.replay_buffer.storage.schema
        if schema is not None and not {*schema.text_keys}.isdisjoint(policy.writes):
            raise NotServedError("The policy writes text.")
        return Rollout(envs, self._carrier, policy, self._new_ids, self._write)

    def _check_options(self) -> None:
        if not isinstance(self.replay_buffer, TrajectoryReplayBuffer) or self._ignore_rb:
            raise NotServedError("There is no TrajectoryReplayBuffer to write to.")
        if self.trajs_per_batch is None:
            raise NotServedError("trajs_per_batch is not set, so whole trajectories are not requested.")
        usual: dict[str, tuple[Any, ...]] = {
            "trajs_per_write": (None, 1),
            "track_traj_ids": (True,),
            "init_random_frames": (0,),
            "extend_buffer": (True,),
            "reset_at_each_iter": (False,),
            "set_truncated": (False,),
            "split_trajs": (False,),
            "postproc": (None,),
            "compact_obs": (False,),
            "compiled_policy": (False,),
            "cudagraphed_policy": (False,),
            "pre_collect_hook": (None,),
            "post_collect_hook": (None,),
        }
        for name, values in usual.items():
            if getattr(self, name) not in values:
                raise NotServedError(f"{name} is set.")
        for device in (self.storing_device, self.policy_device, self.env_device):
            if device is not None and device.type != "cpu":
                raise NotServedError(f"The collector uses {device}, not the CPU.")

    def _new_ids(self, count: int) -> list[int]:
        return self._traj_pool.get_traj_and_increment(count).tolist()

    def _write(self, trajectory: TensorDict) -> None:
        # An inverse transform may write in place, but several keys share memory.
        self.replay_buffer.extend(trajectory.clone() if len(self.replay_buffer._transform) else trajectory)

    def _iter_by_trajectories(self) -> Iterator[None]:
        if self._rollout is None:
            yield from super()._iter_by_trajectories()
            return
        while self._frames < self.total_frames:
            self._iter += 1
            stopped = None if self.interruptor is None else self.interruptor.collection_stopped
            with torch.no_grad(), set_exploration_type(self.exploration_type):
                frames = self._rollout.advance(self.frames_per_batch, stopped)
            self._increment_frames(frames)
            yield

    def reset(self, index: Any = None, **kwargs: Any) -> None:
        super().reset(index, **kwargs)
        if self._rollout is not None:
            self._rollout.begin(self._carrier, self._rows(index))

    def load_state_dict(self, state_dict: Any, **kwargs: Any) -> None:
        super().load_state_dict(state_dict, **kwargs)
        if self._rollout is not None:
            self._rollout.set_trajectory_ids(self._carrier)

    def _rows(self, index: Any) -> list[int]:
        rows = torch.zeros(self.n_env, dtype=torch.bool)
        rows[slice(None) if index is None else index] = True
        return rows.nonzero().flatten().tolist()
