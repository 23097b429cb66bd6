"""A trajectory is looked up by its id: how long it is, and its steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from steps import Child, check_trajectory, make_buffer, make_trajectory, small
from torchrl.envs.transforms import Compose, RenameTransform

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.errors import EmbodiChainRLError, InvalidArgumentError, TrajectoryEvictedError


def some(*lengths: int, **kwargs: Any) -> TrajectoryReplayBuffer:
    return make_buffer([make_trajectory(number, length) for number, length in enumerate(lengths)], **kwargs)


class TestLengths:
    def test_of_what_extend_returned(self) -> None:
        rb = make_buffer()
        ids = rb.extend(torch.cat([small(0, 3), small(1, 5)]))
        assert rb.trajectory_lengths(ids).tolist() == [3] * 3 + [5] * 5

    def test_of_a_batch(self) -> None:
        rb = some(4, 6, 9)
        batch = rb.sample()
        lengths = rb.trajectory_lengths(batch["trajectory", "id"])
        assert lengths.dtype == torch.int64
        assert torch.equal(lengths, batch["label"][..., 2])

    @pytest.mark.parametrize(
        ("ids", "expected"),
        [
            (1, 6),
            (np.int64(2), 9),
            ([0, 2], [4, 9]),
            (np.array([[0], [1]]), [[4], [6]]),
            (torch.tensor([2, 2], dtype=torch.int32), [9, 9]),
            ([], []),
        ],
    )
    def test_of_ids_of_any_form(self, ids: Any, expected: Any) -> None:
        rb = some(4, 6, 9)
        assert rb.trajectory_lengths(ids).tolist() == expected
        assert rb.storage.trajectory_lengths(ids).tolist() == expected

    @pytest.mark.parametrize("ids", [0, [1, 0], 5, -1])
    def test_of_one_that_is_not_there_are_refused(self, ids: Any) -> None:
        rb = some(4, 5, 6, 7, 8)  # room for four
        with pytest.raises(TrajectoryEvictedError, match="ids 1 to 4"):
            rb.trajectory_lengths(ids)

    @pytest.mark.parametrize("ids", [1.0, "a", [True], None, torch.zeros(2)], ids=repr)
    def test_of_no_ids_are_refused(self, ids: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="integers"):
            some(4).trajectory_lengths(ids)

    def test_of_an_empty_buffer_are_refused(self) -> None:
        with pytest.raises(TrajectoryEvictedError):
            make_buffer().trajectory_lengths(0)

    def test_in_another_process(self) -> None:
        child = Child("fork", some(4, 6))
        try:
            assert child.call(TrajectoryReplayBuffer.trajectory_lengths, [1, 0]).tolist() == [6, 4]
        finally:
            child.end()


class TestSteps:
    def test_of_one_trajectory(self) -> None:
        rb = some(4, 6, 9)
        check_trajectory(rb.trajectory(1), 1, 6)
        check_trajectory(rb.storage.trajectory(2), 2, 9)

    def test_are_transformed(self) -> None:
        rb = some(4, transform=Compose(RenameTransform(["observation"], ["obs"])))
        assert "obs" in rb.trajectory(0).keys()  # noqa: SIM118

    def test_of_one_that_is_evicted_are_refused(self) -> None:
        rb = some(4, 5, 6, 7, 8)
        with pytest.raises(TrajectoryEvictedError):
            rb.trajectory(0)

    @pytest.mark.parametrize("trajectory_id", [1.0, None, "0", [0]], ids=repr)
    def test_of_no_id_are_refused(self, trajectory_id: Any) -> None:
        with pytest.raises(EmbodiChainRLError):
            some(4).trajectory(trajectory_id)
