"""Blocks of many environments on a device: what is stored equals what a storage on the CPU makes of the same data."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_device import SimulatedDevice
from steps import make_buffer
from tensordict import TensorDict
from test_device_storage import on

from embodichain_rl import TrajectoryReplayBuffer, TrajectoryWriter
from embodichain_rl.errors import PendingStepsError, SchemaMismatchError, TrajectoryTooLongError
from embodichain_rl.replay.ledger.invariants import check_ledger
from embodichain_rl.replay.writing.lockstep import Lockstep

ENVIRONMENTS = 20


def there(**kwargs: Any) -> TrajectoryReplayBuffer:
    return on(SimulatedDevice(direct=True), max_trajectories=400, max_steps=8000, **kwargs)


def on_cpu(**kwargs: Any) -> TrajectoryReplayBuffer:
    return make_buffer(max_trajectories=400, max_total_steps=8000, **kwargs)


def environments(steps: int, ends: np.ndarray, *, marks: tuple[str, ...] = ()) -> TensorDict:
    """Return ``steps`` steps of environments that are reset where ``ends``, ``bool`` ``[B, T]``, says so."""
    rows = len(ends)
    state = torch.arange(rows * (steps + 1), dtype=torch.float32).view(rows, steps + 1, 1).repeat(1, 1, 3)
    after = state[:, 1:].clone()
    after[torch.from_numpy(ends)] += 0.5  # the last next observation is not the first one behind the reset
    done = torch.from_numpy(ends)[..., None]
    begins = np.ones(ends.shape, dtype=bool)
    begins[:, 1:] = ends[:, :-1]
    number = np.cumsum(begins, axis=1)
    data = TensorDict(
        {
            "state": state[:, :-1],
            "action": torch.randn(rows, steps, 2, dtype=torch.float64),
            "next": {"state": after, "reward": torch.rand(rows, steps, 1), "done": done, "truncated": done.clone()},
        },
        [rows, steps],
    )
    if "ids" in marks:
        ids = torch.from_numpy(number * 1000 + np.arange(rows)[:, None])
        data["collector", "traj_ids"] = ids
    if "is_init" in marks:
        data["is_init"] = torch.from_numpy(begins)[..., None]
    if "step_count" in marks:
        starts = np.maximum.accumulate(np.where(begins, np.arange(steps), 0), axis=1)
        data["step_count"] = torch.from_numpy(np.arange(steps) - starts)[..., None]
    if "policy_version" in marks:
        data["policy_version"] = torch.arange(steps).expand(rows, steps).clone() // 3
    return data


def assert_equal(device: TrajectoryReplayBuffer, cpu: TrajectoryReplayBuffer) -> None:
    """Check that two buffers hold the same trajectories, in the same order."""
    assert (len(device), device.storage.num_steps) == (len(cpu), cpu.storage.num_steps)
    for got, expected in zip(device.storage, cpu.storage, strict=True):
        assert set(got.keys(True, True)) == set(expected.keys(True, True))
        for key in got.keys(True, True):
            assert torch.equal(got[key], expected[key]), key
    rows, of_cpu = (rb.storage.ledger.live_rows() for rb in (device, cpu))
    for name in ("ids", "lengths", "longest_segments", "policy_versions"):
        assert getattr(rows, name).tolist() == getattr(of_cpu, name).tolist(), name
    assert device.stats()["pending_steps"] == cpu.stats()["pending_steps"]
    check_ledger(device.storage.ledger)


MARKS = [(), ("ids",), ("is_init", "step_count"), ("ids", "is_init", "step_count", "policy_version")]


def in_arrays(rb: TrajectoryReplayBuffer) -> bool:
    """Whether what is pending is in arrays."""
    return bool(rb.writer._pending._together)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    chance=st.sampled_from([0.02, 0.2, 0.6]),
    cuts=st.lists(st.integers(1, 39), max_size=6, unique=True),
    marks=st.sampled_from(MARKS),
    compact=st.booleans(),
)
def test_equals_a_cpu_storage(seed: int, chance: float, cuts: list[int], marks: tuple[str, ...], compact: bool) -> None:
    ends = np.random.default_rng(seed).random((ENVIRONMENTS, 40)) < chance
    data = environments(40, ends, marks=marks)
    device, cpu = there(compact=compact), on_cpu(compact=compact)
    for start, stop in itertools.pairwise([0, *sorted(cuts), 40]):
        part = data[:, start:stop].clone()
        assert torch.equal(device.extend(part), cpu.extend(part.clone()))
        part.zero_()  # the collector reuses its memory
        assert in_arrays(device) or not device.stats()["pending_steps"]
    assert_equal(device, cpu)


@pytest.mark.parametrize("marks", MARKS[1:])  # without any, nothing says that a trajectory was broken off
def test_goes_on_where_collection_was_broken_off(marks: tuple[str, ...]) -> None:
    rng = np.random.default_rng(1)
    device, cpu = there(), on_cpu()
    for number in range(4):  # each time, all environments are reset: new ids, counts and initial steps
        data = environments(12, rng.random((ENVIRONMENTS, 12)) < 0.2, marks=marks)
        if "ids" in marks:
            data["collector", "traj_ids"] += 10**6 * number
        for part in data.split([5, 7], dim=1):
            assert torch.equal(device.extend(part.clone()), cpu.extend(part.clone()))
    assert_equal(device, cpu)
    assert device.writer.truncate_pending() == cpu.writer.truncate_pending() > 0
    ends_of, ends_of_cpu = (sorted(t["state"][-1, 0].item() for t in rb.storage) for rb in (device, cpu))
    assert ends_of == ends_of_cpu
    assert all(trajectory["next", "truncated"][-1] for trajectory in device.storage)


def test_the_number_of_environments_may_change_when_nothing_is_pending() -> None:
    device, cpu = there(), on_cpu()
    for rows in (20, 30, 17):
        for part in environments(8, np.tile(np.arange(8) == 7, (rows, 1))).split(4, dim=1):
            assert torch.equal(device.extend(part.clone()), cpu.extend(part.clone()))
        assert in_arrays(device)
    assert_equal(device, cpu)


def test_is_kept_when_other_steps_come_in_between() -> None:
    rng = np.random.default_rng(2)
    device, cpu = there(), on_cpu()
    for part in environments(30, rng.random((ENVIRONMENTS, 30)) < 0.1, marks=("ids",)).split(10, dim=1):
        assert torch.equal(device.extend(part.clone()), cpu.extend(part.clone()))
        other = environments(4, np.eye(4, dtype=bool)[[3]], marks=("ids",))[0]
        other["collector", "traj_ids"] -= 10**7
        assert torch.equal(device.extend(other.clone()), cpu.extend(other.clone()))
    assert_equal(device, cpu)


def test_keeps_little_more_memory_than_its_pending_steps() -> None:
    ends = np.zeros((ENVIRONMENTS, 200), dtype=bool)
    ends[1:, 7::8] = True  # the first environment never ends
    device = there()
    for part in environments(200, ends).split(5, dim=1):
        device.extend(part.clone())
        assert device.writer.pending_bytes <= 4 * device.storage.schema.bytes_of_step * device.writer.pending_steps
    assert in_arrays(device)
    assert device.stats()["pending_steps"] == 200
    assert device.writer.discard_pending() == 200
    assert device.stats()["pending_steps"] == 0


def test_needs_no_object_for_each_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    spans: list[int] = []
    monkeypatch.setattr(Lockstep, "spans", lambda self, row: spans.append(row))
    device = on(SimulatedDevice(direct=True), max_trajectories=5000, max_steps=100_000)
    operations = []
    for rows in (20, 2000):
        before = device.storage._memory.made_for.operations
        for part in environments(20, np.arange(20) % 10 == np.arange(rows)[:, None] % 10).split(5, dim=1):
            device.extend(part.clone())
        device.writer.discard_pending()
        operations.append(device.storage._memory.made_for.operations - before)
    assert not spans
    assert operations[1] <= 2 * operations[0]


def test_many_are_written_in_few_regions_and_evict_the_oldest() -> None:
    device = on(SimulatedDevice(direct=True), max_trajectories=40, max_steps=400)
    cpu = make_buffer(max_trajectories=40, max_total_steps=400)
    for number in range(6):
        data = environments(10, np.tile(np.arange(10) % 5 == 4, (ENVIRONMENTS, 1)))
        data["action"] += number
        assert torch.equal(device.extend(data.clone()), cpu.extend(data.clone()))
        assert_equal(device, cpu)
    assert device.stats()["published"] == 240
    assert len(device) == 40


class TestRefused:
    def test_next_observations_that_are_not_stored_once(self) -> None:
        device = there(compact=True)
        data = environments(8, np.zeros((ENVIRONMENTS, 8), dtype=bool))
        device.extend(data[:, :4].clone())
        wrong = data[:, 4:].clone()
        wrong["next", "state"][7, 1] += 1
        with pytest.raises(
            SchemaMismatchError, match=r"at step 1 of row 7 is not the 'state' of step 2.*compact=False"
        ):
            device.extend(wrong)
        wrong = data[:, 4:].clone()
        wrong["state"][7, 0] += 1
        with pytest.raises(SchemaMismatchError, match="the last step of an earlier call is not the 'state'"):
            device.extend(wrong)
        device.extend(data[:, 4:].clone())  # what was refused has changed nothing
        assert device.stats()["pending_steps"] == 8 * ENVIRONMENTS

    def test_of_a_few_environments(self) -> None:
        device = there(compact=True)
        data = environments(8, np.zeros((2, 8), dtype=bool))
        data["next", "state"][1, 2] += 1
        with pytest.raises(SchemaMismatchError, match="at step 2 of row 1 is not the 'state' of step 3"):
            device.extend(data)

    def test_trajectories_that_never_end(self) -> None:
        device = on(SimulatedDevice(direct=True), max_trajectories=40, max_steps=100)
        with pytest.raises(TrajectoryTooLongError, match="at least 101 steps, but max_total_steps=100"):
            device.extend(environments(101, np.zeros((ENVIRONMENTS, 101), dtype=bool)))
        assert device.stats()["pending_steps"] == 0

    def test_more_pending_bytes_than_allowed(self) -> None:
        device = on(
            SimulatedDevice(direct=True),
            max_trajectories=40,
            max_steps=1000,
            writer=TrajectoryWriter(max_pending_bytes=10_000),
        )
        data = environments(30, np.zeros((ENVIRONMENTS, 30), dtype=bool))
        device.extend(data[:, :5].clone())
        assert in_arrays(device)
        with pytest.raises(PendingStepsError, match="more than max_pending_bytes=10,000"):
            device.extend(data[:, 5:].clone())
        assert device.stats()["pending_steps"] == 5 * ENVIRONMENTS


def test_two_rows_of_one_id_are_one_trajectory() -> None:
    device, cpu = there(), on_cpu()
    data = environments(8, np.zeros((ENVIRONMENTS, 8), dtype=bool))
    data["collector", "traj_ids"] = torch.arange(ENVIRONMENTS)[:, None].expand(-1, 8).clone() // 2
    data["next", "done"][1::2, -1] = True
    assert torch.equal(device.extend(data.clone()), cpu.extend(data.clone()))
    assert_equal(device, cpu)
    assert len(device) == ENVIRONMENTS // 2


def test_the_order_of_pending_steps_is_kept_when_few_are_left() -> None:
    rng = np.random.default_rng(3)
    ends = rng.random((ENVIRONMENTS, 120)) < 0.3
    ends[:3] = False
    ends[:3, -1] = True
    device, cpu = there(), on_cpu()
    for part in environments(120, ends).split(4, dim=1):
        assert torch.equal(device.extend(part.clone()), cpu.extend(part.clone()))
    assert_equal(device, cpu)
