"""The compiled kernels and their twin: equal to the bit, on every request that they take."""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from both_kernels import NAMES, compile_with, in_parts, kernels_named, use
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from waiting import PATIENCE, wait_until

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.errors import (
    EmptyBufferError,
    InvalidArgumentError,
    NativeKernelsError,
    SharingError,
    TrajectoryEvictedError,
)
from embodichain_rl.replay.host import gathering_into
from embodichain_rl.replay.kernels import EMPTY, TWIN, BlockLayout, Draws, compiled, native
from embodichain_rl.replay.kernels.plans import IDS, TODO_SIZE
from embodichain_rl.replay.sampling import one_call
from embodichain_rl.replay.schema import as_array

DTYPES = (torch.float32, torch.uint8, torch.bool, torch.bfloat16, torch.float64, torch.complex64, torch.int16)


def make_trajectory(number: int, steps: int, shapes: list[tuple[int, ...]], pixels: int = 0) -> TensorDict:
    generator = torch.Generator().manual_seed(number)
    done = torch.zeros(steps, 1, dtype=torch.bool)
    done[-1] = True
    observation = torch.rand(steps + 1, 5, generator=generator)
    columns = {
        f"column {n}": torch.randint(2**7, (steps, *shape), generator=generator).to(dtype)
        for n, (shape, dtype) in enumerate(zip(shapes, itertools.cycle(DTYPES), strict=False))
    }
    if pixels:
        columns["pixels"] = torch.randint(256, (steps, pixels), dtype=torch.uint8, generator=generator)
    return TensorDict(
        {
            "observation": observation[:-1],
            **columns,
            "trajectory": {"task": f"task {number % 3}", "goal": torch.full((steps, 3), number)},
            "next": {"observation": observation[1:], "done": done},
        },
        [steps],
    )


def assert_equal_bits(one: TensorDict, other: TensorDict) -> None:
    assert list(one.keys(True, True)) == list(other.keys(True, True))
    assert one.batch_size == other.batch_size
    for key in one.keys(True, True):
        assert one[key].dtype == other[key].dtype
        assert one[key].stride() == other[key].stride()
        assert as_array(one[key]).tobytes() == as_array(other[key]).tobytes(), key


