from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict, TensorDictBase

from embodichain_rl.errors import GenerationFailedError, InvalidArgumentError
from embodichain_rl.replay.writing.acceptance import AcceptFilter, accept_success


def steps(length: int) -> TensorDict:
    """A trajectory."""
    return TensorDict({"step": torch.arange(length)}, [length])


def is_long(trajectory: TensorDictBase) -> bool:
    return len(trajectory) >= 3


def test_keeps_what_is_accepted_and_counts() -> None:
    keep = AcceptFilter(is_long)
    assert [keep.admit(steps(length)) for length in (3, 1, 4, 2, 5)] == [True, False, True, False, True]
    assert (keep.num_accepted, keep.num_rejected, keep.num_failed) == (3, 2, 0)


@pytest.mark.parametrize(("flags", "accepted"), [([0, 0, 1], True), ([0, 1, 0], False), ([0, 0, 0], False)])
def test_success_counts_at_the_last_step(flags: list[int], accepted: bool) -> None:
    success = torch.tensor(flags, dtype=torch.bool)[:, None]
    assert accept_success(TensorDict({"next": {"success": success}}, [3])) is accepted


class TestGivingUp:
    def test_names_the_environment_the_count_and_the_cause(self) -> None:
        keep = AcceptFilter(is_long, max_generation_attempts=3, environment="Environment 2 (Lift-v0)")
        cause = RuntimeError("no path")
        assert keep.admit(steps(3))
        assert not keep.admit(steps(1))
        keep.failed("its planning raised")
        with pytest.raises(GenerationFailedError) as caught:
            keep.failed("its planning raised RuntimeError: no path", cause)
        message = str(caught.value)
        assert message.startswith("Environment 2 (Lift-v0) failed 3 times in a row")
        assert "its planning raised RuntimeError: no path" in message
        assert "1 were accepted, 1 rejected and 2 could not be made" in message
        assert caught.value.__cause__ is cause

    def test_an_accepted_trajectory_starts_the_count_anew(self) -> None:
        keep = AcceptFilter(is_long, max_generation_attempts=2)
        for _ in range(5):
            assert not keep.admit(steps(1))
            assert keep.admit(steps(3))

    def test_going_on_gives_as_many_attempts_again(self) -> None:
        keep = AcceptFilter(is_long, max_generation_attempts=2)
        for _ in range(3):
            assert not keep.admit(steps(1))
            with pytest.raises(GenerationFailedError, match="failed 2 times"):
                keep.admit(steps(1))

    def test_may_never_happen(self) -> None:
        keep = AcceptFilter(is_long)
        assert not any(keep.admit(steps(1)) for _ in range(100))

    def test_needs_a_number(self) -> None:
        with pytest.raises(InvalidArgumentError, match="max_generation_attempts"):
            AcceptFilter(is_long, max_generation_attempts=0)
        with pytest.raises(InvalidArgumentError, match="accept"):
            AcceptFilter(None)  # type: ignore[arg-type]
