"""Transforms and collate functions may return any objects: their tensors and arrays never need /dev/shm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE_WITH_SCRIPTS

SMALL_SHM = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh")

TRAIN = """
import shutil, sys, torch, numpy as np
from collections import namedtuple
from dataclasses import dataclass
from typing import Any
from tensordict import TensorDict, tensorclass
from torch.utils.data import DataLoader, default_collate
from embodichain_rl import OnlineDataset, TrajectoryReplayBuffer

PIXELS = (3, 128, 128)  # a batch of 8 chunks of 4 steps has 1.5 MB, more than there is of /dev/shm

Pair = namedtuple("Pair", "pixels action")

@dataclass
class Sample:
    pixels: torch.Tensor
    more: Any

@tensorclass
class Frames:
    pixels: torch.Tensor
    action: torch.Tensor

class Plain:
    def __init__(self, pixels): self.pixels = pixels

def view(data): return data["pixels"][:, 1:]
def scaled(data): return data["pixels"] * 2
def to_dict(data): return {"pixels": scaled(data), "nested": {"view": view(data), "name": "arm"}}
def to_tuple(data): return scaled(data), view(data)
def to_list(data): return [scaled(data), [view(data)]]
def to_namedtuple(data): return Pair(scaled(data), data["action"] + 1)
def to_dataclass(data): return Sample(scaled(data), {"view": view(data)})
def to_tensorclass(data): return Frames(scaled(data), data["action"] + 1, batch_size=data.batch_size)
def to_arrays(data): return {"pixels": scaled(data).numpy(), "fortran": np.asfortranarray(view(data).numpy())}
def to_object(data): return Plain(scaled(data).numpy())
def to_parameter(data): return [torch.nn.Parameter(scaled(data).float())]
def stack_arrays(items): return Plain(np.stack([item["pixels"] for item in items]))
def collate_dicts(items): return to_dict({"pixels": torch.stack([item["pixels"] for item in items])})

def pixels_of(batch):
    if isinstance(batch, dict): return batch["pixels"]
    if isinstance(batch, (tuple, list)): return batch[0]
    return batch.pixels

def check(pixels, shape):
    pixels = torch.as_tensor(pixels).detach()
    assert tuple(pixels.shape) == (*shape, *PIXELS), pixels.shape
    first = pixels[..., :1, :1, :1]
    assert (pixels == first).all() and (first % 2 == 0).all()
    steps = first.squeeze() // 2
    assert (steps.diff(dim=-1) == 1).all()

def main():
    assert shutil.disk_usage("/dev/shm").total == 2**20
    rb = TrajectoryReplayBuffer(max_trajectories=4, max_total_steps=80, chunk_size=4)
    for _ in range(4):
        pixels = torch.arange(16, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, *PIXELS)
        done = (torch.arange(16) == 15).view(-1, 1)
        rb.extend(TensorDict({"pixels": pixels, "action": torch.zeros(16, 2), "next": {"done": done}}, [16]))
    for transform in (to_dict, to_tuple, to_list, to_namedtuple, to_dataclass, to_tensorclass, to_arrays, to_object,
                      to_parameter):
        batches = iter(DataLoader(OnlineDataset(rb, 4, 8, transform), batch_size=None, num_workers=1))
        kept = [next(batches) for _ in range(4)]
        for batch in kept:
            check(pixels_of(batch), (8, 4))
        if transform is to_dict:
            assert (kept[0]["nested"]["view"] * 2 == kept[0]["pixels"][:, 1:]).all()
        if transform is to_arrays:
            assert (kept[0]["fortran"] * 2 == kept[0]["pixels"][:, 1:]).all()
    for transform, collate in ((to_dict, None), (to_tuple, None), (to_namedtuple, None), (to_arrays, stack_arrays),
                               (to_dict, default_collate), (None, collate_dicts)):
        dataset = OnlineDataset(rb, 4, None, transform)
        batches = iter(DataLoader(dataset, batch_size=8, num_workers=1, collate_fn=collate))
        for _ in range(4):
            check(pixels_of(next(batches)), (8, 4))
    batches = iter(DataLoader(OnlineDataset(rb, 4, 8, lambda data: (i for i in range(3))), None, num_workers=1))
    try:
        next(batches)
    except Exception as error:
        assert "generator" in str(error), error
    else:
        raise AssertionError("a generator can't be sent")
    print("done")

if __name__ == "__main__":
    torch.multiprocessing.set_start_method("fork", force=True)
    main()
"""


def test_with_a_small_dev_shm(tmp_path: Path) -> None:
    if subprocess.run([*SMALL_SHM, "true"], capture_output=True).returncode != 0:
        pytest.skip("a small /dev/shm can't be mounted here: that needs root in a namespace of its own")
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    command = [*SMALL_SHM, sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_WITH_SCRIPTS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")
