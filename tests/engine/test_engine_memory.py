"""Engines with a buffer that is too large, or with a /dev/shm that is too small; the observations are images."""

from __future__ import annotations

import multiprocessing
import re
import subprocess
from pathlib import Path

import pytest
from clockwork import clockwork_engine
from owning import owner

from embodichain_rl.engine.data import OnlineDataEngineState
from embodichain_rl.errors import BufferMemoryError
from embodichain_rl.shared.memory_check import available_memory

pytestmark = pytest.mark.slow


def test_a_buffer_that_does_not_fit_is_refused_before_there_is_a_worker(tmp_path: Path) -> None:
    engine = clockwork_engine(tmp_path, env="Camera-v0", buffer_size=1_000_000)
    with pytest.raises(BufferMemoryError) as raised:
        engine.start()
    message = str(raised.value)
    needed, free = (int(n.replace(",", "")) for n in re.findall(r"([\d,]{9,}) bytes \([\d.]+ GiB\)", message))
    assert needed > 2 * 256 * 256 * 3 * 6_000_000  # observation and next observation of every step
    assert free == pytest.approx(available_memory(), rel=0.5)
    assert "buffer_size * max_episode_steps, here 1,000,000 * 6: lower one of these" in message

    assert not engine.replay_buffer.storage.initialized
    assert engine.stats()["workers"][0]["phase"] == "absent"
    assert len(list(tmp_path.glob("closed-*"))) == 1  # the environment of the probe process
    assert engine.state is OnlineDataEngineState.FAILED
    assert not multiprocessing.active_children()


SMALL_SHM = (
    *("unshare", "--mount", "sh", "-c"),
    'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"',
    "sh",
)

IMAGES = """
import shutil, torch
from torch.utils.data import DataLoader
from embodichain_rl.datasets import OnlineDataset

class Brightness(torch.nn.Linear):
    def forward(self, image):
        return super().forward(image.float().mean((-3, -2, -1), keepdim=True)[..., 0, 0])

def look_at(batches):
    for _ in range(4):  # of 9 MiB for each of the two keys
        batch = next(batches)
        assert batch["pixels"].shape == (16, 3, 256, 256, 3), batch
        assert (batch["pixels"].int().diff(dim=1) == 1).all()
    del batches, batch

def main():
    assert shutil.disk_usage("/dev/shm").total == 64 * 2**20
    policy = Brightness(1, 1)
    settings = {"env": "Camera-v0", "buffer_size": 48, "state_key": "pixels", "policy": policy}
    with clockwork_engine(commands, num_workers=2, **settings) as engine:
        assert engine.stats()["steps"] * 256 * 256 * 3 > 48 * 2**20  # and as much of next observations
        update_policy(engine, policy)
        options = {"multiprocessing_context": "forkserver"}
        look_at(iter(DataLoader(OnlineDataset(engine, 3, 16), batch_size=None, num_workers=2, **options)))
        look_at(iter(DataLoader(OnlineDataset(engine, 3), batch_size=16, num_workers=1, **options)))
    print("done", flush=True)

if __name__ == "__main__":
    main()
"""


def test_an_engine_does_not_need_dev_shm(tmp_path: Path) -> None:
    if subprocess.run([*SMALL_SHM, "true"], capture_output=True).returncode != 0:
        pytest.skip("a small /dev/shm can't be mounted here: that needs root in a namespace of its own")
    with owner(IMAGES, tmp_path, SMALL_SHM) as running:
        running.says("done")
        assert running.ends() == 0
