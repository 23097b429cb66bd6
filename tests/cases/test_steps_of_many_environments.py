"""One step of each of several environments, [B]: refused as a trajectory, and written with add()."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from steps import make_buffer, make_trajectory, small
from tensordict import TensorDict
from torchrl.envs import GymEnv, SerialEnv, StepCounter, TransformedEnv

from embodichain_rl import TrajectoryReplayBuffer, TrajectoryWriter
from embodichain_rl.errors import SchemaMismatchError, StepOrderError

REFUSED = pytest.mark.parametrize("compact", [False, True])


def empty(**kwargs: Any) -> TrajectoryReplayBuffer:
    return make_buffer(**{"max_trajectories": 1000, "max_total_steps": 50_000, "chunk_size": 2, **kwargs})


def environments(count: int = 4, steps: int = 6, **marks: Any) -> TensorDict:
    """Steps ``[B, T]`` of several environments."""
    rows = []
    for number in range(count):
        row = make_trajectory(number, steps, fields=["observation", ("next", "observation")])
        if "traj_ids" in marks:
            row["collector", "traj_ids"] = torch.full((steps,), 10 + number)
        if "step_count" in marks:
            row["step_count"] = torch.arange(steps)[:, None]
        if "is_init" in marks:
            row["is_init"] = (torch.arange(steps) == 0)[:, None]
        rows.append(row)
    return torch.stack(rows)


class TestExtendedAsIfTheyWereATrajectory:
    @REFUSED
    @pytest.mark.parametrize("marks", [{}, {"traj_ids": 1}, {"step_count": 1}, {"is_init": 1}], ids=str)
    def test_are_refused(self, compact: bool, marks: dict[str, Any]) -> None:
        rb, data = empty(compact=compact), environments(**marks)
        with pytest.raises(StepOrderError, match=r"rb\.add\(td\).*td\.unsqueeze\(1\).*sequences=True"):
            rb.extend(data[:, 0])
        assert not rb.storage.initialized
        assert rb.stats()["pending_steps"] == 0

    @pytest.mark.parametrize("step", [1, 3])
    def test_are_refused_at_any_step(self, step: int) -> None:
        data = environments()
        with pytest.raises(StepOrderError):
            empty().extend(data[:, step])

    def test_are_refused_beside_what_is_the_same_everywhere(self) -> None:
        data = environments()
        data["goal"] = data["next", "goal"] = torch.ones(4, 6, 3)
        with pytest.raises(StepOrderError):
            empty().extend(data[:, 0])

    def test_are_refused_by_their_counts_alone(self) -> None:
        data = environments(step_count=1).exclude(("next", "observation"))
        with pytest.raises(StepOrderError, match="'step_count' does not count up"):
            empty().extend(data[:, 2])

    def test_are_refused_by_counts_that_began_at_random(self) -> None:
        torch.manual_seed(0)
        data = small(0, 500, ends=False).set("step_count", torch.randint(0, 100, (500,)))
        with pytest.raises(StepOrderError, match="'step_count' does not count up"):
            empty().extend(data)

    def test_are_refused_where_some_of_them_are_done(self) -> None:
        data = environments(8)[:, 0]
        data["next", "done"][[1, 4]] = True
        with pytest.raises(StepOrderError):
            empty().extend(data)

    def test_of_a_whole_rollout_with_time_first_are_refused(self) -> None:
        data = environments()
        with pytest.raises(StepOrderError, match=r"transpose\(0, 1\)"):
            empty().extend(data[:, :5].transpose(0, 1))
        rb = empty()
        rb.extend(data)
        assert len(rb) == 4

    def test_of_torchrls_environment_are_refused(self) -> None:
        env = SerialEnv(3, lambda: GymEnv("Pendulum-v1"))
        step = env.rollout(4)[:, 0]
        with pytest.raises(StepOrderError):
            empty().extend(step)

    def test_of_which_ids_tell_go_to_their_trajectories(self) -> None:
        rb, data = empty(), environments(traj_ids=1).exclude(("next", "observation"))
        for step in range(6):
            rb.extend(data[:, step])
        assert [trajectory["label"][:, 0].unique().tolist() for trajectory in rb.storage] == [[0], [1], [2], [3]]


class TestWhatIsATrajectory:
    """Each of these has something in common with steps of several environments."""

    @pytest.mark.parametrize("length", [1, 2, 3])
    def test_a_short_one(self, length: int) -> None:
        rb = empty()
        assert rb.extend(make_trajectory(0, length)).tolist() == [0] * length

    @pytest.mark.parametrize("ends", [True, False])
    def test_a_single_step(self, ends: bool) -> None:
        rb = empty()
        assert rb.extend(make_trajectory(0, 1, ends=ends)).tolist() == [0 if ends else -1]

    def test_several_of_one_step_each(self) -> None:
        rb = empty()
        data = torch.cat([make_trajectory(number, 1, traj_id=number) for number in range(5)])
        data["is_init"], data["step_count"] = torch.ones(5, 1, dtype=torch.bool), torch.zeros(5, 1)
        assert rb.extend(data).tolist() == [0, 1, 2, 3, 4]

    def test_one_that_observes_the_same_all_the_time(self) -> None:
        rb = empty()
        data = small(0, 5, ends=False)
        data["observation"] = data["next", "observation"] = torch.ones(5, 3)
        assert rb.extend(data).tolist() == [-1] * 5
        assert rb.stats()["pending_trajectories"] == 1

    def test_one_that_stands_still_at_first(self) -> None:
        rb, data = empty(), make_trajectory(0, 12)
        data["observation"][:8] = 1.0
        data["next", "observation"][:7] = 1.0
        rb.extend(data[:9])
        assert rb.stats()["pending_trajectories"] == 1

    def test_one_that_observes_nan(self) -> None:
        rb, data = empty(), make_trajectory(0, 12, ends=False)
        data["observation"][:, 0] = data["next", "observation"][:, 0] = float("nan")
        rb.extend(data)
        assert rb.stats()["pending_trajectories"] == 1

    def test_one_without_next_observations(self) -> None:
        rb = empty()
        rb.extend(small(0, 6, ends=False))
        assert rb.stats()["pending_trajectories"] == 1

    def test_one_with_noise_in_one_entry(self) -> None:
        rb, data = empty(), make_trajectory(0, 6, ends=False)
        data["camera"], data["next", "camera"] = torch.randn(6, 64), torch.randn(6, 64)
        rb.extend(data)
        assert rb.stats()["pending_trajectories"] == 1

    def test_one_whose_count_goes_up_by_four(self) -> None:
        rb, data = empty(), small(0, 6, ends=False).set("step_count", 4 * torch.arange(6))
        rb.extend(data[:3])
        rb.extend(data[3:])
        assert rb.stats()["pending_trajectories"] == 1

    def test_what_the_user_says_is_one(self) -> None:
        rb = empty(writer=TrajectoryWriter(sequences=True))
        rb.extend(environments(step_count=1)[:, 0])
        assert rb.stats()["pending_trajectories"] == 1


class TestAdded:
    @pytest.mark.parametrize("marks", [{}, {"traj_ids": 1}, {"step_count": 1}, {"is_init": 1}], ids=str)
    @pytest.mark.parametrize("compact", [False, True])
    def test_step_by_step(self, marks: dict[str, Any], compact: bool) -> None:
        rb, data = empty(compact=compact), environments(**marks)
        for step in range(5):
            assert rb.add(data[:, step]).tolist() == [-1] * 4
        assert rb.add(data[:, 5]).tolist() == [0, 1, 2, 3]
        for number, trajectory in enumerate(rb.storage):
            assert trajectory["label"][:, :2].tolist() == [[number, step] for step in range(6)]

    def test_by_torchrls_environment_that_resets_its_own(self) -> None:
        env = TransformedEnv(SerialEnv(3, lambda: GymEnv("Pendulum-v1")), StepCounter(5))
        rb, td = empty(), env.reset()
        for _ in range(20):
            step, td = env.step_and_maybe_reset(env.rand_action(td))
            rb.add(step)
        assert [len(trajectory) for trajectory in rb.storage] == [5] * 12
        for trajectory in rb.storage:
            assert torch.equal(trajectory["next", "observation"][:-1], trajectory["observation"][1:])

    def test_by_environments_of_which_one_is_reset_by_hand(self) -> None:
        rb, data, other = empty(), environments(3, 12), environments(3, 6)
        other["observation"] += 7.0
        other["next", "observation"] += 7.0
        for step in range(4):
            rb.add(data[:, step])
        for step in range(6):
            mixed = data[:, 4 + step].clone()
            mixed[1] = other[1, step]
            rb.add(mixed)
        assert [len(trajectory) for trajectory in rb.storage] == [4, 6]
        assert rb.stats()["truncated"] == 1
        assert rb.stats()["pending_steps"] == 20


class Counter(gymnasium.Env):
    """Its observation is which environment it is, which episode, and which step."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, number: int) -> None:
        self.number, self.episode = number, -1

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return self._observed(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.time += 1
        return self._observed(), float(self.time), False, self.time == 3 + self.number, {}

    def _observed(self) -> np.ndarray:
        return np.array([self.number, self.episode, self.time], dtype=np.float32)


class TestGymnasiumVectors:
    @pytest.mark.parametrize("mode", ["NEXT_STEP", "SAME_STEP"])
    def test_recipe(self, mode: str) -> None:
        """The recipe of the documentation, for both modes."""
        autoreset = getattr(gymnasium.vector.AutoresetMode, mode)
        envs = gymnasium.vector.SyncVectorEnv([lambda n=n: Counter(n) for n in range(3)], autoreset_mode=autoreset)
        rb = empty()

        observation, _ = envs.reset()
        resetting = np.zeros(envs.num_envs, dtype=bool)
        for _ in range(40):
            action = envs.action_space.sample()
            after, reward, terminated, truncated, info = envs.step(action)
            done, following = terminated | truncated, after.copy()
            if mode == "SAME_STEP" and done.any():
                following[done] = np.stack(info["final_obs"][done])
            td = TensorDict(
                {
                    "observation": observation,
                    "action": action,
                    "next": {
                        "observation": following,
                        "reward": reward[:, None].astype(np.float32),
                        "done": done[:, None],
                        "terminated": terminated[:, None],
                        "truncated": truncated[:, None],
                    },
                    "collector": {"mask": ~resetting},  # a step that only resets is no step
                },
                [envs.num_envs],
            )
            rb.add(td)
            observation = after
            if mode == "NEXT_STEP":
                resetting = done

        assert len(rb) > 20
        for trajectory in rb.storage:
            number, episode, time = trajectory["observation"].unbind(-1)
            assert (number == number[0]).all()
            assert (episode == episode[0]).all()
            assert time.tolist() == list(range(3 + int(number[0])))
            assert trajectory["next", "observation"][:, 2].tolist() == [step + 1 for step in time.tolist()]
            assert trajectory["next", "done"][:, 0].tolist() == [False] * (len(time) - 1) + [True]
        assert rb.stats()["truncated"] == 0


def test_the_error_is_one_of_the_schema() -> None:
    assert issubclass(StepOrderError, SchemaMismatchError)
