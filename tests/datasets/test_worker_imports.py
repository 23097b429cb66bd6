"""What a worker of a ``DataLoader`` loads: no TorchRL, unless what it was given needs it."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loaded_modules import InOneWorker
from loading import filled_buffer, loading
from steps import check_chunk, make_buffer, make_trajectory, small
from tensordict import TensorDict
from torchrl.envs.transforms import RenameTransform
from waiting import PATIENCE_WITH_SCRIPTS

from embodichain_rl import (
    ChunkSampler,
    OnlineDataEngine,
    OnlineDataEngineCfg,
    OnlineDataset,
    TrajectoryReplayBuffer,
)
from embodichain_rl.datasets.held import Held
from embodichain_rl.errors import UnsupportedOperationError
from embodichain_rl.replay.batches import BufferChunks
from embodichain_rl.replay.storage import reader_of


@pytest.fixture
def engine() -> Any:
    trajectories = [make_trajectory(10, 30), make_trajectory(11, 40)]
    cfg = OnlineDataEngineCfg(buffer_size=2, max_episode_steps=50, producers=[trajectories], progress_bar=False)
    with OnlineDataEngine(cfg) as started:
        yield started


def in_one_worker(dataset: InOneWorker, start_method: str) -> list[tuple[Any, list[str]]]:
    with loading(dataset, 1, start_method, collate_fn=OnlineDataset.passthrough_collate_fn) as loader:
        return [(copy.deepcopy(item), loaded) for item, loaded in loader]


def test_workers_that_read_chunks_load_no_torchrl(engine: OnlineDataEngine, tmp_path: Path) -> None:
    rb = filled_buffer()
    others = [make_trajectory(20, 30), make_trajectory(21, 40)]
    on_disk = make_buffer(others, path=tmp_path / "buffer")
    plain = make_buffer([small(n, 10 + n).set("label", torch.full((10 + n,), n)) for n in range(3)], compact=True)
    before = {"rb": rb.stats()["batches"], "engine": engine.stats()["samples"]}

    def made() -> InOneWorker:
        options: dict[str, Any] = {"batch_size": 16, "seed": 3}
        return InOneWorker(
            [
                OnlineDataset(rb, 3, **options),
                OnlineDataset(on_disk, 3, **options),
                OnlineDataset(plain, 5, pad="both", weights="steps", **options),
                OnlineDataset(plain, windows={"observation": (-1, 0)}, **options),
                OnlineDataset([rb, on_disk], 3, weights=[0.5, 0.5], **options),
                OnlineDataset(engine, 3, **options),
                OnlineDataset(engine, 3, provenance=True, **options),
                OnlineDataset(rb, 3, replacement=False, passes=1, **options),
            ]
        )

    found, expected = in_one_worker(made(), "spawn"), in_one_worker(made(), "fork")
    kinds, loaded_for_sources = found.pop()
    for (batch, loaded), (same, _) in zip(found, expected, strict=False):
        assert loaded == []
        assert (batch == same).all()
    for batch, _ in [*found[:2], *found[4:]]:
        check_chunk(batch)
    # A worker may ask for the source, which is what it was here, and loads what this needs.
    buffers = ["TrajectoryReplayBuffer"] * 4
    assert kinds == [*buffers, buffers[:2], "OnlineDataEngine", "OnlineDataEngine", buffers[0]]
    assert "torchrl" in loaded_for_sources
    # What both workers sample is counted: a batch of each dataset, and a chunk that the mixture looks at before.
    assert rb.stats()["batches"] - before["rb"] == 2 * (3 + 1)
    assert engine.stats()["samples"] - before["engine"] == 2 * 32
    assert [len(each) for each in (rb, on_disk, plain)] == [20, 2, 3]


FORKSERVER = """
import sys
from loaded_modules import InOneWorker
from torch.utils.data import DataLoader

if __name__ == "__main__":
    from steps import make_buffer, make_trajectory
    from embodichain_rl import OnlineDataset

    dataset = InOneWorker([OnlineDataset(make_buffer([make_trajectory(0, 20)]), 3, 16)])
    loader = DataLoader(
        dataset, batch_size=None, num_workers=1, multiprocessing_context="forkserver",
        collate_fn=OnlineDataset.passthrough_collate_fn,
    )
    (batch, loaded), (kinds, loaded_for_sources) = loader
    print(tuple(batch.shape), loaded, kinds, "torchrl" in loaded_for_sources)
