"""Direct writes of data that is already on the device: the content equals that of a CPU storage."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_device import SimulatedDevice
from steps import check_chunk, contents, make_buffer, make_trajectory, small
from tensordict import TensorDict
from test_device_storage import on

from embodichain_rl import ChunkSampler, TrajectoryReplayBuffer, TrajectoryWriter, accept_success
from embodichain_rl.errors import SchemaMismatchError, StepOrderError, TrajectoryValueError


def there(**kwargs: Any) -> TrajectoryReplayBuffer:
    return on(SimulatedDevice(direct=True), **kwargs)


def pieces_of(trajectories: list[TensorDict], cuts: list[int]) -> list[TensorDict]:
    """Return the same steps, cut at other positions."""
    steps = torch.cat(trajectories)
    edges = sorted({0, *(cut % len(steps) for cut in cuts), len(steps)})
    return [steps[a:b] for a, b in itertools.pairwise(edges)]


def full(number: int, length: int) -> TensorDict:
    steps = make_trajectory(number, length, traj_id=number)
    steps["segment_id"] = torch.arange(length) // 3
    steps["say"] = [f"{number} at {step}" for step in range(length)]
    steps["trajectory", "kind"] = torch.full((length, 1), number % 3)
    steps["policy_version"] = torch.full((length,), number)
    return steps


class TestWritten:
    def test_is_live_immediately_and_has_an_id(self) -> None:
        rb = there()
        assert rb.extend(make_trajectory(0, 5)).tolist() == [0] * 5
        assert rb.extend(make_trajectory(1, 4, ends=False)).tolist() == [-1] * 4
        assert contents(rb) == [(0, 5)]

    @settings(max_examples=25)
    @given(
        lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
        cuts=st.lists(st.integers(0, 400), max_size=8),
    )
    def test_in_any_pieces_equals_a_cpu_storage(self, lengths: list[int], cuts: list[int]) -> None:
        trajectories = [full(number, length) for number, length in enumerate(lengths)]
        device, cpu = there(), make_buffer()
        for piece in pieces_of(trajectories, cuts):
            assert torch.equal(device.extend(piece.clone()), cpu.extend(piece.clone()))
            assert device.stats()["pending_steps"] == cpu.stats()["pending_steps"]
        got, expected = device[:], cpu[:]
        assert len(got) == len(expected) or device.stats()["evicted_early"]
        expected = expected[len(expected) - len(got) :, : got.shape[1]]
        for key in got.keys(True, True):
            assert torch.equal(got[key], expected[key]), key
        rows, of_cpu = (rb.storage.ledger.live_rows() for rb in (device, cpu))
        for name in ("longest_segments", "policy_versions"):
            assert getattr(rows, name).tolist() == getattr(of_cpu, name).tolist()[-len(got) :]

    def test_many_environments_at_once(self) -> None:
        rb = there(max_trajectories=300, max_steps=2400)
        data = torch.stack([torch.cat([small(100 * env + k, 4) for k in range(3)]) for env in range(40)])
        for part in data.split([5, 3, 4], dim=1):
            rb.extend(part)
        assert {(100 * env + k, 4) for env in range(40) for k in range(3)} == set(contents(rb))
        assert rb.stats()["pending_steps"] == 0

    def test_together_is_copied_with_one_operation_per_field(self) -> None:
        device = SimulatedDevice(direct=True)
        rb = on(device, [small(0, 4)], max_trajectories=300, max_steps=2400)
        before = device.operations
        rb.extend(torch.stack([small(env, 4) for env in range(1, 31)]))
        assert device.operations - before == len(rb.storage.arena.stored)
        assert len(contents(rb)) == 31

    def test_without_the_steps_that_the_mask_excludes(self) -> None:
        rb = there()
        data = torch.stack([small(0, 6), torch.cat([small(1, 4), small(9, 2)])])
        data["collector", "mask"] = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
        rb.extend(data)
        assert contents(rb) == [(0, 6), (1, 4)]

    def test_is_copied_before_the_collector_reuses_its_memory(self) -> None:
        rb = there()
        data = make_trajectory(0, 9)
        memory = data[:5].clone()
        rb.extend(memory)
        memory.zero_()
        rb.extend(data[5:])
        assert contents(rb) == [(0, 9)]

    def test_keeps_little_more_memory_than_its_pending_steps(self) -> None:
        rb = there(max_trajectories=100, max_steps=2000)
        long = small(7, 40)
        short = [torch.cat([small(100 * env + k, 8) for k in range(5)]) for env in range(1, 10)]
        data = torch.stack([long, *short])
        for step in range(40):  # nine environments end every 8 steps; they share batches with the long one
            rb.extend(data[:, step : step + 1])
            kept = {id(s.batch): len(s.batch) for u in rb.writer._pending for s in u.spans}
            assert sum(kept.values()) <= 4 * rb.stats()["pending_steps"]
        assert (7, 40) in contents(rb)
        assert len(rb) == 46

    def test_several_trajectories_of_a_row_end_in_one_call(self) -> None:
        rb = there(max_trajectories=20)
        data = torch.cat([small(number, 4) for number in range(5)])
        for part in data.split([6, 11, 3]):
            rb.extend(part)
        assert contents(rb) == [(number, 4) for number in range(5)]

    def test_trajectories_that_take_turns_in_one_call(self) -> None:
        rb = there(max_trajectories=20)
        a, b = (small(number, 8, traj_id=number) for number in range(2))
        rb.extend(torch.cat([a[:2], b[:5], a[2:4]]))
        rb.extend(torch.cat([a[4:6], b[5:], a[6:]]))
        assert contents(rb) == [(1, 8), (0, 8)]

    @pytest.mark.parametrize("mark", ["is_init", "step_count"])
    @pytest.mark.parametrize("together", [True, False])
    def test_is_cut_where_collection_was_broken_off(self, mark: str, together: bool) -> None:
        rb = there(max_trajectories=20)
        steps = [small(0, 9)[:5], small(1, 9)[:4], small(2, 7)]
        for data in steps:
            data[mark] = (torch.arange(len(data)) == 0) if mark == "is_init" else torch.arange(len(data))
        for data in [torch.cat(steps)] if together else steps:
            before = data.clone()
            rb.extend(data)
            assert (data == before).all()
        assert [trajectory["label"][:, 0].tolist() for trajectory in rb.storage] == [[0] * 5, [1] * 4, [2] * 7]
        assert all(trajectory["next", "truncated"][-1] for trajectory in list(rb.storage)[:2])
        assert (rb.stats()["truncated"], rb.stats()["pending_steps"]) == (2, 0)

    def test_is_cut_where_a_next_observation_is_another(self) -> None:
        rb = there(max_trajectories=20)
        rb.extend(torch.cat([make_trajectory(0, 9)[:5], make_trajectory(1, 7)]))
        assert [trajectory["label"][:, 0].tolist() for trajectory in rb.storage] == [[0] * 5, [1] * 7]

    def test_of_another_buffer_is_cut_as_it_was_sampled(self) -> None:
        source = there(trajectories=[make_trajectory(number, 9) for number in range(3)])
        rb = there(max_trajectories=50, max_steps=1000)
        for _ in range(3):
            batch = source.sample()
            before = batch.clone()
            rb.extend(batch)
            assert (batch == before).all()
        assert len(rb) == 24
        for trajectory in rb.storage:
            assert (trajectory["label"][:, 0] == trajectory["label"][0, 0]).all()
            assert (trajectory["label"][:, 1].diff() == 1).all()
            assert trajectory["next", "done"][-1]

    def test_of_several_environments_is_no_trajectory(self) -> None:
        with pytest.raises(StepOrderError):
            there().extend(torch.stack([make_trajectory(number, 6)[1] for number in range(4)]))

    def test_can_be_stored_before_its_end(self) -> None:
        rb = there(max_trajectories=20)
        rb.extend(torch.stack([small(0, 9)[:5], small(1, 9)[:5]]))
        assert rb.stats()["pending_bytes"] == 10 * rb.storage.schema.nbytes
        assert rb.writer.truncate_pending() == 2
        assert [len(trajectory) for trajectory in rb.storage] == [5, 5]
        assert all(trajectory["next", "truncated"][-1] for trajectory in rb.storage)
        rb.extend(small(2, 6))
        assert rb.storage[2]["label"][:, 0].tolist() == [2] * 6

    def test_passes_the_same_filter(self) -> None:
        rb = there(writer=TrajectoryWriter(accept=accept_success))
        for number in range(4):
            steps = small(number, 5)
            steps["next", "success"] = torch.full((5, 1), bool(number % 2))
            rb.extend(steps)
        assert contents(rb) == [(1, 5), (3, 5)]
        assert rb.stats()["rejected"] == 2

    def test_mixed_with_data_from_the_cpu(self) -> None:
        device = SimulatedDevice(direct=True)
        rb = on(device, max_trajectories=50, max_steps=1000)
        for number in range(40):
            device.direct = number % 3 > 0
            rb.extend(make_trajectory(number, 3 + number % 7))
            check_chunk(rb.storage[:])
        rb.storage.flush()
        assert sorted(contents(rb)) == [(number, 3 + number % 7) for number in range(40)]

    def test_is_sampled_by_segments(self) -> None:
        rb = there(sampler=ChunkSampler(3, sampling_mode="segment"))
        rb.extend(torch.cat([full(number, 12) for number in range(3)]))
        batch = rb.sample()
        assert (batch["segment_id"] == batch["segment_id"][:, :1]).all()


class TestRefused:
    def test_without_an_end(self) -> None:
        rb = there()
        with pytest.raises(SchemaMismatchError, match="nothing says where a trajectory ends"):
            rb.extend(TensorDict({"observation": torch.zeros(3, 2)}, [3]))
        assert not rb.storage.initialized

    def test_with_other_keys(self) -> None:
        rb = there()
        rb.extend(small(0, 3))
        with pytest.raises(SchemaMismatchError, match=r"with .*'pixels'"):
            rb.extend(make_trajectory(0, 3))

    def test_with_trajectory_values_that_change(self) -> None:
        steps = small(0, 4)
        steps["trajectory", "mass"] = torch.arange(4.0)
        with pytest.raises(TrajectoryValueError, match="changes at step 1"):
            there().extend(steps)

    @pytest.mark.parametrize("first", [False, True])
    def test_for_a_trajectory_that_began_on_another_device(self, first: bool) -> None:
        device = SimulatedDevice(direct=first)
        rb = on(device)
        rb.extend(small(0, 4)[:2])
        device.direct = not first
        with pytest.raises(SchemaMismatchError, match="Write all steps of a trajectory from the same place"):
            rb.extend(small(0, 4)[2:])
