"""When the collector leaves the work to TorchRL's, and how it behaves as a collector."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import pytest
import torch
from gym_envs import STEPS_PER_BATCH, Walk, assert_same, buffer, collect, trajectories, wrapped
from gymnasium.vector import AutoresetMode
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torchrl.collectors import Collector, MultiAsyncCollector
from torchrl.data import Composite, LazyTensorStorage, ReplayBuffer, Unbounded
from torchrl.envs import EnvBase, GymWrapper, InitTracker, RewardSum, SerialEnv, StepCounter, TransformedEnv
from torchrl.modules import GRUModule
from waiting import wait_until

from embodichain_rl.collectors import GymnasiumCollector
from embodichain_rl.errors import SchemaMismatchError


def linear(actions: int = 2) -> TensorDictModule:
    torch.manual_seed(1)
    return TensorDictModule(torch.nn.Linear(3, actions), ["observation"], ["action"])


def at_random() -> None:
    return None


class Undeclared(TensorDictModuleBase):
    """Writes more than it says."""

    in_keys = ("observation",)
    out_keys = ("action",)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict.set("action", tensordict["observation"][..., :2]).set("more", tensordict["observation"] * 2)


def recurrent() -> Any:
    torch.manual_seed(1)
    gru = GRUModule(input_size=3, hidden_size=4, in_key="observation", out_key="hidden")
    head = TensorDictModule(torch.nn.Linear(4, 2), ["hidden"], ["action"])
    from tensordict.nn import TensorDictSequential

    return TensorDictSequential(gru, head)


def for_recurrent() -> EnvBase:
    gru = GRUModule(input_size=3, hidden_size=4, in_key="observation", out_key="hidden")
    return TransformedEnv(wrapped(Walk), InitTracker()).append_transform(gru.make_tensordict_primer())


def transformed(*transforms: Any) -> EnvBase:
    env = TransformedEnv(wrapped(Walk))
    for transform in transforms:
        env.append_transform(transform())
    return env


def resetting() -> EnvBase:
    """A vector of environments that resets them by itself; TorchRL puts right what comes of it by a transform."""
    env = GymWrapper(gymnasium.vector.SyncVectorEnv([Walk] * 2, autoreset_mode=AutoresetMode.SAME_STEP))
    env.set_seed(0)
    return env


class Batched(EnvBase):
    """Two environments in one that is not Gymnasium's."""

    def __init__(self) -> None:
        super().__init__(batch_size=[2])
        self.observation_spec = Composite(observation=Unbounded((2, 3)), shape=(2,))
        self.action_spec = Unbounded((2, 2))
        self.reward_spec = Unbounded((2, 1))

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: Any) -> TensorDict:
        return TensorDict({"observation": torch.zeros(2, 3), "done": torch.zeros(2, 1, dtype=torch.bool)}, [2])

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        done = tensordict["action"][:, :1] > 0
        return TensorDict({"observation": torch.rand(2, 3), "reward": torch.ones(2, 1), "done": done}, [2])

    def _set_seed(self, seed: int | None) -> None:
        """Draws as torch does."""


def repeating() -> EnvBase:
    env = GymWrapper(Walk(), frame_skip=2)
    env.set_seed(0)
    return env


def reading_info() -> EnvBase:
    from torchrl.envs.gym_like import default_info_dict_reader

    env = wrapped(Walk)
    return env.set_info_dict_reader(default_info_dict_reader(["more"]))


class OwnWrapper(GymWrapper):
    def read_reward(self, reward: Any) -> torch.Tensor:
        return super().read_reward(reward) * 2


LEFT_TO_TORCHRL: dict[str, tuple[Callable[[], EnvBase], Callable[[], Any], dict[str, Any], str]] = {
    "transform": (partial(transformed, RewardSum), linear, {}, "RewardSum"),
    "counter": (partial(transformed, partial(StepCounter, 5, step_count_key="t")), linear, {}, "StepCounter"),
    "vector": (resetting, linear, {}, "VecGymEnvTransform"),
    "vector without its transform": (lambda: resetting().base_env, linear, {}, "autoreset_mode is AutoresetMode.SAME"),
    "not Gymnasium": (Batched, linear, {}, "Batched"),
    "wrapper": (lambda: OwnWrapper(Walk()), linear, {}, "OwnWrapper"),
    "frame skip": (repeating, linear, {}, "frame_skip"),
    "recurrent": (for_recurrent, recurrent, {}, "InitTracker|TensorDictPrimer"),
    "undeclared": (partial(wrapped, Walk), Undeclared, {}, "Undeclared"),
    "random first": (partial(wrapped, Walk), linear, {"init_random_frames": 2 * STEPS_PER_BATCH}, "init_random_frames"),
    "reset": (partial(wrapped, Walk), linear, {"reset_at_each_iter": True}, "reset_at_each_iter"),
    "truncated": (partial(wrapped, Walk), linear, {"set_truncated": True}, "set_truncated"),
}


@pytest.mark.parametrize("case", LEFT_TO_TORCHRL)
def test_is_torchrls_where_it_would_differ(case: str) -> None:
    make_env, make_policy, options, reason = LEFT_TO_TORCHRL[case]
    collector, ours = collect(GymnasiumCollector, make_env, make_policy, **options)
    assert isinstance(collector.fallback_reason, str)
    assert any(part in collector.fallback_reason for part in reason.split("|"))
    if case not in ("wrapper", "vector without its transform"):  # of which the one is not seeded, the other unusable
        assert_same(ours, collect(Collector, make_env, make_policy, **options)[1])


