"""What a worker of a ``DataLoader`` loads: no TorchRL, unless what it was given needs it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from steps import make_buffer, trajectory
from tensordict import TensorDict
from torch.utils.data import DataLoader, get_worker_info
from torchrl.data import TensorDictReplayBuffer
from torchrl.envs.transforms import RenameTransform

from embodichain_rl import (
    ChunkSampler,
    OnlineDataEngine,
    OnlineDataEngineCfg,
    OnlineDataset,
    TrajectoryReplayBuffer,
    TrajectoryStorage,
    TrajectoryWriter,
)
from embodichain_rl.datasets.held import Held


def with_what_is_loaded(item: TensorDict) -> TensorDict:
    return item.set("torchrl", torch.full(item.shape, "torchrl" in sys.modules))


def with_source(item: TensorDict) -> TensorDict:
    info: Any = get_worker_info()
    source = info.dataset.source
    return item.set("live", torch.full(item.shape, len(source))).set(
        "is_buffer", torch.full(item.shape, isinstance(source, TrajectoryReplayBuffer))
    )


def batches(dataset: OnlineDataset, number: int = 2, start_method: str = "spawn") -> list[TensorDict]:
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context=start_method)
    iterator = iter(loader)
    return [next(iterator) for _ in range(number)]


def buffer(**options: Any) -> TrajectoryReplayBuffer:
    return make_buffer([trajectory(10), trajectory(20)], **options)


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_a_worker_of_a_buffer_loads_no_torchrl(start_method: str) -> None:
    rb = buffer()
    dataset = OnlineDataset(rb, chunk_size=3, batch_size=4, seed=0, transform=with_what_is_loaded)
    found = batches(dataset, start_method=start_method)
    assert not any(batch["torchrl"].any() for batch in found)
    plain = OnlineDataset(rb, chunk_size=3, batch_size=4, seed=0)
    for batch, expected in zip(found, batches(plain, start_method="fork"), strict=True):
        assert (batch.exclude("torchrl") == expected).all()
    assert rb.stats()["samples"] == 4 * 4 + rb.stats()["samples"] - 4 * 4  # see below
    readers = [row for row in rb.stats()["processes"] if row["batches"]]
    assert sum(row["batches"] for row in readers) >= 4


def test_a_worker_of_a_mixture_loads_no_torchrl() -> None:
    sources = [buffer(), buffer()]
    dataset = OnlineDataset(sources, chunk_size=3, batch_size=32, weights=[1.0, 1.0], transform=with_what_is_loaded)
    (batch,) = batches(dataset, 1)
    assert not batch["torchrl"].any()
    assert set(batch["trajectory", "source"].unique().tolist()) <= {0, 1}


def test_a_worker_of_an_engine_loads_no_torchrl() -> None:
    cfg = OnlineDataEngineCfg(
        buffer_size=2, max_episode_steps=20, producers=[iter([trajectory(10), trajectory(20)])], progress_bar=False
    )
    with OnlineDataEngine(cfg) as engine:
        for provenance in (False, True):
            dataset = OnlineDataset(
                engine, chunk_size=3, batch_size=4, transform=with_what_is_loaded, provenance=provenance
            )
            (batch,) = batches(dataset, 1)
            assert not batch["torchrl"].any()
            assert (("trajectory", "run_id") in batch.keys(True)) == provenance
        assert engine.stats()["samples"] >= 8


def test_a_worker_of_a_plain_torchrl_buffer_loads_it() -> None:
    rb = TensorDictReplayBuffer(
        storage=TrajectoryStorage(4, 100), writer=TrajectoryWriter(), sampler=ChunkSampler(3), batch_size=4
    )
    rb.extend(trajectory(10))
    (batch,) = batches(OnlineDataset(rb, chunk_size=3, batch_size=4, transform=with_what_is_loaded), 1)
    assert batch["torchrl"].all()


def test_transforms_of_the_buffer_are_applied_in_a_worker() -> None:
    rb = buffer(transform=RenameTransform(["observation"], ["seen"]))
    (batch,) = batches(OnlineDataset(rb, chunk_size=3, batch_size=4), 1)
    assert "seen" in batch.keys()


def test_a_worker_may_ask_for_the_source() -> None:
    (batch,) = batches(OnlineDataset(buffer(), chunk_size=3, batch_size=4, transform=with_source), 1)
    assert (batch["live"] == 2).all()
    assert batch["is_buffer"].all()


def test_a_held_object_stays_the_same_here() -> None:
    thing = object()
    assert Held(thing).value is thing
