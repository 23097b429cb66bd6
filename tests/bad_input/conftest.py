from __future__ import annotations

from pathlib import Path

import pytest
from nonsense import Place, configure, make_buffer

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.engine.data import OnlineDataEngine


@pytest.fixture(scope="module")
def rb() -> TrajectoryReplayBuffer:
    return make_buffer()


@pytest.fixture(scope="module")
def engine() -> OnlineDataEngine:
    return OnlineDataEngine(configure())


@pytest.fixture
def place(rb: TrajectoryReplayBuffer, engine: OnlineDataEngine, tmp_path: Path) -> Place:
    return Place(rb, engine, tmp_path)
