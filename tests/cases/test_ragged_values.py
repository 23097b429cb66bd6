"""Values whose size changes from step to step: point clouds, tokens, graphs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ragged_steps import check_ragged, frame_of, jagged, padded, points_of, ragged_trajectory
from tensordict import NonTensorData, NonTensorStack, TensorDict, lazy_stack
from torch.utils.data import DataLoader

from embodichain_rl import ChunkSampler, JaggedBatches, OnlineDataset, TrajectoryReplayBuffer, buffer_statistics
from embodichain_rl.errors import (
    CheckpointError,
    InvalidArgumentError,
    SchemaMismatchError,
    TrajectoryTooLongError,
    UnsupportedOperationError,
)
from embodichain_rl.replay.ledger.invariants import check_ledger
from embodichain_rl.transforms import jagged as jagged_of

STEPS = 6
POINTS = [points_of(3, step) for step in range(STEPS)]


def make_buffer(**options: Any) -> TrajectoryReplayBuffer:
    return TrajectoryReplayBuffer(
        **{"max_trajectories": 20, "max_total_steps": 200, "chunk_size": 3, "batch_size": 8, **options}
    )


def steps_with(points: Any) -> TensorDict:
    """Return the steps of a trajectory with an entry ``"points"``."""
    done = torch.zeros(STEPS, 1, dtype=torch.bool)
    done[-1] = True
    data = TensorDict({"state": torch.arange(STEPS)[:, None], "next": {"done": done}}, [STEPS])
    return data if points is None else data.set("points", points)


def check_points(rb: TrajectoryReplayBuffer, at: int = 0) -> None:
    trajectory = rb[at]
    assert trajectory["points_lengths"].tolist() == [len(points) for points in POINTS]
    for step, points in enumerate(POINTS):
        assert torch.equal(trajectory["points"][step, : len(points)], points)
        assert not trajectory["points"][step, len(points) :].any()


def as_lazy_stack() -> TensorDict:
    steps = steps_with(None)
    return lazy_stack([steps[step].set("points", points) for step, points in enumerate(POINTS)])


def as_list() -> TensorDict:
    data = steps_with(None)
    data.set_non_tensor("points", POINTS)
    return data


WRITTEN: dict[str, Callable[[], TensorDict]] = {
    "jagged": lambda: steps_with(jagged(POINTS)),
    "jagged with lengths": lambda: steps_with(
        torch.nested.nested_tensor_from_jagged(
            torch.cat([torch.cat([points, torch.full((1, 3), 9.0)]) for points in POINTS]),
            torch.tensor([0, *(len(points) + 1 for points in POINTS)]).cumsum(0),
            torch.tensor([len(points) for points in POINTS]),
        )
    ),
    "strided nested": lambda: steps_with(torch.nested.nested_tensor(POINTS)),
    "a stack of tensors": lambda: steps_with(NonTensorStack(*map(NonTensorData, POINTS))),
    "a list": as_list,
    "a lazy stack of steps": as_lazy_stack,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("declared", [False, True])
def test_are_written_from(name: str, declared: bool) -> None:
    rb = make_buffer(ragged=["points"] if declared else [])
    rb.extend(WRITTEN[name]())
    check_points(rb)
    rb.extend(WRITTEN["jagged"]())  # the next may come in another form
    check_points(rb, 1)


def test_are_written_padded_with_their_lengths() -> None:
    rb = make_buffer(ragged=["points"])
    values, lengths = padded(POINTS)
    rb.extend(steps_with(values).set("points_lengths", lengths))
    check_points(rb)


@pytest.mark.parametrize("lengths", [(STEPS, STEPS), (STEPS, 4)])
@pytest.mark.parametrize("options", [{}, {"ragged": ["points"]}, {"optional_keys": {"wrist": torch.zeros(1)}}])
def test_are_written_in_a_lazy_stack_of_trajectories_that_were_padded_one_by_one(
    options: dict[str, Any], lengths: tuple[int, int]
) -> None:
    rb = make_buffer(**options)
    clouds = [
        [torch.rand((step + 3 * number) % 5 + number, 3) for step in range(n)] for number, n in enumerate(lengths)
    ]
    trajectories = []
    for number, points in enumerate(clouds):
        values, counts = padded(points)
        done = (torch.arange(len(points)) == len(points) - 1)[:, None]
        steps = TensorDict({"points": values, "points_lengths": counts, "next": {"done": done}}, [len(points)])
        if "optional_keys" in options and number:
            steps["wrist"] = torch.ones(len(points), 1)
        trajectories.append(steps)
    assert trajectories[0]["points"].shape[1] != trajectories[1]["points"].shape[1]
    rb.extend(lazy_stack(trajectories))
    for number, points in enumerate(clouds):
        assert rb[number]["points_lengths"].tolist() == [len(cloud) for cloud in points]
        for step, cloud in enumerate(points):
            assert torch.equal(rb[number]["points"][step, : len(cloud)], cloud)


def test_lengths_that_are_none_of_the_values_are_refused() -> None:
    rb = make_buffer()
    for wrong in (torch.full((STEPS,), 9), torch.rand(STEPS), torch.full((STEPS,), -1)):
        with pytest.raises(SchemaMismatchError, match="points_lengths"):
            rb.extend(steps_with(jagged(POINTS)).set("points_lengths", wrong))
    rb.extend(steps_with(jagged(POINTS)).set("points_lengths", torch.tensor([len(points) for points in POINTS])))
    check_points(rb)


def test_are_written_step_by_step() -> None:
    rb = make_buffer(ragged=["points"])
    for step, points in enumerate(POINTS):
        rb.add(steps_with(None)[step].set("points", points))
    check_points(rb)


def test_of_whole_trajectories_in_a_ragged_lazy_stack() -> None:
    rb = make_buffer()
    rb.extend(lazy_stack([steps_with(jagged(POINTS)), steps_with(jagged(POINTS))]))
    check_points(rb, 0)
    check_points(rb, 1)
    done = torch.tensor([[0], [1]]).bool()
    short = TensorDict({"points": torch.ones(2, 9, 3), "state": torch.zeros(2, 1).long(), "next": {"done": done}}, [2])
    rb.extend(lazy_stack([steps_with(jagged(POINTS)), short]))
    check_points(rb, 2)
    assert rb[3]["points"].shape == (2, 9, 3)


def test_tokens_have_no_further_dimension() -> None:
    rb = make_buffer()
    tokens = [torch.arange(n) for n in (3, 1, 0, 7, 2, 5)]
    rb.extend(steps_with(None).set("tokens", jagged(tokens)))
    assert [rb[0]["tokens"][n, : len(some)].tolist() for n, some in enumerate(tokens)] == [t.tolist() for t in tokens]


@pytest.mark.parametrize("compact", [False, True, "views"])
def test_stay_with_their_step_while_the_buffer_turns_over(compact: Any) -> None:
    rb = make_buffer(ragged=["points"], compact=compact)
    for number in range(80):
        rb.extend(ragged_trajectory(number, 4 + number % 9))
        if number % 4 == 0:
            check_ragged(rb.sample())
    check_ledger(rb.storage.ledger)
    for position in (0, 7, -1):
        check_ragged(rb[position])
    for sampler in (
        ChunkSampler(9, pad="both"),
        ChunkSampler(9, strict_length=False),
        ChunkSampler(2, stride=2),
        ChunkSampler(1, squeeze=True, weights="steps"),
    ):
        other = TrajectoryReplayBuffer(storage=rb.storage, sampler=sampler, batch_size=8)
        check_ragged(other.sample())


def test_windows_have_lengths_and_padding() -> None:
    rb = make_buffer(ragged=["points"])
    rb.extend(ragged_trajectory(4, 9))
    windows = {"points": (-2, 0), ("next", "points"): [0], "label": [0]}
    rb.set_sampler(ChunkSampler(windows=windows, pad="both"))
    batch = rb.sample(32)
    for row in range(32):
        step = int(batch["label"][row, 0, 1])
        for at, wanted in enumerate((step - 2, step - 1, step)):
            expected = points_of(4, max(wanted, 0))
            assert int(batch["points_lengths"][row, at]) == len(expected)
            assert torch.equal(batch["points"][row, at, : len(expected)], expected)
            assert bool(batch["points_is_pad"][row, at]) == (wanted < 0)
        following = points_of(4, step + 1)
        assert torch.equal(batch["next", "points"][row, 0, : len(following)], following)


def test_are_handed_out_as_jagged_tensors() -> None:
    rb = make_buffer(ragged=["points"], transform=JaggedBatches(["points"]))
    for number in range(5):
        rb.extend(ragged_trajectory(number, 6))
    batch = rb.sample()
    assert batch.shape == (8 * 3,)
    for key in ("points", ("next", "points")):
        assert batch[key].layout is torch.jagged
        for row, values in enumerate(batch[key].unbind()):
            number, step = batch["label"][row].tolist()
            assert torch.equal(values, points_of(number, step + (key != "points")))
    means = torch.nested.nested_tensor_from_jagged(batch["points"].values() * 2, batch["points"].offsets())
    assert means.size(0) == 24


def test_windows_of_several_steps_are_not_jagged_entries_of_a_batch() -> None:
    rb = make_buffer(sampler=ChunkSampler(windows={"points": [0], "state": [0, 1]}, pad="after"), chunk_size=None)
    rb.extend(steps_with(jagged(POINTS)))
    rb.append_transform(JaggedBatches(["points"]))
    batch = rb.sample(5)
    for row, step in enumerate(batch["trajectory", "step"].tolist()):
        assert torch.equal(batch["points"][row], POINTS[step])
    rb.set_sampler(ChunkSampler(windows={"points": [0, 1]}))
    with pytest.raises(InvalidArgumentError, match="Got 10 values of 'points' in a batch of 5"):
        rb.sample(5)


def test_one_entry_of_a_batch_is_made_jagged() -> None:
    rb = make_buffer()
    rb.extend(steps_with(jagged(POINTS)))
    values = jagged_of(rb[0], "points")
    assert all(torch.equal(a, b) for a, b in zip(values.unbind(), POINTS, strict=True))
    with pytest.raises(InvalidArgumentError, match="state_lengths"):
        jagged_of(rb[0], "state")


def test_go_from_one_buffer_to_another() -> None:
    source, target = make_buffer(ragged=["points"]), make_buffer(ragged=["points"])
    source.extend(ragged_trajectory(3, 6))
    target.extend(source[:])
    check_ragged(target[0])
    target.extend(source.sample(4))
    check_ragged(target.sample())


def test_are_in_checkpoints_and_copies(tmp_path: Path) -> None:
    for compact in (False, True):
        rb = make_buffer(ragged=["points"], compact=compact)
        for number in range(30):
            rb.extend(ragged_trajectory(number, 4 + number % 9))
        rb.dumps(tmp_path / str(compact))
        loaded, from_state = make_buffer(compact=compact), make_buffer(compact=not compact)
        loaded.loads(tmp_path / str(compact))
        from_state.load_state_dict(rb.state_dict())
        for other in (loaded, from_state, pickle.loads(pickle.dumps(rb)), copy.deepcopy(rb)):
            assert len(other) == len(rb)
            for position in range(len(rb)):
                assert torch.equal(other[position]["label"], rb[position]["label"])
                check_ragged(other[position])
            other.extend(ragged_trajectory(77, 5))
            check_ragged(other[-1])


def test_a_damaged_checkpoint_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    rb = make_buffer(ragged=["points"])
    rb.extend(ragged_trajectory(3, 6))
    rb.dumps(tmp_path)
    sizes = next(tmp_path.rglob("field_*_sizes.bin"))
    sizes.write_bytes(sizes.read_bytes()[:-8] + (-5).to_bytes(8, "little", signed=True))
    with pytest.raises(CheckpointError):
        rb.loads(tmp_path)
    check_ragged(rb[0])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("by_item", [False, True])
def test_come_through_the_workers_of_a_loader(num_workers: int, by_item: bool) -> None:
    rb = make_buffer(ragged=["points"])
    for number in range(20):
        rb.extend(ragged_trajectory(number, 4 + number % 9))
    dataset = OnlineDataset(rb, chunk_size=3, **({} if by_item else {"batch_size": 8}))
    loader = DataLoader(dataset, batch_size=8 if by_item else None, num_workers=num_workers)
    for _, batch in zip(range(4), loader, strict=False):
        assert batch.shape == (8, 3)
        check_ragged(batch)


def test_columns_and_single_steps_are_read() -> None:
    rb = make_buffer(ragged=["points"])
    ids = rb.extend(ragged_trajectory(3, 6))
    column = rb.storage["points"]
    assert column.shape == (6, max(len(points) for points in POINTS), 3)
    assert rb.storage["points_lengths"].tolist() == [len(points) for points in POINTS]
    check_ragged(rb.storage[torch.tensor([[[int(ids[0]), 4], [int(ids[0]), 1]]])])


def test_make_room_by_evicting_where_they_are_larger_than_expected() -> None:
    rb = make_buffer(ragged=["points"], ragged_bytes=200)
    for number in range(12):
        many = [torch.full((200 + number, 3), float(number + step)) for step in range(5)]
        done = torch.tensor([[0], [0], [0], [0], [1]]).bool()
        rb.extend(TensorDict({"points": jagged(many), "next": {"done": done}}, [5]))
        check_ledger(rb.storage.ledger)
        newest = rb[-1]
        assert torch.equal(newest["points"][4, : 200 + number], many[4])
    stats = rb.stats()
    assert 1 <= len(rb) < 12
    assert stats["evicted_early"] == 12 - len(rb)
    assert stats["bytes_used"] <= stats["bytes_at_most"]


@pytest.mark.parametrize("trajectories", [4, 10, 60])
def test_take_no_more_than_announced_where_they_are_larger_than_expected(trajectories: int) -> None:
    rb = TrajectoryReplayBuffer(
        max_trajectories=trajectories,
        max_total_steps=20 * trajectories,
        chunk_size=2,
        ragged=["points"],
        ragged_bytes=1000,
    )
    done = torch.zeros(20, 1, dtype=torch.bool)
    done[-1] = True
    for _ in range(4 * trajectories):
        points = jagged(list(torch.rand(20, 800, 1)))  # 3,200 bytes
        rb.extend(TensorDict({"points": points, "next": {"done": done}}, [20]))
        sizes = rb.storage.bytes()
        assert sizes["bytes_used"] <= 1.15 * sizes["bytes_expected"]
    assert len(rb) < trajectories


def test_one_trajectory_with_more_bytes_than_the_buffer_is_refused() -> None:
    rb = make_buffer(ragged=["points"], ragged_bytes=50)
    rb.extend(ragged_trajectory(3, 6))
    huge = [torch.zeros(300_000, 3)] * STEPS
    with pytest.raises(TrajectoryTooLongError, match="ragged_bytes"):
        rb.extend(make_like(ragged_trajectory(4, STEPS), huge))
    assert len(rb) == 1
    check_ragged(rb[0])


def make_like(data: TensorDict, points: list[torch.Tensor]) -> TensorDict:
    """Return steps with other points."""
    values, lengths = padded(points)
    data = data.exclude("points", "points_lengths", ("next", "points"), ("next", "points_lengths"))
    data["points"], data["points_lengths"] = values, lengths
    data["next", "points"], data["next", "points_lengths"] = values, lengths
    return data


class TestRefused:
    def test_values_that_differ_in_more_than_their_first_dimension(self) -> None:
        edges = [torch.zeros(2, 5), torch.zeros(2, 3), torch.zeros(2, 4), *[torch.zeros(2, 1)] * 3]
        with pytest.raises(SchemaMismatchError, match="only n changes"):
            make_buffer().extend(steps_with(NonTensorStack(*map(NonTensorData, edges))))

    def test_ragged_values_where_the_arena_has_others(self) -> None:
        rb = make_buffer()
        rb.extend(steps_with(torch.zeros(STEPS, 4, 3)))
        with pytest.raises(SchemaMismatchError, match=r"ragged=\['points'\]"):
            rb.extend(steps_with(jagged(POINTS)))
        with pytest.raises(SchemaMismatchError, match=r"ragged=\['points'\]"):
            rb.extend(steps_with(torch.zeros(STEPS, 5, 3)))

    def test_another_dtype(self) -> None:
        rb = make_buffer()
        rb.extend(steps_with(jagged(POINTS)))
        with pytest.raises(SchemaMismatchError, match="float64"):
            rb.extend(steps_with(jagged([points.double() for points in POINTS])))

    def test_lengths_beyond_the_padding(self) -> None:
        with pytest.raises(SchemaMismatchError, match="points_lengths"):
            make_buffer(ragged=["points"]).extend(
                steps_with(torch.zeros(STEPS, 4, 3)).set("points_lengths", torch.full((STEPS,), 5))
            )

    def test_data_without_a_declared_key(self) -> None:
        with pytest.raises(SchemaMismatchError, match="cloud"):
            make_buffer(ragged=["cloud"]).extend(steps_with(None))

    def test_ragged_values_of_whole_trajectories(self) -> None:
        data = steps_with(None)
        data["trajectory", "points"] = jagged(POINTS)
        with pytest.raises(SchemaMismatchError, match="whole trajectories"):
            make_buffer().extend(data)

    @pytest.mark.parametrize("options", [{"ragged": "points"}, {"ragged": [3]}, {"ragged": 7}, {"ragged_bytes": 0}])
    def test_arguments_that_cannot_work(self, options: dict[str, Any]) -> None:
        with pytest.raises(InvalidArgumentError):
            make_buffer(**options)

    def test_statistics_and_relabelling(self) -> None:
        rb = make_buffer(ragged=["points"])
        rb.extend(steps_with(jagged(POINTS)))
        with pytest.raises(SchemaMismatchError, match="ragged"):
            buffer_statistics(rb, ["points"])
        with pytest.raises(UnsupportedOperationError, match="ragged"):
            rb.relabel("points", lambda data: data["points"])
        with pytest.raises(UnsupportedOperationError, match="ragged"):
            rb.relabel("points_lengths", lambda data: data["points_lengths"])


def test_other_fields_of_a_step_keep_their_bits() -> None:
    rb = make_buffer(ragged=["points"])
    rb.extend(ragged_trajectory(5, 9))
    assert torch.equal(rb[0]["frame"], torch.stack([frame_of(5, step) for step in range(9)]))
