"""How much memory a buffer says that it takes, how much it takes, and limits in bytes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from waiting import PATIENCE

from embodichain_rl import TrajectoryReplayBuffer, TrajectoryStorage
from embodichain_rl.errors import BufferMemoryError, InvalidArgumentError, OwnerGoneError, TrajectoryTooLongError
from embodichain_rl.shared import memory_check

MOST = 1.15
"""What may be used of what was announced."""


def episode(steps: int, size: int = 1024) -> TensorDict:
    done = torch.zeros(steps, 1, dtype=torch.bool)
    done[-1] = True
    return TensorDict({"pixels": torch.ones(steps, size, dtype=torch.uint8), "next": {"done": done}}, [steps])


def growing(number: int) -> int:
    return min(1000, 50 + number)


RNG = np.random.default_rng(0)
LENGTHS: dict[str, Callable[[int], int]] = {
    "all the same": lambda _: 100,
    "uniform": lambda _: int(RNG.integers(20, 381)),
    "a few long ones": lambda _: 1000 if RNG.random() < 0.05 else 50,
    "log-uniform": lambda _: int(np.exp(RNG.uniform(np.log(10), np.log(3000)))),
    "exponential": lambda _: int(min(3000, 1 + RNG.exponential(200))),
    "two lengths": lambda _: 600 if RNG.random() < 0.5 else 30,
    "hardly any very long": lambda _: 3000 if RNG.random() < 0.02 else 80,
    "growing": growing,
}


@pytest.mark.parametrize("name", LENGTHS)
def test_what_is_used_stays_near_what_was_announced_at_any_mix_of_lengths(name: str) -> None:
    """At most 1.15 of the room is in use, and more than 0.6 of it is live at the end."""
    storage = TrajectoryStorage(10_000, 10_000)
    storage.allocate(episode(1))
    ledger, steps, number = storage.ledger, 0, 0
    while steps < 60_000:
        region = ledger.reserve(LENGTHS[name](number))
        ledger.publish(region)
        steps, number = steps + region.length, number + 1
        assert ledger._read_counters().high_water <= MOST * 10_000
    assert storage.num_steps > 0.6 * 10_000


@pytest.mark.parametrize("trajectories", [1, 2, 5, 20, 40])
def test_a_small_buffer_takes_what_it_announced_at_any_mix_of_lengths(trajectories: int) -> None:
    """Trajectories may be as long as the whole buffer. None is evicted early, and the memory of gaps is given back."""
    most = 100 * trajectories
    rng = np.random.default_rng(trajectories)
    lengths: list[Callable[[int], float]] = [
        lambda _: 100,
        lambda _: rng.integers(20, 181),
        lambda _: 1000 if rng.random() < 0.05 else 50,
        lambda _: np.exp(rng.uniform(np.log(10), np.log(most))),
        lambda _: 1 + rng.exponential(100),
        lambda _: 200 if rng.random() < 0.5 else 12,
        lambda _: most if rng.random() < 0.04 else 80,
        lambda number: 50 + number,
    ]
    pixels, done = np.ones((most, 1024), dtype=np.uint8), np.zeros((most, 1), dtype=bool)
    for length_of in lengths:
        storage = TrajectoryStorage(trajectories, most)
        storage.allocate(episode(1))
        steps = number = 0
        while steps < 15 * most:
            length = min(most, int(length_of(number)))
            storage.write([[pixels[:length], done[:length]]])
            steps, number = steps + length, number + 1
            sizes = storage.bytes()
            assert sizes["bytes_used"] <= MOST * sizes["bytes_expected"]
        assert storage.ledger.stats()["evicted_early"] == 0
        assert sizes["bytes_expected"] < (1.0 + 2.0 / trajectories) * most * 1025 + 250_000


@pytest.mark.parametrize("trajectories", [60, 200])
def test_a_buffer_of_images_evicts_nothing_early_at_any_mix_of_lengths(trajectories: int) -> None:
    most, size = 50 * trajectories, 4096
    rng = np.random.default_rng(trajectories)
    lengths: list[Callable[[int], float]] = [
        lambda _: 500 if rng.random() < 0.05 else 25,
        lambda _: np.exp(rng.uniform(np.log(5), np.log(min(most, 1500)))),
        lambda _: most if rng.random() < 0.02 else 40,
    ]
    pixels, done = np.ones((most, size), dtype=np.uint8), np.zeros((most, 1), dtype=bool)
    for length_of in lengths:
        storage = TrajectoryStorage(trajectories, most)
        storage.allocate(episode(1, size))
        kept: list[int] = []
        steps = number = 0
        while steps < 5 * most:
            length = min(most, int(length_of(number)))
            storage.write([[pixels[:length], done[:length]]])
            steps, number = steps + length, number + 1
            kept.append(length)
            while len(kept) > trajectories or sum(kept) > most:
                del kept[0]
            assert len(storage) == len(kept)
            sizes = storage.bytes()
            assert sizes["bytes_used"] <= MOST * sizes["bytes_expected"]
        assert storage.ledger.stats()["evicted_early"] == 0


def test_a_process_that_is_attached_keeps_to_what_was_announced_too() -> None:
    owner = TrajectoryStorage(4, 400)
    owner.allocate(episode(1, 4096))
    storage = TrajectoryStorage.attached_to(owner.handle)
    rng = np.random.default_rng(0)
    pixels, done = np.ones((400, 4096), dtype=np.uint8), np.zeros((400, 1), dtype=bool)
    for _ in range(100):
        length = int(rng.choice([20, 90, 400]))
        storage.write([[pixels[:length], done[:length]]])
        sizes = owner.bytes()
        assert sizes["bytes_used"] <= MOST * sizes["bytes_expected"]


@pytest.mark.parametrize("trajectories", [4, 10, 40])
def test_a_small_buffer_that_reserves_its_memory_takes_what_it_holds(trajectories: int) -> None:
    storage = TrajectoryStorage(trajectories, 100 * trajectories, reserve=True)
    storage.allocate(episode(1))
    sizes = storage.bytes()
    nbytes = 100 * 1025 * trajectories
    assert sizes["bytes_expected"] < (1.125 + 2.0 / trajectories) * nbytes + 250_000
    pixels, done = np.ones((100, 1024), dtype=np.uint8), np.zeros((100, 1), dtype=bool)
    for _ in range(3 * trajectories):
        storage.write([[pixels, done]])
    assert len(storage) == trajectories
    assert storage.bytes()["bytes_used"] <= MOST * sizes["bytes_expected"]


def test_a_small_buffer_with_a_limit_of_bytes_uses_most_of_them() -> None:
    rb = TrajectoryReplayBuffer(max_trajectories=20, max_bytes=4 << 20, chunk_size=4)
    for _ in range(60):
        rb.extend(episode(150))
    assert rb.stats()["bytes_used"] <= 4 << 20
    assert 1025 * rb.storage.max_total_steps > 0.8 * (4 << 20)
    assert rb.storage.num_steps == 20 * 150


def test_a_small_buffer_of_half_of_the_free_memory_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_check, "available_memory", lambda: 20 << 20)
    TrajectoryStorage(30, 10_000).allocate(episode(1))


def test_what_is_read_of_a_small_buffer_is_whole_although_the_memory_of_gaps_is_given_back() -> None:
    storage = TrajectoryStorage(3, 300)
    rng, kept = np.random.default_rng(0), 0
    for number in range(120):
        length = int(rng.choice([20, 90, 300]))
        done = torch.zeros(length, 1, dtype=torch.bool)
        done[-1] = True
        data = TensorDict({"pixels": torch.full((length, 4096), number % 251, dtype=torch.uint8)}, [length])
        storage.allocate(data.set(("next", "done"), done))
        storage.write([[data["pixels"].numpy(), done.numpy()]])
        for position in range(len(storage)):
            whole = storage[position]
            first = whole["trajectory", "id"][0] % 251
            assert (whole["pixels"] == first).all()
            kept += 1
    assert kept > 120


def test_a_buffer_says_how_much_memory_it_takes() -> None:
    rb = TrajectoryReplayBuffer(max_trajectories=100, max_total_steps=5000, chunk_size=4)
    assert rb.stats()["bytes_expected"] == 0
    for n in range(200):
        rb.extend(episode(20 + n % 60))
    stats = rb.stats()
    assert stats["nbytes_per_step"] == rb.storage.nbytes_per_step == 1025
    assert 5000 * 1025 < stats["bytes_expected"] < 5000 * 1025 + 200_000
    assert 0.9 * stats["bytes_expected"] < stats["bytes_used"] < MOST * stats["bytes_expected"]
    assert stats["bytes_used"] <= stats["bytes_at_most"]
    assert f"of {stats['bytes_expected'] / 2**20:.1f} MiB" in repr(rb.storage)


def test_a_limit_of_bytes_in_place_of_steps() -> None:
    rb = TrajectoryReplayBuffer(max_trajectories=100, max_bytes=4 << 20, chunk_size=4, batch_size=8)
    for n in range(300):
        rb.extend(episode(10 + n % 50))
    stats = rb.stats()
    assert stats["bytes_used"] <= 4 << 20
    assert stats["bytes_at_most"] <= 4 << 20
    assert 3000 < rb.storage.max_total_steps < 4096
    assert rb.storage.num_steps > 0.9 * rb.storage.max_total_steps
    assert rb.sample().shape == (8, 4)
    with pytest.raises(TrajectoryTooLongError):
        rb.extend(episode(5000))


def test_a_limit_of_bytes_beside_one_of_steps() -> None:
    storage = TrajectoryStorage(100, 1000, max_bytes=1 << 30)
    storage.allocate(episode(1))
    assert storage.max_total_steps == 1000


def test_a_limit_of_bytes_that_is_too_small_is_refused() -> None:
    rb = TrajectoryReplayBuffer(max_trajectories=1000, max_bytes=10_000, chunk_size=4)
    with pytest.raises(BufferMemoryError, match="max_bytes=10,000, but the ledger of 1,000 trajectories"):
        rb.extend(episode(5))
    with pytest.raises(InvalidArgumentError, match="max_bytes"):
        TrajectoryReplayBuffer(max_trajectories=10, chunk_size=4)


def test_memory_that_is_reserved_is_taken_at_once() -> None:
    rb = TrajectoryReplayBuffer(max_trajectories=100, max_total_steps=5000, chunk_size=4, reserve=True)
    rb.extend(episode(5))
    assert rb.stats()["bytes_used"] >= rb.stats()["bytes_expected"] - 200_000


def test_of_three_buffers_that_reserve_most_of_what_is_free_one_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = memory_check.available_memory()
    assert begin is not None
    limit = 20 << 20  # as in a small container: only so much more than what is taken now
    taken: list[TrajectoryStorage] = []

    def available() -> int:
        return limit - sum(storage.bytes()["bytes_used"] for storage in taken)

    monkeypatch.setattr(memory_check, "available_memory", available)
    for accepted in (True, False, False):
        storage = TrajectoryStorage(100, 10_000, reserve=True)
        if accepted:
            storage.allocate(episode(1))
            taken.append(storage)
        else:
            with pytest.raises(BufferMemoryError, match="A buffer of 10,000 steps"):
                storage.allocate(episode(1))


def test_the_memory_of_writers_is_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_check, "available_memory", lambda: 12 << 20)
    TrajectoryStorage(100, 10_000).allocate(episode(1))
    with pytest.raises(BufferMemoryError, match="and 8,000,000 bytes that its writers hold"):
        TrajectoryStorage(100, 10_000).allocate(episode(1), beside=8_000_000)


def test_a_query_does_not_pad_everything_to_the_longest() -> None:
    rb = TrajectoryReplayBuffer(max_trajectories=100, max_total_steps=5000, chunk_size=4)
    for _ in range(99):
        rb.extend(episode(10, 4096))
    rb.extend(episode(2000, 4096))
    found = rb.query(lambda trajectory: len(trajectory.data) > 10)
    assert [len(trajectory.data) for trajectory in found] == [2000]
    assert len(rb.query()) == 100


def test_a_closed_buffer_gives_its_memory_back_at_once_also_in_a_reference_cycle() -> None:
    rb = TrajectoryReplayBuffer(max_trajectories=100, max_total_steps=5000, chunk_size=4, batch_size=8)
    rb.itself = rb  # type: ignore[attr-defined]
    rb.extend(episode(1000))
    batch = rb.sample()
    before = rb.stats()["bytes_used"]

    def ignored_in_a_child() -> None:
        rb.close()
        assert len(rb) == 1

    child = multiprocessing.get_context("fork").Process(target=ignored_in_a_child)
    child.start()
    child.join(PATIENCE)
    assert child.exitcode == 0
    rb.close()
    assert rb.stats()["bytes_used"] < before - 1000 * 1024
    assert (batch["pixels"] == 1).all()
    assert len(rb) == 0
    with pytest.raises(OwnerGoneError, match="was closed"):
        rb.sample()
    with pytest.raises(OwnerGoneError, match="was closed"):
        rb.extend(episode(5))
    rb.close()
