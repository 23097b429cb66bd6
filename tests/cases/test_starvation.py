"""A program whose steps never become a batch is told so, once, with the cause; long episodes are no reason to."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from embodichain_rl import OnlineDataset, TrajectoryReplayBuffer, TrajectoryWriter
from embodichain_rl.errors import EmptyBufferError, InvalidArgumentError


def buffer(**kwargs: Any) -> TrajectoryReplayBuffer:
    return TrajectoryReplayBuffer(
        **{"max_trajectories": 1000, "max_total_steps": 100_000, "chunk_size": 4, "batch_size": 8, **kwargs}
    )


def steps(count: int, *flags: str, ends: bool = False, traj_id: int | None = None, rows: int = 0) -> TensorDict:
    """Steps of one environment, or of one a row, with some end flags, of which the last ``ends``."""
    shape = [rows, count] if rows else [count]
    data = TensorDict({"observation": torch.randn(*shape, 3)}, shape)
    for flag in flags or ("done", "terminated", "truncated"):
        data["next", flag] = torch.zeros(*shape, 1, dtype=torch.bool)
    if ends:
        data["next", "done"][..., -1, :] = True
    if traj_id is not None:
        data["collector", "traj_ids"] = torch.full(shape, traj_id)
    return data


def told(write: Callable[[], Any]) -> list[str]:
    gc.collect()  # buffers of other tests may still have something to say
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write()
    return [str(w.message) for w in caught if w.category is UserWarning]


class TestNothingEverEnds:
    def test_ids_that_change_without_an_end_flag(self) -> None:
        rb = buffer()

        def write() -> None:
            for number in range(200):
                rb.extend(steps(20, traj_id=number // 2))

        (message,) = told(write)
        assert "('collector', 'traj_ids'), changes" in message
        assert "traj_key=('collector', 'traj_ids')" in message
        assert "set_truncated=True" in message
        assert "published nothing so far" in message
        assert "unfinished trajectories" in message
        with pytest.raises(EmptyBufferError, match=r"4,000 steps of 100 unfinished .*\('collector', 'traj_ids'\)"):
            rb.sample()

    def test_ids_of_many_environments_in_rows(self) -> None:
        rb = buffer()

        def write() -> None:
            for number in range(100):
                data = steps(10, rows=4)
                data["collector", "traj_ids"] = (torch.arange(4)[:, None] + 4 * (number // 5)).expand(4, 10).clone()
                rb.extend(data)

        (message,) = told(write)
        assert "('collector', 'traj_ids'), changes" in message

    def test_only_terminated_on_a_task_that_only_truncates(self) -> None:
        rb = buffer()
        (message,) = told(lambda: [rb.extend(steps(50, "terminated")) for _ in range(40)])
        assert "the data has ('next', 'terminated'), and not ('next', 'done') and ('next', 'truncated')" in message
        assert "truncated, not terminated" in message

    def test_steps_one_by_one(self) -> None:
        rb = buffer()
        (message,) = told(lambda: [rb.add(steps(1, "terminated")[0]) for _ in range(1000)])
        assert "('next', 'truncated')" in message

    def test_an_end_key_of_another_name(self) -> None:
        rb = buffer()

        def write() -> None:
            for _ in range(20):
                data = steps(50, "terminated")
                data["next", "agents", "done"] = torch.zeros(50, 2, 1, dtype=torch.bool)
                rb.extend(data)

        (message,) = told(write)
        assert "end_key=('next', 'agents', 'done')" in message

    def test_flags_that_are_never_true(self) -> None:
        rb = buffer()
        (message,) = told(lambda: [rb.extend(steps(1000)) for _ in range(40)])
        assert "StepCounter" in message

    def test_an_accept_that_accepts_nothing(self) -> None:
        rb = buffer(writer=TrajectoryWriter(accept=lambda trajectory: False))
        (message,) = told(lambda: [rb.extend(steps(5, ends=True)) for _ in range(300)])
        assert "accept rejected all" in message


class TestHealthyCollectionIsLeftAlone:
    def test_long_episodes(self) -> None:
        rb = buffer(max_total_steps=20_000)
        assert told(lambda: [rb.extend(steps(50, ends=n == 199)) for n in range(200)]) == []
        assert told(lambda: buffer().extend(steps(9_000, "done", ends=True))) == []

    def test_long_episodes_of_many_environments(self) -> None:
        rb = buffer()
        ids = torch.arange(32)[:, None].expand(32, 50)

        def write() -> None:
            for n in range(40):
                data = steps(50, rows=32, ends=n == 39)
                data["collector", "traj_ids"] = ids.clone()
                rb.extend(data)

        assert told(write) == []
        assert len(rb) == 32

    def test_one_environment_after_the_other(self) -> None:
        rb = buffer()
        assert told(lambda: [rb.extend(steps(50, traj_id=n % 12)) for n in range(240)]) == []

    def test_a_prefill_that_waits_for_trajectories(self) -> None:
        rb = buffer()

        def prefill() -> None:
            while len(rb) < 50:
                rb.extend(steps(100, ends=True))

        assert told(prefill) == []

    def test_a_loop_that_logs_the_length_and_samples(self) -> None:
        rb = buffer(max_trajectories=20)

        def train() -> None:
            for _ in range(300):
                rb.extend(steps(20, ends=True))
                rb.sample()
                len(rb), rb.stats(), repr(rb)

        assert told(train) == []


class TestGatesOnTheLength:
    def test_a_gate_on_steps(self) -> None:
        rb = buffer()

        def train() -> None:
            for _ in range(150):
                rb.extend(steps(20, ends=True))
                if len(rb) < 1000:
                    continue
                rb.sample()

        (message,) = told(train)
        assert "len(rb) counts trajectories" in message
        assert "count='steps'" in message

    def test_a_gate_beyond_what_the_buffer_holds(self) -> None:
        rb = buffer(max_trajectories=10)

        def train() -> None:
            for _ in range(60):
                rb.extend(steps(100, ends=True))
                if len(rb) >= 256:
                    rb.sample()

        (message,) = told(train)
        assert "never more than max_trajectories=10" in message

    def test_count_steps_makes_the_gate_count_steps(self) -> None:
        rb = buffer(count="steps", max_total_steps=500)
        updates = 0

        def train() -> None:
            nonlocal updates
            for _ in range(60):
                rb.extend(steps(20, ends=True))
                if len(rb) < 200:
                    continue
                updates += len(rb.sample()) > 0

        assert told(train) == []
        assert updates == 51
        assert len(rb) == rb.storage.num_steps == 500
        assert len(rb.storage) == 25

    def test_count_steps_in_everything_that_shows_the_length(self, tmp_path: Path) -> None:
        rb = buffer(count="steps", max_total_steps=500)
        rb.extend(steps(20, ends=True))
        stats = rb.stats()
        assert (stats["size"], stats["capacity"], stats["utilization"]) == (20, 500, 20 / 500)
        assert "count='steps'" in repr(rb)
        assert "count=" not in repr(buffer())
        rb.dumps(tmp_path / "rb")
        other = buffer(count="steps", max_total_steps=500)
        other.loads(tmp_path / "rb")
        assert len(other) == 20
        assert rb[0].shape == (20,)
        assert rb[:].shape == (1, 20)
        assert next(iter(OnlineDataset(rb, 4, 2))).shape == (2, 4)
        rb.empty()
        assert len(rb) == 0
        with pytest.raises(EmptyBufferError):
            rb.sample()

    def test_count_something_else(self) -> None:
        with pytest.raises(InvalidArgumentError, match="'trajectories' or 'steps'"):
            buffer(count="episodes")  # type: ignore[arg-type]


PROGRAM = """
import torch
from tensordict import TensorDict
from embodichain_rl import TrajectoryReplayBuffer
def main(flag, gate):
    rb = TrajectoryReplayBuffer(max_trajectories=100, max_total_steps=100_000, chunk_size=4, batch_size=8)
    for _ in range(10):
        done = torch.zeros(40, 1, dtype=torch.bool)
        done[-1] = gate
        rb.extend(TensorDict({"observation": torch.randn(40, 3), "next": {flag: done}}, [40]))
        if len(rb) > 100:
            rb.sample()
