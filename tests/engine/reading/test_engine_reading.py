"""What comes out of an engine, who acts in it, which trajectories it keeps, and how fast it replaces them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from clockwork import EPISODE, Clockwork, MisbehavedError, clockwork_cfg, clockwork_engine, order, update_policy
from gymnasium.vector import AutoresetMode
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.envs import GymWrapper, RewardSum
from waiting import PATIENCE, wait_for_children, wait_until

from embodichain_rl.engine.data import OnlineDataEngine, OnlineDataEngineCfg, OnlineDataEngineState
from embodichain_rl.errors import (
    ChunkTooLongError,
    ConfigError,
    EngineStateError,
    EngineTimeoutError,
    GenerationFailedError,
    InvalidArgumentError,
    UnsupportedOperationError,
)

pytestmark = pytest.mark.slow


def always(action: float) -> torch.nn.Linear:
    """A policy that gives the same action for every observation; the environment's reward is the action."""
    policy = torch.nn.Linear(2, 1)
    policy.weight.data.zero_()
    policy.bias.data.fill_(action)
    return policy


def acts(engine: OnlineDataEngine, action: float) -> None:
    """Waits until the engine's trajectories are those of a policy that gives this action."""

    def all_of_it() -> bool:
        rewards = engine.sample_batch(64, EPISODE)["next", "reward"]
        return torch.allclose(rewards, torch.tensor(action))

    wait_until(all_of_it, f"the trajectories of {action}")


@pytest.fixture(scope="class")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnlineDataEngine]:
    commands = tmp_path_factory.mktemp("commands")
    with clockwork_engine(commands, num_workers=2, state_dim=2, policy=always(0.25), compact=True) as engine:
        yield engine


