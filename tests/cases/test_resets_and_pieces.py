"""Collection that is broken off by a reset: what was begun is stored, truncated, and never joined to what follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from steps import make_buffer, make_trajectory, small
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector
from torchrl.data import TensorDictReplayBuffer
from torchrl.envs import GymEnv, InitTracker, SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.transforms import Compose

from embodichain_rl import TrajectoryReplayBuffer, TrajectoryStorage, TrajectoryWriter, accept_success
from embodichain_rl.errors import (
    EmptyBufferError,
    InvalidArgumentError,
    PendingStepsError,
    SchemaMismatchError,
    StepOrderError,
)


def empty(**kwargs: Any) -> TrajectoryReplayBuffer:
    if "storage" not in kwargs:
        kwargs = {"max_trajectories": 1000, "max_total_steps": 50_000, **kwargs}
    return make_buffer(**kwargs)


def pieces_of(rb: TrajectoryReplayBuffer) -> list[tuple[int, int, int]]:
    """Number, first step and length of each trajectory, all of whose steps are consecutive."""
    pieces = []
    for trajectory in rb.storage:
        number, step = trajectory["label"][:, 0].tolist(), trajectory["label"][:, 1].tolist()
        assert len(set(number)) == 1, "a trajectory mixes several"
        assert step == list(range(step[0], step[0] + len(step)))
        pieces.append((number[0], step[0], len(step)))
    return pieces


def marked(number: int, length: int, mark: str, **kwargs: Any) -> TensorDict:
    """A trajectory that tells where it begins by one mark only."""
    data = small(number, length, **kwargs)
    if mark == "is_init":
        data["is_init"] = (torch.arange(length) == 0)[:, None]
    elif mark == "step_count":
        data["step_count"] = torch.arange(length)[:, None]
    else:
        data = make_trajectory(number, length, fields=["observation", ("next", "observation")], **kwargs)
    return data


MARKS = pytest.mark.parametrize("mark", ["is_init", "step_count", "next observation"])


class TestPieces:
    @MARKS
    def test_of_two_trajectories_are_not_joined(self, mark: str) -> None:
        rb = empty()
        first, second = marked(0, 9, mark)[:5], marked(1, 7, mark)
        assert rb.extend(first).tolist() == [-1] * 5
        assert rb.extend(second).tolist() == [1] * 7
        assert pieces_of(rb) == [(0, 0, 5), (1, 0, 7)]
        assert rb.storage[0]["next", "truncated"][:, 0].tolist() == [False] * 4 + [True]
        assert rb.storage[0]["next", "done"][:, 0].tolist() == [False] * 4 + [True]
        assert not rb.storage[0]["next", "terminated"].any()
        assert rb.stats()["truncated"] == 1

    @MARKS
    def test_of_two_trajectories_in_one_call(self, mark: str) -> None:
        rb = empty()
        data = torch.cat([marked(0, 9, mark)[:5], marked(1, 9, mark)[:4], marked(2, 7, mark)])
        before = data.clone()
        assert rb.extend(data).tolist() == [0] * 5 + [1] * 4 + [2] * 7
        assert pieces_of(rb) == [(0, 0, 5), (1, 0, 4), (2, 0, 7)]
        assert rb.stats()["truncated"] == 2
        assert (data == before).all()

    @MARKS
    def test_of_several_environments_a_row_each(self, mark: str) -> None:
        rb = empty()
        rb.extend(torch.stack([marked(0, 9, mark)[:5], marked(1, 5, mark), marked(2, 9, mark)[:5]]))
        rb.extend(torch.stack([marked(3, 4, mark), marked(4, 4, mark), marked(2, 9, mark)[5:]]))
        assert sorted(pieces_of(rb)) == [(0, 0, 5), (1, 0, 5), (2, 0, 9), (3, 0, 4), (4, 0, 4)]

    @MARKS
    def test_of_one_trajectory_are_joined(self, mark: str) -> None:
        rb = empty()
        for piece in marked(0, 20, mark).split(3):
            rb.extend(piece)
        assert pieces_of(rb) == [(0, 0, 20)]
        assert rb.stats()["truncated"] == 0

    @MARKS
    def test_with_the_same_id(self, mark: str) -> None:
        rb = empty()
        rb.extend(marked(0, 9, mark, traj_id=0)[:5])
        rb.extend(marked(1, 7, mark, traj_id=0))  # another collector, that counts from zero again
        assert pieces_of(rb) == [(0, 0, 5), (1, 0, 7)]

    @MARKS
    def test_as_single_steps(self, mark: str) -> None:
        rb = empty()
        for step in [*marked(0, 9, mark)[:5], *marked(1, 9, mark)[:1], *marked(2, 7, mark)]:
            rb.add(step)
        assert pieces_of(rb) == [(0, 0, 5), (1, 0, 1), (2, 0, 7)]

    def test_are_cut_while_a_running_normalization_changes_the_observations(self) -> None:
        rb = empty(writer=TrajectoryWriter(sequences=True))
        for number in range(2):
            data = marked(number, 9, "next observation").set("is_init", (torch.arange(9) == 0)[:, None])
            data["next", "observation"] += 0.5
            rb.extend(data[:5])
        assert pieces_of(rb) == [(0, 0, 5)]

    @pytest.mark.parametrize("ends", [True, False])
    def test_with_noise_are_joined_where_the_user_says_so(self, ends: bool) -> None:
        rb = empty(writer=TrajectoryWriter(sequences=True))
        data = marked(0, 12, "next observation", ends=ends)
        data["next", "observation"] += torch.randn(12, 3)
        for piece in data.split(4):
            rb.extend(piece)
        assert rb.writer.truncate_pending() == (not ends)
        assert pieces_of(rb) == [(0, 0, 12)]

    @pytest.mark.parametrize("ids", [True, False])
    def test_with_noise_are_joined_where_the_data_says_so(self, ids: bool) -> None:
        rb = empty()
        data = marked(0, 12, "next observation", traj_id=3 if ids else None)
        data["next", "observation"] += torch.randn(12, 3)
        if not ids:
            data["step_count"] = torch.arange(12)
        for piece in data.split(4):
            rb.extend(piece)
        assert pieces_of(rb) == [(0, 0, 12)]

    def test_of_whole_trajectories_with_noise_are_stored(self) -> None:
        rb = empty()
        data = torch.cat([marked(n, 12, "next observation") for n in range(3)])
        data["next", "observation"] += torch.randn(36, 3)
        rb.extend(data)
        assert pieces_of(rb) == [(n, 0, 12) for n in range(3)]

    def test_that_are_refused_leave_what_is_pending(self) -> None:
        rb = empty()
        rb.extend(marked(0, 9, "is_init")[:5])
        with pytest.raises(SchemaMismatchError):
            rb.extend(marked(1, 9, "is_init").exclude("observation"))
        assert (len(rb), rb.stats()["pending_steps"], rb.stats()["truncated"]) == (0, 5, 0)

    def test_are_judged_like_any_trajectory(self) -> None:
        rb = empty(writer=TrajectoryWriter(accept=accept_success))
        data = marked(0, 9, "is_init")
        data["next", "success"] = torch.zeros(9, 1, dtype=torch.bool)
        rb.extend(data[:5])
        rb.extend(data)
        assert (len(rb), rb.stats()["rejected"], rb.stats()["truncated"]) == (0, 2, 1)


class TestRollouts:
    def test_short_ones_among_full_ones(self) -> None:
        env = GymEnv("Pendulum-v1")
        rb = empty(chunk_size=4)
        lengths = [20, 7, 20, 7, 7, 20]
        for length in lengths:
            rollout = env.rollout(length)
            if length == 20:
                rollout["next", "done"][-1] = rollout["next", "truncated"][-1] = True
            rb.extend(rollout)
        assert [len(trajectory) for trajectory in rb.storage] == lengths
        for _ in range(20):
            batch = rb.sample()
            assert torch.equal(batch["next", "observation"][:, :-1], batch["observation"][:, 1:])

    @pytest.mark.parametrize("transforms", [[InitTracker()], [StepCounter()], [InitTracker(), StepCounter()]])
    def test_with_marks_behind_each_other_in_one_call(self, transforms: list[Any]) -> None:
        env = TransformedEnv(GymEnv("Pendulum-v1"), Compose(*(t.clone() for t in transforms)))
        rb = empty()
        rb.extend(torch.cat([env.rollout(length) for length in (7, 5, 9)]))
        rb.writer.truncate_pending()
        assert [len(trajectory) for trajectory in rb.storage] == [7, 5, 9]


class TestCollectors:
    @pytest.mark.parametrize("marks", [lambda: [], lambda: [InitTracker()], lambda: [StepCounter()]])
    @pytest.mark.parametrize("ids", [True, False])
    @pytest.mark.parametrize("environments", [1, 3])
    def test_that_reset_at_each_iteration(self, marks: Callable[[], list[Any]], ids: bool, environments: int) -> None:
        env = GymEnv("Pendulum-v1") if environments == 1 else SerialEnv(3, lambda: GymEnv("Pendulum-v1"))
        env = TransformedEnv(env, Compose(*marks()))
        rb = empty()
        frames = 6 * environments
        collector = Collector(
            env,
            None,
            frames_per_batch=frames,
            total_frames=4 * frames,
            reset_at_each_iter=True,
            track_traj_ids=ids,
            replay_buffer=rb,
        )
        for _ in collector:
            pass
        collector.shutdown()
        rb.writer.truncate_pending()
        assert [len(trajectory) for trajectory in rb.storage] == [6] * 4 * environments
        for trajectory in rb.storage:
            assert torch.equal(trajectory["next", "observation"][:-1], trajectory["observation"][1:])


class TestNothingIsFinished:
    def test_sampling_says_how_many_steps_are_pending(self) -> None:
        rb = empty()
        rb.extend(torch.stack([small(0, 9)[:5], small(1, 9)[:5]]))
        with pytest.raises(EmptyBufferError, match=r"10 steps of 2 unfinished trajectories.*set_truncated=True"):
            rb.sample()
        with pytest.raises(EmptyBufferError, match=r"10 steps of 2 unfinished trajectories"):
            rb.sample_chunks(2, 3)
        with pytest.raises(EmptyBufferError, match=r"10 steps of 2 unfinished trajectories"):
            rb.sample(5)

    def test_and_nothing_is_pending(self) -> None:
        with pytest.raises(EmptyBufferError) as raised:
            empty().sample()
        assert "unfinished" not in str(raised.value)

    def test_pending_steps_can_be_stored(self) -> None:
        rb = empty()
        rb.extend(torch.stack([small(0, 9)[:5], small(1, 9)[:5]]))
        assert rb.writer.truncate_pending() == 2
        assert pieces_of(rb) == [(0, 0, 5), (1, 0, 5)]
        assert rb.stats()["pending_trajectories"] == 0


class TestPendingBytes:
    def wide(self, number: int, steps: int) -> TensorDictBase:
        data = small(number, steps, traj_id=number, ends=False)
        return data.set("pixels", torch.zeros(steps, 100_000, dtype=torch.uint8))

    def test_are_bounded_by_those_of_the_buffer(self) -> None:
        rb = empty(max_trajectories=10, max_total_steps=300)
        for number in range(3):
            rb.extend(self.wide(number, 100))
        with pytest.raises(PendingStepsError) as raised:
            rb.extend(self.wide(3, 100))
        step = rb.storage.schema.nbytes
        assert f"4 trajectories with 400 steps wait for their end, which take {400 * step:,} bytes" in str(raised.value)
        assert "max_pending_bytes" in str(raised.value)
        stats = rb.stats()
        assert (stats["pending_steps"], stats["pending_trajectories"]) == (300, 3)
        assert stats["pending_bytes"] == 300 * step

    def test_may_be_more_or_less(self) -> None:
        rb = empty(max_total_steps=100, writer=TrajectoryWriter(max_pending_bytes=50_000_000))
        for number in range(4):
            rb.extend(self.wide(number, 100))
        rb = empty(max_total_steps=100, writer=TrajectoryWriter(max_pending_bytes=1000))
        with pytest.raises(PendingStepsError):
            rb.extend(self.wide(0, 1))

    def test_of_small_steps_may_be_more_than_the_buffer_holds(self) -> None:
        rb = empty(max_total_steps=50)
        rb.extend(torch.stack([small(number, 20) for number in range(40)])[:, :19])
        assert rb.stats()["pending_steps"] == 760

    @pytest.mark.parametrize("argument", [{"max_pending_bytes": 0}, {"sequences": 1}])
    def test_arguments(self, argument: dict[str, Any]) -> None:
        with pytest.raises(InvalidArgumentError, match=next(iter(argument))):
            TrajectoryWriter(**argument)


def test_a_plain_torchrl_buffer_cuts_in_the_same_way() -> None:
    rb = TensorDictReplayBuffer(storage=TrajectoryStorage(10, 100), writer=TrajectoryWriter(), batch_size=2)
    rb.extend(marked(0, 9, "is_init")[:5])
    rb.extend(marked(1, 7, "is_init"))
    assert [len(trajectory) for trajectory in rb.storage] == [5, 7]


def test_steps_that_never_follow_one_another_are_refused() -> None:
    rb = empty()
    rb.add(make_trajectory(0, 9)[0])
    with pytest.raises(StepOrderError, match="sequences=True"):
        rb.add(make_trajectory(1, 9)[0])
