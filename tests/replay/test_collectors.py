"""TorchRL's collectors, real ones over a real environment: what they fill the buffer with is whole."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from steps import make_buffer, make_plain_buffer
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.data import TensorDictReplayBuffer
from torchrl.envs import EnvBase, GymWrapper, SerialEnv, StepCounter, TransformedEnv
from waiting import PATIENCE, wait_until

from embodichain_rl import TrajectoryStorage

pytestmark = pytest.mark.slow


class Episodes(gymnasium.Env):
    """Its observation is: which environment, which episode, which step, and how long the episode will be."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, environment: int = 0) -> None:
        self.environment, self.episode = environment, -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.episode += 1
        self.length = 3 + (5 * self.episode + self.environment) % 7
        self.time = 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.time += 1
        return self._observation(), float(self.time), self.time == self.length, False, {}

    def _observation(self) -> np.ndarray:
        return np.array([self.environment, self.episode, self.time, self.length], dtype=np.float32)


gymnasium.register("embodichain_rl_tests/Episodes-v0", Episodes)


def make_env(environment: int = 0, max_steps: int | None = None) -> EnvBase:
    env = GymWrapper(gymnasium.make("embodichain_rl_tests/Episodes-v0", environment=environment))
    return env if max_steps is None else TransformedEnv(env, StepCounter(max_steps))


def make_batched_env(first: int = 0) -> EnvBase:
    return SerialEnv(3, [functools.partial(make_env, first + n) for n in range(3)])


def make_policy() -> TensorDictModule:
    return TensorDictModule(torch.nn.Linear(4, 2), ["observation"], ["action"])


def make_large_buffer(**kwargs: Any) -> TensorDictReplayBuffer:
    return make_buffer(max_trajectories=1000, max_total_steps=100_000, **kwargs)


def make_bounded_buffer() -> TensorDictReplayBuffer:
    return make_buffer(max_trajectories=60, max_total_steps=1000)


def check_episodes(rb: TensorDictReplayBuffer, max_steps: int = 100) -> dict[int, list[int]]:
    """Says that every trajectory is a whole episode, stored once; returns the episodes of each environment."""
    episodes: dict[int, list[int]] = {}
    for data in rb.storage:
        observation, following = data["observation"], data["next", "observation"]
        environment, episode, _, length = observation[0].tolist()
        length = min(int(length), max_steps)
        assert observation[:, 0].eq(environment).all(), "a trajectory of several environments"
        assert observation[:, 1].eq(episode).all(), "a trajectory of several episodes"
        assert observation[:, 2].tolist() == list(range(length)), "an episode that is cut, or has gaps"
        assert following[:, 2].tolist() == list(range(1, length + 1))
        assert data["next", "reward"][:, 0].tolist() == list(range(1, length + 1))
        assert data["next", "done"][:, 0].tolist() == [False] * (length - 1) + [True]
        assert data["action"].abs().sum() > 0
        episodes.setdefault(int(environment), []).append(int(episode))
    for environment, there in episodes.items():
        assert sorted(there) == list(range(min(there), max(there) + 1)), f"episodes of {environment} are missing"
    check_chunks(rb.sample())
    return episodes


def check_chunks(data: TensorDictBase) -> None:
    steps = data["observation"]
    assert (steps[..., 2].diff() == 1).all(), "steps are not consecutive"
    assert (steps[..., :2].diff(dim=1) == 0).all(), "a chunk is of several episodes"


@pytest.fixture
def start_method(request: pytest.FixtureRequest) -> Iterator[str]:
    """The start method that TorchRL takes, which is the one of torch.multiprocessing."""
    before = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    torch.multiprocessing.set_start_method(before, force=True)


