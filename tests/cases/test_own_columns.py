"""Data with columns whose names a buffer uses as well: they come out as they went in, or are refused by name."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch
from simulated_device import SimulatedDevice
from steps import make_buffer, make_trajectory, small
from tensordict import TensorDict, lazy_stack
from torchrl.data import LazyTensorStorage, ReplayBufferEnsemble, SliceSampler, TensorDictReplayBuffer

from embodichain_rl import (
    ByPriority,
    ChunkSampler,
    TrajectoryReplayBuffer,
    TrajectoryStorage,
)
from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.errors import InvalidArgumentError, SchemaMismatchError


def frames(episode: int, first: int, length: int) -> TensorDict:
    """An episode as LeRobot hands it out: flat keys, and an index through the whole dataset."""
    at = torch.arange(length)
    return TensorDict(
        {
            "observation.state": torch.randn(length, 6),
            "action": torch.randn(length, 4),
            "index": first + at,
            "episode_index": torch.full((length,), episode),
            "frame_index": at,
            "timestamp": at / 10.0,
            "task_index": torch.full((length,), 3),
            "next.done": at == length - 1,
        },
        [length],
    )


LENGTHS = [7, 12, 9]
DATASET = [frames(n, sum(LENGTHS[:n]), length) for n, length in enumerate(LENGTHS)]
ALL = torch.cat(DATASET)


def lerobot_buffer(**kwargs: Any) -> TrajectoryReplayBuffer:
    settings: dict[str, Any] = {"max_trajectories": 20, "max_total_steps": 500, "batch_size": 32, **kwargs}
    if "sampler" not in settings:
        settings["chunk_size"] = 4
    return TrajectoryReplayBuffer(**settings)


def filled(**kwargs: Any) -> TrajectoryReplayBuffer:
    rb = lerobot_buffer(**kwargs)
    for episode in DATASET:
        rb.extend(episode)
    return rb


def check(batch: TensorDict) -> None:
    """Holds all columns of a batch against the dataset, by its own index."""
    for key in DATASET[0].keys():  # noqa: SIM118 - iterating over a TensorDict yields its rows
        assert torch.equal(batch[key], ALL[key][batch["index"]]), key
    assert torch.equal(batch["trajectory", "step"], batch["frame_index"])


class TestFramesOfLeRobot:
    @pytest.mark.parametrize("compact", [False, True])
    def test_come_out_as_they_went_in(self, compact: bool) -> None:
        rb = filled(compact=compact)
        batch = rb.sample()
        check(batch)
        assert torch.equal(batch["trajectory", "id"], batch["episode_index"])
        pairs = torch.stack([batch["trajectory", "id"], batch["trajectory", "step"]], -1)
        assert torch.equal(batch["trajectory", "index"], pairs)
        for number, episode in enumerate(DATASET):
            check(rb[number])
            assert len(rb[number]) == len(episode)

    def test_all_at_once_and_frame_by_frame(self) -> None:
        rb = lerobot_buffer()
        rb.extend(ALL)
        assert [len(rb[n]) for n in range(3)] == LENGTHS
        rb = lerobot_buffer()
        for frame in ALL:
            rb.add(frame)
        assert [len(rb[n]) for n in range(3)] == LENGTHS
        check(rb.sample())

    def test_ended_by_a_flag_that_is_named_or_by_their_episode(self) -> None:
        rb = lerobot_buffer(end_key="next.done")
        rb.extend(ALL)
        assert len(rb) == 3
        rb = lerobot_buffer(traj_key="episode_index")
        rb.extend(ALL.exclude("next.done"))
        rb.writer.truncate_pending()
        assert len(rb) == 3
        batch = rb.sample()
        assert torch.equal(batch["action"], ALL["action"][batch["index"]])

    def test_of_some_episodes_only(self) -> None:
        rb = lerobot_buffer()
        rb.extend(torch.cat([DATASET[2], DATASET[0]]))  # whose index jumps back
        check(rb.sample())

    def test_as_a_lazy_stack(self) -> None:
        rb = lerobot_buffer()
        rb.extend(lazy_stack(DATASET))
        check(rb.sample())

    def test_on_a_device(self) -> None:
        device: Any = SimulatedDevice()
        rb = filled(storage=TrajectoryStorage(20, 500, device=device), max_trajectories=None, max_total_steps=None)
        rb.storage.flush()
        check(rb.sample())
        rb.storage.close()

    def test_through_a_dataset_a_checkpoint_and_a_child(self, tmp_path: Any) -> None:
        rb = filled()
        check(next(iter(OnlineDataset(rb, 4, 8, seed=0))))
        rb.dumps(tmp_path)
        other = lerobot_buffer()
        other.loads(tmp_path)
        check(other.sample())
        queue: Any = multiprocessing.get_context("fork").SimpleQueue()
        child = multiprocessing.get_context("fork").Process(
            target=lambda: queue.put(rb.sample()["index"].numpy().tolist())
        )
        child.start()
        rows = torch.tensor(queue.get())
        child.join()
        assert (rows.diff() == 1).all()

    def test_padded_and_in_windows(self) -> None:
        batch = filled(sampler=ChunkSampler(6, pad="both")).sample()
        check(batch)
        windows: dict[Any, Any] = {"index": (-1, 1), "frame_index": (-1, 1), "action": [0]}
        batch = filled(sampler=ChunkSampler(windows=windows, pad="both")).sample()
        assert torch.equal(batch["action"], ALL["action"][batch["index"][:, 1:2]])
        assert torch.equal(batch["frame_index"], ALL["frame_index"][batch["index"]])
        assert batch["trajectory", "index"].shape == (32, 2)

    @pytest.mark.parametrize("prefetch", [0, 2])
    def test_with_the_info_of_a_sample(self, prefetch: int) -> None:
        rb = filled(prefetch=prefetch)
        batch, info = rb.sample(return_info=True)
        check(batch)
        assert torch.equal(torch.as_tensor(info["trajectory", "index"]), batch["trajectory", "index"])
        check(rb.sample(5))

    def test_are_read_again_by_their_pairs(self) -> None:
        rb = filled()
        batch = rb.sample()
        again = rb[batch["trajectory", "index"]]
        assert torch.equal(again["index"], batch["index"])
        check(rb[batch["trajectory", "id"], batch["trajectory", "step"]])

    def test_into_another_buffer(self) -> None:
        rb, other = filled(), lerobot_buffer()
        for batch in (rb.sample(), rb.sample().reshape(-1)[:4], rb[:], rb[1]):
            other.extend(batch)
        for trajectory in other.storage:
            for key in ("observation.state", "action", "timestamp"):
                assert torch.equal(trajectory[key], ALL[key][trajectory["index"]])
            assert (trajectory["index"].diff() == 1).all()

    def test_into_a_buffer_without_such_a_column_are_refused(self) -> None:
        rb = lerobot_buffer()
        rb.extend(DATASET[0].exclude("index"))
        with pytest.raises(SchemaMismatchError, match="with 'index', which the arena was not allocated for"):
            rb.extend(DATASET[1])

    def test_priorities(self) -> None:
        rb = filled(sampler=ChunkSampler(4, weights=ByPriority()))
        for _ in range(3):
            batch = rb.sample()
            batch["td_error"] = 1e-6 + (batch["episode_index"] == 1).float() * 1e6
            rb.update_tensordict_priority(batch)
        assert (rb.sample()["episode_index"] == 1).all()
        rb.update_priority(batch["trajectory", "index"], (batch["episode_index"] == 2).float()[:, 0] * 1e9)
        rb.update_priority(torch.tensor([2]), 1e12)
        assert (rb.sample()["episode_index"] == 2).all()
        with pytest.raises(InvalidArgumentError, match="The data has a column 'index' of its own"):
            rb.update_priority(batch["index"], 1.0)

    def test_in_a_plain_buffer_of_torchrl_are_refused_by_name(self) -> None:
        a, b = filled(), filled()
        with pytest.raises(SchemaMismatchError, match="a column 'index' of its own, but TorchRL"):
            ReplayBufferEnsemble(a, b, sample_from_all=True, batch_size=8).sample()
        with pytest.raises(SchemaMismatchError, match="a column 'index' of its own, but TorchRL"):
            TensorDictReplayBuffer(storage=a.storage, sampler=ChunkSampler(4), batch_size=4).sample()


class TestIndex:
    """A column "index" without anything beside it that tells what it is."""

    @pytest.mark.parametrize(
        "column",
        [
            torch.arange(20) + 5,
            torch.arange(20) * 10,
            torch.arange(20).flip(0),
            torch.full((20,), 4),
            torch.arange(20).int(),
            torch.rand(20),
            torch.arange(20)[:, None],
            torch.arange(60).view(20, 3),
        ],
        ids=["counts", "tens", "down", "constant", "int32", "float", "one element", "three elements"],
    )
    def test_comes_out_as_it_went_in(self, column: torch.Tensor) -> None:
        rb = make_buffer([make_trajectory(0, 20).set("index", column)], chunk_size=4)
        batch = rb.sample()
        assert torch.equal(batch["index"], column[batch["trajectory", "step"]])

    def test_that_says_no_order_comes_out_as_it_went_in(self) -> None:
        column = torch.randint(1000, (20,))
        rb = make_buffer([make_trajectory(0, 20).set("index", column)], chunk_size=4)
        batch = rb.sample()
        assert torch.equal(batch["index"], column[batch["trajectory", "step"]])

    def test_of_several_environments(self) -> None:
        data = torch.stack([small(n, 8).set("index", torch.arange(8)) for n in range(3)])
        rb = make_buffer([data], chunk_size=4)
        batch = rb.sample()
        assert torch.equal(batch["index"], batch["trajectory", "step"])

    def test_that_was_allocated(self) -> None:
        rb = TrajectoryReplayBuffer(max_trajectories=5, max_total_steps=100, chunk_size=2, batch_size=8)
        column = torch.tensor([3, 4, 5, 0, 1, 2])
        rb.storage.allocate(small(0, 1).set("index", torch.tensor([0])))
        rb.extend(small(0, 6).set("index", column))
        batch = rb.sample()
        assert torch.equal(batch["index"], column[batch["trajectory", "step"]])

    def test_that_is_nested(self) -> None:
        rb = make_buffer([small(0, 6).set(("index", "row"), torch.arange(6))], chunk_size=2)
        batch = rb.sample()
        assert torch.equal(batch["index", "row"], batch["trajectory", "step"])
        assert batch["trajectory", "index"].shape == (*batch.shape, 2)

    def test_of_slices_that_torchrl_sampled_is_not_stored(self) -> None:
        source = TensorDictReplayBuffer(
            storage=LazyTensorStorage(1000), sampler=SliceSampler(slice_len=4, end_key=("next", "done")), batch_size=64
        )
        source.extend(torch.cat([make_trajectory(number, 12) for number in range(5)]))
        rb = make_buffer([source.sample()], chunk_size=2)
        rb.extend(make_trajectory(0, 12))
        batch = rb.sample()
        assert torch.equal(batch["index"], torch.stack([batch["trajectory", "id"], batch["trajectory", "step"]], -1))

    def test_beside_a_trajectory_value_of_that_name_is_refused(self) -> None:
        data = small(0, 6).set("index", torch.arange(6)).set(("trajectory", "index"), torch.full((6,), 3))
        with pytest.raises(SchemaMismatchError, match=r"Got 'index' and \('trajectory', 'index'\)"):
            make_buffer([data])


class TestTrajectoryKeys:
    @pytest.mark.parametrize("keys", [["id"], ["step"], ["id", "step"]], ids=str)
    @pytest.mark.parametrize("index", [False, True])
    def test_of_ones_own_are_refused_by_name(self, keys: list[str], index: bool) -> None:
        values = {"id": torch.full((6,), 77), "step": torch.arange(6) + 100}
        data = small(0, 6)
        for key in keys:
            data["trajectory", key] = values[key]
        if index:
            data["index"] = torch.arange(6)
        rb = TrajectoryReplayBuffer(max_trajectories=5, max_total_steps=100, chunk_size=2)
        with pytest.raises(SchemaMismatchError, match=rf"\('trajectory', '{keys[0]}'\).*Rename it"):
            rb.extend(data)
        assert not rb.storage.initialized
        rb.extend(small(0, 6))
        with pytest.raises(SchemaMismatchError, match="Rename it"):
            rb.extend(data)

    def test_of_a_sample_without_its_index_go_back_to_the_buffer_that_it_is_from(self) -> None:
        rb = make_buffer([small(0, 6), small(1, 6)], chunk_size=3, max_trajectories=20)
        rb.extend(rb.sample().exclude("index"))
        assert rb.storage.num_steps == 12 + 3 * 8
        other = TrajectoryReplayBuffer(max_trajectories=5, max_total_steps=100, chunk_size=2)
        with pytest.raises(SchemaMismatchError, match="leave its 'index'"):
            other.extend(rb.sample().exclude("index"))

    def test_other_values_of_a_trajectory(self) -> None:
        data = small(0, 6).set(("trajectory", "index"), torch.full((6,), 3))
        batch = make_buffer([data], chunk_size=2).sample()
        assert (batch["trajectory", "index"] == 3).all()
        assert batch["index"].shape == (*batch.shape, 2)


class TestPaddingMasks:
    def data(self) -> TensorDict:
        return make_trajectory(0, 9).set("action_is_pad", torch.rand(9) < 0.5)

    @pytest.mark.parametrize("windows", [["action", "action_is_pad"], ["action_is_pad", "action"]], ids=str)
    def test_that_are_stored_come_out_of_windows(self, windows: list[str]) -> None:
        data = self.data()
        sampler = ChunkSampler(windows=dict.fromkeys(windows, (0, 3)), pad="after")
        batch = make_buffer([data], sampler=sampler).sample()
        steps = batch["trajectory", "step"][:, None] + torch.arange(4)
        assert torch.equal(batch["action_is_pad"], data["action_is_pad"][steps.clamp(max=8)])
        assert torch.equal(batch["trajectory", "action_is_pad"], steps > 8)
        assert torch.equal(batch["action_is_pad_is_pad"], steps > 8)

    def test_that_are_stored_come_out_of_chunks_and_go_on_to_another_buffer(self) -> None:
        rb = make_buffer([self.data()], chunk_size=4)
        other = make_buffer([rb.sample(), rb.sample()], chunk_size=2)
        for trajectory in other.storage:
            steps = trajectory["label"][:, 1]
            assert torch.equal(trajectory["action_is_pad"], rb[0]["action_is_pad"][steps])

    def test_both_names_stored_are_refused(self) -> None:
        data = self.data().set(("trajectory", "action_is_pad"), torch.ones(9))
        with pytest.raises(SchemaMismatchError, match="both are stored"):
            make_buffer([data], sampler=ChunkSampler(windows={"action": (0, 3)}, pad="after")).sample()


def test_a_priority_weight_of_ones_own() -> None:
    data = small(0, 9).set("priority_weight", torch.rand(9))
    rb = make_buffer([data], chunk_size=4)
    batch = rb.sample()
    assert torch.equal(batch["priority_weight"], data["priority_weight"][batch["trajectory", "step"]])
    other = make_buffer([batch], chunk_size=2)
    other.extend(rb.sample())
    rb.set_sampler(ChunkSampler(4, weights=ByPriority()))
    with pytest.raises(SchemaMismatchError, match="a column 'priority_weight'"):
        rb.sample()
