"""An engine speaks the words of EmbodiChain's Online Data Streaming, and tells the truth at its end."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from waiting import PATIENCE, wait_until

from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg, OnlineDataEngineState, OnlineDataset
from embodichain_rl.engine.state import EngineChannel, Generations
from embodichain_rl.errors import (
    ChunkTooLongError,
    ConfigError,
    DataTimeoutError,
    DataUnavailableError,
    EmptyBufferError,
    EngineStateError,
    EngineTimeoutError,
    InvalidArgumentError,
    NothingToDrawError,
    RateLimitTimeoutError,
    WorkerHungError,
)

EPISODE = 5


class Ramp(gymnasium.Env):
    """Counts its steps. It fails, or closes badly, when a test says so."""

    observation_space = gymnasium.spaces.Box(0.0, 100.0, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    closing: str = ""
    breaks = False
    slow = 0.0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        if Ramp.breaks:
            raise ZeroDivisionError("the solver diverged")
        time.sleep(Ramp.slow)
        self.steps += 1
        return np.array([self.steps], np.float32), float(action[0]), self.steps == EPISODE, False, {}

    def close(self) -> None:
        if Ramp.closing:
            raise OSError(Ramp.closing)


class RampWithExpert(Ramp):
    def create_demo_action_list(self) -> list[np.ndarray]:
        return [np.full(1, 0.5, np.float32)] * EPISODE


gymnasium.register("Ramp-v0", entry_point=Ramp)
gymnasium.register("RampWithExpert-v0", entry_point=RampWithExpert)


def cfg(env: str = "Ramp-v0", **settings: Any) -> OnlineDataEngineCfg:
    """Return the configuration of an engine that acts on a thread of this process, where ``Ramp`` can be changed."""
    gym_config = {"id": env, "kwargs": {"disable_env_checker": True}}
    defaults: dict[str, Any] = {"buffer_size": 3, "max_episode_steps": EPISODE, "num_workers": 0}
    defaults["start_method"] = "forkserver"  # for the probe
    return OnlineDataEngineCfg(gym_config=gym_config, progress_bar=False, **{**defaults, **settings})


@pytest.fixture(autouse=True)
def well_behaved(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in {"closing": "", "breaks": False, "slow": 0.0}.items():
        monkeypatch.setattr(Ramp, name, value)
    return monkeypatch


def test_the_words_of_its_page_and_a_manual_refill() -> None:
    with OnlineDataEngine(cfg(refill_policy="manual")) as engine:
        assert engine.state == "READY"
        assert f"{engine.state}" == "READY"
        assert engine.state is OnlineDataEngineState.READY
        assert engine.is_init
        assert (engine.buffer_size, engine.device) == (3, torch.device("cpu"))
        stored = engine.shared_buffer
        assert stored["observation"].squeeze(-1).tolist() == [[0, 1, 2, 3, 4]] * 3
        assert stored["trajectory", "generation"].unique().tolist() == [1]
        dataset = OnlineDataset(engine=engine, chunk_size=4, batch_size=8)
        loader = DataLoader(dataset, batch_size=None, collate_fn=OnlineDataset.passthrough_collate_fn)
        assert next(iter(loader)).shape == (8, 4)

        # Nothing is replaced unless it is requested, and then exactly so much.
        for _ in range(300):
            engine.sample_batch(64, EPISODE)
        assert engine.stats()["inserted"] == 3
        assert engine.generation == 1
        generation = engine.request_refill(2)
        assert generation == 2
        engine.wait_for_generation(generation, timeout=PATIENCE)
        assert engine.stats()["inserted"] == 5
        batch = engine.sample_batch(64, 2, provenance=True)
        assert set(batch["trajectory", "generation"].unique().tolist()) == {1, 2}
        assert torch.equal(batch["trajectory", "episode"], batch["trajectory", "id"])
        assert torch.equal(batch["trajectory", "generation"], torch.where(batch["trajectory", "episode"] < 3, 1, 2))
        assert batch["trajectory", "run_id"].unique().numel() == 1
        assert 0 <= time.time() - batch["trajectory", "published_at"].max().item() / 1e9 < 3600
        item = next(iter(OnlineDataset(engine, chunk_size=2, provenance=True)))
        assert item["trajectory", "generation"].shape == (2,)

        # Held producers do not act; nobody waits for a generation that nobody requested.
        engine.hold()
        wait_until(lambda: engine.stats()["workers"][0]["held"])
        held = engine.request_refill()
        with pytest.raises(EngineTimeoutError, match="The producers are held") as raised:
            engine.wait_for_generation(held, timeout=0.2)
        assert isinstance(raised.value, RuntimeError)
        engine.release()
        engine.wait_for_generation(held, timeout=PATIENCE)
        with pytest.raises(InvalidArgumentError, match="only 3 were requested"):
            engine.wait_for_generation(9)
    assert engine.state == "STOPPED"
    with pytest.raises(EngineStateError):
        engine.request_refill()


def test_who_acts_where_no_policy_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with OnlineDataEngine(cfg("RampWithExpert-v0")) as engine:
        assert engine.sample_batch(8, EPISODE)["action"].unique().tolist() == [0.5]
    assert len([record for record in caplog.records if "offers demonstrations" in record.message]) == 1


def test_random_actions_where_they_are_asked_for() -> None:
    with OnlineDataEngine(cfg("RampWithExpert-v0", policy="random")) as engine:
        # All eight chunks may be of one trajectory: the expert's action is one value, random ones are five.
        assert engine.sample_batch(8, EPISODE)["action"].unique().numel() >= EPISODE
        wait_until(lambda: engine.stats()["rate_limiter"]["waiting_producers"] == 1)  # the simulator rests


def test_an_environment_that_fails_to_close_is_told(well_behaved: pytest.MonkeyPatch) -> None:
    def body() -> None:
        with OnlineDataEngine(cfg()):
            well_behaved.setattr(Ramp, "closing", "the disk is full")
            if fails:
                raise KeyError("of the training")

    fails = False
    with pytest.raises(OSError, match="the disk is full"):
        body()
    well_behaved.setattr(Ramp, "closing", "")
    fails = True
    with pytest.raises(KeyError) as raised:
        body()
    assert any("OSError: the disk is full" in note for note in raised.value.__notes__)


def test_a_failure_that_nobody_was_told_of_is_raised_at_the_end(well_behaved: pytest.MonkeyPatch) -> None:
    engine = OnlineDataEngine(cfg(refill_threshold=None, max_worker_restarts=0))

    def body() -> None:
        with engine:
            well_behaved.setattr(Ramp, "breaks", True)
            wait_until(lambda: engine.state == "FAILED")

    with pytest.raises(ZeroDivisionError, match="the solver diverged"):
        body()
    engine.stop()  # once is enough
    assert engine.state == "FAILED"


def test_a_failure_that_a_sample_has_raised_is_not_raised_again(well_behaved: pytest.MonkeyPatch) -> None:
    with OnlineDataEngine(cfg(refill_threshold=None, max_worker_restarts=0)) as engine:
        well_behaved.setattr(Ramp, "breaks", True)
        wait_until(lambda: engine.state == "FAILED")
        with pytest.raises(ZeroDivisionError):
            engine.sample_batch(2, 2)
    assert engine.state == "FAILED"


def test_a_worker_that_does_not_close_in_time_is_told(well_behaved: pytest.MonkeyPatch) -> None:
    engine = OnlineDataEngine(cfg(shutdown_timeout=0.5, refill_threshold=None))
    engine.start()
    well_behaved.setattr(Ramp, "slow", 3.0)
    wait_until(lambda: engine.stats()["workers"][0]["seconds_since_heartbeat"] > 0.5)
    with pytest.raises(WorkerHungError, match=r"within shutdown_timeout=0.5 s"):
        engine.stop()


def test_a_configuration_that_is_changed_is_checked_or_refused() -> None:
    made = cfg()
    made.buffer_size = 0
    with pytest.raises(ConfigError, match="buffer_size"):
        OnlineDataEngine(made)
    made.buffer_size = 2
    made.gym_config["num_envs"] = -1  # type: ignore[index]
    with pytest.raises(ConfigError, match="num_envs"):
        made.validate()
    made.gym_config["num_envs"] = 2  # type: ignore[index]
    assert made.env_maker.is_batch  # type: ignore[union-attr]
    engine = OnlineDataEngine(made)
    assert engine.buffer_size == 2
    with pytest.raises(ConfigError, match=r"cfg\.replace\(buffer_size=\.\.\.\)"):
        engine.cfg.buffer_size = 4
    other = made.replace(buffer_size=4, policy="random")
    assert (other.buffer_size, made.buffer_size) == (4, 2)
    assert OnlineDataEngineCfg(**made.to_dict()) == made
    assert dataclasses.replace(made, seed=1).to_dict()["seed"] == 1
    with pytest.raises(ConfigError, match="no buffer_sizes"):
        made.replace(buffer_sizes=4)


def test_errors_that_mean_wait_are_runtime_errors() -> None:
    waits = [ChunkTooLongError, DataTimeoutError, EmptyBufferError, EngineTimeoutError, NothingToDrawError]
    for error in [*waits, RateLimitTimeoutError]:
        assert issubclass(error, RuntimeError)
        assert issubclass(error, DataUnavailableError)
    assert issubclass(ChunkTooLongError, ValueError)


def test_what_is_read_before_the_start_is_not_there_yet() -> None:
    engine = OnlineDataEngine(cfg())
    with pytest.raises(EmptyBufferError, match="current state is CREATED"):
        _ = engine.shared_buffer
    with pytest.raises(EngineStateError, match="current state is CREATED"):
        engine.sample_batch(1, 1)
    assert not engine.is_init


def test_workers_do_not_write_more_than_is_requested() -> None:
    channel = EngineChannel(2, buffer_size=3, manual=True)
    first, second = channel.worker(0), channel.worker(1)
    target = Generations(channel).target
    assert first.claim_turn(lambda: 2, target)
    assert not second.claim_turn(lambda: 2, target)  # the first is about to write the last one
    first.begin()  # it died before
    assert second.claim_turn(lambda: 2, target)
    second.wrote(EPISODE)
    assert not first.claim_turn(lambda: 3, target)
    assert Generations(channel).request(2, published=3) == 2
    assert Generations(channel).request(4, published=4) == 2  # part of the one before
    assert Generations(channel).of(np.array([0, 2, 3, 6, 7])).tolist() == [1, 1, 2, 2, 3]