@pytest.mark.parametrize("compact", [False, True, "views"])
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=2).map(tuple), max_size=7),
    length=st.integers(1, 6),
    count=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_equal_to_the_bit(compact: Any, lengths: list, shapes: list, length: int, count: int, seed: int) -> None:
    compiled_ones = kernels_named("compiled")
    rb = TrajectoryReplayBuffer(
        max_trajectories=6, max_total_steps=40, chunk_size=length, batch_size=count, compact=compact
    )
    for number, steps in enumerate(lengths):
        rb.extend(make_trajectory(number, steps, shapes))
    results = []
    for kernels in (compiled_ones, TWIN, in_parts(compiled_ones), in_parts(TWIN)):
        with pytest.MonkeyPatch.context() as monkeypatch:
            use(kernels, monkeypatch)
            rb.storage._memory._batches.clear()
            rb.set_rng(torch.Generator().manual_seed(seed))
            if max(lengths[-6:]) < length:
                with pytest.raises(ValueError, match="chunk_size"):
                    rb.sample()
            else:
                results.append([rb.sample(), rb.sample(), rb.sample(count + 1)])
    for other in results[1:]:
        for batch, expected in zip(other, results[0], strict=True):
            assert_equal_bits(batch, expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_with_large_tensors(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    trajectories = [make_trajectory(number, 20, [(2,), (100, 7)], pixels=70_003) for number in range(4)]
    for name in NAMES:
        use(kernels_named(name), monkeypatch)
        rb = TrajectoryReplayBuffer(max_trajectories=6, max_total_steps=400, chunk_size=9, batch_size=7)
        for trajectory in trajectories:
            rb.extend(trajectory)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            rb.set_rng(torch.Generator().manual_seed(1))
            batches.append([rb.sample(size) for size in (7, 1, 30, 7)])
        finally:
            torch.set_num_threads(before)
    for one, other in zip(*batches, strict=True):
        assert_equal_bits(one, other)
        assert torch.equal(one["index"], torch.stack([one["trajectory", "id"], one["trajectory", "step"]], -1))
        for key in ("pixels", "observation"):
            for chunk in one:
                expected = trajectories[int(chunk["trajectory", "id"][0])][key]
                assert torch.equal(chunk[key], expected[chunk["trajectory", "step"]])


@pytest.mark.parametrize("name", NAMES)
def test_in_memory_of_a_caller(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(kernels_named(name), monkeypatch)
    rb = TrajectoryReplayBuffer(max_trajectories=6, max_total_steps=100, chunk_size=3, batch_size=4, compact="views")
    rb.extend(make_trajectory(0, 20, [(2,)]))
    given_out: list[torch.Tensor] = []

    class Memory:
        def empty_together(self, specs: Any) -> list[torch.Tensor]:
            tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in specs]
            given_out.extend(tensors)
            return tensors

    torch.manual_seed(0)
    expected = rb.sample()
    torch.manual_seed(0)
    with gathering_into(Memory()):
        batch = rb.sample()
    for key in batch.keys(True, True):
        assert torch.equal(batch[key], expected[key])
        assert any(t.data_ptr() <= batch[key].data_ptr() < t.data_ptr() + t.nbytes for t in given_out)


def test_tensors_of_a_batch_are_saved_one_by_one() -> None:
    rb = TrajectoryReplayBuffer(max_trajectories=6, max_total_steps=100, chunk_size=4, batch_size=4)
    rb.extend(make_trajectory(0, 20, [(50,)]))
    batch = rb.sample()
    for key in batch.keys(True, True):
        assert len(pickle.dumps(batch[key].numpy() if key != "column 3" else 0)) < batch[key].nbytes + 500
        assert batch[key].untyped_storage().nbytes() <= 2 * batch[key].nbytes, key
        batch[key].detach_()  # no views of each other


def test_a_tensor_keeps_the_block_of_its_batch() -> None:
    rb = TrajectoryReplayBuffer(max_trajectories=6, max_total_steps=100, chunk_size=4, batch_size=4)
    rb.extend(make_trajectory(0, 20, [(50,)]))
    kept = [(rb.sample()["column 0"], rb.sample()["index"].numpy()) for _ in range(50)]
    copies = [(one.clone(), other.copy()) for one, other in kept]
    for _ in range(200):
        rb.sample()
    assert all(torch.equal(one, a) and (other == b).all() for (one, other), (a, b) in zip(kept, copies, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_turn_over_of_the_buffer_between_any_two_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = in_parts(kernels_named(name))
    turn_over: list[Any] = []

    def stopping(function: Any, where: int) -> Any:
        def stop_before(*arguments: Any) -> Any:
            if turn_over and turn_over[0] == where:
                turn_over.pop()
                for number in range(30):
                    rb.extend(make_trajectory(number, 6 + number % 5, [(2,)]))
            return function(*arguments)

        return stop_before

    parts = {
        part: stopping(getattr(kernels, part), n) for n, part in enumerate(("draw", "gather", "write_index", "check"))
    }
    use(in_parts(kernels._replace(**parts)), monkeypatch)
    rb = TrajectoryReplayBuffer(max_trajectories=2, max_total_steps=40, chunk_size=4, batch_size=8)
    for number in range(3):
        rb.extend(make_trajectory(number, 10, [(2,)]))
    for where in range(4):
        redrawn = rb.stats()["redrawn"]
        turn_over.append(where)
        oldest = rb.storage.ledger.next_id
        batch = rb.sample()
        assert batch["trajectory", "id"].min() >= oldest, "a chunk of a trajectory that was overwritten meanwhile"
        assert rb.stats()["redrawn"] - redrawn == (8 if where else 0)
        for chunk in batch:
            written = (int(chunk["trajectory", "id"][0]) - oldest) % 30
            expected = make_trajectory(written, 6 + written % 5, [(2,)])[chunk["trajectory", "step"]]
            assert torch.equal(chunk["observation"], expected["observation"])


@pytest.mark.parametrize("name", NAMES)
def test_a_buffer_that_turns_over_faster_than_it_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = kernels_named(name)

    def gather(*arguments: Any) -> None:
        kernels.gather(*arguments)
        for number in range(6):
            rb.extend(make_trajectory(number, 10, []))

    use(in_parts(kernels._replace(gather=gather)), monkeypatch)
    monkeypatch.setattr(one_call, "REDRAW_ROUNDS", 5)
    rb = TrajectoryReplayBuffer(max_trajectories=2, max_total_steps=20, chunk_size=4, batch_size=8)
    rb.extend(make_trajectory(0, 10, []))
    with pytest.raises(TrajectoryEvictedError, match="turns over faster"):
        rb.sample()


@pytest.mark.parametrize("name", NAMES)
def test_a_buffer_that_is_emptied_while_it_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = kernels_named(name)

    def gather(*arguments: Any) -> None:
        kernels.gather(*arguments)
        rb.storage.ledger.retire_all()
        rb.storage.ledger._row_ids[:] = -1  # as if all space were used again

    use(in_parts(kernels._replace(gather=gather)), monkeypatch)
    rb = TrajectoryReplayBuffer(max_trajectories=2, max_total_steps=20, chunk_size=4, batch_size=8)
    rb.extend(make_trajectory(0, 10, []))
    with pytest.raises(EmptyBufferError):
        rb.sample()
    plan = next(iter(rb.storage._memory._batches.values()))._plan
    numbers = torch.rand(8, dtype=torch.float64)
    assert kernels.draw(plan, numbers.data_ptr(), 0, Draws(8)) == EMPTY


@pytest.mark.parametrize("name", NAMES)
def test_the_ages_of_a_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(kernels_named(name), monkeypatch)
    rb = TrajectoryReplayBuffer(max_trajectories=9, max_total_steps=90, chunk_size=4, batch_size=8)
    for number in range(4):
        data = make_trajectory(number, 10, [])
        rb.storage.allocate(data)
        rb.storage.write(
            [list(map(as_array, rb.storage.schema.leaves(data)[:3]))],
            [np.array(0, np.int32), np.zeros(3, np.int64)],
            policy_version=number - 1,
        )
    batches = [rb.sample() for _ in range(5)]
    ages, ids = rb.sampler.sampled_ages(rb.storage), torch.cat([batch["trajectory", "id"][:, 0] for batch in batches])
    lags = 3 - ids[ids > 0]
    assert ages["sampled_policy_lag_mean"] == pytest.approx(lags.float().mean().item())
    assert ages["sampled_policy_lag_max"] == lags.max()
    assert 0 < ages["sampled_age_mean"] <= ages["sampled_age_max"] < PATIENCE


def test_a_plan_does_not_leave_its_process() -> None:
    rb = TrajectoryReplayBuffer(max_trajectories=2, max_total_steps=20, chunk_size=4, batch_size=8)
    rb.extend(make_trajectory(0, 10, []))
    rb.sample()
    batches = next(iter(rb.storage._memory._batches.values()))
    with pytest.raises(SharingError, match="addresses"):
        pickle.dumps(batches._plan)
    copied = pickle.loads(pickle.dumps(rb))
    assert not copied.storage._memory._batches
    rb.set_storage(copied.storage)
    rb.sample()
    assert next(iter(copied.storage._memory._batches.values()))._plan is not batches._plan


def test_a_child_has_no_helper_threads_and_needs_none() -> None:
    kernels_named("compiled")
    rb = TrajectoryReplayBuffer(max_trajectories=6, max_total_steps=120, chunk_size=16, batch_size=16)
    for number in range(6):
        rb.extend(make_trajectory(number, 20, [], pixels=20_000))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    stop = threading.Event()
    sampling = threading.Thread(target=lambda: [rb.sample() for _ in iter(stop.is_set, True)])
    try:
        rb.sample()
        threads = len(os.listdir("/proc/self/task"))
        sampling.start()  # so that helpers are in the middle of a batch at the fork
        for _ in range(5):
            pid = os.fork()
            if pid == 0:
                batches = [rb.sample() for _ in range(20)]
                whole = all((batch["index"][:, :, 1].diff() == 1).all() for batch in batches)
                os._exit(0 if whole and len(os.listdir("/proc/self/task")) == 1 else 1)
            status: list[int] = []

            def ended(pid: int = pid, status: list[int] = status) -> bool:
                done, code = os.waitpid(pid, os.WNOHANG)
                status.append(code)
                return done == pid

            try:
                wait_until(ended, "the end of the child")
            except BaseException:
                os.kill(pid, signal.SIGKILL)
                raise
            assert status[-1] == 0
        assert threads > 1
    finally:
        stop.set()
        sampling.join()
        torch.set_num_threads(before)


def test_layouts_of_blocks() -> None:
    layout = BlockLayout([((3, 2), torch.bfloat16), ((0, 4), torch.float32), ((), torch.int64), ((5,), torch.bool)])
    block = torch.zeros(layout.nbytes, dtype=torch.uint8)
    tensors = layout.tensors(block)
    assert [(tuple(t.shape), t.dtype) for t in tensors] == list(layout.specs)
    for number, tensor in enumerate(tensors):
        tensor.fill_(1)
        assert tensor.data_ptr() == block.data_ptr() + layout.offsets[number] or not tensor.numel()
    assert block.count_nonzero() > 10
    assert pickle.loads(pickle.dumps(layout)) == layout


class TestChoice:
    """``EMBODICHAIN_RL_NATIVE``."""

    @pytest.fixture(autouse=True)
    def _chosen_anew(self) -> Iterator[None]:
        native.kernels.cache_clear()
        yield
        native.kernels.cache_clear()

    def test_of_the_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        is_there = native.LIBRARY.exists()
        monkeypatch.delenv(native.VARIABLE, raising=False)
        assert native.kernels().is_compiled == is_there
        native.kernels.cache_clear()
        monkeypatch.setenv(native.VARIABLE, "0")
        assert native.kernels() is TWIN
        native.kernels.cache_clear()
        monkeypatch.setenv(native.VARIABLE, "yes")
        with pytest.raises(InvalidArgumentError, match="EMBODICHAIN_RL_NATIVE='yes'"):
            native.kernels()

    @pytest.mark.parametrize("library", ["/nowhere/kernels.so", os.__file__])
    def test_without_compiled_kernels(self, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native.compiled, "__defaults__", (Path(library),))
        monkeypatch.delenv(native.VARIABLE, raising=False)
        assert native.kernels() is TWIN
        native.kernels.cache_clear()
        monkeypatch.setenv(native.VARIABLE, "1")
        with pytest.raises(NativeKernelsError, match="compile"):
            TrajectoryReplayBuffer(max_trajectories=2, max_total_steps=20, chunk_size=4)

    def test_kernels_of_another_version_are_refused(self, tmp_path: Any) -> None:
        library = compile_with(tmp_path, "-USOURCE_CHECKSUM")
        with pytest.raises(NativeKernelsError, match="not those of this version"):
            compiled(library)


def test_a_draw_does_not_change_other_chunks() -> None:
    rb = TrajectoryReplayBuffer(max_trajectories=9, max_total_steps=90, chunk_size=4, batch_size=8)
    for number in range(4):
        rb.extend(make_trajectory(number, 10, []))
    rb.sample()
    plan = next(iter(rb.storage._memory._batches.values()))._plan
    for name in NAMES:
        kernels, draws = kernels_named(name), Draws(8)
        numbers = torch.rand(8, dtype=torch.float64)
        assert kernels.draw(plan, numbers.data_ptr(), 0, draws) == 0
        assert draws.header[TODO_SIZE] == 8
        before = draws.arrays[IDS].copy()
        rb.storage.ledger._row_ids[before[3] % rb.storage.ledger.num_rows] = -1
        torn = before == before[3]
        assert kernels.check(plan, draws) == -torn.sum()
        rb.storage.ledger._row_ids[before[3] % rb.storage.ledger.num_rows] = before[3]
        again = torch.full((int(torn.sum()),), 0.999, dtype=torch.float64)
        assert kernels.draw(plan, again.data_ptr(), len(again), draws) == 0
        assert (draws.arrays[IDS][torn] == 3).all()
        assert (draws.arrays[IDS][~torn] == before[~torn]).all()
