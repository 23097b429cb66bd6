"""Observations stored once: what is handed out is what the other layout hands out."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import SHIFTED, assert_same, buffer, layouts, trajectory
from steps import Child
from tensordict import TensorDict
from torch.utils.data import DataLoader
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from embodichain_rl import ChunkSampler, TrajectoryReplayBuffer, TrajectoryStorage
from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.errors import (
    BufferMemoryError,
    ChunkTooLongError,
    NothingToDrawError,
    TrajectoryTooLongError,
)
from embodichain_rl.replay.ledger.invariants import check_ledger
from embodichain_rl.shared.memory_check import available_memory

EXPECTED_ERRORS = (ChunkTooLongError, NothingToDrawError)


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except EXPECTED_ERRORS as error:
        return type(error)


ways_to_draw = st.one_of(
    st.tuples(
        st.integers(2, 14),
        st.sampled_from(
            [
                {"sampling_mode": "segment"},
                {"sampling_mode": "boundary"},
                *({"pad": pad} for pad in ("none", "before", "after", "both")),
            ]
        ),
    ).map(lambda drawn: {"chunk_size": drawn[0], **drawn[1]}),
    st.fixed_dictionaries(
        {
            "windows": st.dictionaries(
                st.sampled_from(
                    ["observation", ("next", "observation"), ("next", "pixels"), ("next", "done"), "clock"]
                ),
                st.tuples(st.integers(-4, 4), st.integers(0, 4)).map(lambda w: (w[0], w[0] + w[1])),
                min_size=1,
            ),
            "pad": st.sampled_from(["none", "before", "after", "both"]),
        }
    ),
)


@settings(max_examples=70)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=14),
    way=ways_to_draw,
    pieces=st.integers(1, 3),
    layout=st.sampled_from([True, "views"]),
)
def test_both_layouts_hand_out_the_same(
    lengths: list[int], way: dict[str, Any], pieces: int, layout: bool | str
) -> None:
    wide, compact = layouts(layout, sampler=ChunkSampler(**way))
    for number, steps in enumerate(lengths):
        for piece in trajectory(number, steps).split(-(-steps // pieces)):
            assert torch.equal(wide.extend(piece), compact.extend(piece))
        check_ledger(compact.storage.ledger)
    assert {compact.storage.schema.keys[n] for n in compact.storage.arena.shifted} == SHIFTED
    assert compact.storage.schema == wide.storage.schema
    assert compact.storage.num_steps == wide.storage.num_steps
    for _ in range(2):
        expected, got = outcome(wide.sample), outcome(compact.sample)
        if isinstance(expected, type):
            assert got is expected
        else:
            assert_same(got, expected)
    for index in (0, -1, slice(None), [0, -1]):
        assert_same(compact[index], wide[index])
    for found, there in zip(compact.query(), wide.query(), strict=True):
        assert_same(found.data, there.data)
    state, reference = compact.storage.state_dict(), wide.storage.state_dict()
    for value, other in zip(state.pop("values"), reference.pop("values"), strict=True):
        assert_same(TensorDict({"value": value}, []), TensorDict({"value": other}, []))
    assert state.pop("lengths").tolist() == reference.pop("lengths").tolist()
    assert state == reference


def test_a_plain_torchrl_buffer_hands_out_the_same() -> None:
    wide, compact = layouts()
    for number, steps in enumerate([7, 4, 12]):
        wide.extend(trajectory(number, steps))
        compact.extend(trajectory(number, steps))
    plain = [
        TensorDictReplayBuffer(
            storage=rb.storage, sampler=ChunkSampler(4), batch_size=32, generator=torch.Generator().manual_seed(1)
        )
        for rb in (wide, compact)
    ]
    assert_same(plain[1].sample(), plain[0].sample())
    apart = (torch.tensor([0, 2, 1, 2]), torch.tensor([6, 11, 3, 0]))  # last steps, in any order
    assert_same(compact.storage.get(apart), wide.storage.get(apart))


@pytest.mark.parametrize(
    ("compact", "pad", "shared"), [("views", "none", True), ("views", "both", False), (True, "none", False)]
)
def test_a_chunk_and_its_next_are_views_of_one_memory_where_that_is_wanted_and_it_is_not_padded(
    compact: bool | str, pad: str, shared: bool
) -> None:
    rb = buffer(compact, sampler=ChunkSampler(4, pad=pad))
    rb.extend(trajectory(0, 9))
    batch = rb.sample()
    for key in ("pixels", "observation"):
        memory, of_next = (value.untyped_storage().data_ptr() for value in (batch[key], batch["next", key]))
        assert (memory == of_next) is shared


def test_next_of_a_repeated_edge_step_is_that_of_the_edge() -> None:
    rb = buffer(sampler=ChunkSampler(6, pad="both"), batch_size=64)
    rb.extend(trajectory(0, 5))
    batch = rb.sample()
    assert torch.equal(batch["clock"], batch["trajectory", "step"].double())
    assert torch.equal(batch["next", "clock"], batch["clock"] + 1)
    assert not batch["collector", "mask"].all()


def test_a_padded_chunk_at_the_very_end_of_the_arena() -> None:
    rb = buffer(max_trajectories=1, max_total_steps=3, sampler=ChunkSampler(3, pad="both"))
    ledger = rb.storage.ledger
    while ledger.reserve(1).start + 4 < ledger.arena_steps:  # as writers that stand still
        pass
    rb.extend(trajectory(0, 1))
    assert ledger.live_rows().starts + 2 == ledger.arena_steps
    batch = rb.sample()
    assert torch.equal(batch["next", "clock"], batch["clock"] + 1)


@pytest.mark.parametrize(
    ("number", "limits"), [(1, (1, 1)), (30, (40, 10)), (30, (3, 9)), (20, (1, 9))], ids=["one step", *"abc"]
)
def test_limits_are_those_of_trajectories(number: int, limits: tuple[int, int]) -> None:
    wide, compact = layouts(max_trajectories=limits[0], max_total_steps=limits[1], chunk_size=1)
    for n in range(number):
        for rb in (wide, compact):
            rb.extend(trajectory(n, 1 + n % limits[1]))
        assert_same(compact[:], wide[:])
        assert compact.stats()["evicted_early"] == 0
    with pytest.raises(TrajectoryTooLongError):
        compact.extend(trajectory(0, limits[1] + 1))


def test_what_differs_in_shape_or_dtype_or_stands_only_once_is_stored_as_it_is() -> None:
    data = trajectory(0, 6)
    data["next", "clock"] = data["next", "clock"].float()
    data["next", "pixels"] = data["next", "pixels"][:, :2].clone()
    data["next", "value"] = torch.randn(6, 1)
    rb = buffer()
    rb.extend(data)
    arena = rb.storage.arena
    assert {arena.schema.keys[n] for n in arena.shifted} == {("next", "observation"), ("next", "robot", "joints")}
    assert_same(rb[0].exclude("index", "trajectory"), data)


class TestSaving:
    @pytest.mark.parametrize("into_compact", [True, False])
    @pytest.mark.parametrize("from_compact", [True, False])
    def test_a_checkpoint_goes_from_layout_to_layout(
        self, from_compact: bool, into_compact: bool, tmp_path: Path
    ) -> None:
        source, target = buffer(from_compact), buffer(into_compact)
        for number in range(7):
            source.extend(trajectory(number, 3 + number))
        source.dumps(tmp_path)
        target.loads(tmp_path)
        assert_same(target[:].exclude("index", "trajectory"), source[:].exclude("index", "trajectory"))

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda rb: pickle.loads(pickle.dumps(rb))])
    @pytest.mark.parametrize("compact", [True, "views"])
    def test_a_copy_is_compact_too(self, copied: Callable[[Any], Any], compact: bool | str) -> None:
        rb = buffer(compact)
        rb.extend(trajectory(0, 6))
        storage = copied(rb.storage)
        assert (storage.compact, storage.next_views) == (True, compact == "views")
        assert_same(storage[0].exclude("index", "trajectory"), trajectory(0, 6))


def touched_bytes(storage: TrajectoryStorage) -> int:
    return 512 * os.fstat(storage._memory.arena_block._fd).st_blocks


def test_memory_is_about_half_of_that_of_torchrl() -> None:
    number, steps = 24, 60

    def with_images(n: int) -> TensorDict:
        pixels = torch.full((steps + 1, 64, 64, 3), n % 256, dtype=torch.uint8)
        data = trajectory(n, steps)
        data["pixels"], data["next", "pixels"] = pixels[:-1], pixels[1:]
        return data

    theirs = LazyTensorStorage(number * steps)
    theirs.set(range(steps), with_images(0))
    reference = sum(value.nbytes for value in theirs._storage.values(True, True))
    rb = buffer(max_trajectories=number, max_total_steps=number * steps)
    for n in range(number):
        rb.extend(with_images(n))
    assert rb.storage.num_steps == number * steps
    assert touched_bytes(rb.storage) < 0.52 * reference
    for n in range(5 * number):
        rb.extend(with_images(n))
    assert touched_bytes(rb.storage) < 0.55 * reference


def test_what_is_not_stored_is_not_asked_of_the_machine() -> None:
    free = available_memory()
    if free is None:
        pytest.skip("nothing says how much memory is left")
    steps = int(1.5 * free) // (2 * 10**6)
    step = torch.zeros(10**6, dtype=torch.uint8)
    data = TensorDict({"pixels": step, "next": {"pixels": step, "done": torch.zeros(1, dtype=torch.bool)}}, [])
    TrajectoryStorage(100, steps, compact=True).allocate(data)
    with pytest.raises(BufferMemoryError, match="steps of 2,000,001 bytes"):
        TrajectoryStorage(100, steps).allocate(data)
    with pytest.raises(BufferMemoryError, match="steps of 1,000,001 bytes"):
        TrajectoryStorage(100, 2 * steps, compact=True).allocate(data)


def take_over(rb: TrajectoryReplayBuffer, numbers: range) -> int:
    for number in numbers:
        rb.extend(trajectory(number, 3 + number % 11))
    return len(rb)


@pytest.mark.parametrize("allocated_first", [True, False])
def test_other_processes_know_which_keys_are_stored_once(allocated_first: bool) -> None:
    rb = buffer()
    if allocated_first:
        rb.storage.allocate(trajectory(0, 3))
    child = Child("forkserver", rb)
    try:
        child.call(take_over, range(5))
        assert_same(rb[-1].exclude("index", "trajectory"), trajectory(4, 7))
        child.begin(take_over, range(5, 300))
        while rb.storage.ledger.next_id < 300:
            batch = rb.sample()
            assert torch.equal(batch["next", "clock"], batch["clock"] + 1)
            assert (batch["clock"].diff(dim=1) == 1).all()
            assert (batch["clock"] // 1000 == (batch["trajectory", "id"]).double()).all()
            last = batch["next", "done"][..., 0]
            assert torch.equal(
                batch["next", "observation"][:, :-1].nan_to_num(7), batch["observation"][:, 1:].nan_to_num(7)
            )
            assert (batch["clock"][last] % 1000 == 2 + batch["trajectory", "id"][last] % 11).all()
        child.result()
    finally:
        child.end()
    check_ledger(rb.storage.ledger)


@pytest.mark.parametrize("batch_size", [None, 8])
@pytest.mark.parametrize("pad", ["none", "both"])
def test_through_a_dataloader(batch_size: int | None, pad: str) -> None:
    wide, compact = layouts()
    for number in range(5):
        for rb in (wide, compact):
            rb.extend(trajectory(number, 8 + number))

    def batches(rb: TrajectoryReplayBuffer) -> list[TensorDict]:
        dataset = OnlineDataset(rb, 4, batch_size, pad=pad, seed=0)
        workers = {"num_workers": 1, "multiprocessing_context": "fork", "timeout": 60}
        loader = DataLoader(dataset, batch_size=None if batch_size else 8, **workers)
        return [batch.clone() for batch, _ in zip(loader, range(3), strict=False)]

    for got, expected in zip(batches(compact), batches(wide), strict=True):
        assert got.shape == (8, 4)
        assert_same(got, expected)
