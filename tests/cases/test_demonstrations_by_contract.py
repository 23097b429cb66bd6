"""Demonstrations of environments that follow EmbodiChain's contract: segments, verdicts, masks, actions, continuity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, GymWrapper

from embodichain_rl.engine.demonstrations import DemonstrationRollout
from embodichain_rl.errors import GenerationFailedError


@dataclass(frozen=True)
class DemoSegment:
    """A segment with the fields of EmbodiChain's."""

    actions: Any
    name: str = "segment"
    target_uid: str | None = None
    instruction: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    validator: Callable[[], Any] | None = None
    abort_actions: Callable[..., Any] | None = None
    failure_policy: str = "batch_abort"


@dataclass(frozen=True)
class ControllerAction:
    value: Any
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Counter(gymnasium.Env):
    """Adds up its actions; the task is done at ``goal``. Its ``info`` says what the test wants."""

    observation_space = gymnasium.spaces.Box(-100.0, 100.0, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-10.0, 10.0, (1,), np.float32)
    metadata = {"dataset": {"instruction": {"lang": "Count to three."}}}  # noqa: RUF012

    def __init__(self, segments: Callable[[Counter], Any], infos: Mapping[int, dict[str, Any]] | None = None) -> None:
        self._segments = segments
        self._infos = infos or {}
        self.goal = 3.0
        self.taken: list[Any] = []
        self.events: list[str] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.events.append("reset")
        self.position = 0.0
        self.taken = []
        return np.array([0.0], np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.taken.append(action)
        self.events.append("step")
        self.position += float(np.asarray(action).reshape(-1)[0])
        info = {"success": False, **self._infos.get(len(self.taken), {})}
        ends = info.pop("terminated", False), info.pop("truncated", False)
        return np.array([self.position], np.float32), 0.0, *ends, info

    def create_demo_segments(self) -> Any:
        return self._segments(self)

    def is_task_success(self) -> torch.Tensor:
        self.events.append("judged")
        return torch.tensor([self.position == self.goal])


def ones(count: int) -> list[np.ndarray]:
    return [np.ones(1, np.float32)] * count


def rolled(env: Counter, **settings: Any) -> tuple[TensorDictBase, DemonstrationRollout]:
    rollout = DemonstrationRollout([GymWrapper(env)], **{"max_generation_attempts": 1, **settings})
    return next(rollout), rollout


def failure(env: Counter, **settings: Any) -> str:
    with pytest.raises(GenerationFailedError) as raised:
        rolled(env, **settings)
    return str(raised.value)


def test_the_environment_judges_when_the_plan_is_exhausted() -> None:
    env = Counter(lambda _: [DemoSegment(ones(3))])  # its info says "success": False all the way
    trajectory, _ = rolled(env)
    assert trajectory["observation"].flatten().tolist() == [0.0, 1.0, 2.0]
    assert trajectory["next", "done"].flatten().tolist() == [False, False, True]
    assert env.events == ["reset", "step", "step", "step", "judged"]  # the last observation is taken before a reset
    assert "was not accepted" in failure(Counter(lambda _: [DemoSegment(ones(2))]))


def test_the_verdict_is_what_is_stored_as_success() -> None:
    env = GymWrapper(Counter(lambda _: [DemoSegment(ones(3))]))
    env.set_info_dict_reader(_Success())
    trajectory = next(DemonstrationRollout([env]))
    assert trajectory["next", "success"].flatten().tolist() == [False, False, True]


def test_an_episode_that_fails_on_the_way_is_left_out() -> None:
    for info in ({"fail": True}, {"terminated": True}, {"truncated": True, "success": True}):
        env = Counter(lambda _: [DemoSegment(ones(3))], {2: info})
        assert "was not accepted" in failure(env)
        assert len(env.taken) == 2
    env = Counter(lambda _: [DemoSegment(ones(9))], {2: {"terminated": True, "success": True}})
    trajectory, _ = rolled(env)
    assert len(trajectory) == len(env.taken) == 2


def test_a_segment_that_is_not_validated_ends_the_plan() -> None:
    asked = []

    def segments(env: Counter) -> Iterator[DemoSegment]:
        yield DemoSegment(ones(2), "pick", validator=lambda: torch.tensor([env.position > 5]))
        asked.append("the second segment")
        yield DemoSegment(ones(1), "place")

    assert "segment 0 ('pick') of its plan was not validated" in failure(Counter(segments), accept=lambda _: True)
    assert not asked


def test_a_segment_that_is_broken_off_is_stopped_safely() -> None:
    stops: list[tuple[str, bool]] = []

    def abort(reason: str, *, last_action_consumed: bool) -> list[np.ndarray]:
        stops.append((reason, last_action_consumed))
        return [np.full(1, -7.0, np.float32)]

    env = Counter(lambda _: [DemoSegment(iter(ones(9)), abort_actions=abort)], {2: {"fail": True}})
    trajectory, _ = rolled(env, accept=lambda _: True)
    assert stops == [("failure", True)]
    assert float(env.taken[-1][0]) == -7.0
    assert trajectory["action"].flatten().tolist() == [1.0, 1.0]  # without what stopped it

    def breaks() -> Iterator[np.ndarray]:
        yield from ones(1)
        raise RuntimeError("no path")

    env = Counter(lambda _: [DemoSegment(breaks(), abort_actions=abort)])
    assert "no path" in failure(env)
    assert stops[-1] == ("action_generation_failed", True)


def test_segments_say_what_they_are_about() -> None:
    segments = [DemoSegment(ones(2), "pick", "cup", "Pick it up."), DemoSegment(ones(1), "place")]
    trajectory, rollout = rolled(Counter(lambda _: segments))
    assert trajectory["target_uid"] == ["cup", "cup", ""]
    assert trajectory["instruction"] == ["Pick it up.", "Pick it up.", "Count to three."]
    assert [segment.target_uid for segment in rollout.segments] == ["cup", None]


def test_the_cfg_of_the_task_comes_before_the_metadata_of_the_data() -> None:
    env = Counter(lambda _: DemoSegment(ones(3)))  # a single segment, not in a list
    env.cfg = {"task_instruction": "Count on."}  # type: ignore[attr-defined]
    assert rolled(env)[0]["instruction"] == ["Count on."] * 3


def test_no_chunk_crosses_a_restored_state() -> None:
    segments = [
        DemoSegment(ones(2), metadata={"continuity_id": 0}),
        DemoSegment(ones(1), metadata={"continuity_id": 1}),
    ]
    first, rollout = rolled(Counter(lambda _: segments))
    second = next(rollout)
    assert [len(first), len(second)] == [2, 1]
    assert first["next", "done"].flatten().tolist() == [False, True]
    assert second["segment_id"].tolist() == [1]
    assert first["collector", "traj_ids"][0] != second["collector", "traj_ids"][0]


class Controlled(Counter):
    """Takes actions of twice the size, and envelopes as they are; like EmbodiChain's, it normalises them itself."""

    def _normalize_demo_action(self, action: Any) -> Any:
        if isinstance(action, ControllerAction):
            return action
        return action[..., :1] if isinstance(action, torch.Tensor) else action

    def step(self, action: Any) -> tuple:
        kept = action
        if isinstance(action, ControllerAction):
            action = action.value
        if isinstance(action, TensorDict):
            action = action["qpos"]
        result = super().step(action)
        self.taken[-1] = kept
        return result


def test_the_environment_takes_its_own_kinds_of_action() -> None:
    commands = TensorDict({"qpos": torch.ones(1), "qvel": torch.zeros(1)}, [])
    actions = [torch.tensor([1.0, 5.0]), commands, ControllerAction(commands)]
    env = Controlled(lambda _: [DemoSegment(actions)])
    trajectory, _ = rolled(env)
    assert [type(action) for action in env.taken] == [torch.Tensor, TensorDict, ControllerAction]
    assert env.taken[0].tolist() == [1.0]  # as the environment has normalised it
    assert trajectory["action"].flatten().tolist() == [1.0, 1.0, 1.0]


def test_accept_may_ask_the_environment() -> None:
    env = Counter(lambda _: [DemoSegment(ones(4))])
    seen = []

    def accept(trajectory: TensorDictBase, env: Counter) -> bool:
        seen.append((len(trajectory), env.position))
        return env.position == 4.0

    assert len(rolled(env, accept=accept)[0]) == 4
    assert seen == [(4, 4.0)]


class _Success:
    info_spec: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self) -> None:
        from torchrl.data import Categorical

        self.info_spec = Composite(success=Categorical(2, shape=(1,), dtype=torch.bool))

    def __call__(self, info: dict[str, Any], steps: TensorDictBase) -> TensorDictBase:
        return steps.set("success", torch.tensor([bool(info.get("success", False))]))


