"""Code without a module that processes could import, and the start method of the user."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from typing import Any

import pytest
from loading import filled_buffer, iterating
from waiting import PATIENCE, PATIENCE_WITH_SCRIPTS

from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg, OnlineDataset
from embodichain_rl.errors import EngineStateError

NOTEBOOK = """
import multiprocessing
from dataclasses import dataclass
from pathlib import Path
import gymnasium, numpy as np, torch
from torch.utils.data import DataLoader
from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg, OnlineDataset
from torchrl.data import LazyTensorStorage, ReplayBuffer

class CellEnv(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.step_count = 0
        return np.zeros(2, np.float32), {}
    def step(self, action):
        self.step_count += 1
        return np.full(2, self.step_count / 10, np.float32), 0.0, self.step_count == 5, False, {}

@dataclass
class Sample:
    observation: torch.Tensor

gymnasium.register("Cell-v0", entry_point=CellEnv)
cfg = OnlineDataEngineCfg(
    buffer_size=4,
    max_episode_steps=5,
    gym_config={"id": "Cell-v0"},
    policy=lambda observation: observation[:1],
    accept=lambda steps: True,
)
with OnlineDataEngine(cfg) as engine:
    pid = engine.stats()["workers"][0]["pid"]
    assert "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text(), "the worker was not spawned"
    dataset = OnlineDataset(engine, lambda: 2, 3, transform=lambda batch: Sample(batch["observation"]))
    batches = iter(DataLoader(dataset, None, num_workers=1, multiprocessing_context="spawn"))
    batch = next(batches)
    assert type(batch) is Sample and batch.observation.shape == (3, 2, 2), batch
    collate = lambda items: Sample(torch.stack([item["observation"] for item in items]))
    dataset = OnlineDataset(engine, 2)
    batches = iter(DataLoader(dataset, 3, num_workers=1, multiprocessing_context="spawn", collate_fn=collate))
    batch = next(batches)
    assert type(batch) is Sample and batch.observation.shape == (3, 2, 2), batch
    del batches
ReplayBuffer(storage=LazyTensorStorage(10))
assert multiprocessing.get_start_method(allow_none=True) is None, "the start method was changed"
print("done")
"""


def test_a_script_on_standard_input() -> None:
    run = subprocess.run(
        [sys.executable, "-"], input=NOTEBOOK, capture_output=True, text=True, timeout=PATIENCE_WITH_SCRIPTS
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("done\n")


@pytest.mark.parametrize("method", ["forkserver"])
def test_local_functions_reach_workers(method: str) -> None:
    offset = 7

    def shifted(batch: Any) -> Any:
        return batch["observation"] + offset

    with iterating(OnlineDataset(filled_buffer(), 8, 3, shifted), 1, method) as batches:
        assert next(batches).shape[:2] == (3, 8)


def _start_an_engine(results: Any) -> None:
    cfg = OnlineDataEngineCfg(buffer_size=2, gym_config={"id": "Pendulum-v1"}, progress_bar=False)
    try:
        OnlineDataEngine(cfg).start()
    except Exception as error:
        results.put((type(error), str(error)))


def test_an_engine_in_a_daemonic_process() -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_start_an_engine, args=(results,), daemon=True)
    process.start()
    kind, message = results.get(timeout=PATIENCE)
    process.join()
    assert kind is EngineStateError
    assert "a daemonic process" in message
    assert "with daemon=False" in message