"""


def test_so_do_workers_of_a_fork_server(tmp_path: Path) -> None:
    # In a process of its own: the fork server of this one has loaded everything already.
    script = tmp_path / "script.py"
    script.write_text(FORKSERVER)
    path = ":".join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=PATIENCE_WITH_SCRIPTS,
        check=False,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"},
    )
    assert done.stdout == "(16, 3) [] ['TrajectoryReplayBuffer'] True\n", done.stderr


class WithOwnChunks(TrajectoryReplayBuffer):
    """A buffer whose chunks are not those of its class."""

    def sample_chunks(self, *args: Any, **kwargs: Any) -> TensorDict:
        data = super().sample_chunks(*args, **kwargs)
        return data.set("own", torch.ones(data.shape))


class WithOwnDraws(ChunkSampler):
    """A sampler whose chunks are not those of its class."""

    def sample_chunks(self, *args: Any, **kwargs: Any) -> TensorDict:
        data = super().sample_chunks(*args, **kwargs)
        return data.set("own", torch.ones(data.shape))


@pytest.mark.parametrize("what", ["transform", "buffer", "sampler"])
def test_transforms_and_subclasses_do_their_work_in_a_worker(what: str) -> None:
    settings: dict[str, Any] = {"max_trajectories": 4, "max_total_steps": 100}
    rb = {
        "transform": lambda: TrajectoryReplayBuffer(
            chunk_size=3, transform=RenameTransform(["observation"], ["own"]), **settings
        ),
        "buffer": lambda: WithOwnChunks(chunk_size=3, **settings),
        "sampler": lambda: TrajectoryReplayBuffer(sampler=WithOwnDraws(3), **settings),
    }[what]()
    rb.extend(make_trajectory(0, 20))
    # Also in a mixture, where the other source needs nothing.
    for source in (rb, [rb, rb]):
        with loading(OnlineDataset(source, 3, 4), 1, "forkserver") as loader:
            assert next(iter(loader)).get("own", None) is not None


def with_copies(item: TensorDict) -> TensorDict:
    """Add what copies of the dataset draw that are made in the worker."""
    info: Any = torch.utils.data.get_worker_info()
    copied = copy.deepcopy(info.dataset.inner)
    with pytest.raises(UnsupportedOperationError, match="not copied"):
        copy.deepcopy(BufferChunks(reader_of(copied.source.storage), ChunkSampler(3)))
    pickled = pickle.loads(pickle.dumps(info.dataset.inner))
    return item.set("from copies", torch.tensor([len(copied.source), len(pickled.source)]).expand(*item.shape, 2))


class Nested(torch.utils.data.IterableDataset[Any]):
    """A user's dataset around one of this library."""

    def __init__(self, inner: OnlineDataset) -> None:
        self.inner = inner

    def __iter__(self) -> Any:
        return (with_copies(item) for item in self.inner)


def test_a_worker_may_copy_its_dataset() -> None:
    dataset = OnlineDataset(make_buffer([make_trajectory(0, 20), make_trajectory(1, 20)]), 3, 4)
    with loading(Nested(dataset), 1, "forkserver") as loader:
        assert next(iter(loader))["from copies"].unique().tolist() == [2]


class Recorded:
    """A source of the user's own, which is not replaced in a worker."""

    def __init__(self) -> None:
        self.calls = 0

    def sample_chunks(self, batch_size: int, chunk_size: int, *, generator: Any = None) -> TensorDict:
        self.calls += 1
        return TensorDict({"calls": torch.full((batch_size, chunk_size), self.calls)}, [batch_size, chunk_size])


class AsksTheSource(Nested):
    """Looks at the source in the worker."""

    def __iter__(self) -> Any:
        return (item.set("seen", torch.full(item.shape, self.inner.source.calls)) for item in self.inner)


def test_a_source_of_the_users_own_is_the_one_that_is_drawn_from() -> None:
    with loading(AsksTheSource(OnlineDataset(Recorded(), 3, 4)), 1, "forkserver") as loader:
        batches = iter(loader)
        for _ in range(3):
            batch = next(batches)
            assert torch.equal(batch["seen"], batch["calls"])
        del batches


def _dataset_is_over(rb: TrajectoryReplayBuffer, dataset: OnlineDataset, answer: Any) -> None:
    answer.send(dataset.source is rb and isinstance(dataset.source, TrajectoryReplayBuffer))


def test_a_process_that_is_no_worker_gets_the_dataset_with_its_source() -> None:
    rb = make_buffer([make_trajectory(0, 20)])
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_dataset_is_over, args=(rb, OnlineDataset(rb, 3, 4), sender))
    process.start()
    assert receiver.recv()
    process.join()


def test_a_held_object_stays_the_same_here() -> None:
    thing = object()
    assert Held(thing).value is thing