class TestReading:
    def test_batches_are_chunks_of_episodes(self, engine: OnlineDataEngine) -> None:
        batch = engine.sample_batch(5, 3, sampling_mode="episode")
        assert batch.shape == (5, 3)
        assert batch["observation"].shape == (5, 3, 2)
        assert (batch["observation"].diff(dim=1) == torch.tensor([0.0, 1.0])).all()
        assert (batch["next", "observation"][:, :-1] == batch["observation"][:, 1:]).all()
        assert engine.sample_batch(1, EPISODE).shape == (1, EPISODE)
        assert engine.sample_batch(1, EPISODE)["next", "observation"][0, -1, 1] == EPISODE
        arena = engine.replay_buffer.storage.arena
        assert ("next", "observation") in {arena.schema.keys[n] for n in arena.shifted}

    def test_draws_follow_the_generator(self, engine: OnlineDataEngine) -> None:
        batch = engine.sample_chunks(4, 2, generator=torch.Generator().manual_seed(1))
        assert batch.shape == (4, 2)

    def test_refuses_what_it_can_not_give(self, engine: OnlineDataEngine) -> None:
        with pytest.raises(InvalidArgumentError, match="sampling_mode='step'; it must be one of"):
            engine.sample_batch(2, 3, sampling_mode="step")
        with pytest.raises(TypeError, match=r"^sample_batch\(\) got .*'chunksize'\. Did you mean 'chunk_size'"):
            engine.sample_batch(2, chunksize=3)
        with pytest.raises(InvalidArgumentError, match="batch_size"):
            engine.sample_batch(0, 3)
        with pytest.raises(ChunkTooLongError):
            engine.sample_batch(2, EPISODE + 1)

    def test_only_the_owner_is_told_its_configuration(self, engine: OnlineDataEngine) -> None:
        assert engine.cfg.buffer_size == 4
        assert engine.is_init
        assert "READY" in repr(engine)

    def test_stats_say_what_goes_on(self, engine: OnlineDataEngine) -> None:
        wait_until(lambda: all(worker["phase"] == "acting" for worker in engine.stats()["workers"]), "all workers")
        before = engine.stats()
        for _ in range(10):
            engine.sample_batch(8, 2)
        wait_until(lambda: engine.stats()["inserted"] > before["inserted"] + 4)
        after = engine.stats()
        assert after["state"] == "READY"
        assert (after["fill"], after["trajectories"], after["steps"]) == (1.0, 4, 4 * EPISODE)
        assert after["samples"] == before["samples"] + 80
        assert after["inserted"] - after["evicted"] == pytest.approx(4, abs=2)  # workers go on while they are read
        assert after["inserts_per_second"] > 0
        assert after["samples_per_second"] > 0
        assert after["samples_per_insert"] > 0
        assert after["retries"] >= before["retries"] >= 0
        assert 0 <= after["age_newest"] <= after["age_mean"] <= after["age_oldest"] < PATIENCE
        assert (after["rejected"], after["restarts"], after["rate_limiter"]) == (0, 0, None)
        for worker in after["workers"]:
            assert (worker["phase"], worker["collector"]) == ("acting", "GymnasiumCollector")
            assert 0 <= worker["pending_steps"] <= worker["steps"]
            assert 0 <= worker["seconds_since_heartbeat"] < PATIENCE
            assert (worker["rejected"], worker["failed_attempts"], worker["restarts"]) == (0, 0, 0)
        # The workers go on while the numbers are read one after the other, for as long as that takes.
        later = engine.stats()
        for worker, then in zip(after["workers"], later["workers"], strict=True):
            # The last step of an episode counts when the episode is written already.
            assert then["steps"] + 1 >= worker["trajectories"] * EPISODE
        first, then = (sum(worker["trajectories"] for worker in stats["workers"]) for stats in (after, later))
        assert first <= later["inserted"]
        assert then >= after["inserted"] - 2  # each worker may have inserted one that it has yet to count

    def test_stats_before_the_start(self, tmp_path: Path) -> None:
        stats = clockwork_engine(tmp_path).stats()
        assert (stats["state"], stats["fill"], stats["samples_per_insert"]) == ("CREATED", 0.0, None)
        assert (stats["age_newest"], stats["age_mean"], stats["age_oldest"]) == (None, None, None)
        assert (stats["workers"][0]["phase"], stats["workers"][0]["collector"]) == ("absent", None)

    def test_policy_updates_reach_all_workers(self, engine: OnlineDataEngine) -> None:
        version = engine.stats()["policy_version"]
        version += update_policy(engine, always(0.5))
        acts(engine, 0.5)
        version += update_policy(engine, TensorDict.from_module(always(0.75)).data)
        acts(engine, 0.75)
        stats = engine.stats()
        assert stats["policy_version"] == version
        assert [worker["policy_version"] for worker in stats["workers"]] == [version] * 2
        assert 0 <= stats["policy_lag_mean"] <= stats["policy_lag_max"] <= version
        wait_until(lambda: engine.stats()["policy_lag_max"] == 0)
        assert engine.sample_batch(4, 3, max_policy_lag=0).shape == (4, 3)

    def test_stats_say_how_old_the_samples_of_this_process_were(self, tmp_path: Path) -> None:
        names = ("sampled_age_mean", "sampled_age_max", "sampled_policy_lag_mean", "sampled_policy_lag_max")
        with clockwork_engine(tmp_path) as engine:
            assert [engine.stats()[name] for name in names] == [None] * 4
            engine.sample_batch(8, 3)
            mean, largest, lag, lag_max = (engine.stats()[name] for name in names)
            assert 0.0 < mean <= largest
            assert (lag, lag_max) == (0.0, 0)  # the policy was never updated

    def test_policy_updates_do_not_wait_for_a_worker_that_is_stopped(self, engine: OnlineDataEngine) -> None:
        stopped = engine.stats()["workers"][0]["pid"]
        os.kill(stopped, signal.SIGSTOP)
        try:
            began = time.monotonic()
            updated = [engine.update_policy_weights_(always(0.125))]
            assert time.monotonic() - began < PATIENCE  # rather than for ever
            while updated[-1] != [1] and len(updated) < 20:  # the other one gets no processor
                updated.append(engine.update_policy_weights_(always(0.125)))
            assert updated == [[]] * (len(updated) - 1) + [[1]]
        finally:
            os.kill(stopped, signal.SIGCONT)
        update_policy(engine, always(-0.5))
        acts(engine, -0.5)

    def test_wrong_weights_are_refused(self, engine: OnlineDataEngine) -> None:
        for wrong in (torch.nn.Linear(3, 1), torch.nn.Linear(2, 1, bias=False)):
            with pytest.raises(InvalidArgumentError, match="do not match the engine's policy; they differ in"):
                engine.update_policy_weights_(wrong)
        with pytest.raises(InvalidArgumentError, match=r"Got a OrderedDict; .* needs a torch\.nn\.Module"):
            engine.update_policy_weights_(always(0.0).state_dict())