def test_is_torchrls_without_whole_trajectories_to_write() -> None:
    make_env = partial(wrapped, Walk)
    rb = ReplayBuffer(storage=LazyTensorStorage(1000))
    for options in ({"trajs_per_batch": 1}, {"replay_buffer": buffer()}, {"trajs_per_batch": 1, "replay_buffer": rb}):
        collector = GymnasiumCollector(make_env, None, frames_per_batch=10, total_frames=10, **options)
        assert collector.fallback_reason is not None
        collector.shutdown()


def test_a_policy_that_changes_its_mind_is_refused() -> None:
    dtypes = iter([torch.float32, torch.float64])
    policy = TensorDictModule(lambda x: x[:2].to(next(dtypes)), ["observation"], ["action"])
    with pytest.raises(SchemaMismatchError, match="float64"):
        collect(GymnasiumCollector, partial(wrapped, Walk), lambda: policy)


def test_text_is_left_to_torchrl_where_it_is_known() -> None:
    speaking = lambda x: (x[:2], "left" if x[0] > 0 else "right")  # noqa: E731
    make_policy = partial(TensorDictModule, speaking, ["observation"], ["action", "said"])
    _, ours = collect(GymnasiumCollector, partial(wrapped, Walk), linear)
    with pytest.raises(SchemaMismatchError, match=r"torchrl\.collectors\.Collector"):
        collect(GymnasiumCollector, partial(wrapped, Walk), make_policy)
    rb = buffer()
    rb.storage.allocate(ours[0][0].set("said", "left"))
    collector, ours = collect(GymnasiumCollector, partial(wrapped, Walk), make_policy, replay_buffer=rb)
    assert collector.fallback_reason == "The policy writes text."
    assert all(len(data["said"]) == len(data) for data in ours)


class Stops:
    """Tells a collector to break off every time after so many steps, as TorchRL's preemption does."""

    def __init__(self, steps: int) -> None:
        self.steps, self.asked = steps, 0

    def collection_stopped(self) -> bool:
        self.asked += 1
        return self.asked % self.steps == 0


def test_breaks_off_when_told_to_and_goes_on() -> None:
    stops, make_env = Stops(5), partial(wrapped, Walk)
    collector, ours = collect(GymnasiumCollector, make_env, linear, total_frames=200, interruptor=stops)
    assert stops.asked == 200
    assert collector.state_dict()["iter"] == 200 / 5 - 1
    # TorchRL's own fails when it is stopped while it writes to a buffer.
    assert_same(ours, collect(Collector, make_env, linear, total_frames=200, frames_per_batch=5)[1])


def serial() -> EnvBase:
    env = SerialEnv(2, partial(wrapped, Walk))
    env.set_seed(5)
    return env


@pytest.mark.parametrize("index", [None, 1])
def test_a_reset_drops_what_is_under_way(index: int | None) -> None:
    both = []
    for collector_class in (GymnasiumCollector, Collector):
        rb = buffer()
        torch.manual_seed(0)
        collector = collector_class(
            serial, linear(), frames_per_batch=10, total_frames=300, replay_buffer=rb, trajs_per_batch=1
        )
        for number, _ in enumerate(collector):
            if number in (4, 9):
                collector.reset(index)
        both.append(trajectories(rb))
    if index is None:
        assert_same(*both)
    for data in both[0]:  # whole, and of one episode each
        assert data["next", "observation"][:-1].equal(data["observation"][1:])
        assert data["next", "done"][:, 0].tolist() == [False] * (len(data) - 1) + [True]


def test_new_weights_act_from_the_next_step_on() -> None:
    rb, policy = buffer(), linear()
    collector = GymnasiumCollector(
        partial(wrapped, Walk), policy, frames_per_batch=60, total_frames=120, replay_buffer=rb, trajs_per_batch=1
    )
    new = linear()
    torch.nn.init.zeros_(new.module.weight)
    torch.nn.init.constant_(new.module.bias, 0.25)
    for number, _ in enumerate(collector):
        if number == 0:
            collector.update_policy_weights_(TensorDict.from_module(new))
    actions = torch.cat([data["action"] for data in trajectories(rb)])
    assert not (actions[:10] == 0.25).any()
    assert (actions[60:] == 0.25).all()
    assert len(actions) > 70


def make_env() -> EnvBase:
    return TransformedEnv(GymWrapper(Walk()), StepCounter(9))


def test_in_a_process_of_torchrl() -> None:
    rb, policy = buffer(), linear()
    collector = MultiAsyncCollector(
        [make_env],
        policy,
        frames_per_batch=40,
        total_frames=-1,
        replay_buffer=rb,
        trajs_per_batch=1,
        collector_class=GymnasiumCollector,
        num_threads=torch.get_num_threads(),
    )
    try:
        assert collector.get_distant_attr("fallback_reason") == [None]
        collector.set_seed(3)
        collector.start()
        wait_until(lambda: len(rb) >= 20)
        with torch.no_grad():
            policy.module.weight.zero_()
            policy.module.bias.fill_(0.25)
        collector.update_policy_weights_(policy)
        wait_until(lambda: bool((rb[-1]["action"] == 0.25).all()))
    finally:
        collector.shutdown()
    for data in trajectories(rb):
        assert data["step_count"][:, 0].tolist() == list(range(len(data)))
        assert data["next", "done"][:, 0].tolist() == [False] * (len(data) - 1) + [True]


def test_goes_on_from_a_state() -> None:
    both = []
    for collector_class in (GymnasiumCollector, Collector):
        first, _ = collect(collector_class, serial, linear)
        rb = buffer()
        torch.manual_seed(0)
        second = collector_class(
            serial, linear(), frames_per_batch=12, total_frames=500, replay_buffer=rb, trajs_per_batch=1
        )
        second.load_state_dict(first.state_dict())
        for _ in second:
            pass
        both.append(trajectories(rb))
    assert_same(*both)