def start_methods(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("start_method", names, indirect=True)


@pytest.fixture(autouse=True)
def _keep_the_number_of_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class TestSingleProcess:
    """120 frames: what is not stored is under way."""

    @pytest.mark.parametrize("make", [make_env, make_batched_env], ids=["one environment", "three"])
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"track_traj_ids": False},
            {"split_trajs": True},
            {"trajs_per_batch": 2},
            {"max_frames_per_traj": 4},
            {"reset_at_each_iter": True, "set_truncated": True},
            {"return_same_td": True},
        ],
        ids=lambda settings: ", ".join(settings) or "defaults",
    )
    def test_iterated_and_extended(self, make: Callable[[], EnvBase], settings: dict[str, Any]) -> None:
        rb = make_large_buffer()
        collector = Collector(make(), None, frames_per_batch=30, total_frames=120, **settings)
        for data in collector:
            rb.extend(data)
        collector.shutdown()
        if "reset_at_each_iter" in settings:
            assert rb.storage.num_steps == rb.write_count == 120
            return
        check_episodes(rb, settings.get("max_frames_per_traj", 100))
        if "trajs_per_batch" not in settings:
            assert rb.write_count + rb.writer.pending_steps == 120
        assert rb.write_count > 80

    @pytest.mark.parametrize("make", [make_env, make_batched_env], ids=["one environment", "three"])
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"extend_buffer": False},
            {"extend_buffer": False, "track_traj_ids": False},
            {"trajs_per_batch": 1},
            {"trajs_per_batch": 3, "trajs_per_write": 2},
            {"trajs_per_batch": 1, "max_frames_per_traj": 4},
            {"compact_obs": False},
        ],
        ids=lambda settings: ", ".join(settings) or "defaults",
    )
    @pytest.mark.parametrize("make_rb", [make_large_buffer, make_plain_buffer], ids=["ours", "TorchRL's"])
    def test_filling_the_buffer(
        self, make: Callable[[], EnvBase], settings: dict[str, Any], make_rb: Callable[..., TensorDictReplayBuffer]
    ) -> None:
        rb = make_rb() if make_rb is make_large_buffer else make_rb(storage=TrajectoryStorage(1000, 100_000))
        collector = Collector(make(), None, frames_per_batch=30, total_frames=120, replay_buffer=rb, **settings)
        for _ in collector:
            pass
        collector.shutdown()
        check_episodes(rb, settings.get("max_frames_per_traj", 100))
        if "trajs_per_batch" not in settings:
            assert rb.write_count + rb.writer.pending_steps == 120
        assert rb.write_count > 80

    def test_random_frames_are_counted_in_steps(self) -> None:
        rb = make_large_buffer()
        policy = TensorDictModule(lambda observation: torch.full((2,), 0.5), ["observation"], ["action"])
        collector = Collector(
            make_env(), policy, frames_per_batch=20, total_frames=100, replay_buffer=rb, init_random_frames=50
        )
        for _ in collector:
            pass
        collector.shutdown()
        random = [bool((data["action"] != 0.5).any()) for data in rb.storage]
        assert random == sorted(random, reverse=True)
        steps = sum(len(data["action"]) for data, was_random in zip(rb.storage, random, strict=True) if was_random)
        assert 40 <= steps <= 80

    def test_in_a_thread(self) -> None:
        rb = make_large_buffer()
        collector = Collector(make_env(), None, frames_per_batch=30, total_frames=-1, replay_buffer=rb)
        collector.start()
        try:
            wait_until(lambda: len(rb) >= 20)
            check_episodes(rb)
        finally:
            collector.async_shutdown(timeout=PATIENCE)
        check_episodes(rb)

    # A thread may have the id of one that ended, and each collector counts its trajectories from zero.
    def test_in_one_thread_after_another(self) -> None:
        rb = make_large_buffer()
        for environment in range(3):
            collector = Collector(make_env(environment), None, frames_per_batch=10, total_frames=-1, replay_buffer=rb)
            collector.start()
            enough = len(rb) + 5
            try:
                wait_until(lambda: len(rb) >= enough)  # noqa: B023
            finally:
                collector.async_shutdown(timeout=PATIENCE)
        assert set(check_episodes(rb)) == {0, 1, 2}


