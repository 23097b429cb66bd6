"""What is done with any batch is done with those of a compact buffer, which stores each observation once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from layouts import SHIFTED, buffer, trajectory
from simulated_device import SimulatedDevice
from tensordict import TensorDictBase
from torch.utils.data import DataLoader
from torchrl.data import TensorDictReplayBuffer
from torchrl.envs.transforms import VecNorm

from embodichain_rl import ChunkSampler, OnlineDataset, TrajectoryReplayBuffer, TrajectoryStorage, TrajectoryWriter
from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.transforms import FlatChunks

OBSERVED = ["observation", "pixels", ("robot", "joints"), "clock", *SHIFTED]


def filled(rb: Any = None, **kwargs: Any) -> Any:
    rb = buffer(**kwargs) if rb is None else rb
    for number in range(4):
        rb.extend(trajectory(number, 9 + number))
    return rb


def plain_torchrl_buffer() -> TensorDictReplayBuffer:
    parts = {"storage": TrajectoryStorage(5, 60, compact=True), "writer": TrajectoryWriter()}
    return TensorDictReplayBuffer(**parts, sampler=ChunkSampler(4), batch_size=16)


def from_a_loader(batch_size: int | None, **kwargs: Any) -> TensorDictBase:
    dataset = OnlineDataset(filled(), chunk_size=4, batch_size=None if batch_size else 16, seed=0)
    return next(iter(DataLoader(dataset, batch_size=batch_size, **kwargs)))


BATCHES: dict[str, Callable[[], Any]] = {
    "sample": lambda: filled().sample(),
    "sample_chunks": lambda: filled().sample_chunks(16, 4),
    "sample with prefetch": lambda: filled(prefetch=1).sample(),
    "padded": lambda: filled(sampler=ChunkSampler(4, pad="both")).sample(),
    "a plain TorchRL buffer": lambda: filled(plain_torchrl_buffer()).sample(),
    "on a device": lambda: filled(
        TrajectoryReplayBuffer(
            storage=TrajectoryStorage(5, 60, compact=True, device=SimulatedDevice()),  # type: ignore[arg-type]
            chunk_size=4,
            batch_size=16,
        )
    ),
    "a loader of batches": lambda: from_a_loader(None),
    "a loader of chunks": lambda: from_a_loader(16),
    "a loader with a worker": lambda: from_a_loader(None, num_workers=1, multiprocessing_context="fork"),
    "flat chunks": lambda: filled(transform=FlatChunks()).sample(),
    "whole trajectories": lambda: filled()[:],
}


def on_the_device(rb: TrajectoryReplayBuffer) -> TensorDictBase:
    rb.storage.flush()
    return rb.sample()


@pytest.mark.parametrize("source", BATCHES)
def test_every_entry_is_contiguous_and_can_be_viewed(source: str) -> None:
    batch = BATCHES[source]()
    if isinstance(batch, TrajectoryReplayBuffer):
        batch = on_the_device(batch)
    for key in OBSERVED:
        assert batch[key].is_contiguous(), key
        assert batch[key].view(-1).numel() == batch[key].numel()
    assert batch["observation"].view(-1, 3).shape == (batch.numel(), 3)
    assert batch.view(-1).shape == (batch.numel(),)
    assert batch.view(2, -1).shape == (2, batch.numel() // 2)


@pytest.mark.filterwarnings("ignore:.*deprecated.*VecNormV2:FutureWarning")
@pytest.mark.parametrize("keys", [["observation", ("next", "observation")], [("next", "robot", "joints")]])
def test_a_running_mean_of_observations(keys: list[Any]) -> None:
    rb = filled(transform=VecNorm(in_keys=keys))
    for _ in range(3):
        assert rb.sample().view(-1).shape == (64,)


CHANGES: dict[str, Callable[[TensorDictBase], Any]] = {
    "normalised in place": lambda batch: batch["observation"].sub_(1.0).div_(3.0),
    "with noise": lambda batch: batch["observation"].add_(torch.ones_like(batch["observation"])),
    "masked": lambda batch: batch["observation"].masked_fill_(batch["segment_id"][..., None] == 0, 0.0),
    "one chunk": lambda batch: batch["observation"].__setitem__(0, 0.0),
    "by key": lambda batch: batch.set_("observation", torch.zeros_like(batch["observation"])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_in_place_the_next_observation_is_as_it_was(change: str) -> None:
    batch = filled().sample()
    before = batch["next", "observation"].clone()
    CHANGES[change](batch)
    assert torch.equal(batch["next", "observation"].view(torch.int32), before.view(torch.int32))


def test_through_numpy_modules_copies_and_pickles() -> None:
    batch = filled().sample()
    assert batch["next", "pixels"].numpy().reshape(-1, 60).shape == (64, 60)
    assert np.frombuffer(batch["pixels"].numpy(), dtype=np.uint8).size == 64 * 60
    assert torch.nn.Linear(3, 2)(batch["next", "observation"].view(-1, 3)).shape == (64, 2)
    for twin in (copy.deepcopy(batch), pickle.loads(pickle.dumps(batch)), batch.clone()):
        assert torch.equal(twin.view(-1)["next", "pixels"], batch.view(-1)["next", "pixels"])
    assert torch.stack([batch, batch]).view(-1).shape == (128,)


def test_a_saved_entry_takes_no_more_than_its_own_bytes() -> None:
    batch = filled().sample()
    for key in OBSERVED:
        assert batch[key].untyped_storage().nbytes() == batch[key].nbytes


class TestViewsByName:
    """``compact="views"`` hands out one memory of L + 1 steps for both."""

    def test_the_values_are_the_same(self) -> None:
        batches = []
        for compact in (True, "views"):
            rb = filled(compact=compact, generator=torch.Generator().manual_seed(0))
            batches.append(rb.sample())
        assert torch.equal(batches[0]["next", "pixels"], batches[1]["next", "pixels"])
        memory = [batches[1][key].untyped_storage().data_ptr() for key in ("pixels", ("next", "pixels"))]
        assert memory[0] == memory[1]

    def test_a_buffer_and_an_engine_take_it(self) -> None:
        from embodichain_rl import OnlineDataEngineCfg

        assert TrajectoryStorage(2, 20, compact="views").compact is True
        cfg = OnlineDataEngineCfg(buffer_size=2, gym_config={"id": "Pendulum-v1"}, compact="views")
        assert cfg.compact == "views"

    @pytest.mark.parametrize("compact", ["view", "Views", 2, None, ["views"]])
    def test_other_names_are_refused(self, compact: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="True, False or 'views'"):
            TrajectoryStorage(2, 20, compact=compact)
