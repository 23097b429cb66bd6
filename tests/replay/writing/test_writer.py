"""TrajectoryWriter: whatever it is handed, only whole trajectories are stored, and what is refused changes nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import Child, contents, make_buffer, make_storage, make_trajectory, make_writer, numbers_of, small
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.collectors.utils import split_trajectories
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from waiting import PATIENCE

from embodichain_rl import TrajectoryStorage, TrajectoryWriter
from embodichain_rl.errors import (
    EmbodiChainRLError,
    InvalidArgumentError,
    PendingStepsError,
    SchemaMismatchError,
    TrajectoryTooLongError,
)
from embodichain_rl.replay.writing.continuing import MAX_PENDING


@pytest.fixture
def storage() -> TrajectoryStorage:
    return make_storage([], 100, 1000)


@pytest.fixture
def writer(storage: TrajectoryStorage) -> TrajectoryWriter:
    return make_writer(storage)


def with_ids(trajectories: list[TensorDictBase]) -> list[TensorDictBase]:
    for traj_id, trajectory in enumerate(trajectories):
        trajectory["collector", "traj_ids"] = torch.full(trajectory.shape, 100 + traj_id)
    return trajectories


def of_one_key(length: int, done: torch.Tensor, key: str = "done") -> TensorDict:
    return TensorDict({"observation": torch.arange(float(length)), "next": {key: done}}, [length])


class TestWholeTrajectories:
    def test_one(self, storage: TrajectoryStorage, writer: TrajectoryWriter) -> None:
        assert writer.extend(make_trajectory(0, 5)).tolist() == [0] * 5
        assert contents(storage) == [(0, 5)]

    @pytest.mark.parametrize("ids", [True, False])
    def test_several_one_behind_the_other(
        self, storage: TrajectoryStorage, writer: TrajectoryWriter, ids: bool
    ) -> None:
        trajectories = [make_trajectory(number, 3 + number) for number in range(4)]
        index = writer.extend(torch.cat(with_ids(trajectories) if ids else trajectories))
        assert contents(storage) == [(0, 3), (1, 4), (2, 5), (3, 6)]
        assert index.tolist() == [number for number in range(4) for _ in range(3 + number)]

    def test_one_a_row(self, storage: TrajectoryStorage, writer: TrajectoryWriter) -> None:
        index = writer.extend(torch.stack([make_trajectory(number, 4) for number in range(3)]))
        assert contents(storage) == [(0, 4), (1, 4), (2, 4)]
        assert index.tolist() == [[0] * 4, [1] * 4, [2] * 4]

    def test_lie_where_the_index_says(self, storage: TrajectoryStorage, writer: TrajectoryWriter) -> None:
        index = writer.extend(torch.cat([small(7, 3), small(8, 2)]))
        assert [storage[i]["trajectory", "id"].tolist() for i in range(2)] == [index[:3].tolist(), index[3:].tolist()]

    @pytest.mark.parametrize("key", ["done", "terminated", "truncated"])
    def test_end_where_any_end_key_is_true(
        self, storage: TrajectoryStorage, writer: TrajectoryWriter, key: str
    ) -> None:
        data = of_one_key(5, torch.zeros(5, 1, dtype=torch.bool))
        data["next", key] = torch.tensor([0, 0, 1, 0, 1]).bool()[:, None]
        assert writer.extend(data).tolist() == [0, 0, 0, 1, 1]
        assert [rows["observation"].tolist() for rows in storage] == [[0, 1, 2], [3, 4]]

    @pytest.mark.parametrize(
        "done",
        [
            torch.tensor([0, 0, 1, 0, 1]).bool(),
            torch.tensor([0, 0, 1, 0, 1]).bool()[:, None],
            torch.tensor([[0, 0], [0, 0], [0, 1], [0, 0], [1, 1]]).bool(),  # of several agents
            torch.tensor([0, 0, 1, 0, 1], dtype=torch.uint8)[:, None],
            torch.tensor([0, 0, 1, 0, 1], dtype=torch.float32)[:, None],
        ],
        ids=["[T]", "[T, 1]", "[T, 2]", "uint8", "float32"],
    )
    @pytest.mark.parametrize("ids", [False, True])
    def test_end_keys_have_any_form(
        self, storage: TrajectoryStorage, writer: TrajectoryWriter, done: torch.Tensor, ids: bool
    ) -> None:
        data = of_one_key(5, done)
        if ids:
            data["collector", "traj_ids"] = torch.tensor([0, 0, 0, 1, 1])
        assert writer.extend(data).tolist() == [0, 0, 0, 1, 1]
        assert torch.equal(storage[0]["next", "done"], done[:3])


class TestPieces:
    @settings(max_examples=40)
    @given(data=st.data(), ids=st.booleans(), lazy=st.booleans())
    def test_of_one_environment_cut_anywhere(self, data: st.DataObject, ids: bool, lazy: bool) -> None:
        lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
        trajectories: list[TensorDictBase] = [small(number, length) for number, length in enumerate(lengths)]
        steps = torch.cat(with_ids(trajectories) if ids else trajectories)
        cuts = sorted(data.draw(st.sets(st.integers(1, len(steps)))))
        storage = TrajectoryStorage(100, 1000)
        writer = make_writer(storage)
        for start, stop in zip([0, *cuts], [*cuts, len(steps)], strict=True):
            if stop > start:
                piece = steps[start:stop]
                writer.extend(lazy_stack(list(piece.unbind(0))) if lazy else piece)
        assert contents(storage) == list(enumerate(lengths))
        assert writer.pending_steps == 0

    @settings(max_examples=40)
    @given(data=st.data(), ids=st.booleans())
    def test_of_several_environments_a_row_each(self, data: st.DataObject, ids: bool) -> None:
        environments, steps = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 30))
        rows, traj_ids = [], iter(range(1000))
        for row in range(environments):
            lengths: list[int] = []
            while sum(lengths) < steps:
                lengths.append(data.draw(st.integers(1, 12)))
            trajectories = [small(100 * row + n, length) for n, length in enumerate(lengths)]
            for trajectory in trajectories if ids else []:
                trajectory["collector", "traj_ids"] = torch.full(trajectory.shape, next(traj_ids))
            rows.append(torch.cat(trajectories)[:steps])
        whole = torch.stack(rows)
        finished = {
            (int(number), int(length)) for number, _, length, _ in whole[whole["next", "done"][..., 0]]["label"]
        }
        storage = TrajectoryStorage(100, 1000)
        writer = make_writer(storage)
        cuts = sorted(data.draw(st.sets(st.integers(1, steps - 1)))) if steps > 1 else []
        for start, stop in zip([0, *cuts], [*cuts, steps], strict=True):
            index = writer.extend(whole[:, start:stop])
            assert index.shape == (environments, stop - start)
        assert set(contents(storage)) == finished
        assert writer.pending_steps == environments * steps - sum(length for _, length in finished)

    def test_of_interleaved_trajectories_are_told_apart_by_id(
        self, storage: TrajectoryStorage, writer: TrajectoryWriter
    ) -> None:
        a, b, c = with_ids([make_trajectory(number, 6) for number in range(3)])
        writer.extend(torch.cat([a[:2], b[:3], c[:1]]))
        writer.extend(torch.cat([c[1:4], a[2:5]]))
        writer.extend(torch.stack([b[3:5], c[4:]]))
        assert contents(storage) == [(2, 6)]
        writer.extend(torch.cat([b[5:], a[5:]]))
        assert contents(storage) == [(2, 6), (1, 6), (0, 6)]

    def test_that_move_to_another_row_are_found_by_id(
        self, storage: TrajectoryStorage, writer: TrajectoryWriter
    ) -> None:
        a, b = with_ids([make_trajectory(number, 4) for number in range(2)])
        writer.extend(torch.stack([a[:2], b[:2]]))
        writer.extend(torch.stack([b[2:], a[2:]]))
        assert contents(storage) == [(1, 4), (0, 4)]

    def test_are_stored_when_the_end_comes_and_not_before(
        self, storage: TrajectoryStorage, writer: TrajectoryWriter
    ) -> None:
        steps = make_trajectory(0, 6)
        assert writer.extend(steps[:4]).tolist() == [-1] * 4
        assert (len(storage), writer.pending_steps, writer._write_count) == (0, 4, 0)
        assert writer.extend(steps[4:]).tolist() == [0, 0]
        assert (len(storage), writer.pending_steps, writer._write_count) == (1, 0, 6)

    def test_are_copied(self, storage: TrajectoryStorage, writer: TrajectoryWriter) -> None:
        memory = make_trajectory(0, 3)
        source = make_trajectory(0, 9)
        for start in (0, 3, 6):
            memory.update_(source[start : start + 3])  # as a collector uses its memory again
            writer.extend(memory)
            memory.zero_()
        assert contents(storage) == [(0, 9)]

    def test_of_a_lazy_stack_along_time(self, storage: TrajectoryStorage, writer: TrajectoryWriter) -> None:
        steps = torch.stack([make_trajectory(number, 5) for number in range(2)])
        writer.extend(lazy_stack(list(steps[:, :3].unbind(1)), dim=1))
        writer.extend(lazy_stack(list(steps[:, 3:].unbind(1)), dim=1))
        assert contents(storage) == [(0, 5), (1, 5)]

    def test_can_be_forgotten(self, storage: TrajectoryStorage, writer: TrajectoryWriter) -> None:
        writer.extend(torch.stack([small(0, 5)[:3], small(1, 5)[:3]]))
        assert writer.discard_pending() == 6
        assert writer.pending_steps == 0
        writer.extend(small(2, 4))
        assert contents(storage) == [(2, 4)]


class TestSingleSteps:
    def test_are_put_together(self, storage: TrajectoryStorage, writer: TrajectoryWriter) -> None:
        assert [writer.add(step) for step in make_trajectory(0, 4)] == [-1, -1, -1, 0]
        assert contents(storage) == [(0, 4)]

    @pytest.mark.parametrize("ids", [True, False])
    def test_of_several_environments_are_put_together_row_by_row(
        self, storage: TrajectoryStorage, writer: TrajectoryWriter, ids: bool
    ) -> None:
        trajectories: list[TensorDictBase] = [small(number, 4) for number in range(3)]
        steps = torch.stack(with_ids(trajectories) if ids else trajectories)
        for step in range(4):
            index = writer.add(steps[:, step])  # what a Collector(extend_buffer=False) does
        assert index.tolist() == [0, 1, 2]
        assert contents(storage) == [(0, 4), (1, 4), (2, 4)]


class TestMasks:
    @pytest.mark.parametrize("shape", ["[B, T]", "[B, T, 1]"])
    def test_padding_is_not_stored(self, storage: TrajectoryStorage, writer: TrajectoryWriter, shape: str) -> None:
        trajectories = with_ids([make_trajectory(number, length) for number, length in enumerate([5, 2, 7])])
        padded = split_trajectories(torch.cat(trajectories))
        assert padded.shape == (3, 7)
        if shape == "[B, T, 1]":
            padded["collector", "mask"] = padded["collector", "mask"][..., None]
        index = writer.extend(padded)
        assert contents(storage) == [(0, 5), (1, 2), (2, 7)]
        assert index[1].tolist() == [1, 1, -1, -1, -1, -1, -1]
        assert ("collector", "mask") not in storage.schema.keys

    def test_of_one_row(self, storage: TrajectoryStorage, writer: TrajectoryWriter) -> None:
        padded = torch.cat([small(0, 3), small(1, 2)])
        padded["collector", "mask"] = torch.tensor([1, 1, 1, 0, 0]).bool()
        assert writer.extend(padded).tolist() == [0, 0, 0, -1, -1]
        assert contents(storage) == [(0, 3)]

    def test_without_a_real_step_store_nothing(self, storage: TrajectoryStorage, writer: TrajectoryWriter) -> None:
        padded = torch.stack([small(0, 3), small(1, 3)])
        padded["collector", "mask"] = torch.tensor([[0, 0, 0], [1, 1, 1]]).bool()
        writer.extend(padded)
        assert contents(storage) == [(1, 3)]

    def test_an_end_in_the_padding_ends_nothing(self, storage: TrajectoryStorage, writer: TrajectoryWriter) -> None:
        padded = small(0, 5)
        padded["collector", "mask"] = torch.tensor([1, 1, 1, 0, 0]).bool()
        writer.extend(padded)
        assert (len(storage), writer.pending_steps) == (0, 3)

    def test_what_a_storage_gives_goes_into_another(self, storage: TrajectoryStorage, writer: TrajectoryWriter) -> None:
        source = make_storage([make_trajectory(number, 2 + number) for number in range(3)])
        writer.extend(source[:])
        writer.extend(source[1])
        assert contents(storage) == [(0, 2), (1, 3), (2, 4), (1, 3)]


class TestRefusals:
    """Each on a storage that holds two trajectories and has a third under way."""

    def refused(
        self, data: Any, error: type[EmbodiChainRLError], message: str, max_total_steps: int = 100
    ) -> tuple[TrajectoryStorage, TrajectoryWriter]:
        storage = make_storage([make_trajectory(0, 4), make_trajectory(1, 6)], 5, max_total_steps)
        writer = make_writer(storage)
        writer.extend(make_trajectory(2, 8)[:5])
        before = storage.ledger.stats()
        with pytest.raises(error, match=message):
            writer.extend(data)
        assert storage.ledger.stats() == before
        assert writer.pending_steps == 5
        writer.extend(make_trajectory(2, 8)[5:])
        assert contents(storage) == [(0, 4), (1, 6), (2, 8)]
        return storage, writer

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda d: d.exclude("speed"), "Got data without 'speed'. Every step must have the same keys"),
            (lambda d: d.set("colour", torch.zeros(4)), "with 'colour', which the arena was not allocated for"),
            (lambda d: d.rename_key_("speed", "sped"), "'sped' may be meant as 'speed'"),
            (
                lambda d: d.exclude(("robot", "arm", "joints")).set(("robot", "arm", "join"), torch.zeros(4, 7)),
                r"\('robot', 'arm', 'join'\) may be meant as \('robot', 'arm', 'joints'\)",
            ),
            (lambda d: d.set("speed", torch.zeros(4, 1)), r"'speed' with \(1,\) elements of torch.float32 a step"),
            (lambda d: d.set("clock", torch.zeros(4, 1)), r"'clock' with .* torch.float32 a step.*\(1,\) of torch.fl"),
            (lambda d: d.set("pixels", d["pixels"].to(torch.int8)), "'pixels' with .* torch.int8 a step"),
            (lambda d: d.set("robot", torch.zeros(4, 3)), "with 'robot', which"),
            (lambda d: d.set("speed", TensorDict({"x": torch.zeros(4)}, [4])), r"with \('speed', 'x'\)"),
            (lambda d: d.set_non_tensor("task", 3), "'task' of type NonTensorData; the arena holds tensors and text"),
            (
                lambda d: d.set(("robot", "arm", "name"), ["a", 2] * 2),
                r"\('robot', 'arm', 'name'\) of type NonTensorSta",
            ),
            (lambda d: d.exclude("next"), r"Got data without \('next', .*the same keys as the first"),
            (lambda d: d.reshape(2, 2, 1), r"batch size \[2, 2, 1\]"),
            (lambda d: d[0], r"batch size \[\]"),
            (lambda d: d.set(("collector", "mask"), torch.tensor([0, 1, 1, 1]).bool()), "padding before real steps"),
            (lambda d: d.set(("collector", "mask"), torch.tensor([1, 0, 1, 1]).bool()), "padding before real steps"),
            (lambda d: d.to_dict(), "Got a dict; trajectories are written as TensorDicts"),
            (lambda d: d["observation"], "Got a Tensor; trajectories are written as TensorDicts"),
        ],
    )
    def test_of_data_that_does_not_fit(self, change: Callable[[TensorDict], Any], message: str) -> None:
        self.refused(change(make_trajectory(7, 4)), SchemaMismatchError, message)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda d: d.exclude("next"), r"without \('next', 'done'\).*nothing says where a trajectory ends"),
            (lambda d: d.set(("next", "done"), ["no"] * 4), r"Got text as \('next', 'done'\)"),
        ],
        ids=["nothing", "text"],
    )
    def test_of_first_data_that_never_ends(self, change: Callable[[TensorDict], Any], message: str) -> None:
        storage = TrajectoryStorage(3, 18)
        with pytest.raises(SchemaMismatchError, match=message):
            make_writer(storage).extend(change(make_trajectory(7, 4)))
        assert not storage.initialized

    @pytest.mark.parametrize(
        "data",
        [make_trajectory(7, 19), torch.cat([make_trajectory(7, 3), make_trajectory(8, 19)])],
        ids=["alone", "behind one that fits"],
    )
    def test_of_a_trajectory_that_is_too_long(self, data: TensorDict) -> None:
        # A whole one that begins while the third is under way goes on with the third: 24 steps.
        self.refused(data, TrajectoryTooLongError, r"trajectory of \d+ steps, but max_total_steps=18. Raise max", 18)

    def test_of_a_trajectory_that_grows_too_long(self) -> None:
        more = make_trajectory(2, 20)[5:19]
        self.refused(more, TrajectoryTooLongError, r"of at least 19 steps, but max_total_steps=18", 18)

    def test_mended_data_is_taken(self) -> None:
        data = make_trajectory(3, 5)
        speed = data["speed"]
        storage, writer = self.refused(data.exclude("speed"), SchemaMismatchError, "without 'speed'")
        writer.extend(data.set("speed", speed))
        assert contents(storage)[-1] == (3, 5)

    def test_part_of_refused_data_is_not_taken(self, storage: TrajectoryStorage, writer: TrajectoryWriter) -> None:
        short = make_storage([], 5, 10)
        refusing = make_writer(short)
        refusing.extend(small(0, 2))
        with pytest.raises(TrajectoryTooLongError):
            refusing.extend(torch.cat([small(1, 3), small(2, 11), small(3, 2)]))
        assert contents(short) == [(0, 2)]
        assert refusing.pending_steps == 0
        refusing.extend(torch.cat([small(1, 3), small(3, 2)]))
        assert contents(short) == [(0, 2), (1, 3), (3, 2)]

    def test_the_first_data_allocates_nothing_when_it_is_refused(self) -> None:
        storage = TrajectoryStorage(5, 10)
        writer = make_writer(storage)
        with pytest.raises(TrajectoryTooLongError):
            writer.extend(make_trajectory(0, 11))
        assert not storage.initialized
        writer.extend(small(1, 4))
        assert contents(storage) == [(1, 4)]

    # 'index' is what TorchRL writes into data that was extended, ('trajectory', 'id' | 'step') what the buffer adds to
    # what it hands out; a planned path, say, in the place of these must not be lost.
    @pytest.mark.parametrize("key", ["trajectory", ("trajectory", "step", "waypoints")], ids=str)
    def test_keys_that_the_buffer_adds_can_not_be_stored(self, writer: TrajectoryWriter, key: Any) -> None:
        with pytest.raises(SchemaMismatchError, match=r"'trajectory'.*where the buffer says what a step comes from"):
            writer.extend(small(0, 4).set(key, torch.zeros(4, 7)))

    def test_trajectories_that_never_end(self, storage: TrajectoryStorage, writer: TrajectoryWriter) -> None:
        steps = small(0, 2)[:1].expand(MAX_PENDING).clone()
        steps["collector", "traj_ids"] = torch.arange(len(steps))
        writer.extend(steps)
        step = small(5, 2)[:1].set(("collector", "traj_ids"), torch.tensor([-7]))
        writer.extend(step)
        step["collector", "traj_ids"] -= 1
        with pytest.raises(PendingStepsError, match=r"4,09\d trajectories with 4,09\d steps wait for their end"):
            writer.extend(step)
        assert writer.discard_pending() == MAX_PENDING + 1
        writer.extend(small(6, 3).set(("collector", "traj_ids"), torch.zeros(3, dtype=torch.int64)))
        assert contents(storage) == [(6, 3)]

    @pytest.mark.parametrize("other", [LazyTensorStorage(10), None, 3], ids=["LazyTensorStorage", "None", "int"])
    def test_another_storage(self, other: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="a TrajectoryWriter writes to a TrajectoryStorage"):
            TrajectoryWriter().register_storage(other)

    def test_writing_without_a_storage(self) -> None:
        with pytest.raises(EmbodiChainRLError, match="register_storage"):
            TrajectoryWriter().extend(small(0, 3))


class TestCounts:
    def test_write_count_is_of_steps_that_were_stored(
        self, storage: TrajectoryStorage, writer: TrajectoryWriter
    ) -> None:
        writer.extend(torch.cat([small(0, 5), small(1, 4), small(2, 9)[:2]]))
        assert writer._write_count == 9

    def test_write_count_goes_on_beyond_32_bits(self) -> None:
        rb = make_buffer()
        rb.storage.ledger.count_steps_from(2**31 - 2)
        rb.extend(small(0, 5))
        assert rb.write_count == 2**31 + 3
        rb.storage.ledger.count_steps_from(2**40)
        rb.extend(small(0, 5))
        assert rb.write_count == 2**40 + 5

    def test_ids_are_never_used_again(self) -> None:
        rb = make_buffer(max_trajectories=2)
        seen = []
        for number in range(20):
            seen.append(int(rb.extend(small(number, 3))[0]))
            if number % 5 == 0:
                rb.empty()
        assert seen == sorted(set(seen))


class TestThreadsAndProcesses:
    def test_threads_write_at_the_same_time(self) -> None:
        rb = make_buffer(max_trajectories=1000, max_total_steps=100_000)
        start = threading.Barrier(4)

        def write(thread: int) -> None:
            start.wait()
            for n in range(50):  # the same ids and rows in every thread: they must be kept apart
                steps = small(1000 * thread + n, 2 + n % 7, traj_id=n)
                rb.extend(steps[:1])
                rb.extend(steps[1:])

        threads = [threading.Thread(target=write, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        expected = [(1000 * thread + n, 2 + n % 7) for thread in range(4) for n in range(50)]
        assert sorted(contents(rb)) == expected
        assert len(set(rb[:]["trajectory", "id"][:, 0].tolist())) == 200

    def test_pending_steps_can_be_asked_for_while_another_thread_writes(self) -> None:
        rb = make_buffer(max_trajectories=10, max_total_steps=10_000)
        steps = small(0, 2)[:1].expand(200).clone()
        done = threading.Event()

        def write() -> None:
            for n in range(50):
                rb.extend(steps.set(("collector", "traj_ids"), torch.arange(200) + 200 * n))
                rb.writer.discard_pending()
            done.set()

        writing = threading.Thread(target=write)
        writing.start()
        counts = []
        while not done.is_set():
            counts.append(rb.stats()["pending_steps"])
        writing.join(PATIENCE)
        assert min(counts) >= 0
        assert max(counts) <= 200

    # The system gives the id of a thread to the next one, and every collector counts its trajectories from zero.
    def test_what_an_ended_thread_left_unfinished_stays_unfinished(self) -> None:
        rb = make_buffer()
        idents: list[int] = []

        def run(data: TensorDictBase) -> None:
            idents.append(threading.get_ident())
            rb.extend(data)

        for _ in range(50):
            number = len(idents)
            thread = threading.Thread(target=run, args=(small(number, 6, traj_id=0)[: 3 if number == 0 else 6],))
            thread.start()
            thread.join(PATIENCE)
            if idents[0] in idents[1:]:
                break
        else:
            pytest.skip("this system does not give the id of a thread to another")
        assert contents(rb)[-1] == (len(idents) - 1, 6)

    @pytest.mark.parametrize("start_method", ["fork", "forkserver"])
    def test_what_is_under_way_stays_with_its_process(self, start_method: str) -> None:
        rb = make_buffer([small(0, 4)])
        rb.extend(small(1, 6)[:3])
        child = Child(start_method, rb)
        assert child.call(extend_and_count_pending, small(2, 5)) == (0, 0)
        child.end()
        rb.extend(small(1, 6)[3:])
        assert contents(rb) == [(0, 4), (2, 5), (1, 6)]


def extend_and_count_pending(rb: TensorDictReplayBuffer, data: TensorDict) -> tuple[int, int]:
    before = rb.writer.pending_steps
    rb.extend(data)
    return before, rb.writer.pending_steps


class TestEmptying:
    def test_forgets_what_is_under_way(self) -> None:
        rb = make_buffer([small(0, 4)])
        rb.extend(small(1, 6)[:3])
        rb.empty()
        assert (len(rb), rb.write_count, rb.writer.pending_steps) == (0, 0, 0)
        rb.extend(small(2, 5))
        assert contents(rb) == [(2, 5)]

    def test_can_leave_the_count(self) -> None:
        rb = make_buffer([small(0, 4)])
        rb.empty(empty_write_count=False)
        assert (len(rb), rb.write_count) == (0, 4)


def test_a_sample_can_be_extended_into_another_buffer() -> None:
    # What the buffer adds to its samples is not taken for data.
    source = make_buffer([make_trajectory(3, 6)])
    target = make_buffer(chunk_size=6)
    target.extend(source.storage[0])
    target.extend(source.sample_chunks(1, 6)[0])
    assert contents(target) == [(3, 6), (3, 6)]
    assert numbers_of(target.sample()) == [3] * 8


def test_repr_is_short() -> None:
    assert repr(TrajectoryWriter()) == "TrajectoryWriter()"


@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=str)
def test_the_index_is_shaped_like_the_data(shape: tuple[int, ...]) -> None:
    index = make_buffer().extend(small(0, 6).reshape(shape))
    assert index.dtype == torch.int64
    assert index.shape == shape
