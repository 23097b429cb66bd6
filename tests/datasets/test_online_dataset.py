from __future__ import annotations

import collections
import copy
import multiprocessing
import os
import pickle
import signal
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import (
    LENGTHS,
    START_METHODS,
    check_batch,
    filled_buffer,
    indices,
    iterating,
    loading,
    overlap,
    same,
    take,
)
from scripts import reuse_fork_server
from steps import LABEL, check_chunk, make_trajectory, small
from tensordict import TensorDict
from torch.utils.data import DataLoader
from waiting import PATIENCE

from embodichain_rl import ByGroup, ByPriority, ByRecency, ChunkSampler, TrajectoryReplayBuffer
from embodichain_rl.datasets import ChunkSizeSampler, OnlineDataset, UniformChunkSampler
from embodichain_rl.errors import (
    ChunkTooLongError,
    EmptyBufferError,
    InvalidArgumentError,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rb() -> TrajectoryReplayBuffer:
    return filled_buffer()


class Counting(ChunkSizeSampler):
    """Sizes 3, 4, 5, …: says how often it was asked."""

    def __init__(self) -> None:
        self.size = 2

    def __call__(self) -> int:
        self.size += 1
        return self.size


def add_sum(data: TensorDict) -> TensorDict:
    data["sum"] = data["observation"].sum(-1)
    return data


def to_pair(data: TensorDict) -> tuple[torch.Tensor, torch.Tensor]:
    return data["observation"], data[LABEL]


# -------------------------------------------------------------------------------------------- what an item, a batch is


def test_items_are_single_chunks_and_the_loader_makes_batches_of_them(rb: TrajectoryReplayBuffer) -> None:
    dataset = OnlineDataset(rb, chunk_size=8)
    assert check_chunk(next(iter(dataset))).shape == (8,)
    for batch in take(DataLoader(dataset, batch_size=5), 3):
        assert check_batch(batch).shape == (5, 8)
        assert ("collector", "mask") not in batch.keys(True)


def test_items_are_whole_batches_and_the_loader_passes_them_on(rb: TrajectoryReplayBuffer) -> None:
    dataset = OnlineDataset(rb, chunk_size=8, batch_size=5)
    assert check_batch(next(iter(dataset))).shape == (5, 8)
    for batch in take(DataLoader(dataset, batch_size=None), 3):
        assert type(batch) is TensorDict
        assert check_batch(batch).shape == (5, 8)


def test_collate_functions_can_be_named(rb: TrajectoryReplayBuffer) -> None:
    items = DataLoader(OnlineDataset(rb, 8), batch_size=5, collate_fn=OnlineDataset.collate_fn)
    batches = DataLoader(OnlineDataset(rb, 8, 5), batch_size=None, collate_fn=OnlineDataset.passthrough_collate_fn)
    for loader in (items, batches):
        assert check_batch(take(loader, 1)[0]).shape == (5, 8)


def test_sizes_are_asked_for_once_for_each_item_or_batch(rb: TrajectoryReplayBuffer) -> None:
    assert [len(item) for item in islice(OnlineDataset(rb, Counting()), 6)] == [3, 4, 5, 6, 7, 8]
    assert [b.shape for b in islice(OnlineDataset(rb, Counting(), 4), 3)] == [(4, 3), (4, 4), (4, 5)]
    padded = take(DataLoader(OnlineDataset(rb, Counting()), batch_size=2), 2)
    assert [check_batch(batch)["collector", "mask"].sum(-1).tolist() for batch in padded] == [[3, 3], [4, 4]]


@pytest.mark.parametrize("workers", [0, 2])
def test_items_of_one_batch_of_the_loader_have_one_size(rb: TrajectoryReplayBuffer, workers: int) -> None:
    with loading(OnlineDataset(rb, UniformChunkSampler(2, 10), seed=5), workers, batch_size=6) as loader:
        batches = take(loader, 12)
    assert all(check_batch(batch)["collector", "mask"].all() for batch in batches)
    assert len({batch.shape for batch in batches}) > 3


def test_items_of_a_batch_that_could_not_be_completed_do_not_count(rb: TrajectoryReplayBuffer) -> None:
    calls = iter([8, 100, 3, 5])
    batches = iter(DataLoader(OnlineDataset(rb, lambda: next(calls)), batch_size=4))
    assert next(batches).shape == (4, 8)
    with pytest.raises(ChunkTooLongError):
        next(batches)
    assert [next(batches).shape for _ in range(2)] == [(4, 3), (4, 5)]


def test_chunks_of_changing_size_always_have_a_mask(rb: TrajectoryReplayBuffer) -> None:
    """Else a batch would have none when all its chunks happen to have one length."""
    batch = take(DataLoader(OnlineDataset(rb, UniformChunkSampler(6, 6)), batch_size=4), 1)[0]
    assert batch["collector", "mask"].shape == (4, 6)
    assert batch["collector", "mask"].all()


@pytest.mark.parametrize("workers", [0, 1])
def test_transform_is_applied_to_each_item_or_batch(rb: TrajectoryReplayBuffer, workers: int) -> None:
    with loading(OnlineDataset(rb, 8, transform=add_sum), workers, batch_size=4) as loader:
        for batch in take(loader, 2):
            assert torch.equal(check_batch(batch)["sum"], batch["observation"].sum(-1))
    with loading(OnlineDataset(rb, 8, 4, to_pair), workers) as loader:
        observation, label = next(iter(loader))
        assert observation.shape == (4, 8, 3)
        assert label.shape == (4, 8, 4)


@pytest.mark.parametrize("weights", [ByRecency(0.01), ByGroup(("robot", "mode")), ByPriority(), "steps"])
@pytest.mark.parametrize("workers", [0, 1])
def test_weights_are_those_of_the_dataset(workers: int, weights: Any) -> None:
    rb = filled_buffer()
    with iterating(OnlineDataset(rb, 12, 50, weights=weights, max_age=3600.0), workers) as batches:
        numbers = check_batch(next(batches))[LABEL][:, 0, 0]
    if isinstance(weights, ByRecency):
        assert set(numbers.tolist()) == {19}


def test_priorities_are_set_through_a_buffer_that_draws_by_them() -> None:
    rb = filled_buffer(chunk_size=None, sampler=ChunkSampler(8, weights=ByPriority(eps=1e-30, alpha=1.0)))
    rb.update_priority(range(20), [0.0] * 19 + [1.0])
    with iterating(OnlineDataset(rb, 12, 50, weights=ByPriority()), 1) as batches:
        batch = check_batch(next(batches))
    assert set(batch[LABEL][:, 0, 0].tolist()) == {19}
    assert (batch["priority_weight"] == 1.0).all()


def test_sizes_below_one_are_refused_when_they_come(rb: TrajectoryReplayBuffer) -> None:
    with pytest.raises(InvalidArgumentError, match="return value of chunk_size"):
        next(iter(OnlineDataset(rb, int)))


# ------------------------------------------------------------------------------------------------------------- workers


@pytest.mark.parametrize("method", START_METHODS)
def test_workers_hand_out_whole_chunks_of_streams_of_their_own(rb: TrajectoryReplayBuffer, method: str) -> None:
    dataset = OnlineDataset(rb, UniformChunkSampler(2, 10), 3, seed=5)
    with loading(dataset, 2, method, persistent_workers=True) as loader:
        first, second = take(loader, 8), take(loader, 8)
    for batch in first + second:
        assert type(batch) is TensorDict
        assert check_batch(batch).shape[0] == 3
    assert not overlap(first[::2], first[1::2]), "two workers draw the same"
    assert not overlap(first, second), "a second iteration repeats the first"
    # The streams don't depend on how workers are started: these are the reference for every method.
    alone = OnlineDataset(rb, UniformChunkSampler(2, 10), 3, seed=5)
    assert same(first[::2], list(islice(alone, 4)))
    assert same(second[::2], list(islice(alone, 4)))


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_items_of_workers_are_put_together_in_them(rb: TrajectoryReplayBuffer, method: str) -> None:
    with loading(OnlineDataset(rb, UniformChunkSampler(2, 10), seed=5), 1, method, batch_size=4) as loader:
        for batch in take(loader, 4):
            assert check_batch(batch).shape[0] == 4
            assert batch["collector", "mask"].any(0).all()


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_that_are_started_anew_go_on(rb: TrajectoryReplayBuffer, method: str) -> None:
    with loading(OnlineDataset(rb, 8, 3, seed=5), 2, method) as loader:
        assert not overlap(take(loader, 4), take(loader, 4))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_same_seed_same_batches(rb: TrajectoryReplayBuffer, workers: int) -> None:
    runs = []
    for _ in range(2):
        with loading(OnlineDataset(rb, UniformChunkSampler(2, 10), 3, seed=5), workers) as loader:
            runs.append(take(loader, 6) + take(loader, 6))
    assert same(*runs)
    with loading(OnlineDataset(rb, UniformChunkSampler(2, 10), 3, seed=6), workers) as loader:
        assert not overlap(take(loader, 6), runs[0])


def test_without_a_seed_nothing_repeats(rb: TrajectoryReplayBuffer) -> None:
    torch.manual_seed(0)
    with loading(OnlineDataset(rb, 8, 3), 2) as loader:
        first = take(loader, 8)
    torch.manual_seed(0)
    with loading(OnlineDataset(rb, 8, 3), 2) as loader:
        assert not overlap(take(loader, 8), first)
    assert not overlap(first[::2], first[1::2])


def test_a_seed_leaves_the_users_sampler_and_torchs_numbers_alone(rb: TrajectoryReplayBuffer) -> None:
    sizes, untouched = UniformChunkSampler(2, 10, seed=1), UniformChunkSampler(2, 10, seed=1)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    take(OnlineDataset(rb, sizes, 3, seed=5), 5)
    assert torch.equal(torch.rand(1), expected)
    assert [sizes() for _ in range(9)] == [untouched() for _ in range(9)]


def test_without_a_seed_the_users_sampler_keeps_its_own(rb: TrajectoryReplayBuffer) -> None:
    reference = UniformChunkSampler(2, 10, seed=1)
    dataset = OnlineDataset(rb, UniformChunkSampler(2, 10, seed=1), 3)
    for _ in range(2):  # the second iteration goes on
        assert [b.shape[1] for b in islice(dataset, 5)] == [reference() for _ in range(5)]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
def test_pinning_needs_no_accelerator(rb: TrajectoryReplayBuffer) -> None:
    with loading(OnlineDataset(rb, 8, 3), 1, pin_memory=True) as loader:
        assert check_batch(take(loader, 1)[0]).shape == (3, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_can_be_pinned(rb: TrajectoryReplayBuffer, workers: int) -> None:
    with loading(OnlineDataset(rb, 8, 3), workers, pin_memory=True) as loader:
        for batch in islice(iter(loader), 5):
            assert check_batch(batch)["observation"].is_pinned()


def test_a_copy_of_the_dataset_draws_on_by_itself() -> None:
    dataset = OnlineDataset(filled_buffer(), 8, 3, seed=5)
    take(dataset, 1)
    for other in (copy.deepcopy(dataset), pickle.loads(pickle.dumps(dataset))):
        reference = OnlineDataset(other.source, 8, 3, seed=5)
        take(reference, 1)
        assert same(take(other, 3), take(reference, 3))


# --------------------------------------------------------------------------------------------------------------- ranks


def test_ranks_of_the_environment_draw_streams_of_their_own(
    rb: TrajectoryReplayBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = {}
    for rank in ("0", "1", None):
        monkeypatch.delenv("RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        for workers in (0, 1):
            with loading(OnlineDataset(rb, 8, 3, seed=5), workers) as loader:
                batches[rank, workers] = take(loader, 4)
    assert same(batches["0", 0], batches["0", 1])
    assert same(batches["1", 0], batches["1", 1])
    assert same(batches["0", 0], batches[None, 0])
    assert not overlap(batches["0", 0], batches["1", 0])


def test_a_rank_that_is_no_number_is_refused(rb: TrajectoryReplayBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(InvalidArgumentError, match="RANK='first'"):
        OnlineDataset(rb, 8)


def _draw_as_rank(rank: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    reuse_fork_server()
    rb = filled_buffer()
    dataset = OnlineDataset(rb, 8, 3, seed=5)  # made before anyone knows the rank
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    drawn = [[b.tolist() for b in indices(take(dataset, 4))]]
    for method in ("fork", "forkserver"):
        with loading(OnlineDataset(rb, 8, 3, seed=5), 1, method) as loader:
            drawn.append([b.tolist() for b in indices(take(loader, 4))])
    results.put((rank, drawn))
    torch.distributed.destroy_process_group()


def test_ranks_of_a_process_group_draw_streams_of_their_own(rb: TrajectoryReplayBuffer, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    ranks = [context.Process(target=_draw_as_rank, args=(rank, str(tmp_path / "store"), results)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    drawn = dict(results.get(timeout=PATIENCE) for _ in ranks)
    for process in ranks:
        process.join(PATIENCE)
    assert drawn[0][0] == drawn[0][1] == drawn[0][2]
    assert drawn[1][0] == drawn[1][1] == drawn[1][2], "the worker does not know the rank of its parent"
    assert not any(batch in drawn[0][0] for batch in drawn[1][0])


# ---------------------------------------------------------------------------------- while others write, and get killed


def _write_for_ever(rb: TrajectoryReplayBuffer, first: int) -> None:
    torch.set_num_threads(1)
    for number in range(first, 10**9):
        rb.extend(make_trajectory(number, 12 + number % 20))


def test_chunks_are_whole_while_another_process_writes() -> None:
    rb = filled_buffer(max_trajectories=8, max_total_steps=160)
    writer = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(rb, len(LENGTHS)), daemon=True)
    writer.start()
    try:
        with iterating(OnlineDataset(rb, UniformChunkSampler(2, 12), 16), 2) as batches:
            deadline = time.monotonic() + PATIENCE
            newest = 0
            # Until the buffer was turned over a hundred times while it was sampled.
            while newest < 1000 and time.monotonic() < deadline:
                newest = max(newest, int(check_batch(next(batches))[LABEL][..., 0].max()))
            assert newest >= 1000
            assert writer.is_alive()
    finally:
        writer.kill()
        writer.join(PATIENCE)


def test_a_killed_worker_ends_its_loader_and_nothing_else(rb: TrajectoryReplayBuffer) -> None:
    dataset = OnlineDataset(rb, 8, 3, seed=5)
    held = []

    def lose_a_worker() -> None:
        with iterating(dataset, 2) as batches:
            held.extend(next(batches) for _ in range(4))
            os.kill(batches._workers[0].pid, signal.SIGKILL)
            collections.deque(islice(batches, 100), maxlen=0)

    # torch raises it wherever the main process is when it hears of the death, while the loader is shut down too.
    with pytest.raises(RuntimeError, match=r"killed by signal|exited unexpectedly|ended before the batch"):
        lose_a_worker()
    assert len(held) == 4
    for batch in held:
        check_batch(batch)
    rb.extend(make_trajectory(0, 12))
    with loading(dataset, 2) as loader:
        assert check_batch(take(loader, 4)[-1]).shape == (3, 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_iteration_survives_an_empty_buffer(workers: int) -> None:
    rb = TrajectoryReplayBuffer(max_trajectories=4, max_total_steps=100, chunk_size=8)
    rb.extend(small(0, 12))
    rb.empty()
    with iterating(OnlineDataset(rb, 8, 3), workers) as batches:
        with pytest.raises(EmptyBufferError, match="Cannot sample from an empty storage"):
            next(batches)
        rb.extend(small(1, 12))
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                assert check_batch(next(batches)).shape == (3, 8)
                return
            except EmptyBufferError:  # asked for ahead, before there was anything
                continue
        pytest.fail("no batch after the buffer was filled")
