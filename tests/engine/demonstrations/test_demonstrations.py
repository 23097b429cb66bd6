from __future__ import annotations

import itertools
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from demo_envs import STEP_SIZE, ActionListReach, RowsReach, SegmentReach
from tensordict import TensorDictBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, GymWrapper

from embodichain_rl.engine.demonstrations import DemonstrationRollout, Segment, find_planner
from embodichain_rl.engine.environments import EnvMaker
from embodichain_rl.errors import ActionMismatchError, ConfigError, GenerationFailedError, InvalidArgumentError
from embodichain_rl.replay.writing.acceptance import accept_all

ACTION_LIST, SEGMENTS = "demo_envs:ActionListReach-v0", "demo_envs:SegmentReach-v0"


def envs(env_id: str, num_envs: int = 1, **kwargs: Any) -> list[EnvBase]:
    return EnvMaker({"id": env_id, "num_envs": num_envs, "kwargs": kwargs}).each()


def assert_whole(trajectory: TensorDictBase, *, reports_success: bool = True) -> None:
    """The trajectory is one episode of a ``Reach``, every step what the environment made of the action."""
    assert not trajectory["observation"][0, :2].any()
    assert torch.equal(trajectory["observation"][1:], trajectory["next", "observation"][:-1])
    moved = trajectory["next", "observation"][:, :2] - trajectory["observation"][:, :2]
    torch.testing.assert_close(moved, STEP_SIZE * trajectory["action"])
    assert trajectory["next", "done"].flatten().tolist() == [False] * (len(trajectory) - 1) + [True]
    assert not trajectory["done"].any()
    assert not reports_success or trajectory["next", "success"][-1].item()


def test_an_action_list_is_one_segment() -> None:
    rollout = DemonstrationRollout(envs(ACTION_LIST))
    for index, trajectory in enumerate(itertools.islice(rollout, 3)):
        assert_whole(trajectory)
        length = len(trajectory)
        assert trajectory.shape == (length,)
        assert trajectory["collector", "traj_ids"].tolist() == [index] * length
        assert trajectory["segment_id"].tolist() == [0] * length
        assert trajectory["segment_step"].tolist() == list(range(length))
        assert rollout.segments == (Segment("demonstration", None, length),)
    assert (rollout.num_accepted, rollout.num_rejected, rollout.num_failed) == (3, 0, 0)


def test_segments_are_planned_one_after_another() -> None:
    rollout = DemonstrationRollout(envs(SEGMENTS))
    trajectory = next(rollout)
    assert_whole(trajectory)
    approach, rise = rollout.segments
    assert (approach.name, approach.instruction) == ("approach", "Go below the goal.")
    assert (rise.name, rise.instruction) == ("rise", "Rise to the goal.")
    assert trajectory["segment_id"].tolist() == [0] * approach.num_steps + [1] * rise.num_steps
    assert trajectory["segment_step"].tolist() == [*range(approach.num_steps), *range(rise.num_steps)]
    assert trajectory["segment_id"].dtype == trajectory["segment_step"].dtype == torch.int64
    assert trajectory["segment_name"] == ["approach"] * approach.num_steps + ["rise"] * rise.num_steps
    assert (
        trajectory["instruction"] == [approach.instruction] * approach.num_steps + [rise.instruction] * rise.num_steps
    )


def test_the_keys_are_those_of_a_collector() -> None:
    maker = EnvMaker({"id": SEGMENTS}, max_episode_steps=40)
    collector = Collector(maker, None, frames_per_batch=5, total_frames=5)
    collected = next(iter(collector))
    collector.shutdown()
    added = ("segment_id", "segment_step", "segment_name", "instruction")
    demonstrated = next(DemonstrationRollout(maker.each())).exclude(*added)
    assert set(demonstrated.keys()) == set(collected.keys())
    described = [
        {key: (value.dtype, value.shape[1:]) for key, value in steps.items(True, True)}
        for steps in (demonstrated, collected)
    ]
    assert described[0] == described[1]


class Observed(SegmentReach):
    """Observes an instruction of its own, and its segments have none; the name of the second is up to the caller."""

    observation_space = gymnasium.spaces.Dict(
        {"observation": SegmentReach.observation_space, "instruction": gymnasium.spaces.Text(20)}
    )

    def __init__(self, name: Any = "rise") -> None:
        super().__init__()
        self._name = name

    def reset(self, **kwargs: Any) -> tuple:
        observation, info = super().reset(**kwargs)
        return {"observation": observation.copy(), "instruction": "Go."}, info

    def step(self, action: Any) -> tuple:
        observation, *rest = super().step(action)
        return {"observation": observation.copy(), "instruction": "Go."}, *rest

    def create_demo_segments(self) -> Any:
        for segment, name in zip(super().create_demo_segments(), ("approach", self._name), strict=True):
            segment.name, segment.instruction = name, None
            yield segment


def test_an_instruction_that_is_observed_stays_as_it_is() -> None:
    trajectory = next(DemonstrationRollout([GymWrapper(Observed())], accept=accept_all))
    assert set(trajectory["instruction"]) == set(trajectory["next", "instruction"]) == {"Go."}
    assert set(trajectory["segment_name"]) == {"approach", "rise"}