class TestWhoActs:
    def test_a_function_that_only_cloudpickle_can_pickle(self, tmp_path: Path) -> None:
        policy = lambda observation: torch.full((1,), 0.375)  # noqa: E731
        with clockwork_engine(tmp_path, policy=policy) as engine:
            acts(engine, 0.375)
            with pytest.raises(UnsupportedOperationError, match="no weights"):
                engine.update_policy_weights_(always(0.0))

    def test_a_torchrl_module(self, tmp_path: Path) -> None:
        def policy(action: float) -> TensorDictModule:
            return TensorDictModule(always(action), in_keys=["observation"], out_keys=["action"])

        with clockwork_engine(tmp_path, policy=policy(0.5)) as engine:
            acts(engine, 0.5)
            update_policy(engine, policy(0.25))
            acts(engine, 0.25)


class TestStateDim:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"state_dim": 10}, r"state_dim=10, but 'observation' of the environment has the shape \[2\]"),
            (
                {"state_dim": 2, "state_key": "joints"},
                r"state_key='joints' is not an observation .*'observation': \[2\]",
            ),
        ],
    )
    def test_that_differs_is_refused(self, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
        engine = clockwork_engine(tmp_path, **settings)
        with pytest.raises(ConfigError, match=message):
            engine.start()
        assert engine.state is OnlineDataEngineState.FAILED
        with pytest.raises(ConfigError, match=message):
            engine.check_health()
        assert not multiprocessing.active_children()


class TestAccept:
    def test_keeps_what_the_function_accepts(self, tmp_path: Path) -> None:
        with clockwork_engine(tmp_path, accept=lambda episode: episode["observation"][0, 0] % 2 == 0) as engine:
            assert (engine.sample_batch(64, 2)["observation"][:, :, 0] % 2 == 0).all()
            # Every other one is rejected, the first one before one is inserted; the worker counts on between two looks.
            stats = engine.stats()
            assert stats["inserted"] > 0
            wait_until(lambda: engine.stats()["rejected"] >= stats["inserted"])
            wait_until(lambda: engine.stats()["inserted"] >= stats["rejected"] - 1)
            assert engine.state is OnlineDataEngineState.READY

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_gives_up_and_names_the_environment(self, tmp_path: Path, num_workers: int) -> None:
        settings = {"accept": lambda episode: False, "max_generation_attempts": 7, "num_workers": num_workers}
        engine = clockwork_engine(tmp_path, **settings)
        with pytest.raises(GenerationFailedError, match=r"clockwork:Clockwork-v0 \(worker 0\) failed 7 times in a row"):
            engine.start()
        assert engine.stats()["restarts"] == 0
        wait_for_children()


class TestSources:
    def test_env_factory(self, tmp_path: Path) -> None:
        cfg = OnlineDataEngineCfg(
            buffer_size=4,
            max_episode_steps=4,
            env_factory=lambda: GymWrapper(gymnasium.make("Pendulum-v1")),
            transforms=RewardSum(),
            state_dim=3,
            start_method="forkserver",
            progress_bar=False,
        )
        with OnlineDataEngine(cfg) as engine:
            assert engine.sample_batch(3, 4)["observation"].shape == (3, 4, 3)
            assert engine.stats()["steps"] == 16  # each episode is truncated
            steps = engine.sample_batch(3, 4)
            assert steps["next", "episode_reward"].allclose(steps["next", "reward"].cumsum(1))
            reason = "Collector: The environment is transformed by a RewardSum."
            assert engine.stats()["workers"][0]["collector"] == reason

    def test_a_vector_of_environments(self) -> None:
        options = {"autoreset_mode": AutoresetMode.DISABLED}
        cfg = OnlineDataEngineCfg(
            buffer_size=6,
            max_episode_steps=4,
            env_factory=lambda: GymWrapper(gymnasium.make_vec("Pendulum-v1", 3, "sync", vector_kwargs=options)),
            start_method="forkserver",
            progress_bar=False,
        )
        with OnlineDataEngine(cfg) as engine:
            steps = engine.sample_batch(5, 4)
            assert steps["observation"].shape == (5, 4, 3)
            assert steps["observation"][:, 1:].equal(steps["next", "observation"][:, :-1])
            assert engine.stats()["steps"] == 24
            assert engine.stats()["workers"][0]["collector"] == "GymnasiumCollector"

    def test_in_this_process(self, tmp_path: Path) -> None:
        threads = threading.active_count()
        with clockwork_engine(tmp_path, num_workers=0, policy=always(0.5)) as engine:
            assert not multiprocessing.active_children()
            assert engine.stats()["workers"][0]["pid"] == os.getpid()
            acts(engine, 0.5)
            assert engine.update_policy_weights_(always(0.25)) == [0]
            acts(engine, 0.25)
        wait_until(lambda: threading.active_count() <= threads, "the end of the threads")
        assert (tmp_path / f"closed-{os.getpid()}").exists()

    def test_in_this_process_raises(self, tmp_path: Path) -> None:
        with clockwork_engine(tmp_path, num_workers=0, max_worker_restarts=1) as engine:
            order(tmp_path, "step", "raise")
            wait_until(lambda: engine.stats()["restarts"] == 1, "the restart")
            order(tmp_path, "step", "raise")
            wait_until(lambda: engine.state is OnlineDataEngineState.FAILED, "the failure")
            with pytest.raises(MisbehavedError):
                engine.sample_batch(2, 3)


def collector(commands: Path, total_frames: int = -1) -> Collector:
    def make_env() -> GymWrapper:
        return GymWrapper(Clockwork(str(commands)))

    return Collector(make_env, None, frames_per_batch=4, total_frames=total_frames)


def producers_engine(*producers: Any, **settings: Any) -> OnlineDataEngine:
    return OnlineDataEngine(
        OnlineDataEngineCfg(
            buffer_size=4,
            max_episode_steps=EPISODE,
            producers=producers,
            progress_bar=False,
            shutdown_timeout=PATIENCE,
            refill_threshold=None,
            **settings,
        )
    )


@pytest.fixture
def two_collectors(tmp_path: Path) -> Iterator[list[Collector]]:
    collectors = [collector(tmp_path) for _ in range(2)]
    yield collectors
    for each in collectors:
        each.shutdown()


class TestProducers:
    def test_collectors_are_iterated(self, two_collectors: list[Collector]) -> None:
        with producers_engine(*two_collectors) as engine:
            # Their batches of 4 steps end within episodes of 6; the buffer has whole ones.
            assert engine.sample_batch(32, EPISODE)["next", "done"][:, -1].all()
            wait_until(lambda: all(worker["trajectories"] > 4 for worker in engine.stats()["workers"]))
        assert not any(thread.name.startswith("embodichain-rl-producer") for thread in threading.enumerate())

    def test_one_that_raises_fails_the_engine(self, tmp_path: Path, two_collectors: list[Collector]) -> None:
        with producers_engine(*two_collectors) as engine:
            order(tmp_path, "step", "raise")
            wait_until(lambda: engine.state is OnlineDataEngineState.FAILED)
            with pytest.raises(MisbehavedError, match="misbehaved at step") as raised:
                engine.sample_batch(2, 3)
            assert "in _obey" in "\n".join(raised.value.__notes__)

    def test_those_that_end_too_early(self, tmp_path: Path) -> None:
        short = collector(tmp_path, total_frames=2 * EPISODE)
        with pytest.raises(EngineStateError, match="All producers ended with 2 of buffer_size=4 trajectories"):
            producers_engine(short).start()

    def test_an_engine_goes_on_when_they_have_ended(self, tmp_path: Path) -> None:
        enough = collector(tmp_path, total_frames=5 * EPISODE + 2)
        with producers_engine(enough) as engine:
            for _ in range(3):
                assert engine.sample_batch(8, 3).shape == (8, 3)
            engine.check_health()


class TestPacing:
    THRESHOLD = 8.0

    @pytest.fixture(scope="class")
    @classmethod
    def paced(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnlineDataEngine]:
        commands = tmp_path_factory.mktemp("commands")
        with clockwork_engine(commands, refill_threshold=cls.THRESHOLD) as engine:
            yield engine

    def wait_until_idle(self, engine: OnlineDataEngine) -> None:
        wait_until(lambda: engine.stats()["rate_limiter"]["waiting_producers"] == 1, "that the producer waits")

    def test_producers_wait_for_a_learner_that_does_nothing(self, paced: OnlineDataEngine) -> None:
        self.wait_until_idle(paced)
        before = paced.stats()
        # A worker that waits for its turn goes on giving signs of life, and so does not count as hung.
        for _ in range(4):
            seen = time.monotonic() - paced.stats()["workers"][0]["seconds_since_heartbeat"]
            wait_until(
                lambda seen=seen: (
                    time.monotonic() - paced.stats()["workers"][0]["seconds_since_heartbeat"] > seen + 0.1
                ),
                "a sign of life",
            )
        after = paced.stats()
        assert after["workers"][0]["steps"] == before["workers"][0]["steps"]
        assert after["inserted"] == before["inserted"]
        assert after["restarts"] == 0

    def test_a_trajectory_is_replaced_after_so_many_draws(self, paced: OnlineDataEngine) -> None:
        self.wait_until_idle(paced)
        before = paced.stats()
        for _ in range(100):
            paced.sample_batch(4, 3)
        self.wait_until_idle(paced)
        wait_until(lambda: paced.stats()["inserted"] - before["inserted"] >= 400 / self.THRESHOLD - 1)
        self.wait_until_idle(paced)
        assert paced.stats()["inserted"] - before["inserted"] == pytest.approx(400 / self.THRESHOLD, abs=2)

    def test_can_be_changed_while_it_runs(self, paced: OnlineDataEngine) -> None:
        self.wait_until_idle(paced)
        assert paced.rate_limiter is not None
        paced.rate_limiter.pause()
        inserted = paced.stats()["inserted"]
        wait_until(lambda: paced.stats()["inserted"] > inserted + 20)
        paced.rate_limiter.resume()
        self.wait_until_idle(paced)

    def test_a_worker_that_is_killed_while_it_waits_is_replaced(self, paced: OnlineDataEngine) -> None:
        self.wait_until_idle(paced)
        before = paced.stats()
        os.kill(before["workers"][0]["pid"], signal.SIGKILL)
        wait_until(lambda: paced.stats()["restarts"] == before["restarts"] + 1)
        for _ in range(100):
            paced.sample_batch(4, 3)
        wait_until(lambda: paced.stats()["inserted"] >= before["inserted"] + 400 / self.THRESHOLD - 2)
        self.wait_until_idle(paced)
        assert paced.stats()["workers"][0]["pid"] != before["workers"][0]["pid"]

    def test_stop_does_not_wait_for_a_producer_that_waits(self, paced: OnlineDataEngine) -> None:
        self.wait_until_idle(paced)
        closed = Path(paced.cfg.gym_config["kwargs"]["commands"]) / f"closed-{paced.stats()['workers'][0]['pid']}"
        paced.stop()
        assert closed.exists(), "it was killed in the end"
        assert not multiprocessing.active_children()


def test_a_sample_does_not_wait_for_ever_for_the_start(tmp_path: Path) -> None:
    order(tmp_path, "step", "hang always")
    cfg = clockwork_cfg(tmp_path, initialization_timeout=1.0, shutdown_timeout=4.0)
    engine = OnlineDataEngine(cfg)  # whose samples wait 1 s
    engine.cfg.initialization_timeout = PATIENCE
    outcome: list[BaseException] = []

    def start() -> None:
        try:
            engine.start()
        except EngineStateError as error:
            outcome.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    wait_until(lambda: engine.state is OnlineDataEngineState.STARTING)
    try:
        with pytest.raises(
            EngineTimeoutError, match=r"still starting after 1 s, with 0 of 4 trajectories: worker 0( .*)? is"
        ):
            engine.sample_batch(2, 3)
    finally:
        engine.stop()
        thread.join(PATIENCE)
    assert len(outcome) == 1
