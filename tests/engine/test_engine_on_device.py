"""An engine whose buffer lies on a device: its workers write to the staging ring, its owner samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from clockwork import EPISODE, clockwork_cfg
from simulated_device import SimulatedDevice
from tensordict import TensorDict
from torch.utils.data import DataLoader
from waiting import wait_until

from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.engine.data import OnlineDataEngine, OnlineDataEngineCfg
from embodichain_rl.errors import UploadError


def on(device: SimulatedDevice, cfg: OnlineDataEngineCfg) -> OnlineDataEngine:
    cfg.buffer_device = device  # type: ignore[assignment] # which the configuration takes no other way
    return OnlineDataEngine(cfg)


def episodes() -> Iterator[TensorDict]:
    number = 0
    while True:
        number += 1
        steps = torch.stack([torch.full((EPISODE,), float(number)), torch.arange(EPISODE) + 0.0], dim=-1)
        done = torch.zeros(EPISODE, 1, dtype=torch.bool)
        done[-1] = True
        yield TensorDict({"observation": steps, "next": {"done": done}}, [EPISODE])


def producers_cfg(**settings: Any) -> OnlineDataEngineCfg:
    return OnlineDataEngineCfg(
        buffer_size=4, max_episode_steps=EPISODE, producers=[episodes()], progress_bar=False, **settings
    )


def check(batch: TensorDict) -> None:
    assert (batch["observation"].diff(dim=1) == torch.tensor([0.0, 1.0])).all()


def test_workers_write_and_the_owner_samples(tmp_path: Path) -> None:
    with on(SimulatedDevice(), clockwork_cfg(tmp_path)) as engine:
        check(engine.sample_batch(8, 3))
        dataset = OnlineDataset(engine, chunk_size=3, batch_size=4)
        check(next(iter(DataLoader(dataset, batch_size=None))))
        inserted = engine.stats()["inserted"]
        wait_until(lambda: engine.stats()["inserted"] > inserted + 5, "that the worker goes on")


@pytest.mark.parametrize("direct", [False, True])
def test_producers_on_threads_are_judged_paced_and_counted(direct: bool) -> None:
    cfg = producers_cfg(accept=lambda trajectory: bool(trajectory["observation"][0, 0] % 2), refill_threshold=8.0)
    with on(SimulatedDevice(direct=direct), cfg) as engine:
        before = engine.stats()["workers"][0]["trajectories"]
        for _ in range(40):
            batch = engine.sample_batch(8, 3)
            check(batch)
            assert (batch["observation"][..., 0] % 2 == 1).all()
        # 320 chunks make up for 40 trajectories.
        wait_until(lambda: engine.stats()["workers"][0]["trajectories"] >= before + 36, "that it goes on")
        engine.replay_buffer.storage.flush()

        def written_is_inserted() -> bool:
            stats = engine.stats()
            return stats["inserted"] == stats["workers"][0]["trajectories"]

        wait_until(written_is_inserted, "that all who are ahead wait")
        stats = engine.stats()
        assert stats["workers"][0]["trajectories"] <= before + 40 + 10
        assert stats["rejected"] >= stats["inserted"] - 2


def test_an_upload_that_fails_ends_it() -> None:
    device = SimulatedDevice()
    with on(device, producers_cfg()) as engine:
        device.error = RuntimeError("CUDA error")

        def fails() -> bool:
            try:
                engine.sample_batch(8, 3)
            except UploadError:
                return True
            except RuntimeError as error:  # of its own gather, before the next upload
                if error is not device.error:
                    raise
            return False

        wait_until(fails, "that the failure is told")