def test_a_name_that_is_no_text_is_a_failure() -> None:
    rollout = DemonstrationRollout([GymWrapper(Observed(3))], accept=accept_all, max_generation_attempts=1)
    with pytest.raises(GenerationFailedError, match="segment 1 of its plan has name=3 and instruction=None"):
        next(rollout)


def test_an_action_list_has_no_text() -> None:
    assert "instruction" not in next(DemonstrationRollout(envs(ACTION_LIST)))


def test_the_end_of_the_actions_truncates() -> None:
    trajectory = next(DemonstrationRollout(envs(ACTION_LIST)))
    assert trajectory["next", "truncated"][-1].item()
    assert not trajectory["next", "terminated"][-1].item()


def test_the_end_of_the_episode_ends_the_demonstration() -> None:
    maker = EnvMaker({"id": SEGMENTS}, max_episode_steps=3)
    rollout = DemonstrationRollout(maker.each(), accept=accept_all)
    trajectory = next(rollout)
    assert len(trajectory) == 3
    assert sum(segment.num_steps for segment in rollout.segments) == 3
    assert trajectory["next", "done"].flatten().tolist() == [False, False, True]


def test_no_action_is_asked_for_after_the_end_of_the_episode() -> None:
    class Endless(ActionListReach):
        def create_demo_action_list(self) -> Any:
            return itertools.repeat([0.0, 0.0])

    env = GymWrapper(gymnasium.wrappers.TimeLimit(Endless(), 4))
    assert len(next(DemonstrationRollout([env]))) == 4


def test_an_environment_may_write_its_steps_into_the_same_memory() -> None:
    assert_whole(next(DemonstrationRollout([GymWrapper(SegmentReach())], accept=accept_all)), reports_success=False)


class TestAccept:
    def test_success_is_the_default_where_it_is_reported(self) -> None:
        rollout = DemonstrationRollout(envs(ACTION_LIST, bad_plans=2, way="miss"))
        assert_whole(next(rollout))
        assert (rollout.num_accepted, rollout.num_rejected) == (1, 2)

    def test_everything_is_the_default_where_it_is_not(self) -> None:
        maker = EnvMaker({"id": ACTION_LIST, "kwargs": {"bad_plans": 1, "way": "miss"}}, reports_success=False)
        rollout = DemonstrationRollout(maker.each())
        assert next(rollout)["next", "done"][-1].item()
        assert (rollout.num_accepted, rollout.num_rejected) == (1, 0)

    def test_a_predicate_sees_the_trajectory(self) -> None:
        rollout = DemonstrationRollout(
            envs(SEGMENTS, num_envs=2),
            accept=lambda trajectory: bool((trajectory["segment_id"] == 0).sum() > 7),
            max_generation_attempts=1000,
        )
        for _ in itertools.islice(rollout, 20):
            assert rollout.segments[0].num_steps > 7
        assert rollout.num_rejected > 0


class TestFailures:
    @pytest.mark.parametrize("way", ["none", "empty", "raise", "miss"])
    @pytest.mark.parametrize("env_id", [ACTION_LIST, SEGMENTS])
    def test_too_many_name_the_environment_and_the_count(self, env_id: str, way: str) -> None:
        rollout = DemonstrationRollout(envs(env_id, bad_plans=7, way=way), max_generation_attempts=4)
        with pytest.raises(
            GenerationFailedError, match=r"Environment 0 \(\w+Reach-v0\) failed 4 times in a row"
        ) as caught:
            next(rollout)
        if way == "raise":
            assert "no collision-free path" in str(caught.value)
            assert isinstance(caught.value.__cause__, RuntimeError)
        assert_whole(next(rollout))  # the three that were left, and one that works
        assert rollout.num_rejected + rollout.num_failed == 7

    def test_fewer_are_tried_again(self) -> None:
        rollout = DemonstrationRollout(envs(SEGMENTS, bad_plans=3, way="raise"), max_generation_attempts=4)
        assert_whole(next(rollout))
        assert (rollout.num_accepted, rollout.num_failed) == (1, 3)

    def test_one_environment_does_not_discard_the_trajectories_of_others(self) -> None:
        both = [*envs(ACTION_LIST, bad_plans=10**6), *envs(SEGMENTS)]
        rollout = DemonstrationRollout(both, max_generation_attempts=3)
        handed_out, errors = [], []
        while len(handed_out) < 9:
            try:
                handed_out.append(next(rollout))
            except GenerationFailedError as error:
                errors.append(str(error))
        for index, trajectory in enumerate(handed_out):
            assert_whole(trajectory)
            assert trajectory["collector", "traj_ids"].unique().tolist() == [index]
        assert rollout.num_accepted == 9
        assert len(errors) == 3
        assert all("Environment 0 (ActionListReach-v0)" in error for error in errors)

    def test_an_error_of_the_simulator_is_no_failed_plan(self) -> None:
        class Breaks(ActionListReach):
            def step(self, action: np.ndarray) -> tuple:
                raise ArithmeticError("the solver diverged")

        with pytest.raises(ArithmeticError, match="diverged"):
            next(DemonstrationRollout([GymWrapper(Breaks())]))

    @pytest.mark.parametrize("actions", [np.zeros((4, 3)), [[0.5, 0.5], "up"]])
    def test_actions_are_checked(self, actions: Any) -> None:
        class Wrong(ActionListReach):
            def create_demo_action_list(self) -> Any:
                return actions

        with pytest.raises(ActionMismatchError, match=r"The demonstration of Environment 0 .* shape \[2\]"):
            next(DemonstrationRollout([GymWrapper(Wrong())]))