class Rows(EnvBase):
    """Two counters in one simulator, with EmbodiChain's hooks; the first is done at 2, the second at 3."""

    def __init__(self, segments: list[DemoSegment], ends: Mapping[int, tuple[list[bool], list[bool]]]) -> None:
        super().__init__(batch_size=[2])
        self.observation_spec = Composite(observation=Unbounded(shape=(2, 1)), shape=(2,))
        self.action_spec = Bounded(-10.0, 10.0, shape=(2, 1))
        self.reward_spec = Unbounded(shape=(2, 1))
        self.segments, self.ends = segments, ends
        self.masks: list[tuple[bool, ...]] = []
        self.held: list[bool] = []
        self._demo_no_auto_reset = False
        self.last_info: dict[str, Any] = {}

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: Any) -> TensorDictBase:
        self.position, self.steps = torch.zeros(2, 1), 0
        return TensorDict({"observation": self.position.clone()}, [2])

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.steps += 1
        self.held.append(self._demo_no_auto_reset)
        self.position = self.position + tensordict["action"]
        terminated, success = self.ends.get(self.steps, ([False, False], [False, False]))
        self.last_info = {"success": torch.tensor(success)}
        done = torch.tensor(terminated).unsqueeze(-1)
        return TensorDict({"observation": self.position.clone(), "reward": torch.zeros(2, 1), "done": done}, [2])

    def _set_seed(self, seed: int | None) -> None:
        pass

    def _mask_demo_action(self, action: torch.Tensor, active_mask: tuple[bool, ...]) -> torch.Tensor:
        self.masks.append(active_mask)
        return action * torch.tensor(active_mask).unsqueeze(-1)

    def is_task_success(self) -> torch.Tensor:
        return torch.tensor([True, True])

    def create_demo_segments(self) -> list[DemoSegment]:
        return self.segments


def rows(count: int) -> torch.Tensor:
    return torch.ones(count, 2, 1)


def test_a_row_that_is_done_is_masked_while_the_other_goes_on() -> None:
    env = Rows([DemoSegment(rows(3)), DemoSegment(rows(1))], {2: ([True, False], [True, False])})
    rollout = DemonstrationRollout([env])
    first, second = next(rollout), next(rollout)
    assert (len(first), len(second)) == (2, 4)
    assert env.masks == [(False, True)] * 2
    assert env.held == [True] * 4
    assert not env._demo_no_auto_reset


def test_one_row_that_fails_ends_all_or_only_itself() -> None:
    ends = {2: ([True, False], [False, False])}
    together = DemonstrationRollout([Rows([DemoSegment(rows(3))], ends)], max_generation_attempts=1)
    with pytest.raises(GenerationFailedError, match=r"row 0, failed .* was not accepted"):
        next(together)
    with pytest.raises(GenerationFailedError, match=r"row 1, failed .* another row failed"):
        next(together)
    apart = Rows([DemoSegment(rows(3), failure_policy="row_independent")], ends)
    trajectory = next(DemonstrationRollout([apart]))
    assert trajectory["observation"].flatten().tolist() == [0.0, 1.0, 2.0]
