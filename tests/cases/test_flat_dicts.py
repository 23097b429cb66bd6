"""Batches as plain dicts, for training loops that know no TensorDict."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from steps import check_chunk, make_buffer, make_trajectory
from tensordict import TensorDict
from torch.utils.data import DataLoader
from torch.utils.data._utils.collate import default_collate

from embodichain_rl import OnlineDataset, ResolveText, TrajectoryReplayBuffer, UniformChunkSampler
from embodichain_rl.datasets import flat_dict
from embodichain_rl.errors import InvalidArgumentError, SchemaMismatchError

NAMES = {
    "observation",
    "pixels",
    "flags",
    "speed",
    "clock",
    "action",
    "robot.arm.joints",
    "robot.mode",
    "next.observation",
    "next.reward",
    "next.done",
    "next.terminated",
    "next.truncated",
    "label",
    "index",
    "trajectory.id",
    "trajectory.step",
}


@pytest.fixture
def rb() -> TrajectoryReplayBuffer:
    return make_buffer([make_trajectory(number, 20 + number) for number in range(5)])


def nested(batch: dict[str, Any], batch_dims: int = 2) -> TensorDict:
    """Return the TensorDict that a flat dict was made of."""
    data = TensorDict(batch_size=batch["label"].shape[:batch_dims])
    for name, value in batch.items():
        data.set(tuple(name.split(".")), value)
    return data


def test_keys_are_named_as_lerobot_names_them(rb: TrajectoryReplayBuffer) -> None:
    item = next(iter(OnlineDataset(rb, chunk_size=4, as_dict=True)))
    assert type(item) is dict
    assert item.keys() == NAMES
    check_chunk(nested(item, 1)[None])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batch_size", [None, 8])
def test_batches_of_a_data_loader(rb: TrajectoryReplayBuffer, batch_size: int | None, workers: int) -> None:
    dataset = OnlineDataset(rb, chunk_size=4, batch_size=batch_size, seed=0, as_dict=True)
    batches = iter(
        DataLoader(
            dataset,
            batch_size=8 if batch_size is None else None,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
        )
    )
    for _ in range(3):
        batch = next(batches)
        assert type(batch) is dict
        assert batch.keys() == NAMES
        assert batch["action"].shape == (8, 4, 2)
        check_chunk(nested(batch))


def test_they_are_the_batches_of_the_same_seed(rb: TrajectoryReplayBuffer) -> None:
    as_dicts, as_tensordicts = (
        iter(OnlineDataset(rb, chunk_size=4, batch_size=8, seed=3, as_dict=as_dict)) for as_dict in (True, False)
    )
    for _ in range(3):
        expected = next(as_tensordicts)
        assert (nested(next(as_dicts)) == expected).all()


def test_a_batch_of_varying_sizes_has_one_of_them(rb: TrajectoryReplayBuffer) -> None:
    batches = iter(DataLoader(OnlineDataset(rb, UniformChunkSampler(2, 12), seed=0, as_dict=True), batch_size=8))
    lengths = set()
    for _ in range(4):
        batch = next(batches)
        assert batch["collector.mask"].all()
        check_chunk(nested(batch).exclude("collector"))
        lengths.add(batch["label"].shape[1])
    assert len(lengths) > 1


def test_chunks_of_unequal_length_are_padded_by_our_collate_function(rb: TrajectoryReplayBuffer) -> None:
    chunks = iter(OnlineDataset(rb, UniformChunkSampler(2, 12), seed=0, as_dict=True))
    items = [next(chunks) for _ in range(8)]
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        default_collate(items)
    batch = OnlineDataset.collate_fn(items)
    mask = batch["collector.mask"]
    assert type(batch) is dict
    assert mask.sum(-1).tolist() == [len(item["label"]) for item in items]
    assert batch["observation"].shape == (*mask.shape, 3)
    assert not batch["label"][~mask].any()
    for row, real in zip(nested(batch), mask, strict=True):
        check_chunk(row[real].exclude("collector")[None])


def test_windows(rb: TrajectoryReplayBuffer) -> None:
    dataset = OnlineDataset(
        rb, None, windows={"observation": (-1, 0), ("next", "reward"): (0, 3), "label": (0, 0)}, as_dict=True
    )
    batch = next(iter(DataLoader(dataset, batch_size=8)))
    assert batch["observation"].shape == (8, 2, 3)
    assert batch["next.reward_is_pad"].shape == (8, 4)


def test_text_is_a_list_of_strings() -> None:
    rb = make_buffer([])
    for number in range(3):
        rb.extend(
            make_trajectory(number, 6, fields=["observation"]).set(("trajectory", "task"), [f"lift {number}"] * 6)
        )
    dataset = OnlineDataset(rb, 4, 2, transform=ResolveText(rb, ("trajectory", "task")), as_dict=True)
    batch = next(iter(dataset))
    assert batch["trajectory.task"] == [[f"lift {int(n)}"] * 4 for n in batch["label"][:, 0, 0]]


def test_a_transform_comes_before(rb: TrajectoryReplayBuffer) -> None:
    dataset = OnlineDataset(rb, 4, 2, transform=lambda data: data.select("action"), as_dict=True)
    assert next(iter(dataset)).keys() == {"action"}


def test_a_transform_that_returns_no_tensordict_is_refused(rb: TrajectoryReplayBuffer) -> None:
    dataset = OnlineDataset(rb, 4, 2, transform=lambda data: data["action"], as_dict=True)
    with pytest.raises(InvalidArgumentError, match="Got a Tensor from transform="):
        next(iter(dataset))


def test_two_entries_of_one_name_are_refused() -> None:
    data = TensorDict({"next.done": torch.zeros(3), "next": {"done": torch.ones(3)}}, [3])
    with pytest.raises(SchemaMismatchError, match=r"'next\.done' itself and \('next', 'done'\)"):
        flat_dict(data)


def test_as_dict_must_be_a_bool(rb: TrajectoryReplayBuffer) -> None:
    with pytest.raises(InvalidArgumentError, match="as_dict='flat'"):
        OnlineDataset(rb, 4, as_dict="flat")  # type: ignore[arg-type]