class TestSeveralProcesses:
    @pytest.mark.parametrize(
        ("start_method", "cat_results"), [("fork", "stack"), ("forkserver", 0), ("fork", -1)], indirect=["start_method"]
    )
    def test_synchronous_iterated_and_extended(self, start_method: str, cat_results: Any) -> None:
        rb = make_large_buffer()
        collector = MultiSyncCollector(
            [functools.partial(make_env, n) for n in range(2)],
            None,
            frames_per_batch=40,
            total_frames=160,
            cat_results=cat_results,
            use_buffers=True,
            num_threads=torch.get_num_threads(),
        )
        for data in collector:
            rb.extend(data)
        collector.shutdown()
        assert set(check_episodes(rb)) == {0, 1}
        assert rb.write_count + rb.writer.pending_steps == 160

    @start_methods("forkserver")
    def test_asynchronous_iterated_and_extended(self, start_method: str) -> None:
        rb = make_large_buffer()
        collector = MultiAsyncCollector(
            [functools.partial(make_env, n) for n in range(2)],
            None,
            frames_per_batch=40,
            total_frames=160,
            num_threads=torch.get_num_threads(),
        )
        for data in collector:
            rb.extend(data)
        collector.shutdown()
        check_episodes(rb)
        assert rb.write_count + rb.writer.pending_steps == 160

    @pytest.mark.parametrize(
        ("start_method", "settings"), [("forkserver", {}), ("fork", {"trajs_per_batch": 1})], indirect=["start_method"]
    )
    def test_synchronous_filling_the_buffer(self, start_method: str, settings: dict[str, Any]) -> None:
        rb = make_large_buffer()
        collector = MultiSyncCollector(
            [functools.partial(make_env, n) for n in range(2)],
            make_policy(),
            frames_per_batch=40,
            total_frames=160,
            replay_buffer=rb,
            num_threads=torch.get_num_threads(),
            **settings,
        )
        for _ in collector:
            pass
        collector.shutdown()
        assert set(check_episodes(rb)) == {0, 1}
        assert 120 <= rb.write_count <= 160
        assert rb.writer.pending_steps == 0

    def fill(
        self, rb: TensorDictReplayBuffer, count: int = 24, max_steps: int = 100, **settings: Any
    ) -> dict[int, list[int]]:
        """Lets two processes fill the buffer while this one samples; returns the episodes of each environment."""
        envs = settings.pop("envs", [functools.partial(make_env, n) for n in range(2)])
        policy = settings.pop("policy", make_policy())
        threads = torch.get_num_threads()
        collector = MultiAsyncCollector(
            envs, policy, frames_per_batch=30, total_frames=-1, replay_buffer=rb, num_threads=threads, **settings
        )
        assert len(rb) == 0
        collector.start()
        try:
            wait_until(lambda: rb.write_count >= 6 * count or not all(worker.is_alive() for worker in collector.procs))
            assert rb.write_count >= 6 * count, "a worker died"
            for _ in range(20):
                check_chunks(rb.sample())
        finally:
            collector.shutdown()
        assert rb.writer.pending_steps == 0
        return check_episodes(rb, max_steps)

    @pytest.mark.parametrize(
        ("start_method", "settings", "allocated"),
        [
            ("fork", {}, True),
            ("fork", {"trajs_per_batch": 1}, False),
            ("forkserver", {}, False),
            ("forkserver", {"trajs_per_batch": 1}, True),
        ],
        indirect=["start_method"],
    )
    def test_in_start_mode(self, start_method: str, settings: dict[str, Any], allocated: bool) -> None:
        rb = make_bounded_buffer()
        if allocated:
            step = make_env().fake_tensordict()
            rb.storage.allocate(step.set(("collector", "traj_ids"), torch.zeros((), dtype=torch.int64)))
        self.fill(rb, **settings)

    @start_methods("spawn")
    def test_in_start_mode_as_torchrl_does_by_default(self, start_method: str) -> None:
        self.fill(make_bounded_buffer(), trajs_per_batch=1, envs=[make_env])

    @start_methods("forkserver")
    def test_in_start_mode_into_torchrls_buffer(self, start_method: str) -> None:
        self.fill(make_plain_buffer(storage=TrajectoryStorage(60, 1000), shared=True), trajs_per_batch=1)

    @start_methods("forkserver")
    def test_in_start_mode_with_batched_environments(self, start_method: str) -> None:
        envs = [functools.partial(make_batched_env, 10 * n) for n in range(2)]
        episodes = self.fill(make_bounded_buffer(), 40, envs=envs)
        assert set(episodes) <= {0, 1, 2, 10, 11, 12}
        assert len(episodes) > 3

    @start_methods("forkserver")
    def test_in_start_mode_with_environments_that_truncate(self, start_method: str) -> None:
        rb = make_bounded_buffer()
        self.fill(rb, max_steps=5, trajs_per_batch=1, envs=[functools.partial(make_env, 0, 5)])
        assert max(len(data) for data in rb.storage) == 5
        assert ("next", "step_count") in rb.storage.schema.keys

    @start_methods("forkserver")
    def test_a_policy_made_by_the_workers_leaves_nothing_on_the_disk(
        self, start_method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
    ) -> None:
        # TorchRL lets the first worker allocate such a storage, and would do it in a directory that it never removes.
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        rb = make_bounded_buffer()
        collected = self.fill(rb, trajs_per_batch=1, policy=None, policy_factory=make_policy)
        assert collected
        assert rb.storage.shared_init, "TorchRL did not take that way: this test is of no use any more"
        assert not [path for path, _, files in os.walk(tmp_path) if files]
        assert not rb.storage._storage.is_memmap()


def test_what_slice_sampler_code_gave_can_be_had_from_the_buffer() -> None:
    """A loop written for SliceSampler, whose batches are flat, works with its batches reshaped."""
    rb = make_large_buffer(batch_size=4)
    collector = Collector(make_env(), None, frames_per_batch=30, total_frames=90, replay_buffer=rb)
    for _ in collector:
        flat = rb.sample().reshape(-1)
        assert flat.shape == (12,)
        assert (flat["observation"][:, 2].reshape(4, 3).diff() == 1).all()
    collector.shutdown()
