"""Training that begins before the buffer is full: start() returns at min_trajectories, and filling goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from tensordict import TensorDict
from waiting import PATIENCE, wait_until

from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg
from embodichain_rl.errors import ConfigError, EngineStateError

STEPS = 5


def episode(number: int) -> TensorDict:
    done = torch.zeros(STEPS, 1, dtype=torch.bool)
    done[-1] = True
    return TensorDict({"number": torch.full((STEPS, 1), float(number)), "next": {"done": done}}, [STEPS])


def configured(producer: Iterator[TensorDict], **options: object) -> OnlineDataEngineCfg:
    settings = {"buffer_size": 8, "max_episode_steps": STEPS, "progress_bar": False, "producers": [producer]}
    return OnlineDataEngineCfg(**{**settings, **options})


def test_sampling_begins_at_three_of_eight_episodes_and_filling_goes_on() -> None:
    go_on = threading.Event()

    def episodes() -> Iterator[TensorDict]:
        for number in range(8):
            if number == 3:
                assert go_on.wait(PATIENCE)
            yield episode(number)

    with OnlineDataEngine(configured(episodes(), min_trajectories=3)) as engine:
        assert len(engine.replay_buffer) == 3
        batch = engine.sample_batch(16, 2)
        assert set(batch["number"].flatten().tolist()) <= {0.0, 1.0, 2.0}
        go_on.set()
        wait_until(lambda: len(engine.replay_buffer) == 8, "a full buffer")
        assert set(engine.sample_batch(64, 2)["number"].flatten().tolist()) <= {float(number) for number in range(8)}


def test_by_default_the_buffer_is_filled_first() -> None:
    with pytest.raises(EngineStateError, match="ended with 3 of buffer_size=8 trajectories"):
        OnlineDataEngine(configured(map(episode, range(3)))).start()
    engine = OnlineDataEngine(configured(map(episode, range(3)), min_trajectories=3))
    engine.start()
    assert len(engine.replay_buffer) == 3
    engine.stop()


@pytest.mark.parametrize("wrong", [0, 9, 2.5])
def test_more_than_the_buffer_keeps_are_refused(wrong: object) -> None:
    with pytest.raises(ConfigError, match="min_trajectories"):
        configured(map(episode, range(3)), min_trajectories=wrong)
