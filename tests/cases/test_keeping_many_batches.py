"""A list of batches from workers: what is kept takes no file descriptor."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import pytest
import torch
from loading import check_batch, filled_buffer, iterating

from embodichain_rl import OnlineDataset, TrajectoryReplayBuffer
from embodichain_rl.errors import SharingError


@pytest.fixture(scope="module")
def rb() -> TrajectoryReplayBuffer:
    return filled_buffer()


def limit_open_files(more: int) -> None:
    """Allow only some open files more than there are, in this process and those that it starts."""
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + more, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def take_all_files() -> list[int]:
    """Open files until no more are allowed."""
    taken = []
    while True:
        try:
            taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            return taken


@contextmanager
def open_files_limited_to(more: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit_open_files(more)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _to_dict(data: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: data["observation"] + number for number, name in enumerate(("zero", "one", "two"))}


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_many_more_than_open_files_are_allowed(rb: TrajectoryReplayBuffer, method: str) -> None:
    with open_files_limited_to(80):
        with iterating(OnlineDataset(rb, 8, 3), 2, method) as batches:
            kept = list(islice(batches, 250))
        for batch in kept:
            check_batch(batch)


def test_of_dicts(rb: TrajectoryReplayBuffer) -> None:
    with open_files_limited_to(80):
        with iterating(OnlineDataset(rb, 8, 3, _to_dict), 1) as batches:
            kept = list(islice(batches, 150))
        for batch in kept:
            assert torch.equal(batch["two"], batch["zero"] + 2)


def test_with_the_sharing_strategy_of_the_user(rb: TrajectoryReplayBuffer) -> None:
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        for method in ("fork", "forkserver"):
            _check_first_batch_is_torchs_own(rb, method)
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


def _check_first_batch_is_torchs_own(rb: TrajectoryReplayBuffer, method: str) -> None:
    # Torch's manager of such memory has one second for each answer, which a busy machine may not give it: torch raises
    # then, in the worker, whose batch does not come, or here.
    for turns_left in reversed(range(10)):
        try:
            with iterating(OnlineDataset(rb, 8, 3), 1, method, timeout=60) as batches:
                batch = check_batch(next(batches))
                assert batch["observation"].is_shared(), "it is not in torch's own shared memory"
            return
        except RuntimeError as error:
            if not turns_left or "timed out" not in str(error):
                raise


def _allow_no_more_files(worker: int) -> None:
    limit_open_files(0)
    os.close(take_all_files()[-1])  # for the lock that counts the iterations


@pytest.mark.parametrize("transform", [None, _to_dict], ids=["gathering", "sending"])
def test_no_open_file_left_in_the_worker(rb: TrajectoryReplayBuffer, transform: object) -> None:
    dataset = OnlineDataset(rb, 8, 3, transform)
    with (
        iterating(dataset, 1, worker_init_fn=_allow_no_more_files) as batches,
        pytest.raises(SharingError, match="ulimit -n"),
    ):
        next(batches)