class TestRows:
    """One simulator with several rows, each a trajectory of its own."""

    def test_are_cut_where_each_ends(self) -> None:
        rollout = DemonstrationRollout([RowsReach()], accept=accept_all)
        for goal, trajectory in zip([2, 4, 6, 2, 4, 6], rollout, strict=False):
            assert trajectory["observation"].flatten().tolist() == list(range(goal))
            assert trajectory["next", "done"].flatten().tolist() == [False] * (goal - 1) + [True]
            assert trajectory["segment_step"].tolist() == list(range(goal))

    def test_are_judged_each_on_its_own(self) -> None:
        rollout = DemonstrationRollout([RowsReach()], max_generation_attempts=2)
        assert [len(next(rollout)) for _ in range(4)] == [2, 4, 2, 4]
        with pytest.raises(GenerationFailedError, match=r"Environment 0 \(RowsReach\), row 2, failed 2 times"):
            next(rollout)
        assert [len(next(rollout)) for _ in range(2)] == [2, 4]

    def test_that_ended_before_the_planning_failed_are_whole(self) -> None:
        class LosesItsWay(RowsReach):
            def create_demo_action_list(self) -> Any:
                yield from super().create_demo_action_list()[:3]
                raise RuntimeError("no path")

        rollout = DemonstrationRollout([LosesItsWay()])
        assert [len(next(rollout)) for _ in range(3)] == [2, 2, 2]
        assert (rollout.num_accepted, rollout.num_failed) == (3, 6)


class TestFindPlanner:
    def test_looks_into_the_wrappers(self) -> None:
        class Spin(gymnasium.Wrapper):
            def create_demo_action_list(self) -> list:
                return [[2.0]]

        env = GymWrapper(gymnasium.wrappers.TimeLimit(Spin(gymnasium.make("Pendulum-v1")), 5))
        assert next(DemonstrationRollout([env]))["action"].tolist() == [[2.0]]

    def test_segments_come_first(self) -> None:
        class Both(SegmentReach, ActionListReach):
            pass

        assert find_planner(GymWrapper(Both())).__name__ == "create_demo_segments"

    def test_an_environment_without_demonstrations(self) -> None:
        with pytest.raises(ConfigError, match=r"create_demo_segments\(\) or create_demo_action_list\(\)"):
            DemonstrationRollout(envs("CartPole-v1"))

    def test_several_environments_in_one(self) -> None:
        for max_episode_steps in (None, 5):
            batched = EnvMaker({"id": SEGMENTS, "num_envs": 2}, max_episode_steps=max_episode_steps)()
            with pytest.raises(ConfigError, match=r"EnvMaker\.each\(\)"):
                DemonstrationRollout([batched])


def test_refuses_what_can_not_work() -> None:
    with pytest.raises(InvalidArgumentError, match="list"):
        DemonstrationRollout([])
    with pytest.raises(InvalidArgumentError, match="list"):
        DemonstrationRollout(RowsReach())  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="max_generation_attempts"):
        DemonstrationRollout([RowsReach()], max_generation_attempts=0)


def test_a_robot_reaches() -> None:
    """A scripted expert for FetchReach, planned step by step from where the arm is."""
    pytest.importorskip("gymnasium_robotics", reason="Gymnasium-Robotics is an optional dependency")

    class Expert(gymnasium.Wrapper):
        def create_demo_segments(self) -> Any:
            yield DemoSegment("reach", lambda way: way)
            yield DemoSegment("hold", lambda way: 0.1 * way)

    class DemoSegment:
        instruction = "Bring the gripper to the red dot."

        def __init__(self, name: str, follow: Any) -> None:
            self.name = name
            self.actions = (self._towards_goal(follow) for _ in range(10))

        def _towards_goal(self, follow: Any) -> np.ndarray:
            task = robot.unwrapped
            way = task.goal - task._get_obs()["achieved_goal"]
            return np.append(follow(10 * way), 0.0).clip(-1, 1)

    robot = Expert(gymnasium.make("gymnasium_robotics:FetchReach-v4"))
    env = EnvMaker(env_factory=lambda: GymWrapper(robot), max_episode_steps=50)()
    rollout = DemonstrationRollout([env], accept=lambda trajectory: True)
    trajectory = next(rollout)
    distance = (trajectory["next", "achieved_goal"] - trajectory["next", "desired_goal"]).norm(dim=-1)
    assert len(trajectory) == 20
    assert distance[-1] < 0.05
    assert [segment.name for segment in rollout.segments] == ["reach", "hold"]
