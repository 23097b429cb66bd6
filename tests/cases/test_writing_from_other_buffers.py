"""What users copy from one buffer into another: no trajectory of the copy mixes trajectories of the source."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from steps import make_buffer, make_trajectory, small
from tensordict import TensorDict, TensorDictBase
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer, prefill_replay_buffer
from torchrl.data.replay_buffers.samplers import RandomSampler

from embodichain_rl import ByPriority, ChunkSampler, TrajectoryReplayBuffer
from embodichain_rl.errors import SchemaMismatchError, StepOrderError
from embodichain_rl.transforms import FlatChunks

LENGTHS = [7, 9, 12, 8]


def filled(**kwargs: Any) -> TrajectoryReplayBuffer:
    kwargs = {"max_trajectories": 100, "max_total_steps": 5000, **kwargs} if "storage" not in kwargs else kwargs
    return make_buffer([make_trajectory(number, length) for number, length in enumerate(LENGTHS)], **kwargs)


def empty(**kwargs: Any) -> TrajectoryReplayBuffer:
    return make_buffer(max_trajectories=5000, max_total_steps=50_000, **kwargs)


def assert_unmixed(rb: TrajectoryReplayBuffer) -> list[tuple[int, int, int]]:
    """Say that each trajectory is consecutive steps of one of the source; return its number, first step and length."""
    pieces = []
    for trajectory in rb.storage:
        number, step, length, _ = trajectory["label"].unbind(-1)
        assert (number == number[0]).all(), "a trajectory mixes several of the source"
        assert (step == step[0] + torch.arange(len(step))).all(), "steps are not consecutive"
        assert (trajectory["next", "observation"][:-1] == trajectory["observation"][1:]).all()
        assert trajectory["next", "done"][:, 0].tolist() == [False] * (len(step) - 1) + [True]
        at_its_end = bool(step[-1] == length[-1] - 1)
        assert bool(trajectory["next", "truncated"][-1]) is not at_its_end
        assert bool(trajectory["next", "terminated"][-1]) is at_its_end
        pieces.append((int(number[0]), int(step[0]), len(step)))
    return pieces


def assert_next_episode_is_whole(rb: TrajectoryReplayBuffer, number: int = 99) -> None:
    rb.extend(make_trajectory(number, 6))
    assert rb.storage[len(rb) - 1]["label"][:, :2].tolist() == [[number, step] for step in range(6)]


class TestSamples:
    def test_extended_again_and_again(self) -> None:
        a, b = filled(), empty()
        for _ in range(40):
            index = b.extend(a.sample())
            assert index.shape == (8, 3)
            assert (index == index[:, :1]).all()
        assert len(assert_unmixed(b)) == len(b) == 320
        assert b.stats()["pending_steps"] == 0
        assert_next_episode_is_whole(b)

    def test_prefill_replay_buffer(self) -> None:
        a, b = filled(), empty()
        prefill_replay_buffer(b, a, n_samples=4, chunk_size=2)
        assert len(assert_unmixed(b)) == 4
        assert_next_episode_is_whole(b)

    def test_counted_as_truncated(self) -> None:
        a, b = filled(chunk_size=4), empty()
        b.extend(a.sample())
        ends = sum(step + length == LENGTHS[number] for number, step, length in assert_unmixed(b))
        assert b.stats()["truncated"] == 8 - ends

    def test_that_are_flattened(self) -> None:
        a, b = filled(), empty()
        for _ in range(20):
            b.extend(a.sample().reshape(-1))
        assert_unmixed(b)
        assert b.storage.num_steps == 20 * 24

    def test_of_single_steps(self) -> None:
        a, b = filled(), empty()
        steps = a.sample()[:, 0]
        b.extend(steps)
        assert b.storage.num_steps == len(steps)
        assert_unmixed(b)  # two steps that happen to follow one another are one trajectory of two steps

    def test_known_by_their_index_alone(self) -> None:
        a, b = filled(), empty()
        b.extend(a.sample().exclude("trajectory").reshape(-1))
        assert b.storage.num_steps == 24
        assert_unmixed(b)

    def test_while_an_episode_of_ones_own_is_under_way(self) -> None:
        a, b = filled(), empty()
        own = make_trajectory(77, 9)
        b.extend(own[:4])
        b.extend(a.sample())
        b.extend(own[4:])
        assert len(b) == 9
        assert b.storage[8]["label"][:, :2].tolist() == [[77, step] for step in range(9)]

    def test_into_a_buffer_whose_trajectories_have_ids(self) -> None:
        a, b = make_buffer([small(n, 8, traj_id=n) for n in range(3)]), empty()
        b.extend(small(1, 8, traj_id=1)[:4])
        for _ in range(5):
            b.extend(a.sample())
        b.extend(small(1, 8, traj_id=1)[4:])
        assert b.storage[len(b) - 1]["label"][:, :2].tolist() == [[1, step] for step in range(8)]

    def test_of_a_transposed_batch(self) -> None:
        a, b = filled(), empty()
        b.extend(a.sample().transpose(0, 1))
        assert_unmixed(b)

    def test_from_a_compact_buffer_into_another(self) -> None:
        a, b = filled(compact=True), empty(compact=True)
        for _ in range(10):
            b.extend(a.sample())
        assert len(assert_unmixed(b)) == 80
        assert_next_episode_is_whole(b)

    @pytest.mark.parametrize("compact", [False, True])
    @pytest.mark.parametrize("pad", ["before", "after", "both"])
    def test_that_are_padded(self, pad: str, compact: bool) -> None:
        a, b = filled(sampler=ChunkSampler(6, pad=pad)), empty(compact=compact)
        real = 0
        for _ in range(20):
            batch = a.sample()
            real += int(batch["collector", "mask"].sum())
            b.extend(batch)
        assert b.storage.num_steps == real
        assert_unmixed(b)
        assert_next_episode_is_whole(b)

    def test_drawn_by_priority(self) -> None:
        a, b = filled(sampler=ChunkSampler(3, weights=ByPriority())), empty()
        b.extend(a.sample())
        assert_unmixed(b)
        assert_next_episode_is_whole(b)

    def test_whole_trajectories(self) -> None:
        a, b = filled(), empty()
        b.extend(a.storage[:])
        b.extend(a.storage[2])
        assert assert_unmixed(b) == [(0, 0, 7), (1, 0, 9), (2, 0, 12), (3, 0, 8), (2, 0, 12)]
        assert b.stats()["truncated"] == 0

    def test_that_have_no_truncated_flag_keep_their_flags(self) -> None:
        keys = [("next", "truncated"), ("next", "terminated")]
        a, b = make_buffer([make_trajectory(0, 9).exclude(*keys)], chunk_size=4), empty()
        batch = a.sample()
        b.extend(batch)
        for row, trajectory in zip(batch, b.storage, strict=True):
            assert torch.equal(row["next", "done"], trajectory["next", "done"])

    def test_are_not_changed_themselves(self) -> None:
        a, b = filled(), empty()
        batch = a.sample()
        before = batch.clone()
        b.extend(batch)
        assert (batch == before).all()

    @pytest.mark.parametrize("windows", [{"observation": (-1, 2), ("next", "done"): (0, 0)}, {"observation": (0, 0)}])
    def test_of_windows_are_refused(self, windows: Any) -> None:
        a, b = filled(sampler=ChunkSampler(windows=windows)), empty()
        with pytest.raises(SchemaMismatchError, match=r"batch of windows.*ChunkSampler\(chunk_size\)"):
            b.extend(a.sample())
        assert not b.storage.initialized


class TestFlatChunks:
    def test_extended_again_and_again(self) -> None:
        a, b = filled(transform=FlatChunks()), empty()
        for _ in range(20):
            b.extend(a.sample())
        pieces = [trajectory["label"] for trajectory in b.storage]
        assert [len(piece) for piece in pieces] == [3] * 160
        assert all((piece[:, 0] == piece[0, 0]).all() and (piece[:, 1].diff() == 1).all() for piece in pieces)
        own = make_trajectory(5, 6).set("is_init", torch.tensor([1, 0, 0, 0, 0, 0]).bool()[:, None])
        b.extend(own)
        assert b.storage[160]["label"][:, 0].tolist() == [5] * 6


class TestTorchRLBuffers:
    @pytest.fixture
    def source(self) -> TensorDictReplayBuffer:
        return self.make(SliceSampler(slice_len=3, end_key=("next", "done"), strict_length=True))

    def make(self, sampler: Any) -> TensorDictReplayBuffer:
        rb = TensorDictReplayBuffer(storage=LazyTensorStorage(1000), sampler=sampler, batch_size=24)
        rb.extend(torch.cat([make_trajectory(number, 8 + number) for number in range(5)]))
        return rb

    def test_slices(self, source: TensorDictReplayBuffer) -> None:
        b = empty()
        for _ in range(30):
            b.extend(source.sample())
        for trajectory in b.storage:
            assert (trajectory["label"][:, 0] == trajectory["label"][0, 0]).all()
            assert (trajectory["label"][:, 1].diff() == 1).all()
            assert trajectory["next", "done"][-1]
        assert b.stats()["pending_steps"] == 0
        assert_next_episode_is_whole(b)

    def test_slices_without_marks(self) -> None:
        source = self.make(SliceSampler(slice_len=4, end_key=("next", "done"), truncated_key=None))
        b = empty()
        for _ in range(30):
            b.extend(source.sample())
        b.writer.truncate_pending()
        assert b.storage.num_steps == 30 * 24
        for trajectory in b.storage:
            assert (trajectory["label"][:, 0] == trajectory["label"][0, 0]).all()
            assert (trajectory["label"][:, 1].diff() == 1).all()

    def test_single_transitions_are_refused(self) -> None:
        source, b = self.make(RandomSampler()), empty()
        with pytest.raises(StepOrderError, match="no next observation"):
            b.extend(source.sample())
        assert len(b) == b.stats()["pending_steps"] == 0

    def test_single_transitions_without_observations_are_refused_by_their_index(self) -> None:
        source = TensorDictReplayBuffer(storage=LazyTensorStorage(1000), batch_size=24)
        source.extend(torch.cat([small(number, 8) for number in range(5)]))
        with pytest.raises(StepOrderError, match="'index'"):
            empty().extend(source.sample())

    def test_what_was_extended_into_torchrls_buffer_before_is_still_joined(self) -> None:
        other, b = TensorDictReplayBuffer(storage=LazyTensorStorage(10)), empty()
        whole: TensorDictBase = make_trajectory(0, 24)
        for piece in whole.split(4):
            other.extend(piece)  # writes "index", which wraps around after ten steps
            b.extend(piece)
        assert assert_unmixed(b) == [(0, 0, 24)]

    def test_slices_of_a_buffer_of_two_dimensions_without_marks(self) -> None:
        sampler = SliceSampler(slice_len=4, end_key=("next", "done"), truncated_key=None)
        source = TensorDictReplayBuffer(storage=LazyTensorStorage(1000, ndim=2), sampler=sampler, batch_size=24)
        source.extend(torch.stack([small(number, 12) for number in range(3)]))
        b = empty()
        for _ in range(10):
            batch = source.sample()
            assert batch["index"].shape == (24, 2)
            b.extend(batch)
        assert b.stats()["pending_steps"] == 0
        assert b.storage.num_steps == 240
        for trajectory in b.storage:
            assert (trajectory["label"][:, 0] == trajectory["label"][0, 0]).all()
            assert (trajectory["label"][:, 1].diff() == 1).all()


def test_own_data_under_reserved_keys_is_refused() -> None:
    data = small(0, 4).set(("trajectory", "id"), torch.zeros(4, 2))
    with pytest.raises(SchemaMismatchError, match="one integer for each step"):
        empty().extend(data)
    with pytest.raises(SchemaMismatchError, match="one integer for each step"):
        empty().extend(TensorDict({**small(0, 4), "trajectory": TensorDict({"id": ["a"] * 4}, [4])}, [4]))
