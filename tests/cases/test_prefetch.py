"""Prefetching: a batch is what was asked for, of what the buffer holds, by the sampler and transforms it has."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from steps import LABEL, Child, check_chunk, make_buffer, make_storage, numbers_of, small
from torchrl.data import RandomSampler, SamplerWithoutReplacement
from waiting import PATIENCE

from embodichain_rl import ChunkSampler, TrajectoryReplayBuffer
from embodichain_rl.errors import EmptyBufferError

LENGTH = 6


def prefetching(numbers: range = range(3), **kwargs: Any) -> TrajectoryReplayBuffer:
    """A buffer of some trajectories with a full queue of prefetched batches of 16."""
    rb = make_buffer([small(number, LENGTH) for number in numbers], prefetch=2, batch_size=16, **kwargs)
    rb.sample()
    assert rb.stats()["prefetch_queue_size"] == 2
    return rb


def shape(rb: TrajectoryReplayBuffer, batch_size: int | None = None) -> tuple[int, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tuple(check_chunk(rb.sample(batch_size)).shape)


def test_another_batch_size_is_that_of_the_call_and_of_no_other() -> None:
    rb = prefetching()
    asked = [5, None, 5, 7, 16, None, None, 1, None]
    assert [shape(rb, count)[0] for count in asked] == [5, 16, 5, 7, 16, 16, 16, 1, 16]


@pytest.mark.parametrize("sampler", [ChunkSampler(3), RandomSampler(), SamplerWithoutReplacement()], ids=repr)
def test_another_batch_size_comes_with_its_info(sampler: Any) -> None:
    rb = make_buffer([small(number, LENGTH) for number in range(4)], sampler=sampler, prefetch=2, batch_size=4)
    usual, usual_info = rb.sample(return_info=True)
    other, info = rb.sample(2, return_info=True)
    assert (len(usual), len(other), len(torch.as_tensor(info["index"]))) == (4, 2, 2)
    assert set(info) == set(usual_info)
    assert set(other.keys(True, True)) == set(usual.keys(True, True))
    assert other["index"].shape[1:] == usual["index"].shape[1:]


def test_a_batch_that_no_thread_has_begun_is_drawn_by_the_caller() -> None:
    rb = prefetching()
    released = threading.Event()
    busy = [rb._prefetch_executor.submit(released.wait, PATIENCE) for _ in range(2)]  # all threads
    try:
        for _ in range(5):  # two are there; the others would wait behind
            assert shape(rb) == (16, 3)
        assert not any(each.done() for each in busy)
        assert rb.stats()["prefetch_queue_size"] == 2
    finally:
        released.set()


def test_iteration_goes_on_in_the_size_of_the_buffer() -> None:
    rb = prefetching()
    assert shape(rb, 3) == (3, 3)
    assert [len(batch) for batch, _ in zip(rb, range(4), strict=False)] == [16] * 4


def test_emptied_and_not_filled_again_there_is_nothing_to_sample() -> None:
    rb = prefetching()
    rb.empty()
    for count in (None, 5, None):
        with pytest.raises(EmptyBufferError):
            rb.sample(count)


def test_emptied_and_filled_again_only_what_is_new_comes() -> None:
    rb = prefetching()
    rb.empty()
    rb.extend(small(9, LENGTH))
    assert {number for _ in range(5) for number in numbers_of(check_chunk(rb.sample()))} == {9}


def empty(rb: TrajectoryReplayBuffer) -> None:
    rb.empty()
    rb.extend(small(9, LENGTH))


@pytest.mark.parametrize("how", ["by another process", "through its storage"])
def test_emptied_elsewhere_only_what_is_new_comes(how: str) -> None:
    rb = prefetching()
    if how == "by another process":
        child = Child("fork", rb)
        child.call(empty)
        child.end()
    else:
        rb.storage._empty()
        rb.extend(small(9, LENGTH))
    assert {number for _ in range(5) for number in numbers_of(check_chunk(rb.sample()))} == {9}


def test_a_new_sampler_draws_from_the_next_batch_on() -> None:
    rb = prefetching()
    rb.set_sampler(ChunkSampler(5))
    assert [shape(rb) for _ in range(4)] == [(16, 5)] * 4
    rb.sampler.chunk_size = 2
    assert [shape(rb) for _ in range(4)] == [(16, 2)] * 4


def test_a_new_storage_is_sampled_from_the_next_batch_on() -> None:
    rb = prefetching()
    rb.set_storage(make_storage([small(9, LENGTH)]))
    assert {number for _ in range(4) for number in numbers_of(check_chunk(rb.sample()))} == {9}


ADD_A_TRANSFORM: dict[str, Callable[[TrajectoryReplayBuffer, Any], Any]] = {
    "append_transform": lambda rb, transform: rb.append_transform(transform),
    "insert_transform": lambda rb, transform: rb.insert_transform(0, transform),
    "transform.append": lambda rb, transform: rb.transform.append(transform),
}


@pytest.mark.parametrize("way", ADD_A_TRANSFORM)
def test_a_new_transform_applies_from_the_next_batch_on(way: str) -> None:
    from torchrl.envs.transforms import RenameTransform

    rb = prefetching()
    ADD_A_TRANSFORM[way](rb, RenameTransform([LABEL], ["renamed"]))
    assert all("renamed" in rb.sample() for _ in range(4))


def test_a_new_generator_draws_from_the_next_batch_on() -> None:
    drawn = []
    for _ in range(2):
        rb = make_buffer([small(number, 50) for number in range(2)], prefetch=1, batch_size=16)
        rb.sample()
        rb.set_rng(torch.Generator().manual_seed(7))
        drawn.append(torch.stack([rb.sample()["index"] for _ in range(3)]))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("way", ["loads", "load_state_dict"])
def test_loaded_only_what_was_saved_comes(way: str, tmp_path: Path) -> None:
    saved = prefetching(range(7, 9))
    saved.dumps(tmp_path)
    rb = prefetching()
    if way == "loads":
        rb.loads(tmp_path)
    else:
        rb.load_state_dict(saved.state_dict())
    live = range(*rb.storage.ledger.live_range())
    for _ in range(5):
        batch = check_chunk(rb.sample())
        assert set(numbers_of(batch)) <= {7, 8}
        assert set(batch["trajectory", "id"].flatten().tolist()) <= set(live)


def test_a_state_goes_to_a_buffer_that_prefetches_otherwise() -> None:
    plain = make_buffer(batch_size=16)
    plain.load_state_dict(prefetching(range(7, 9)).state_dict())
    assert set(numbers_of(check_chunk(plain.sample()))) <= {7, 8}


def test_saving_and_loading_is_not_in_the_way_of_an_error_of_a_prefetched_batch(tmp_path: Path) -> None:
    sizes = iter([3, *[99] * 5, *[3] * 20])
    rb = make_buffer([small(0, LENGTH)], chunk_size=lambda: next(sizes), prefetch=2, batch_size=16)
    rb.sample()
    state = rb.state_dict()
    rb.dumps(tmp_path)
    rb.loads(tmp_path)
    rb.load_state_dict(state)
    assert len(rb) == 1


def test_saving_leaves_what_was_prefetched(tmp_path: Path) -> None:
    rb = prefetching()
    rb.dumps(tmp_path)
    rb.state_dict()
    assert rb.stats()["prefetch_queue_size"] == 2


def test_a_shut_down_buffer_is_not_sampled() -> None:
    rb = prefetching()
    rb.shutdown()
    for count in (None, 5):
        with pytest.raises(RuntimeError, match="shut down"):
            rb.sample(count)
