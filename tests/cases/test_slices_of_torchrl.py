"""Chunks in the place of TorchRL's slices: short episodes, marks of the first steps, and the flat layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from steps import assert_chances, make_buffer, make_plain_buffer, small
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer

from embodichain_rl import ByPriority, ByRecency, ChunkSampler, OnlineDataset, TrajectoryReplayBuffer
from embodichain_rl.errors import InvalidArgumentError, SchemaMismatchError, UnsupportedOperationError
from embodichain_rl.transforms import FlatChunks

LENGTHS = (2, 3, 5, 8)


def buffer(lengths: tuple[int, ...] = LENGTHS, **kwargs: Any) -> TrajectoryReplayBuffer:
    defaults: dict[str, Any] = {"max_trajectories": 10, "max_total_steps": 100, "batch_size": 400}
    if "sampler" not in kwargs:
        defaults |= {"chunk_size": 4, "strict_length": False}
    rb = TrajectoryReplayBuffer(**{**defaults, **kwargs})
    for number, length in enumerate(lengths):
        rb.extend(small(number, length))
    return rb


def not_the_second(number: int) -> bool:
    return number != 1


def check(batch: Any, length: int = 4, stride: int = 1) -> None:
    """``min(L, T)`` steps of each chunk are real, and consecutive; the rest repeats the last one."""
    mask, label = batch["collector", "mask"], batch["label"]
    of_trajectory = label[:, 0, 2]
    fitting = (of_trajectory - label[:, 0, 1] + stride - 1) // stride
    assert torch.equal(mask.sum(-1), fitting.clamp(max=length))
    short = of_trajectory <= (length - 1) * stride
    assert (label[short, 0, 1] == 0).all()
    assert mask[~short].all()
    assert torch.equal(mask, mask.long().cummin(-1).values.bool())
    steps = label[..., 1]
    wanted = steps[:, :1] + stride * torch.arange(length)
    assert torch.equal(steps, torch.minimum(wanted, of_trajectory[:, None] - 1))


class TestShortEpisodes:
    def test_are_sampled_whole(self) -> None:
        torch.manual_seed(0)
        batch = buffer().sample()
        assert batch.shape == (400, 4)
        check(batch)
        assert_chances(batch["label"][:, 0, 0].tolist(), dict.fromkeys(range(4), 1.0))
        starts = [tuple(row) for row in batch["label"][:, 0, :2].tolist()]
        assert set(starts) == {(0, 0), (1, 0), (2, 0), (2, 1), *((3, n) for n in range(5))}

    def test_as_slice_sampler_draws_them(self) -> None:
        theirs = TensorDictReplayBuffer(
            storage=LazyTensorStorage(100),
            sampler=SliceSampler(
                slice_len=4, end_key=("next", "done"), strict_length=False, pad_output=True, cache_values=True
            ),
            batch_size=400,
        )
        for number, length in enumerate(LENGTHS):
            theirs.extend(small(number, length))
        slices = theirs.sample().reshape(-1, 4)
        ours = buffer().sample()

        def seen(batch: Any) -> set[Any]:
            rows = zip(batch["label"].tolist(), batch["collector", "mask"].tolist(), strict=True)
            return {(str(label), str(mask)) for label, mask in rows}

        assert seen(ours) == seen(slices)

    @pytest.mark.parametrize(
        "options",
        [
            {"weights": "steps"},
            {"weights": ByRecency(half_life=3)},
            {"replacement": False},
            {"stride": 2},
            {"stride": 3, "weights": "steps"},
            {"subset": not_the_second},
        ],
        ids=["by steps", "by recency", "a pass", "a stride", "a stride, by steps", "a subset"],
    )
    def test_with_other_options(self, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        batch = buffer(sampler=ChunkSampler(4, strict_length=False, **options)).sample(200)
        check(batch, stride=options.get("stride", 1))

    def test_every_chunk_is_equally_likely_by_steps(self) -> None:
        torch.manual_seed(0)
        batch = buffer(sampler=ChunkSampler(4, strict_length=False, weights="steps")).sample(2000)
        chunks = [(0, 0), (1, 0), (2, 0), (2, 1), *((3, n) for n in range(5))]
        drawn = [tuple(row) for row in batch["label"][:, 0, :2].tolist()]
        assert_chances(drawn, dict.fromkeys(chunks, 1.0))

    def test_a_pass_has_each_chunk_once(self) -> None:
        rb = buffer(sampler=ChunkSampler(4, strict_length=False, replacement=False), batch_size=2)
        drawn = sorted(tuple(row) for batch in rb for row in batch["label"][:, 0, :2].tolist())
        assert drawn == [(0, 0), (1, 0), (2, 0), (2, 1), *((3, n) for n in range(5))]

    def test_only_short_ones(self) -> None:
        rb = buffer((1, 2))
        check(rb.sample())

    def test_in_a_dataset_and_with_other_chunk_sizes(self) -> None:
        rb = buffer()
        check(rb.sample_chunks(50, 6), 6)
        strict = make_buffer([small(0, 2)])
        dataset = OnlineDataset(strict, 4, 8, strict_length=False)
        assert next(iter(dataset))["collector", "mask"].sum(-1).tolist() == [2] * 8

    @pytest.mark.parametrize(
        "options",
        [{"pad": "after"}, {"pad_before": 1}, {"sampling_mode": "segment"}, {"drop_n_last_frames": 1}],
        ids=str,
    )
    def test_options_that_contradict_it(self, options: dict[str, Any]) -> None:
        with pytest.raises(InvalidArgumentError, match="strict_length=False"):
            ChunkSampler(4, strict_length=False, **options)

    def test_something_else_than_a_bool(self) -> None:
        with pytest.raises(InvalidArgumentError, match="strict_length"):
            ChunkSampler(4, strict_length="no")  # type: ignore[arg-type]

    def test_a_plain_buffer_refuses_it(self) -> None:
        with pytest.raises(UnsupportedOperationError, match="strict_length=False"):
            make_plain_buffer([small(0, 5)], sampler=ChunkSampler(4, strict_length=False)).sample()

    def test_a_sampler_shows_it(self) -> None:
        assert "strict_length=False" in repr(ChunkSampler(4, strict_length=False))


def with_init(number: int, length: int, at: int = 0) -> TensorDict:
    data = small(number, length)
    data["is_init"] = torch.arange(length)[:, None] == at
    return data


class TestMarksOfFirstSteps:
    def test_are_an_option(self) -> None:
        rb = make_buffer([with_init(0, 9)], chunk_size=3, batch_size=50)
        plain = rb.sample()
        assert torch.equal(plain["is_init"], plain["label"][..., 1:2] == 0)
        rb = make_buffer([with_init(0, 9)], chunk_size=3, batch_size=50, init_key="is_init")
        marked = rb.sample()
        assert marked["is_init"].shape == (50, 3, 1)
        assert marked["is_init"][:, 0].all()
        assert not marked["is_init"][:, 1:].any()

    def test_do_not_remove_what_is_stored(self) -> None:
        sampler = ChunkSampler(3, init_key="is_init", pad="before")
        batch = make_buffer([with_init(0, 9)], sampler=sampler, batch_size=50).sample()
        stored = batch["label"][..., 1:2] == 0
        assert (batch["is_init"] >= stored).all()
        assert batch["is_init"][:, 0].all()

    def test_are_made_where_none_are_stored(self) -> None:
        rb = make_buffer([small(0, 9)], init_key=("agents", "is_init"))
        assert rb.sample()["agents", "is_init"][:, :, 0].tolist() == [[True, False, False]] * 8
        assert rb.storage["label"].shape == (9, 4)  # what is stored is as it was

    def test_of_a_key_that_is_no_flag(self) -> None:
        with pytest.raises(SchemaMismatchError, match=r"torch\.bool"):
            make_buffer([small(0, 9)], init_key="observation").sample()

    def test_of_windows(self) -> None:
        with pytest.raises(InvalidArgumentError, match="init_key"):
            ChunkSampler(windows={"observation": (-1, 0)}, init_key="is_init")

    def test_a_plain_buffer_refuses_them(self) -> None:
        with pytest.raises(UnsupportedOperationError, match="init_key"):
            make_plain_buffer([small(0, 5)], sampler=ChunkSampler(3, init_key="is_init")).sample()


class TestFlatChunks:
    def test_mark_as_slice_sampler_does(self) -> None:
        theirs = TensorDictReplayBuffer(
            storage=LazyTensorStorage(100),
            sampler=SliceSampler(slice_len=3, end_key=("next", "done")),
            batch_size=30,
        )
        theirs.extend(with_init(0, 9))
        ours = make_buffer([with_init(0, 9)], transform=FlatChunks(), batch_size=10)
        for batch in (theirs.sample(), ours.sample()):
            first = torch.arange(30)[:, None] % 3 == 0
            assert torch.equal(batch["is_init"], first)
            assert torch.equal(batch["next", "truncated"], first.roll(-1, 0))

    def test_keep_marks_inside_of_a_chunk(self) -> None:
        sampler = ChunkSampler(3, pad="before")
        ours = make_buffer([with_init(0, 9)], sampler=sampler, transform=FlatChunks(), batch_size=50).sample()
        stored = ours["label"][:, 1:2] == 0
        assert (ours["is_init"] >= stored).all()
        assert ours["is_init"].sum() > 50

    @pytest.mark.parametrize("key", [None, "begins"])
    def test_under_another_key_or_none(self, key: str | None) -> None:
        ours = make_buffer([small(0, 9)], transform=FlatChunks(init_key=key)).sample()
        assert "is_init" not in ours.keys()  # noqa: SIM118
        if key is not None:
            assert ours[key].sum() == 8


class TestSingleSteps:
    """``chunk_size=1`` with ``weights="steps"`` draws what a buffer of steps draws."""

    def buffer(self, **kwargs: Any) -> TrajectoryReplayBuffer:
        rb = TrajectoryReplayBuffer(
            max_trajectories=10,
            max_total_steps=100,
            batch_size=2000,
            **{"chunk_size": 1, "weights": "steps", "squeeze": True, **kwargs},
        )
        for number, length in enumerate(LENGTHS):
            rb.extend(small(number, length))
        return rb

    def test_all_steps_are_equally_likely(self) -> None:
        torch.manual_seed(0)
        batch = self.buffer().sample()
        assert batch.shape == batch["next"].shape == (2000,)
        assert batch["observation"].shape == (2000, 3)
        assert batch["index"].shape == (2000, 2)
        steps = [(n, step) for n, length in enumerate(LENGTHS) for step in range(length)]
        assert_chances([tuple(row) for row in batch["label"][:, :2].tolist()], dict.fromkeys(steps, 1.0))

    def test_they_are_the_steps_that_were_written(self) -> None:
        rb = self.buffer()
        batch = rb.sample()
        assert (rb[batch["index"]] == batch).all()

    @pytest.mark.parametrize("options", [{"strict_length": False}, {"init_key": "is_init"}, {"weights": "uniform"}])
    def test_with_other_options(self, options: dict[str, Any]) -> None:
        batch = self.buffer(**options).sample(5)
        assert batch.shape == (5,)
        assert batch.get("is_init", torch.ones(5, 1)).shape == (5, 1)

    def test_while_trajectories_come_and_go(self) -> None:
        torch.manual_seed(0)
        rb = self.buffer()
        for number in range(4, 60):
            rb.extend(small(number, 2 + number % 7))
            batch = rb.sample(300)
            live = {label for length in rb.storage for label in length["label"][:, 0].tolist()}
            assert set(batch["label"][:, 0].tolist()) == live
        rb.empty()
        rb.extend(small(99, 3))
        assert rb.sample()["label"][:, 0].unique().tolist() == [99]

    def test_without_replacement(self) -> None:
        sampler = ChunkSampler(1, replacement=False, squeeze=True)
        rb = make_buffer([small(0, 5), small(1, 6)], sampler=sampler, batch_size=4)
        drawn = sorted(tuple(row) for batch in rb for row in batch["index"].tolist())
        assert drawn == [(n, step) for n, length in enumerate((5, 6)) for step in range(length)]

    def test_in_a_plain_buffer(self) -> None:
        rb = make_plain_buffer([small(0, 5)], sampler=ChunkSampler(1, weights="steps", squeeze=True))
        assert rb.sample().shape == (8,)

    def test_priorities_of_them(self) -> None:
        rb = make_buffer([small(0, 5)], sampler=ChunkSampler(1, weights=ByPriority(), squeeze=True))
        batch = rb.sample()
        assert batch["priority_weight"].shape == (8,)
        rb.update_priority(batch["index"], torch.ones(8))

    def test_longer_chunks_can_not_be_squeezed(self) -> None:
        with pytest.raises(InvalidArgumentError, match="FlatChunks"):
            ChunkSampler(4, squeeze=True)
        with pytest.raises(InvalidArgumentError, match="FlatChunks"):
            self.buffer().sample_chunks(3, 4)
