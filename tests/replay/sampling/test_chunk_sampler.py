"""ChunkSampler: chunks of the length that is asked for, every one with the probability that is promised."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import (
    assert_uniform,
    check_chunk,
    make_buffer,
    make_plain_buffer,
    make_storage,
    make_trajectory,
    numbers_of,
    small,
)
from tensordict import TensorDictBase
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer

from embodichain_rl import ByRecency, ChunkSampler, OnlineDataset, TrajectoryReplayBuffer, TrajectoryStorage
from embodichain_rl.errors import ChunkTooLongError, EmptyBufferError, InvalidArgumentError

BUFFERS = [make_buffer, make_plain_buffer]
"""Every promise holds in both: the library's buffer and TorchRL's, of the same parts."""

MakeBuffer = Callable[..., TensorDictReplayBuffer]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def starts_of(data: TensorDictBase) -> list[tuple[int, int]]:
    """Trajectory number and first step of each chunk."""
    return [(int(number), int(start)) for number, start in data["label"][:, 0, :2]]


def draws(buffer: ReplayBuffer, batches: int) -> list[tuple[int, int]]:
    return [draw for _ in range(batches) for draw in starts_of(buffer.sample())]


class Sizes:
    """Returns the given sizes in turn, and counts how often it was asked."""

    def __init__(self, *sizes: Any) -> None:
        self.sizes = sizes
        self.asked = 0

    def __call__(self) -> Any:
        self.asked += 1
        return self.sizes[(self.asked - 1) % len(self.sizes)]


class TestChunks:
    @pytest.mark.parametrize("make", BUFFERS)
    @pytest.mark.parametrize(("batch_size", "length"), [(1, 1), (7, 1), (1, 9), (32, 4)])
    def test_have_the_shape_that_was_asked_for(self, make: MakeBuffer, batch_size: int, length: int) -> None:
        rb = make(
            [make_trajectory(number, 9 + number) for number in range(4)],
            batch_size=batch_size,
            sampler=ChunkSampler(length),
        )
        for _ in range(20):
            data = check_chunk(rb.sample())
            assert data.shape == (batch_size, length)
            assert data["index"].shape == (batch_size, length, 2)
            assert torch.equal(data["index"], torch.stack([data["trajectory", "id"], data["trajectory", "step"]], -1))

    @pytest.mark.parametrize("make", BUFFERS)
    def test_of_a_trajectory_as_long_as_a_chunk(self, make: MakeBuffer) -> None:
        assert starts_of(check_chunk(make([make_trajectory(5, 3)]).sample())) == [(5, 0)] * 8

    @settings(max_examples=40)
    @given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=10), length=st.integers(1, 12), data=st.data())
    def test_are_whole_whatever_the_lengths(self, lengths: list[int], length: int, data: st.DataObject) -> None:
        rb = make_buffer(max_trajectories=6, max_total_steps=40, chunk_size=length, generator=generator(0))
        for number, steps in enumerate(lengths):
            rb.extend(small(number, steps))
        live = [rows["label"][0, 2].item() for rows in rb.storage]
        if length > max(live):
            with pytest.raises(ChunkTooLongError, match=f"{length}.* {max(live)} steps"):
                rb.sample()
        else:
            assert check_chunk(rb.sample()).shape == (8, length)

    @pytest.mark.parametrize("make", BUFFERS)
    def test_can_be_changed_without_changing_the_buffer(self, make: MakeBuffer) -> None:
        rb = make([make_trajectory(0, 5), make_trajectory(1, 7)])
        for _ in range(3):
            check_chunk(rb.sample()).zero_()

    def test_of_one_key_can_be_changed_without_changing_another(self) -> None:
        # Keys of one shape and dtype are gathered together.
        rb = make_buffer([make_trajectory(0, 9)])
        data = rb.sample()
        before = data.clone()
        for key in rb.storage.schema.keys:
            data[key].zero_()
            before[key].zero_()
            assert (data == before).all(), key

    def test_are_read_by_their_index(self) -> None:
        rb = make_buffer([make_trajectory(number, 9) for number in range(4)])
        data = rb.sample()
        again = check_chunk(rb.storage.get((data["index"][..., 0], data["index"][..., 1])))
        assert torch.equal(again["label"], data["label"])


class TestChances:
    """A trajectory uniformly among those with enough steps, then a start uniformly among its valid ones."""

    LENGTHS = (4, 12, 5, 30, 3)

    @pytest.fixture(params=BUFFERS, ids=["TrajectoryReplayBuffer", "TensorDictReplayBuffer"])
    def drawn(self, request: pytest.FixtureRequest) -> list[tuple[int, int]]:
        rb = request.param(
            [small(number, length) for number, length in enumerate(self.LENGTHS)],
            storage=TrajectoryStorage(5, 100),
            sampler=ChunkSampler(4),
            batch_size=1000,
            generator=generator(7),
        )
        return draws(rb, 12)

    def test_of_trajectories(self, drawn: list[tuple[int, int]]) -> None:
        assert_uniform([number for number, _ in drawn], [0, 1, 2, 3])

    @pytest.mark.parametrize("number", [1, 2, 3])
    def test_of_starts(self, drawn: list[tuple[int, int]], number: int) -> None:
        assert_uniform([start for n, start in drawn if n == number], range(self.LENGTHS[number] - 3))

    def test_do_not_depend_on_what_was_evicted_before(self) -> None:
        rb = make_buffer(
            [small(number, 2 + number % 9) for number in range(100)],
            max_trajectories=20,
            max_total_steps=1000,
            chunk_size=2,
            batch_size=1000,
            generator=generator(3),
        )
        assert_uniform([number for number, _ in draws(rb, 3)], range(80, 100))

    @pytest.mark.parametrize("long_ones", [1, 3])
    def test_of_a_few_long_trajectories_among_a_thousand_short_ones(self, long_ones: int) -> None:
        # So few draws hit a long one that the ledger is scanned in nearly every batch.
        rb = make_buffer(max_trajectories=1000, max_total_steps=10_000, chunk_size=6, generator=generator(5))
        long = [100 + 300 * n for n in range(long_ones)]
        for number in range(1000):
            rb.extend(small(number, 8 if number in long else 3))
        drawn = draws(rb, 60)
        assert_uniform(drawn, [(number, start) for number in long for start in range(3)])

    def test_of_long_trajectories_among_as_many_short_ones(self) -> None:
        # Some draws are repeated: that must not favour anything.
        rb = make_buffer(
            [small(number, 4 if number % 2 else 1 + number) for number in range(12)],
            max_trajectories=12,
            max_total_steps=1000,
            chunk_size=5,
            batch_size=50,
            generator=generator(11),
        )
        assert_uniform([number for number, _ in draws(rb, 100)], [4, 6, 8, 10])

    def test_of_one_chunk_do_not_depend_on_its_place_in_the_batch(self) -> None:
        rb = make_buffer([small(0, 9), small(1, 3), small(2, 6)], chunk_size=5, batch_size=4, generator=generator(2))
        batches = [starts_of(rb.sample()) for _ in range(400)]
        for place in range(4):
            assert_uniform([batch[place][0] for batch in batches], [0, 2])


class TestSeeds:
    @pytest.mark.parametrize("make", BUFFERS)
    def test_of_a_generator_repeat_the_draws(self, make: MakeBuffer) -> None:
        trajectories = [small(number, 20) for number in range(4)]
        first, second, other = (draws(make(trajectories, generator=generator(seed)), 3) for seed in (1, 1, 2))
        assert first == second != other

    @pytest.mark.parametrize("make", BUFFERS)
    def test_of_torch_repeat_the_draws_without_a_generator(self, make: MakeBuffer) -> None:
        rb = make([small(number, 20) for number in range(4)])
        torch.manual_seed(1)
        first = draws(rb, 3)
        torch.manual_seed(1)
        assert draws(rb, 3) == first
        assert draws(rb, 3) != first

    def test_of_numpy_and_python_have_no_part_in_it(self) -> None:
        rb = make_buffer([small(number, 20) for number in range(4)], generator=generator(1))
        state = np.random.get_state()[1].tolist()
        rb.sample()
        assert np.random.get_state()[1].tolist() == state


class TestChunkSize:
    @pytest.mark.parametrize("make", BUFFERS)
    def test_is_asked_for_once_a_batch(self, make: MakeBuffer) -> None:
        sizes = Sizes(2, 5, np.int32(3))
        rb = make([make_trajectory(0, 9)], sampler=ChunkSampler(sizes))
        assert [check_chunk(rb.sample()).shape for _ in range(4)] == [(8, 2), (8, 5), (8, 3), (8, 2)]
        assert sizes.asked == 4

    def test_is_not_asked_for_where_the_caller_says_it(self) -> None:
        sizes = Sizes(2)
        rb = make_buffer([make_trajectory(0, 9)], chunk_size=sizes)
        assert check_chunk(rb.sample_chunks(3, 6)).shape == (3, 6)
        assert sizes.asked == 0

    @pytest.mark.parametrize("chunk_size", [0, -1, 2.0, True, "3", math.nan, [3]], ids=repr)
    def test_of_nonsense_is_refused(self, chunk_size: Any) -> None:
        with pytest.raises(InvalidArgumentError, match=r"chunk_size must be an integer of at least 1, got"):
            ChunkSampler(chunk_size)

    @pytest.mark.parametrize("returned", [0, -1, 2.0, True, "3", None], ids=repr)
    def test_of_nonsense_from_a_callable_is_refused(self, returned: Any) -> None:
        rb = make_buffer([small(0, 9)], chunk_size=Sizes(3, returned))
        check_chunk(rb.sample())
        with pytest.raises(InvalidArgumentError, match=r"the return value of chunk_size=.*Sizes.* got"):
            rb.sample()
        check_chunk(rb.sample())

    def test_whose_callable_raises_raises_that(self) -> None:
        class Broken(Exception):
            pass

        def broken() -> int:
            raise Broken

        with pytest.raises(Broken):
            make_buffer([small(0, 9)], chunk_size=broken).sample()


class TestRefusals:
    @pytest.mark.parametrize("make", BUFFERS)
    @pytest.mark.parametrize("state", ["not allocated", "allocated", "emptied", "unfinished"])
    def test_of_an_empty_buffer(self, make: MakeBuffer, state: str) -> None:
        rb = make()
        if state == "allocated":
            rb.storage.allocate(small(0, 3))
        elif state == "emptied":
            rb.extend(small(0, 3))
            rb.empty()
        elif state == "unfinished":
            rb.extend(small(0, 3)[:2])
        with pytest.raises(EmptyBufferError, match="Cannot sample from an empty storage"):
            rb.sample()
        assert not rb.can_sample()
        rb.extend(small(1, 4))

    @pytest.mark.parametrize("make", BUFFERS)
    def test_of_chunks_longer_than_every_trajectory(self, make: MakeBuffer) -> None:
        rb = make([small(0, 2), small(1, 1)])
        message = "Got chunk_size 3, but the longest of 2 live trajectories has 2 steps. Ask for at most 2 steps"
        with pytest.raises(ChunkTooLongError, match=message):
            rb.sample()
        rb.extend(small(2, 3))
        assert numbers_of(check_chunk(rb.sample())) == [2] * 8

    @pytest.mark.parametrize("length", [101, 10**6, 2**62])
    def test_of_chunks_longer_than_the_arena(self, length: int) -> None:
        rb = make_buffer([small(0, 9)])
        with pytest.raises(ChunkTooLongError, match=f"Got chunk_size {length}, but the longest of 1 live"):
            rb.sample_chunks(2, length)

    @pytest.mark.parametrize("make", BUFFERS)
    @pytest.mark.parametrize("batch_size", [0, -1, 2.0, True], ids=repr)
    @pytest.mark.filterwarnings("ignore:Got conflicting batch_sizes")
    def test_of_batch_sizes_that_are_none(self, make: MakeBuffer, batch_size: Any) -> None:
        rb = make([small(0, 9)])
        with pytest.raises(
            InvalidArgumentError, match=f"batch_size must be an integer of at least 1, got {batch_size}"
        ):
            rb.sample(batch_size)

    @pytest.mark.parametrize(
        ("batch_size", "chunk_size", "message"),
        [
            (0, 3, "batch_size must be"),
            (True, 3, "batch_size must be"),
            (2.0, 3, "batch_size must be"),
            (2, 0, "chunk_size must be"),
            (2, -1, "chunk_size must be"),
            (2, 2.0, "chunk_size must be"),
            (2, "3", "chunk_size must be"),
        ],
    )
    def test_of_arguments_of_sample_chunks(self, batch_size: Any, chunk_size: Any, message: str) -> None:
        rb = make_buffer([small(0, 9)])
        with pytest.raises(InvalidArgumentError, match=message):
            rb.sample_chunks(batch_size, chunk_size)

    def test_of_unknown_arguments_names_the_class_that_was_called(self) -> None:
        with pytest.raises(TypeError, match=r"^ChunkSampler got .*Did you mean 'drop_n_last_frames'"):
            ChunkSampler(4, drop_last_frames=3)  # type: ignore[call-arg]
        with pytest.raises(TypeError, match=r"^OnlineDataset got .*Did you mean 'batch_size'"):
            OnlineDataset(make_buffer([small(0, 9)]), 3, batchsize=2)  # type: ignore[call-arg]
        with pytest.raises(TypeError, match=r"^OnlineDataset got .*'options'"):
            OnlineDataset(make_buffer([small(0, 9)]), 3, options={})  # type: ignore[call-arg]

    def test_of_another_storage(self) -> None:
        rb = TensorDictReplayBuffer(storage=LazyTensorStorage(10), sampler=ChunkSampler(2), batch_size=2)
        rb.extend(small(0, 5))
        with pytest.raises(
            InvalidArgumentError, match="Got a LazyTensorStorage; a ChunkSampler draws from a Trajectory"
        ):
            rb.sample()


class TestLargeValues:
    """Chunks of one key from 64 KiB on are copied another way, into memory that is used again."""

    @pytest.mark.parametrize(("features", "length"), [(2**12, 3), (2**12, 16), (2**15, 2)])
    def test_are_whole(self, features: int, length: int) -> None:
        rb = make_buffer(max_trajectories=3, max_total_steps=60, chunk_size=length, batch_size=5)
        for number in range(5):
            steps = small(number, 17 + number)
            place = torch.arange(features, dtype=torch.float32)
            steps["image"] = 1000 * steps["label"][:, :1] + steps["label"][:, 1:2] + place / features
            rb.extend(steps)
        held = [rb.sample() for _ in range(4)]
        for data in held:
            check_chunk(data)
            expected = 1000 * data["label"][..., :1] + data["label"][..., 1:2] + torch.arange(features) / features
            assert torch.equal(data["image"], expected.float())


def test_travels_by_pickle() -> None:
    sampler = pickle.loads(pickle.dumps(ChunkSampler(Sizes(4, 2))))
    rb = TrajectoryReplayBuffer(storage=make_storage([small(0, 9)]), sampler=sampler, batch_size=2)
    assert rb.sample().shape == (2, 4)


def test_repr() -> None:
    assert repr(ChunkSampler(16)) == "ChunkSampler(chunk_size=16)"


@pytest.mark.parametrize("size", [1, 16])
def test_what_is_overwritten_between_the_draw_and_the_copy_is_drawn_again(size: int, monkeypatch: Any) -> None:
    # The usual draws are copied by the kernels (test_any_instruction.py), these by the arena.
    sampler = ChunkSampler(3, weights=ByRecency(half_life=2))
    rb = make_buffer([make_trajectory(number, 12) for number in range(3)], batch_size=size, sampler=sampler)
    arena, copy_chunks, written = rb.storage.arena, rb.storage.arena.copy_chunks, []

    def copy_after_others_wrote(*args: Any, **kwargs: Any) -> Any:
        for number in range(100, 130) if not written else ():
            written.append(set(rb.extend(make_trajectory(number, 12)).tolist()).pop())
        return copy_chunks(*args, **kwargs)

    monkeypatch.setattr(arena, "copy_chunks", copy_after_others_wrote)
    chunks = check_chunk(rb.sample())
    assert rb.stats()["redrawn"] == size
    ids = chunks["trajectory", "id"][:, 0].tolist()
    assert set(ids) <= set(written[-4:])
    assert numbers_of(chunks) == [100 + written.index(number) for number in ids]