main("terminated", False)
main("done", True)
main("done", False)
"""


def test_a_short_program_without_an_update_says_why_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    result = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert result.stderr.count("truncated, not terminated") == 1
    assert result.stderr.count("len(rb) counts trajectories") == 1
    assert result.stderr.count("StepCounter") == 1


class TestBatchesOfOnPolicyPrograms:
    """Each batch is written, sampled and dropped; what it ends with is the beginning of an episode."""

    @staticmethod
    def batch() -> TensorDict:
        return torch.cat([steps(5, ends=True), steps(3)])

    def test_emptying_drops_the_end_of_each_batch_and_says_so_once(self) -> None:
        rb = buffer()

        def learn() -> None:
            for _ in range(3):
                rb.empty()
                rb.extend(self.batch())
                assert rb.storage.num_steps == 5

        (message,) = told(learn)
        assert "drops 3 steps of 1 unfinished" in message
        assert "set_truncated=True" in message
        assert "truncate_pending" in message

    def test_pending_steps_that_are_truncated_are_sampled_too(self) -> None:
        rb = buffer()

        def learn() -> None:
            for _ in range(3):
                rb.empty()
                rb.extend(self.batch())
                rb.writer.truncate_pending()
                assert rb.storage.num_steps == 8

        assert told(learn) == []

    def test_trying_a_buffer_with_one_step_is_no_reason(self) -> None:
        rb = buffer()

        def try_it() -> None:
            rb.extend(steps(5, ends=True))
            rb.extend(steps(1, rows=2))
            rb.empty()

        assert told(try_it) == []
